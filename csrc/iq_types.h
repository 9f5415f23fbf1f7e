// The IQ types as rows, the same as IQ_TYPES in fewbits/formats/iq.py, which explains them. Their lattices
// come from there at run time (`register_table`), so that each table exists once.
#pragma once

#include "lanes.h"

namespace FEWBITS_ISA {

// One block with everything unpacked, as the reference's values.
struct IqBlock {
    uint16_t index[64];
    uint8_t sign[32], scale[16], shift[32], nibble[4];
    float d;
};

enum class Signs { none, free, even };
enum class Piece { index, sign, scale, shift, nibble };

constexpr int piece(Piece what, int bits, int shift = 0) { return int(what) << 16 | bits << 8 | shift; }

// COUNT little-endian words, cut into pieces from the lowest bit on; each takes the next of its kind.
template <int COUNT, int BITS, int... PIECES>
struct Words {
    static constexpr int nbytes = COUNT * BITS / 8;
    static constexpr bool nibbles = ((PIECES >> 16 == int(Piece::nibble)) || ...);
    static constexpr int per(int what) { return (int((PIECES >> 16) == what) + ...); }

    // Calls use(what, element, bits, shift, place in the word) for each piece of one word.
    template <class USE>
    static INLINE void each(int word, USE use) {
        int taken[5] = {}, at = 0;
        auto one = [&](int p, int count) {
            int what = p >> 16, bits = (p >> 8) & 255;
            use(what, word * count + taken[what]++, bits, p & 255, at);
            at += bits;
        };
        (one(PIECES, per(PIECES >> 16)), ...);
    }
    static INLINE unsigned get(const IqBlock& b, int what, int i) {
        return what == 0 ? b.index[i] : what == 1 ? b.sign[i] : what == 2 ? b.scale[i]
             : what == 3 ? b.shift[i] : b.nibble[i];
    }
    static INLINE void add(IqBlock& b, int what, int i, unsigned v) {
        uint8_t* bytes = what == 1 ? b.sign : what == 2 ? b.scale : what == 3 ? b.shift : b.nibble;
        if (what == 0) b.index[i] |= uint16_t(v);
        else bytes[i] |= uint8_t(v);
    }
    static void pack(const IqBlock& b, uint8_t* out) {
        for (int word = 0; word < COUNT; ++word) {
            uint64_t v = 0;
            each(word, [&](int what, int i, int bits, int shift, int at) {
                v |= uint64_t((get(b, what, i) >> shift) & ((1u << bits) - 1)) << at;
            });
            std::memcpy(out + word * BITS / 8, &v, BITS / 8);
        }
    }
    static void unpack(const uint8_t* in, IqBlock& b) {
        for (int word = 0; word < COUNT; ++word) {
            uint64_t v = 0;
            std::memcpy(&v, in + word * BITS / 8, BITS / 8);
            each(word, [&](int what, int i, int bits, int shift, int at) {
                add(b, what, i, unsigned((v >> at) & ((1u << bits) - 1)) << shift);
            });
        }
    }
};

struct HalfD {
    static constexpr int nbytes = 2;
    static constexpr bool nibbles = false;
    static void pack(const IqBlock& b, uint8_t* out) {
        uint16_t h = half_bits(b.d);
        std::memcpy(out, &h, 2);
    }
    static void unpack(const uint8_t* in, IqBlock& b) {
        uint16_t h;
        std::memcpy(&h, in, 2);
        b.d = half_value(h);
    }
};

template <class... PARTS>
struct IqStruct {
    static constexpr int nbytes = (PARTS::nbytes + ...);
    static constexpr bool nibbles = (PARTS::nibbles || ...);
    static void pack(const IqBlock& b, uint8_t* out) { ((PARTS::pack(b, out), out += PARTS::nbytes), ...); }
    static void unpack(const uint8_t* in, IqBlock& b) {
        std::memset(&b, 0, sizeof b);
        ((PARTS::unpack(in, b), in += PARTS::nbytes), ...);
    }
};

constexpr int MAX_POINTS = 2048, MAX_QUARTER = 9;

// A row: the points with one upper half and one second quarter, which differ in their first quarters only.
// Set 0 of first quarters is empty; each of the others is its last one and the rest, a set before it.
struct Rows {
    static constexpr int halves = MAX_QUARTER * MAX_QUARTER;
    int count;  // of sets
    uint16_t last[1 << MAX_QUARTER], rest[1 << MAX_QUARTER];  // offsets of costs
    uint16_t set[halves][MAX_QUARTER];                        // of each row; an offset, too
    uint16_t members[halves][MAX_QUARTER];                    // bits of the first quarters
    uint16_t place[halves][MAX_QUARTER][MAX_QUARTER];
};

// The points of one type, as fewbits/formats/iq_lattice.py lays them out.
struct Lattice {
    int count = 0;
    float level[8];
    uint16_t low[MAX_POINTS], high[MAX_POINTS];  // where the costs of the two halves begin, in floats
    float value[MAX_POINTS][8];
    Rows rows;
};

// DIM weights a point, of LEVELS levels; POINTS: how many there are; SHIFT: weights that share one, or 0;
// UNIT: odd integers of scales are multiples of d / UNIT; SCALES: how many of them there are.
template <int GROUP, int DIM, int LEVELS, int POINTS, Signs SIGNS, int SHIFT, int UNIT, int SCALES,
          class STRUCT>
struct IqType {
    static constexpr bool lattice = true;
    static constexpr int block = 256, group = GROUP, groups = block / GROUP, dim = DIM, levels = LEVELS;
    static constexpr int shift = SHIFT, scale_hi = 2 * SCALES - 1;
    static constexpr int quarter = DIM == 8 ? LEVELS * LEVELS : LEVELS;  // values of a quarter of a point
    // An eighth of all vectors or more: rows are faster than points. Measured: slower from a twelfth down.
    static constexpr bool dense = POINTS * 8 >= quarter * quarter * quarter * quarter;
    static constexpr Signs signs = SIGNS;
    static constexpr float unit = 1.0f / UNIT;
    static constexpr bool nibbles = STRUCT::nibbles;  // d lies in the scales' words
    static constexpr int nbytes() { return STRUCT::nbytes; }
    static void pack(const IqBlock& b, uint8_t* out) { STRUCT::pack(b, out); }
    static void unpack(const uint8_t* in, IqBlock& b) { STRUCT::unpack(in, b); }
};

constexpr int I8 = piece(Piece::index, 8), I9 = piece(Piece::index, 9), H1 = piece(Piece::index, 1, 8);
constexpr int H2 = piece(Piece::index, 2, 8), H3 = piece(Piece::index, 3, 8), N4 = piece(Piece::nibble, 4);
constexpr int S7 = piece(Piece::sign, 7), S8 = piece(Piece::sign, 8);
constexpr int C4 = piece(Piece::scale, 4), C3 = piece(Piece::scale, 3), T1 = piece(Piece::shift, 1);

using IQ3_S = IqType<32, 4, 8, 512, Signs::free, 0, 1, 16,
                     IqStruct<HalfD, Words<64, 8, I8>, Words<8, 8, H1, H1, H1, H1, H1, H1, H1, H1>,
                              Words<32, 8, S8>, Words<4, 8, C4, C4>>>;
using IQ3_XXS = IqType<32, 4, 8, 256, Signs::even, 0, 4, 16,
                       IqStruct<HalfD, Words<64, 8, I8>, Words<8, 32, S7, S7, S7, S7, C4>>>;
using IQ2_S = IqType<16, 8, 3, 1024, Signs::free, 0, 8, 16,
                     IqStruct<HalfD, Words<32, 8, I8>, Words<32, 8, S8>, Words<8, 8, H2, H2, H2, H2>,
                              Words<8, 8, C4, C4>>>;
using IQ2_XS = IqType<16, 8, 3, 512, Signs::even, 0, 8, 16,
                      IqStruct<HalfD, Words<32, 16, I9, S7>, Words<8, 8, C4, C4>>>;
using IQ2_XXS = IqType<32, 8, 3, 256, Signs::even, 0, 8, 16,
                       IqStruct<HalfD, Words<8, 64, I8, I8, I8, I8, S7, S7, S7, S7, C4>>>;
using IQ1_S = IqType<32, 8, 3, 2048, Signs::none, 32, 1, 8,
                     IqStruct<HalfD, Words<32, 8, I8>, Words<8, 16, H3, H3, H3, H3, C3, T1>>>;
using IQ1_M = IqType<16, 8, 3, 2048, Signs::none, 8, 1, 8,
                     IqStruct<Words<32, 8, I8>, Words<16, 8, H3, T1, H3, T1>,
                              Words<4, 16, C3, C3, C3, C3, N4>>>;

}  // namespace FEWBITS_ISA
