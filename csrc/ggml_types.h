// The GGML types as rows, the same as TYPES in fewbits/formats/ggml.py (a test compares every bit).
#pragma once

#include "ggml_layout.h"
#include "search.h"

namespace FEWBITS_ISA {

enum class Kind { symmetric, affine, table, exponent };

template <Kind KIND, int BLOCK, int GROUP, int TOP, int ZERO, int SCALE_LO, int SCALE_HI, class STRUCT>
struct Type {
    static constexpr bool lattice = false;
    static constexpr Kind kind = KIND;
    static constexpr int block = BLOCK, group = GROUP, groups = BLOCK / GROUP, top = TOP, zero = ZERO;
    static constexpr int scale_lo = SCALE_LO, scale_hi = SCALE_HI;
    static constexpr bool two_level = SCALE_LO != SCALE_HI;
    static constexpr int nbytes() { return STRUCT::template nbytes<Type>(); }
    static void pack(const Block& b, uint8_t* out) { STRUCT::template pack<Type>(b, out); }
    static void unpack(const uint8_t* in, Block& b) { STRUCT::template unpack<Type>(in, b); }
};

struct Iq4 {
    static constexpr int size = 16;
    static constexpr float levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                         1,    13,   25,  38,  53,  69,  89,  113};
    static constexpr uint8_t codes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

struct Mxfp4 {  // e2m1 doubled
    static constexpr int size = 15;
    static constexpr float levels[15] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12};
    static constexpr uint8_t codes[15] = {15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7};
};

template <int BITS, int RUN, int SHIFT = 0, int FLIP = 0>
using Codes = Runs<Part::code, BITS, RUN, SHIFT, FLIP>;
template <int BITS, int RUN, int SHIFT = 0, int FLIP = 0>
using Scales = Runs<Part::scale, BITS, RUN, SHIFT, FLIP>;
using D = Half<&Block::d>;
using M = Half<&Block::m>;
using DMin = Half<&Block::dmin>;
using Nibbles = Codes<4, 16>;
using Fifth = Codes<1, 1, 4>;

constexpr Kind SYM = Kind::symmetric, AFF = Kind::affine, TAB = Kind::table, EXP = Kind::exponent;
using Q4_0 = Type<SYM, 32, 32, 15, 8, 0, 0, Struct<D, Nibbles>>;
using Q4_1 = Type<AFF, 32, 32, 15, 0, 0, 0, Struct<D, M, Nibbles>>;
using Q5_0 = Type<SYM, 32, 32, 31, 16, 0, 0, Struct<D, Fifth, Nibbles>>;
using Q5_1 = Type<AFF, 32, 32, 31, 0, 0, 0, Struct<D, M, Fifth, Nibbles>>;
using Q8_0 = Type<SYM, 32, 32, 255, 128, 0, 0, Struct<D, Codes<8, 1, 0, 128>>>;
using Q2_K = Type<AFF, 256, 16, 3, 0, 0, 15, Struct<ScaleMin4, Codes<2, 32>, D, DMin>>;
using Q3_K = Type<SYM, 256, 16, 7, 4, -32, 31,
                  Struct<Codes<1, 32, 2>, Codes<2, 32>, Scales<4, 8>, Scales<2, 4, 4>, D>>;
using Q4_K = Type<AFF, 256, 32, 15, 0, 0, 63, Struct<D, DMin, ScaleMin6, Codes<4, 32>>>;
using Q5_K = Type<AFF, 256, 32, 31, 0, 0, 63, Struct<D, DMin, ScaleMin6, Codes<1, 32, 4>, Codes<4, 32>>>;
using Q6_K = Type<SYM, 256, 16, 63, 32, -128, 127,
                  Struct<Codes<4, 64>, Codes<2, 32, 4>, Scales<8, 1, 0, 128>, D>>;
using IQ4_NL = Type<TAB, 32, 32, 15, 0, 0, 0, Struct<D, Nibbles>>;
using IQ4_XS = Type<TAB, 256, 32, 15, 0, -32, 31, Struct<D, Scales<2, 1, 4>, Scales<4, 1>, Nibbles>>;
using TQ1_0 = Type<SYM, 256, 256, 2, 1, 0, 0, Struct<Ternary, D>>;
using TQ2_0 = Type<SYM, 256, 256, 2, 1, 0, 0, Struct<Codes<2, 32>, D>>;
using MXFP4 = Type<EXP, 32, 32, 15, 0, 0, 0, Struct<Runs<Part::exponent, 8, 1>, Nibbles>>;

}  // namespace FEWBITS_ISA
