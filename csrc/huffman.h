// Canonical Huffman codes of bytes, at most 12 bits long, read by table.
//
// Symbol i belongs to bit stream i mod 8. A piece is the bits of each stream (8 x u32, little endian), then the
// streams, each from a new byte, a code's first bit highest. A table is the length of each symbol's code, 0 for
// one that does not occur; codes of one length are consecutive in the order of the symbols, and shorter ones come
// first. There are several tables where each symbol has a class, as in rans.h. Source: Huffman 1952; Han et al.,
// Deep Compression (arXiv 1510.00149). Reference: fewbits/packing/huffman.py.
#pragma once

#include <cstdint>

namespace fewbits {

constexpr int HUFFMAN_BITS = 12, HUFFMAN_STREAMS = 8;

// lengths: of 256 symbols, in each of `tables` tables. of: the table of each symbol; null if there is one.
// -> whether the piece held exactly `count` symbols. Reads only `bytes` of it.
bool huffman_decode(const uint8_t* in, int64_t bytes, const uint8_t* lengths, int tables, const uint8_t* of,
                    uint8_t* out, int64_t count);

}  // namespace fewbits
