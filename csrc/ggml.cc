// Encoding and decoding of every GGML type for one instruction set. CMakeLists.txt compiles this file
// once for each, with FEWBITS_ISA naming the namespace; dispatch.cc picks one at run time.
#include "kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

#include "columns.h"
#include "ggml_encode.h"
#include "iq_encode.h"

namespace FEWBITS_ISA {

using fewbits::Job;
using fewbits::Error;
using fewbits::UNIT;

// -> whether all of them are finite and not too large.
bool to_f32(const void* src, int dtype, int64_t first, int64_t n, float* out) {
    if (dtype == fewbits::F32) {
        std::memcpy(out, static_cast<const float*>(src) + first, n * sizeof(float));
    } else if (dtype == fewbits::BF16) {
        const uint16_t* in = static_cast<const uint16_t*>(src) + first;
        uint32_t* bits = reinterpret_cast<uint32_t*>(out);
        for (int64_t i = 0; i < n; ++i) bits[i] = uint32_t(in[i]) << 16;
    } else {
        const uint16_t* in = static_cast<const uint16_t*>(src) + first;
        for (int64_t i = 0; i < n; ++i) out[i] = half_value(in[i]);
    }
    constexpr int32_t LARGEST = 0x5b800000;  // 2^56: the sums of a group cannot overflow below it
    int32_t worst = 0;
    const int32_t* bits = reinterpret_cast<const int32_t*>(out);
    for (int64_t i = 0; i < n; ++i) worst = std::max(worst, bits[i] & 0x7fffffff);
    return worst <= LARGEST;
}

template <class T>
void decode_type(const uint8_t* blocks, int64_t count, float* out) {
    if constexpr (T::lattice) decode_lattice<T>(blocks, count, out);
    else decode_blocks<T>(blocks, count, out);
}

// Sums by lane in f32 over one tile, then in f64: the same for every instruction set.
template <class T>
void measure_tile(const uint8_t* blocks, const float* x, int64_t n, Error* error) {
    alignas(64) float value[256 * LANES];
    decode_type<T>(blocks, n / T::block, value);
    F squared = {}, energy = {}, largest = {};
    for (int64_t i = 0; i < n; i += LANES) {
        F v = load(x + i), e = load(value + i) - v;
        squared += e * e;
        energy += v * v;
        largest = vmax(vmax(e, -e), largest);
    }
    for (int i = 0; i < LANES; ++i) {
        error->squared += double(squared[i]);
        error->energy += double(energy[i]);
        error->largest = std::max(error->largest, double(largest[i]));
    }
}

// Importances of weights [first, first + n): a row of `count` numbers, repeated.
void repeat(const float* importance, int64_t count, int64_t first, int64_t n, float* out) {
    for (int64_t done = 0, at = first % count; done < n; at = 0) {
        int64_t here = std::min(n - done, count - at);
        std::memcpy(out + done, importance + at, here * sizeof(float));
        done += here;
    }
}

template <class T>
void encode(const Job& job, int64_t unit, Error* error) {
    constexpr int TILE = T::group * LANES;
    alignas(64) float x[UNIT], w[UNIT];
    int64_t first = unit * UNIT, n = std::min(UNIT, job.weights - first);
    if (!to_f32(job.src, job.dtype, first, n, x)) {
        error->refused += 1;
        return;
    }
    std::fill(x + n, x + UNIT, 0.0f);
    if (job.importance) {
        repeat(job.importance, job.importances, first, n, w);
        std::fill(w + n, w + UNIT, 0.0f);
    }
    for (int64_t at = 0; at < n; at += TILE) {
        int64_t here = std::min<int64_t>(TILE, n - at);
        uint8_t* out = job.blocks + (first + at) / T::block * T::nbytes();
        int blocks = int(here / T::block);
        if constexpr (T::lattice)
            encode_lattice<T>(x + at, job.importance ? w + at : nullptr, job.search, blocks, out);
        else if (job.importance)
            encode_tile<T, true>(x + at, w + at, job.search, blocks, out);
        else
            encode_tile<T, false>(x + at, nullptr, job.search, blocks, out);
    }
}

template <class T>
void measure(const Job& job, int64_t unit, Error* error) {
    constexpr int TILE = T::group * LANES;
    alignas(64) float x[UNIT];
    int64_t first = unit * UNIT, n = std::min(UNIT, job.weights - first);
    to_f32(job.src, job.dtype, first, n, x);
    for (int64_t at = 0; at < n; at += TILE)
        measure_tile<T>(job.blocks + (first + at) / T::block * T::nbytes(), x + at,
                        std::min<int64_t>(TILE, n - at), error);
}

template <class T>
constexpr fewbits::TypeKernels row(const char* name) {
    if constexpr (T::lattice)
        return {name, T::block, T::nbytes(), encode<T>, measure<T>, decode_type<T>,
                {T::dim, T::levels, MAX_POINTS, MAX_STARTS, set_table<T>}};
    else
        return {name, T::block, T::nbytes(), encode<T>, measure<T>, decode_type<T>, {}};
}

const fewbits::TypeKernels TYPES[] = {
    row<Q4_0>("q4_0"),     row<Q4_1>("q4_1"),     row<Q5_0>("q5_0"),   row<Q5_1>("q5_1"),
    row<Q8_0>("q8_0"),     row<Q2_K>("q2_k"),     row<Q3_K>("q3_k"),   row<Q4_K>("q4_k"),
    row<Q5_K>("q5_k"),     row<Q6_K>("q6_k"),     row<IQ4_NL>("iq4_nl"), row<IQ4_XS>("iq4_xs"),
    row<TQ1_0>("tq1_0"),   row<TQ2_0>("tq2_0"),   row<MXFP4>("mxfp4_ggml"),
    row<IQ3_S>("iq3_s"),   row<IQ3_XXS>("iq3_xxs"), row<IQ2_S>("iq2_s"), row<IQ2_XS>("iq2_xs"),
    row<IQ2_XXS>("iq2_xxs"), row<IQ1_S>("iq1_s"),   row<IQ1_M>("iq1_m"),
};

#define FEWBITS_STRING(x) #x
#define FEWBITS_NAME(x) FEWBITS_STRING(x)
extern const fewbits::Kernels kernels;
const fewbits::Kernels kernels = {FEWBITS_NAME(FEWBITS_ISA), TYPES, int(sizeof TYPES / sizeof *TYPES),
                                  quantize_columns};

}  // namespace FEWBITS_ISA
