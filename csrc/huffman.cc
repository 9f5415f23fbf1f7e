// Huffman codes: see huffman.h.
#include "huffman.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace fewbits {

// What each 12 bits begin with: symbol, and length of its code in the high byte; 0 where no code begins so.
// -> whether the lengths are those of a prefix code.
static bool fill(const uint8_t* lengths, uint16_t* table) {
    uint32_t place = 0;
    std::memset(table, 0, sizeof(uint16_t) << HUFFMAN_BITS);
    for (int length = 1; length <= HUFFMAN_BITS; ++length)
        for (int s = 0; s < 256; ++s) {
            if (lengths[s] > HUFFMAN_BITS) return false;
            if (lengths[s] != length) continue;
            uint32_t size = 1u << (HUFFMAN_BITS - length);
            if (place + size > 1u << HUFFMAN_BITS) return false;
            std::fill(table + place, table + place + size, uint16_t(s | length << 8));
            place += size;
        }
    return true;
}

static uint64_t big_endian(const uint8_t* at) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word = word << 8 | at[i];  // compilers make one load of it
    return word;
}

bool huffman_decode(const uint8_t* in, int64_t bytes, const uint8_t* lengths, int tables, const uint8_t* of,
                    uint8_t* out, int64_t count) {
    constexpr int STREAMS = HUFFMAN_STREAMS;
    if (bytes < 4 * STREAMS || tables < 1 || (!of && tables != 1 && count)) return false;
    if (of) {
        uint8_t largest = 0;
        for (int64_t i = 0; i < count; ++i) largest = std::max(largest, of[i]);
        if (largest >= tables) return false;
    }
    static thread_local std::vector<uint16_t> table;
    table.resize(size_t(tables) << HUFFMAN_BITS);
    for (int t = 0; t < tables; ++t)
        if (!fill(lengths + 256 * t, table.data() + (size_t(t) << HUFFMAN_BITS))) return false;
    uint64_t at[STREAMS], end[STREAMS], first = 8 * 4 * STREAMS;  // in bits
    for (int j = 0; j < STREAMS; ++j) {
        const uint8_t* size = in + 4 * j;
        at[j] = first;
        end[j] = first + (size[0] | size[1] << 8 | size[2] << 16 | uint64_t(size[3]) << 24);
        first = (end[j] + 7) & ~uint64_t(7);
    }
    if (first != 8 * uint64_t(bytes)) return false;
    // A window of 8 bytes that ends inside: the last ones are read from a copy with zeros behind it.
    uint8_t tail[24] = {};
    uint64_t kept = uint64_t(std::min<int64_t>(bytes, 16)), from = uint64_t(bytes) - kept;
    std::memcpy(tail, in + from, kept);
    auto next = [&](int j, int64_t i) {
        uint64_t byte = at[j] >> 3;
        if (byte >= uint64_t(bytes)) return false;
        const uint8_t* window = byte + 8 <= uint64_t(bytes) ? in + byte : tail + (byte - from);
        uint64_t bits = big_endian(window) << (at[j] & 7) >> (64 - HUFFMAN_BITS);
        uint16_t entry = table[bits | uint64_t(of ? of[i] : 0) << HUFFMAN_BITS];
        out[i] = uint8_t(entry);
        at[j] += entry >> 8;
        return true;
    };
    int64_t i = 0;
    for (; i + STREAMS <= count; i += STREAMS) {
        bool inside = true;
        for (int j = 0; j < STREAMS; ++j) inside &= next(j, i + j);
        if (!inside) return false;
    }
    for (int j = 0; i < count; ++i, ++j)
        if (!next(j, i)) return false;
    for (int j = 0; j < STREAMS; ++j)
        if (at[j] != end[j]) return false;
    return true;
}

}  // namespace fewbits
