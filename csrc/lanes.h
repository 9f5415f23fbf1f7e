// Sixteen groups in parallel: lane i of every vector belongs to group i.
//
// F is one AVX-512 register, two AVX registers or four SSE registers (GCC/Clang vector extensions).
// With -ffp-contract=off each lane does the same IEEE operations, so every instruction set (and
// the torch reference) gives the same bits.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Sixteen lanes are more than one register on most machines: a call would pass them through memory.
#define INLINE inline __attribute__((always_inline))

namespace FEWBITS_ISA {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;
typedef float Native __attribute__((vector_size(4 * WIDTH)));
typedef int32_t NativeMask __attribute__((vector_size(4 * WIDTH)));

struct F {
    Native part[PARTS];
    float operator[](int i) const { return part[i / WIDTH][i % WIDTH]; }
};
struct Mask {
    NativeMask part[PARTS];
};

INLINE F splat(float x) {
    F r;
    for (int p = 0; p < PARTS; ++p) r.part[p] = x - Native{};
    return r;
}
INLINE F load(const float* x) {
    F r;  // part by part: one copy of it all would go through memory in smaller pieces
    for (int p = 0; p < PARTS; ++p) std::memcpy(&r.part[p], x + p * WIDTH, sizeof(Native));
    return r;
}
INLINE void store(float* x, F v) {
    for (int p = 0; p < PARTS; ++p) std::memcpy(x + p * WIDTH, &v.part[p], sizeof(Native));
}

#define FEWBITS_ARITHMETIC(OP)                                          \
    INLINE F operator OP(F a, F b) {                                    \
        for (int p = 0; p < PARTS; ++p) a.part[p] = a.part[p] OP b.part[p]; \
        return a;                                                       \
    }                                                                   \
    INLINE F operator OP(F a, float b) { return a OP splat(b); }        \
    INLINE F operator OP(float a, F b) { return splat(a) OP b; }
FEWBITS_ARITHMETIC(+)
FEWBITS_ARITHMETIC(-)
FEWBITS_ARITHMETIC(*)
FEWBITS_ARITHMETIC(/)
#undef FEWBITS_ARITHMETIC
INLINE F& operator+=(F& a, F b) { return a = a + b; }
INLINE F operator-(F a) {
    for (int p = 0; p < PARTS; ++p) a.part[p] = -a.part[p];
    return a;
}

#define FEWBITS_COMPARE(OP)                                                    \
    INLINE Mask operator OP(F a, F b) {                                        \
        Mask m;                                                                \
        for (int p = 0; p < PARTS; ++p) m.part[p] = a.part[p] OP b.part[p];    \
        return m;                                                              \
    }                                                                          \
    INLINE Mask operator OP(F a, float b) { return a OP splat(b); }
FEWBITS_COMPARE(<)
FEWBITS_COMPARE(>)
FEWBITS_COMPARE(<=)
FEWBITS_COMPARE(>=)
#undef FEWBITS_COMPARE
INLINE Mask operator&(Mask a, Mask b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] = a.part[p] & b.part[p];
    return a;
}
INLINE F select(Mask m, F a, F b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] = m.part[p] ? a.part[p] : b.part[p];
    return a;
}

// a > b ? a : b and a < b ? a : b; compilers do not use the single instruction for it.
INLINE Native vmax(Native a, Native b) {
#if defined(__AVX512F__)  // the masked form: GCC 12 warns of its own header in the plain one
    return (Native)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Native)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (Native)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}
INLINE Native vmin(Native a, Native b) {
#if defined(__AVX512F__)
    return (Native)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Native)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (Native)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
}
INLINE F vmax(F a, F b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] = vmax(a.part[p], b.part[p]);
    return a;
}
INLINE F vmin(F a, F b) {
    for (int p = 0; p < PARTS; ++p) a.part[p] = vmin(a.part[p], b.part[p]);
    return a;
}
INLINE F clamp(F x, float lo, float hi) { return vmin(vmax(x, splat(lo)), splat(hi)); }

// Round half to even: adding 1.5 * 2^23 leaves no bit for a fraction. Exact below 2^22; codes are.
constexpr float ROUNDER = 12582912.0f;
INLINE F round_even(F x) { return (x + ROUNDER) - ROUNDER; }
INLINE float round_even(float x) {
    return __builtin_fabsf(x) < 4194304.0f ? (x + ROUNDER) - ROUNDER : x;
}
INLINE float clamp(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }

INLINE F inverse(F x) {
    F y = 1.0f / x;
    return select(vmax(y, -y) <= FLT_MAX, y, F{});
}
INLINE float inverse(float x) {
    float y = 1.0f / x;
    return __builtin_fabsf(y) <= FLT_MAX ? y : 0.0f;
}

// IEEE half precision, round to nearest even.
INLINE uint16_t half_bits(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t u;
    std::memcpy(&u, &x, 4);
    uint32_t sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
    if (mag >= 0x47800000u) return sign | (mag > 0x7f800000u ? 0x7e00u : 0x7c00u);
    if (mag < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the last kept bit
        float f;
        std::memcpy(&f, &mag, 4);
        f += 0.5f;
        std::memcpy(&mag, &f, 4);
        return sign | (mag - 0x3f000000u);
    }
    mag += 0xc8000fffu + ((mag >> 13) & 1);  // rebias the exponent, round to even
    return sign | (mag >> 13);
#endif
}

INLINE float half_value(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = uint32_t(h & 0x8000u) << 16, mag = h & 0x7fffu, u;
    float f;
    if (mag >= 0x7c00u) {
        u = sign | 0x7f800000u | (mag & 0x3ffu) << 13;
    } else {
        u = mag << 13;
        std::memcpy(&f, &u, 4);
        f *= 0x1p112f;  // exact: moves the exponent bias, and normalizes denormals
        std::memcpy(&u, &f, 4);
        u |= sign;
    }
    std::memcpy(&f, &u, 4);
    return f;
#endif
}

// f32 -> the nearest half (the largest finite one on overflow), minus zero becoming zero.
INLINE float to_half(float x) {
    return half_value(half_bits(clamp(x, -65504.0f, 65504.0f) + 0.0f));
}

INLINE F to_half(F x) {
    x = clamp(x, -65504.0f, 65504.0f) + 0.0f;
#if defined(__AVX512F__)
    x.part[0] = (Native)_mm512_maskz_cvtph_ps(
        0xffff, _mm512_maskz_cvtps_ph(0xffff, (__m512)x.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (int p = 0; p < PARTS; ++p)
        x.part[p] = (Native)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x.part[p], _MM_FROUND_TO_NEAREST_INT));
#else
    float lane[LANES];
    store(lane, x);
    for (int i = 0; i < LANES; ++i) lane[i] = half_value(half_bits(lane[i]));
    x = load(lane);
#endif
    return x;
}

// The halves of two vectors, interleaved: a0 b0 a1 b1 ... GCC before 12 has no shuffle that Clang has, too.
#if defined(__clang__) || __GNUC__ >= 12
#define FEWBITS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FEWBITS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(mask_of(a)){__VA_ARGS__})
#endif
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourMask __attribute__((vector_size(16)));
FourMask mask_of(Four);
INLINE Four low_halves(Four a, Four b) { return FEWBITS_SHUFFLE(a, b, 0, 4, 1, 5); }
INLINE Four high_halves(Four a, Four b) { return FEWBITS_SHUFFLE(a, b, 2, 6, 3, 7); }
#if defined(__AVX512F__)
NativeMask mask_of(Native);
INLINE Native low_halves(Native a, Native b) {
    return FEWBITS_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
INLINE Native high_halves(Native a, Native b) {
    return FEWBITS_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#endif
#undef FEWBITS_SHUFFLE

// N vectors of N, transposed in place: log2(N) perfect shuffles.
template <int N, class VECTOR>
INLINE void transpose_square(VECTOR* a) {
    VECTOR b[N];
    for (int size = 1; size < N; size *= 2) {
        for (int i = 0; i < N / 2; ++i) {
            b[2 * i] = low_halves(a[i], a[i + N / 2]);
            b[2 * i + 1] = high_halves(a[i], a[i + N / 2]);
        }
        std::memcpy(a, b, sizeof b);
    }
}

// (LANES, group) row-major -> (group, LANES).
template <int GROUP>
INLINE void transpose(const float* __restrict src, F* __restrict dst) {
#if defined(__AVX512F__)
    for (int at = 0; at < GROUP; at += LANES) {
        Native a[LANES];
        for (int i = 0; i < LANES; ++i) a[i] = load(src + i * GROUP + at).part[0];
        transpose_square<LANES>(a);
        for (int i = 0; i < LANES; ++i) dst[at + i].part[0] = a[i];
    }
#else
    float* out = reinterpret_cast<float*>(dst);
    for (int i = 0; i < GROUP; i += 4) {
        for (int lane = 0; lane < LANES; lane += 4) {
            Four a[4];
            for (int j = 0; j < 4; ++j) std::memcpy(&a[j], src + (lane + j) * GROUP + i, sizeof(Four));
            transpose_square<4>(a);
            for (int j = 0; j < 4; ++j) std::memcpy(out + (i + j) * LANES + lane, &a[j], sizeof(Four));
        }
    }
#endif
}

}  // namespace FEWBITS_ISA
