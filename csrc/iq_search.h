// The cheapest point of a lattice, by lane. Reference: Lattice.search in fewbits/formats/iq_lattice.py.
#pragma once

#include "iq_types.h"

namespace FEWBITS_ISA {

constexpr int MAX_STARTS = 12;

// The reference's data of the type, set at run time.
template <class T>
struct Known {
    static inline Lattice lattice;
    static inline float starts[MAX_STARTS], last = 1;
    static inline int count = 0;
};

template <int A, int B>
INLINE void sums(const F* first, const F* second, F* out) {
    for (int b = 0; b < B; ++b)
        for (int a = 0; a < A; ++a) out[b * A + a] = second[b] + first[a];
}

// Costs of each level of each coordinate.
template <class T, class SHIFT>
INLINE void level_costs(const F* wx, const F* w, F scale, SHIFT shift, F (*cost)[T::levels]) {
    for (int i = 0; i < T::dim; ++i) {
        F ws = w[i] * scale, wx2 = 2.0f * wx[i];
        for (int l = 0; l < T::levels; ++l) {
            SHIFT level = shift + Known<T>::lattice.level[l];
            cost[i][l] = level * (level * ws - wx2);
        }
    }
}

// Costs of each quarter of a point: sums over its coordinates.
template <class T, class SHIFT>
INLINE void quarter_costs(const F* wx, const F* w, F scale, SHIFT shift, F (*quarter)[T::quarter]) {
    constexpr int L = T::levels;
    if constexpr (T::dim == 4) {
        level_costs<T>(wx, w, scale, shift, quarter);
    } else {
        F cost[T::dim][L];
        level_costs<T>(wx, w, scale, shift, cost);
        for (int q = 0; q < 4; ++q) sums<L, L>(cost[2 * q], cost[2 * q + 1], quarter[q]);
    }
}

// Compares every point. Quarters of them are scanned in parallel, so that comparisons do not wait for each
// other.
template <class T>
INLINE void search_each(const F (*quarter)[T::quarter], F* place, F* cost) {
    constexpr int Q = T::quarter, CHAINS = 4;
    F low[Q * Q], high[Q * Q];
    sums<Q, Q>(quarter[0], quarter[1], low);
    sums<Q, Q>(quarter[2], quarter[3], high);
    const Lattice& known = Known<T>::lattice;
    const float *lows = reinterpret_cast<const float*>(low), *highs = reinterpret_cast<const float*>(high);
    const int count = known.count / CHAINS;
    F best[CHAINS], at[CHAINS], number = {};
    for (int c = 0; c < CHAINS; ++c) best[c] = splat(INFINITY), at[c] = F{};
    for (int k = 0; k < count; ++k) {
        for (int c = 0; c < CHAINS; ++c) {
            F v = load(lows + known.low[c * count + k]) + load(highs + known.high[c * count + k]);
            at[c] = select(v < best[c], number, at[c]);
            best[c] = vmin(v, best[c]);
        }
        number = number + 1.0f;
    }
    for (int c = 1; c < CHAINS; ++c) {
        at[0] = select(best[c] < best[0], at[c] + float(c * count), at[0]);
        best[0] = vmin(best[c], best[0]);
    }
    *place = at[0];
    *cost = best[0];
}

// Offsets in bytes, which save the multiplication of an index.
INLINE uint16_t offset_of(int i) { return uint16_t(i * sizeof(F)); }
INLINE const F& by_offset(const F* table, uint16_t offset) {
    return *reinterpret_cast<const F*>(reinterpret_cast<const char*>(table) + offset);
}

// The cheapest upper half, by lane, with its cheapest lower one, and their cost. Registers, not lanes,
// are outermost, so that the costs of the second quarter stay in them.
template <int Q>
INLINE void scan_rows(const Rows& rows, const F* sets, const F* second, const F* high, F* at, F* cost) {
    for (int part = 0; part < PARTS; ++part) {
        Native add[Q], best = splat(INFINITY).part[0], chosen = {}, number = {};
        for (int q = 0; q < Q; ++q) add[q] = second[q].part[part];
        for (int h = 0; h < Q * Q; ++h) {
            Native least = splat(INFINITY).part[0];  // stays if a sum is NaN, as after overflows
            for (int q = 0; q < Q; ++q)
                least = vmin(add[q] + by_offset(sets, rows.set[h][q]).part[part], least);
            Native v = least + high[h].part[part];
            chosen = v < best ? number : chosen;
            best = vmin(v, best);
            number += 1.0f;
        }
        at->part[part] = chosen;
        cost->part[part] = best;
    }
}

INLINE const float* lanes_of(const F* table) { return reinterpret_cast<const float*>(table); }

// The first point of an upper half that has that cost, by lane: its row, then its place there.
template <int Q>
INLINE F find_point(const Rows& rows, const F* sets, const F (*quarter)[Q], const F* high, F at, F cost) {
    float half[LANES], upper[LANES], least[Q][LANES], hits[LANES], second[LANES], place[LANES];
    int row[LANES];
    store(half, at);
    for (int lane = 0; lane < LANES; ++lane) {
        int h = int(half[lane]);
        upper[lane] = lanes_of(high + h)[lane];
        for (int q = 0; q < Q; ++q) least[q][lane] = lanes_of(&by_offset(sets, rows.set[h][q]))[lane];
    }
    F mask = {};  // bits of the rows
    for (int q = 0; q < Q; ++q) {
        F v = quarter[1][q] + load(least[q]) + load(upper);
        mask += select(v <= cost, splat(float(1 << q)), F{});
    }
    store(hits, mask);
    for (int lane = 0; lane < LANES; ++lane) {
        row[lane] = __builtin_ctz(unsigned(hits[lane]) | 1u << (Q - 1));
        second[lane] = lanes_of(quarter[1] + row[lane])[lane];
    }
    mask = F{};  // bits of the first quarters, also of those that are not in the row
    for (int q = 0; q < Q; ++q) {
        F v = load(second) + quarter[0][q] + load(upper);
        mask += select(v <= cost, splat(float(1 << q)), F{});
    }
    store(hits, mask);
    for (int lane = 0; lane < LANES; ++lane) {
        int h = int(half[lane]), q = row[lane];
        unsigned member = unsigned(hits[lane]) & rows.members[h][q];
        place[lane] = rows.place[h][q][__builtin_ctz(member | 1u << (Q - 1))];
    }
    return select(cost < INFINITY, load(place), F{});
}

// Compares rows of points (iq_types.h). Rounding keeps the order of sums, so that the least cost of a row is
// the sum of what its points share and the least of what they do not; and few sets of first quarters are
// in all rows.
template <class T>
INLINE void search_rows(const F (*quarter)[T::quarter], F* place, F* cost) {
    constexpr int Q = T::quarter;
    const Rows& rows = Known<T>::lattice.rows;
    F sets[1 << Q], high[Q * Q], at;
    sets[0] = splat(INFINITY);
    for (int i = 1; i < rows.count; ++i)
        sets[i] = vmin(by_offset(quarter[0], rows.last[i]), by_offset(sets, rows.rest[i]));
    sums<Q, Q>(quarter[2], quarter[3], high);
    scan_rows<Q>(rows, sets, quarter[1], high, &at, cost);
    *place = find_point<Q>(rows, sets, quarter, high, at, *cost);
}

// The first of the cheapest points, by lane, and its cost.
template <class T, class SHIFT>
INLINE void search_points(const F* wx, const F* w, F scale, SHIFT shift, F* place, F* cost) {
    F quarter[4][T::quarter];
    quarter_costs<T>(wx, w, scale, shift, quarter);
    if constexpr (T::dense) search_rows<T>(quarter, place, cost);
    else search_each<T>(quarter, place, cost);
}

inline int add_set(Rows& rows, int* known, int members) {
    if (!members || known[members]) return known[members];
    int last = 31 - __builtin_clz(unsigned(members)), rest = add_set(rows, known, members ^ 1 << last);
    rows.last[rows.count] = offset_of(last);
    rows.rest[rows.count] = offset_of(rest);
    return known[members] = rows.count++;
}

// Points come in order of their upper halves' numbers, then of their lower ones': the first of equals is
// that of the first row.
template <class T>
void fill_rows(Rows& rows, const uint16_t* low, const uint16_t* high, int count) {
    constexpr int Q = T::quarter;
    int known[1 << Q] = {};
    std::memset(&rows, 0, sizeof rows);
    for (int k = 0; k < count; ++k) {
        int h = high[k] / LANES, l = low[k] / LANES;
        rows.members[h][l / Q] |= uint16_t(1 << l % Q);
        rows.place[h][l / Q][l % Q] = uint16_t(k);
    }
    rows.count = 1;
    for (int h = 0; h < Q * Q; ++h)
        for (int q = 0; q < Q; ++q) rows.set[h][q] = offset_of(add_set(rows, known, rows.members[h][q]));
}

}  // namespace FEWBITS_ISA
