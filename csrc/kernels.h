// The C ABI between the kernels, compiled once for each instruction set, and the module that calls them.
#pragma once

#include <cstdint>

namespace fewbits {

// Weights per unit of work: whole tiles of every type.
constexpr int64_t UNIT = 4096;

enum Dtype : int { F32 = 0, F16 = 1, BF16 = 2 };

struct Job {
    const void* src;
    int dtype;
    int64_t weights;           // n * k
    const float* importance;   // null, or `importances` numbers repeated over the weights
    int64_t importances;
    bool search;
    uint8_t* blocks;           // written by encode, read by measure
};

struct Error {
    double squared, energy, largest;
    int64_t refused;
};

// A type whose codes are points of a lattice needs their table once, before its first use.
struct Table {
    int dim, levels, most_points, most_starts;
    void (*set)(const float* levels, const uint8_t* points, int count, const float* starts, int n_starts);
};

struct TypeKernels {
    const char* name;
    int block, nbytes;
    // One unit (or the shorter last one): encode it, adding to error->refused; or decode it again and
    // add its error.
    void (*encode)(const Job& job, int64_t unit, Error* error);
    void (*measure)(const Job& job, int64_t unit, Error* error);
    void (*decode)(const uint8_t* in, int64_t blocks, float* out);
    Table table;
};

// k columns of n rows to round one after the other (columns.h). Arrays are stored by column, (k, n). group:
// for each column, its row of scale, inverse, offset and zeros, which are (groups, n). A table has `count`
// levels.
struct Columns {
    int64_t k, n;
    const float* state;
    const float* coupling;  // (k, k), its part above the diagonal
    const float* pivot;     // (k), or null: moves are from `old`
    const float* old;       // (k, n), or null
    const int64_t* group;   // (k)
    const float *scale, *inverse;
    const float* offset;    // or null
    const float* zeros;     // or null: `zero`
    float zero;
    int top;
    int count;              // 0: an affine grid
    const float *boundaries, *levels, *level_codes;
    uint8_t* codes;         // written, (k, n), as the rest
    float *values, *moves;
};

struct Kernels {
    const char* isa;
    const TypeKernels* types;
    int count;
    void (*quantize_columns)(const Columns& columns, int64_t tile);  // rows 16 * tile and on
};

}  // namespace fewbits
