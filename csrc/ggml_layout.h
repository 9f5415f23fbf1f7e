// The bytes of a GGML block: the fields of fewbits/formats/ggml_layout.py, which explains them.
#pragma once

#include "lanes.h"

namespace FEWBITS_ISA {

// One block with everything unpacked; codes and scales unsigned, as in the reference.
struct Block {
    uint8_t code[256];
    uint8_t scale[16];
    uint8_t minimum[8 * 2];
    uint8_t exponent[1];
    float d, m, dmin;  // already rounded to half precision
};

// element j of a chunk's byte: j, run + j, 2 run + j ...
template <int BITS, int RUN, int SHIFT, int FLIP>
inline void pack_runs(const uint8_t* __restrict code, int n, uint8_t* __restrict out) {
    constexpr int PER = 8 / BITS, MASK = (1 << BITS) - 1;
    if (BITS == 1 && RUN == 1) {  // the product gathers the low bits of eight bytes in its top byte
        for (int i = 0; i < n; i += 8) {
            uint64_t eight;
            std::memcpy(&eight, code + i, 8);
            *out++ = uint8_t((((eight >> SHIFT) & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
        }
        return;
    }
    for (int chunk = 0; chunk < n; chunk += RUN * PER, out += RUN) {
        for (int j = 0; j < RUN; ++j) {
            int byte = 0;
            for (int p = 0; p < PER; ++p)
                byte |= (((code[chunk + p * RUN + j] >> SHIFT) ^ FLIP) & MASK) << (p * BITS);
            out[j] = uint8_t(byte);
        }
    }
}

template <int BITS, int RUN, int SHIFT, int FLIP>
inline void unpack_runs(const uint8_t* __restrict in, int n, uint8_t* __restrict code) {
    constexpr int PER = 8 / BITS, MASK = (1 << BITS) - 1;
    for (int chunk = 0; chunk < n; chunk += RUN * PER, in += RUN)
        for (int p = 0; p < PER; ++p)
            for (int j = 0; j < RUN; ++j)
                code[chunk + p * RUN + j] |= uint8_t((((in[j] >> (p * BITS)) ^ FLIP) & MASK) << SHIFT);
}

enum class Part { code, scale, exponent };

template <Part PART>
inline uint8_t* part_of(Block& b) {
    return PART == Part::code ? b.code : PART == Part::scale ? b.scale : b.exponent;
}

template <Part PART, int BITS, int RUN, int SHIFT = 0, int FLIP = 0>
struct Runs {
    template <class T> static constexpr int count() {
        return PART == Part::code ? T::block : PART == Part::scale ? T::block / T::group : 1;
    }
    template <class T> static constexpr int nbytes() { return count<T>() * BITS / 8; }
    template <class T> static void pack(const Block& b, uint8_t* out) {
        pack_runs<BITS, RUN, SHIFT, FLIP>(part_of<PART>(const_cast<Block&>(b)), count<T>(), out);
    }
    template <class T> static void unpack(const uint8_t* in, Block& b) {
        unpack_runs<BITS, RUN, SHIFT, FLIP>(in, count<T>(), part_of<PART>(b));
    }
};

template <float Block::*VALUE>
struct Half {
    template <class T> static constexpr int nbytes() { return 2; }
    template <class T> static void pack(const Block& b, uint8_t* out) {
        uint16_t h = half_bits(b.*VALUE);
        std::memcpy(out, &h, 2);
    }
    template <class T> static void unpack(const uint8_t* in, Block& b) {
        uint16_t h;
        std::memcpy(&h, in, 2);
        b.*VALUE = half_value(h);
    }
};

struct ScaleMin6 {
    template <class T> static constexpr int nbytes() { return 12; }
    template <class T> static void pack(const Block& b, uint8_t* out) {
        for (int j = 0; j < 4; ++j) {
            out[j] = uint8_t(b.scale[j] | (b.scale[j + 4] >> 4) << 6);
            out[4 + j] = uint8_t(b.minimum[j] | (b.minimum[j + 4] >> 4) << 6);
            out[8 + j] = uint8_t((b.scale[j + 4] & 15) | (b.minimum[j + 4] & 15) << 4);
        }
    }
    template <class T> static void unpack(const uint8_t* in, Block& b) {
        for (int j = 0; j < 4; ++j) {
            b.scale[j] = in[j] & 63;
            b.minimum[j] = in[4 + j] & 63;
            b.scale[j + 4] = uint8_t((in[8 + j] & 15) | (in[j] >> 6) << 4);
            b.minimum[j + 4] = uint8_t((in[8 + j] >> 4) | (in[4 + j] >> 6) << 4);
        }
    }
};

struct ScaleMin4 {
    template <class T> static constexpr int nbytes() { return T::block / T::group; }
    template <class T> static void pack(const Block& b, uint8_t* out) {
        for (int j = 0; j < T::block / T::group; ++j) out[j] = uint8_t(b.scale[j] | b.minimum[j] << 4);
    }
    template <class T> static void unpack(const uint8_t* in, Block& b) {
        for (int j = 0; j < T::block / T::group; ++j) {
            b.scale[j] = in[j] & 15;
            b.minimum[j] = in[j] >> 4;
        }
    }
};

struct Ternary {
    template <class T> static constexpr int nbytes() { return 52; }

    template <int DIGITS, int RUN> static void pack_part(const uint8_t*& code, uint8_t*& out, int bytes) {
        for (int done = 0; done < bytes; done += RUN, code += DIGITS * RUN, out += RUN) {
            for (int j = 0; j < RUN; ++j) {
                int n = 0, power = 81;
                for (int p = 0; p < DIGITS; ++p, power /= 3) n += code[p * RUN + j] * power;
                out[j] = uint8_t((n * 256 + 242) / 243);
            }
        }
    }
    template <int DIGITS, int RUN> static void unpack_part(const uint8_t*& in, uint8_t*& code, int bytes) {
        for (int done = 0; done < bytes; done += RUN, code += DIGITS * RUN, in += RUN) {
            for (int j = 0; j < RUN; ++j)
                for (int p = 0, power = 1; p < DIGITS; ++p, power *= 3)
                    code[p * RUN + j] = uint8_t((((in[j] * power) & 255) * 3) >> 8);
        }
    }
    template <class T> static void pack(const Block& b, uint8_t* out) {
        const uint8_t* code = b.code;
        pack_part<5, 32>(code, out, 32);
        pack_part<5, 16>(code, out, 16);
        pack_part<4, 4>(code, out, 4);
    }
    template <class T> static void unpack(const uint8_t* in, Block& b) {
        uint8_t* code = b.code;
        unpack_part<5, 32>(in, code, 32);
        unpack_part<5, 16>(in, code, 16);
        unpack_part<4, 4>(in, code, 4);
    }
};

template <class... PARTS>
struct Struct {
    template <class T> static constexpr int nbytes() { return (PARTS::template nbytes<T>() + ...); }
    template <class T> static void pack(const Block& b, uint8_t* out) {
        ((PARTS::template pack<T>(b, out), out += PARTS::template nbytes<T>()), ...);
    }
    template <class T> static void unpack(const uint8_t* in, Block& b) {
        std::memset(b.code, 0, T::block);
        std::memset(b.scale, 0, sizeof b.scale);
        b.exponent[0] = 0;
        ((PARTS::template unpack<T>(in, b), in += PARTS::template nbytes<T>()), ...);
    }
};

}  // namespace FEWBITS_ISA
