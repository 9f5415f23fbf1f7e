// rANS: see rans.h. Streams and bytes are the same for every instruction set.
#include "rans.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(FEWBITS_X86)
#include <immintrin.h>
#endif

namespace fewbits {

// Whether every table sums to 2^12, and every symbol has one.
static bool rans_valid(const RansTables& tables, int64_t count) {
    for (int t = 0; t < tables.count; ++t) {
        uint32_t total = 0;
        for (int s = 0; s < 256; ++s) total += tables.frequency[256 * t + s];
        if (total != RANS_TOTAL) return false;
    }
    if (!tables.of) return tables.count == 1 || !count;
    uint8_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, tables.of[i]);
    return largest < tables.count;
}

int64_t rans_encode(const uint8_t* in, int64_t count, const RansTables& tables, uint8_t* out, int64_t room) {
    if (!rans_valid(tables, count)) return -1;
    std::vector<uint32_t> start(size_t(256) * tables.count);
    for (int t = 0; t < tables.count; ++t)
        for (int s = 1; s < 256; ++s)
            start[256 * t + s] = start[256 * t + s - 1] + tables.frequency[256 * t + s - 1];
    uint32_t state[RANS_STATES];
    for (auto& x : state) x = RANS_LOW;
    int64_t at = room;  // words are written from the end: decoding reads them the other way round
    for (int64_t i = count; i-- > 0;) {
        uint32_t& x = state[i % RANS_STATES];
        size_t place = 256 * (tables.of ? tables.of[i] : 0) + in[i];
        uint32_t f = tables.frequency[place];
        if (!f) return -1;
        if (uint64_t(x) >= uint64_t(f) << 20) {
            if (at < 2 + 4 * RANS_STATES) return -1;
            out[--at] = uint8_t(x >> 8);
            out[--at] = uint8_t(x);
            x >>= 16;
        }
        x = (x / f << RANS_BITS) + x % f + start[place];
    }
    if (at < 4 * RANS_STATES) return -1;
    for (int j = RANS_STATES; j-- > 0;)
        for (int byte = 3; byte >= 0; --byte) out[--at] = uint8_t(state[j] >> 8 * byte);
    std::memmove(out, out + at, size_t(room - at));
    return room - at;
}

// slots: of each table, what each of its 2^12 places stands for: symbol, frequency - 1, place - start in 8,
// 12, 12 bits.
struct Reader {
    const uint32_t* slots;
    uint32_t x[RANS_STATES];
    const uint8_t *words, *end;
};

// The next 32 symbols, again and again, while 32 words are left -> how many symbols.
static int64_t rounds_portable(Reader& r, const uint8_t* of, uint8_t* out, int64_t count) {
    const uint8_t* at = r.words;
    int64_t i = 0;
    for (; i + RANS_STATES <= count && r.end - at >= 2 * RANS_STATES; i += RANS_STATES) {
        for (int j = 0; j < RANS_STATES; ++j) {
            uint32_t place = (r.x[j] & (RANS_TOTAL - 1)) | (of ? uint32_t(of[i + j]) << RANS_BITS : 0);
            uint32_t slot = r.slots[place];
            out[i + j] = uint8_t(slot);
            uint32_t next = ((slot >> 8 & 4095) + 1) * (r.x[j] >> RANS_BITS) + (slot >> 20);
            bool low = next < RANS_LOW;
            r.x[j] = low ? next << 16 | at[0] | at[1] << 8 : next;
            at += low ? 2 : 0;
        }
    }
    r.words = at;
    return i;
}

#if defined(FEWBITS_X86)
// For each mask of lanes: lane j gets the word of its rank among the lanes of the mask.
struct Ranks {
    alignas(32) int32_t of[256][8];
    Ranks() {
        for (int mask = 0; mask < 256; ++mask)
            for (int j = 0, rank = 0; j < 8; ++j) of[mask][j] = mask >> j & 1 ? rank++ : 0;
    }
};

using Lanes = __m256i;

template <bool CLASSES>
__attribute__((target("avx2"))) static int64_t rounds_avx2(Reader& r, const uint8_t* of, uint8_t* out,
                                                           int64_t count) {
    static const Ranks ranks;
    constexpr int GROUPS = RANS_STATES / 8;
    const Lanes low12 = _mm256_set1_epi32(4095), one = _mm256_set1_epi32(1);
    const Lanes bytes = _mm256_set1_epi32(12 << 24 | 8 << 16 | 4 << 8);  // of each lane its lowest
    Lanes x[GROUPS];
    for (int g = 0; g < GROUPS; ++g) x[g] = _mm256_loadu_si256(reinterpret_cast<const Lanes*>(r.x + 8 * g));
    const uint8_t* at = r.words;
    int64_t i = 0;
    for (; i + RANS_STATES <= count && r.end - at >= 2 * RANS_STATES; i += RANS_STATES) {
        Lanes slot[GROUPS];
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) {
            Lanes place = _mm256_and_si256(x[g], low12);
            if (CLASSES) {
                const auto* classes = reinterpret_cast<const __m128i*>(of + i + 8 * g);
                Lanes table = _mm256_cvtepu8_epi32(_mm_loadl_epi64(classes));
                place = _mm256_or_si256(place, _mm256_slli_epi32(table, RANS_BITS));
            }
            slot[g] = _mm256_i32gather_epi32(reinterpret_cast<const int*>(r.slots), place, 4);
        }
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) {
            Lanes symbols = _mm256_shuffle_epi8(slot[g], bytes);
            int first = _mm256_extract_epi32(symbols, 0), second = _mm256_extract_epi32(symbols, 4);
            std::memcpy(out + i + 8 * g, &first, 4);
            std::memcpy(out + i + 8 * g + 4, &second, 4);
            Lanes f = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(slot[g], 8), low12), one);
            Lanes next = _mm256_mullo_epi32(f, _mm256_srli_epi32(x[g], RANS_BITS));
            next = _mm256_add_epi32(next, _mm256_srli_epi32(slot[g], 20));
            Lanes low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
            int mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
            Lanes word = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            Lanes rank = _mm256_load_si256(reinterpret_cast<const Lanes*>(ranks.of[mask]));
            word = _mm256_permutevar8x32_epi32(word, rank);
            x[g] = _mm256_blendv_epi8(next, _mm256_or_si256(_mm256_slli_epi32(next, 16), word), low);
            at += 2 * __builtin_popcount(unsigned(mask));
        }
    }
    for (int g = 0; g < GROUPS; ++g) _mm256_storeu_si256(reinterpret_cast<Lanes*>(r.x + 8 * g), x[g]);
    r.words = at;
    return i;
}
#endif

bool rans_decode(const uint8_t* in, int64_t bytes, const RansTables& tables, uint8_t* out, int64_t count,
                 bool avx2) {
    if (!rans_valid(tables, count) || bytes < 4 * RANS_STATES) return false;
    static thread_local std::vector<uint32_t> slots;
    slots.resize(size_t(RANS_TOTAL) * tables.count);
    uint32_t* place = slots.data();
    for (int s = 0; s < 256 * tables.count; ++s)
        for (uint32_t i = 0, f = tables.frequency[s]; i < f; ++i)
            *place++ = uint32_t(s & 255) | (f - 1u) << 8 | i << 20;
    Reader r{slots.data(), {}, in + 4 * RANS_STATES, in + bytes};
    for (int j = 0; j < RANS_STATES; ++j)
        r.x[j] = in[4 * j] | in[4 * j + 1] << 8 | in[4 * j + 2] << 16 | uint32_t(in[4 * j + 3]) << 24;
    // 32 symbols read 32 words at most: no check inside while so many are left.
    auto* rounds = rounds_portable;
#if defined(FEWBITS_X86)
    if (avx2) rounds = tables.of ? rounds_avx2<true> : rounds_avx2<false>;
#endif
    (void)avx2;
    int64_t i = rounds(r, tables.of, out, count);
    for (; i < count; ++i) {
        uint32_t& state = r.x[i % RANS_STATES];
        uint32_t table = tables.of ? tables.of[i] : 0;
        uint32_t slot = r.slots[(state & (RANS_TOTAL - 1)) | table << RANS_BITS];
        out[i] = uint8_t(slot);
        state = ((slot >> 8 & 4095) + 1) * (state >> RANS_BITS) + (slot >> 20);
        if (state < RANS_LOW) {
            if (r.end - r.words < 2) return false;
            state = state << 16 | r.words[0] | r.words[1] << 8;
            r.words += 2;
        }
    }
    for (uint32_t state : r.x)
        if (state != RANS_LOW) return false;
    return r.words == r.end;
}

}  // namespace fewbits
