// Interleaved rANS of bytes: 32 states of 32 bits, 12 bits of probability, 16-bit words.
//
//     encode x, s:   while x >= f(s) 2^20: word(x mod 2^16), x /= 2^16
//                    x = x / f(s) 2^12 + x mod f(s) + c(s)
//     decode x:      s = the symbol of x mod 2^12
//                    x = f(s) (x / 2^12) + x mod 2^12 - c(s);  if x < 2^16: x = x 2^16 + word
//
// f: frequencies that sum to 2^12; c: their running sum. There are several tables of them where each symbol
// has a class, the number of its table. Symbol i belongs to state i mod 32. A stream is the 32 final states,
// then the words in the order in which decoding reads them; all little endian. Source: Duda, Asymmetric
// numeral systems (arXiv 1311.2540). Reference: fewbits/packing/rans.py.
#pragma once

#include <cstdint>

namespace fewbits {

constexpr int RANS_BITS = 12, RANS_STATES = 32;
constexpr uint32_t RANS_TOTAL = 1u << RANS_BITS, RANS_LOW = 1u << 16;

// frequency: of 256 symbols, in each of `count` tables. of: the table of each symbol; null if there is one.
struct RansTables {
    const uint16_t* frequency;
    int count;
    const uint8_t* of;
};

// -> bytes written, from the start of `out` on; -1 for a symbol without frequency or table, or if `room` is
// too small.
int64_t rans_encode(const uint8_t* in, int64_t count, const RansTables& tables, uint8_t* out, int64_t room);

// -> whether the stream held exactly `count` symbols and ended where encoding began. Reads only `bytes` of
// it. avx2: may it use these instructions?
bool rans_decode(const uint8_t* in, int64_t bytes, const RansTables& tables, uint8_t* out, int64_t count,
                 bool avx2);

}  // namespace fewbits
