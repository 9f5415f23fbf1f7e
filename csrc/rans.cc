// rANS: see rans.h. Streams and bytes are the same for every instruction set.
#include "rans.h"

#include <cstring>

#if defined(FEWBITS_X86)
#include <immintrin.h>
#endif

namespace fewbits {

static bool rans_sums(const uint16_t* frequency) {
    uint32_t total = 0;
    for (int s = 0; s < 256; ++s) total += frequency[s];
    return total == RANS_TOTAL;
}

int64_t rans_encode(const uint8_t* in, int64_t count, const uint16_t* frequency, uint8_t* out,
                    int64_t room) {
    if (!rans_sums(frequency)) return -1;
    uint32_t start[256], sum = 0, state[RANS_STATES];
    for (int s = 0; s < 256; ++s) {
        start[s] = sum;
        sum += frequency[s];
    }
    for (auto& x : state) x = RANS_LOW;
    int64_t at = room;  // words are written from the end: decoding reads them the other way round
    for (int64_t i = count; i-- > 0;) {
        uint32_t& x = state[i % RANS_STATES];
        uint32_t f = frequency[in[i]];
        if (!f) return -1;
        if (uint64_t(x) >= uint64_t(f) << 20) {
            if (at < 2 + 4 * RANS_STATES) return -1;
            out[--at] = uint8_t(x >> 8);
            out[--at] = uint8_t(x);
            x >>= 16;
        }
        x = (x / f << RANS_BITS) + x % f + start[in[i]];
    }
    if (at < 4 * RANS_STATES) return -1;
    for (int j = RANS_STATES; j-- > 0;)
        for (int byte = 3; byte >= 0; --byte) out[--at] = uint8_t(state[j] >> 8 * byte);
    std::memmove(out, out + at, size_t(room - at));
    return room - at;
}

// The next eight symbols, again and again, while eight words are left -> how many symbols.
static int64_t eight_portable(const uint32_t* slots, uint32_t* x, const uint8_t** words, const uint8_t* end,
                              uint8_t* out, int64_t count) {
    const uint8_t* at = *words;
    int64_t i = 0;
    for (; i + RANS_STATES <= count && end - at >= 2 * RANS_STATES; i += RANS_STATES) {
        for (int j = 0; j < RANS_STATES; ++j) {
            uint32_t slot = slots[x[j] & (RANS_TOTAL - 1)];
            out[i + j] = uint8_t(slot);
            uint32_t next = ((slot >> 8 & 4095) + 1) * (x[j] >> RANS_BITS) + (slot >> 20);
            bool low = next < RANS_LOW;
            x[j] = low ? next << 16 | at[0] | at[1] << 8 : next;
            at += low ? 2 : 0;
        }
    }
    *words = at;
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

__attribute__((target("avx2"))) static int64_t eight_avx2(const uint32_t* slots, uint32_t* states,
                                                          const uint8_t** words, const uint8_t* end,
                                                          uint8_t* out, int64_t count) {
    static const Ranks ranks;
    const Lanes low12 = _mm256_set1_epi32(4095), one = _mm256_set1_epi32(1);
    const Lanes bytes = _mm256_set1_epi32(12 << 24 | 8 << 16 | 4 << 8);  // of each lane its lowest
    Lanes x = _mm256_loadu_si256(reinterpret_cast<const Lanes*>(states));
    const uint8_t* at = *words;
    int64_t i = 0;
    for (; i + RANS_STATES <= count && end - at >= 2 * RANS_STATES; i += RANS_STATES) {
        Lanes place = _mm256_and_si256(x, low12);
        Lanes slot = _mm256_i32gather_epi32(reinterpret_cast<const int*>(slots), place, 4);
        Lanes symbols = _mm256_shuffle_epi8(slot, bytes);
        int first = _mm256_extract_epi32(symbols, 0), second = _mm256_extract_epi32(symbols, 4);
        std::memcpy(out + i, &first, 4);
        std::memcpy(out + i + 4, &second, 4);
        Lanes f = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(slot, 8), low12), one);
        Lanes next = _mm256_mullo_epi32(f, _mm256_srli_epi32(x, RANS_BITS));
        next = _mm256_add_epi32(next, _mm256_srli_epi32(slot, 20));
        Lanes low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
        int mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
        Lanes word = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        Lanes rank = _mm256_load_si256(reinterpret_cast<const Lanes*>(ranks.of[mask]));
        word = _mm256_permutevar8x32_epi32(word, rank);
        x = _mm256_blendv_epi8(next, _mm256_or_si256(_mm256_slli_epi32(next, 16), word), low);
        at += 2 * __builtin_popcount(unsigned(mask));
    }
    _mm256_storeu_si256(reinterpret_cast<Lanes*>(states), x);
    *words = at;
    return i;
}
#endif

bool rans_decode(const uint8_t* in, int64_t bytes, const uint16_t* frequency, uint8_t* out, int64_t count,
                 bool avx2) {
    if (!rans_sums(frequency) || bytes < 4 * RANS_STATES) return false;
    static thread_local uint32_t slots[RANS_TOTAL];  // symbol, frequency - 1, place - start: 8, 12, 12 bits
    uint32_t place = 0, x[RANS_STATES];
    for (int s = 0; s < 256; ++s)
        for (uint32_t i = 0; i < frequency[s]; ++i)
            slots[place++] = uint32_t(s) | (frequency[s] - 1u) << 8 | i << 20;
    for (int j = 0; j < RANS_STATES; ++j)
        x[j] = in[4 * j] | in[4 * j + 1] << 8 | in[4 * j + 2] << 16 | uint32_t(in[4 * j + 3]) << 24;
    const uint8_t *words = in + 4 * RANS_STATES, *end = in + bytes;
    // Eight symbols read eight words at most: no check inside while so many are left.
    auto* eight = eight_portable;
#if defined(FEWBITS_X86)
    if (avx2) eight = eight_avx2;
#endif
    (void)avx2;
    int64_t i = eight(slots, x, &words, end, out, count);
    for (; i < count; ++i) {
        uint32_t& state = x[i % RANS_STATES];
        uint32_t slot = slots[state & (RANS_TOTAL - 1)];
        out[i] = uint8_t(slot);
        state = ((slot >> 8 & 4095) + 1) * (state >> RANS_BITS) + (slot >> 20);
        if (state < RANS_LOW) {
            if (end - words < 2) return false;
            state = state << 16 | words[0] | words[1] << 8;
            words += 2;
        }
    }
    for (uint32_t state : x)
        if (state != RANS_LOW) return false;
    return words == end;
}

}  // namespace fewbits
