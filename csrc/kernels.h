// The C ABI between the kernels, compiled once for each instruction set, and the module that calls them.
#pragma once

#include <cstdint>

namespace fewbits {

// Weights per unit of work: whole tiles of every type.
constexpr int64_t UNIT = 4096;

enum Dtype : int { F32 = 0, F16 = 1, BF16 = 2 };

struct EncodeJob {
    const void* src;
    int dtype;
    int64_t weights;           // n * k
    const float* importance;   // null, or `importances` numbers repeated over the weights
    int64_t importances;
    bool search, measure;
    uint8_t* dst;
};

struct Error {
    double squared, energy, largest;
    int64_t refused;
};

struct TypeKernels {
    const char* name;
    int block, nbytes;
    // Encodes one unit (or the shorter last one) and, if asked, measures what it cost.
    void (*encode)(const EncodeJob& job, int64_t unit, Error* error);
    void (*decode)(const uint8_t* in, int64_t blocks, float* out);
};

struct Kernels {
    const char* isa;
    const TypeKernels* types;
    int count;
};

}  // namespace fewbits
