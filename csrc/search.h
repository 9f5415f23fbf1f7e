// The search of scales and offsets for sixteen groups at a time. Reference, equal to it bit for bit:
// fewbits/formats/search.py. Sums run from the first weight of a group to its last.
#pragma once

#include "lanes.h"

namespace FEWBITS_ISA {

constexpr int SCALE_CANDIDATES = 6, AFFINE_CANDIDATES = 9, BATCH = 3;
constexpr int SCALE_ROUNDS = 1, AFFINE_ROUNDS = 2;
constexpr double SYMMETRIC_MARGINS[SCALE_CANDIDATES] = {0.0, -0.6, 0.4, -1.5, -1.0, -0.3};
constexpr double COARSE_MARGINS[SCALE_CANDIDATES] = {0.4, 1.2, 1.8, 0.0, 0.8, 2.5};
constexpr double AFFINE_MARGINS[AFFINE_CANDIDATES] = {0.0, -1.8, -1.5, -1.2, -0.9, -0.6, -0.3, 0.3, 0.6};
constexpr double TABLE_MARGINS[SCALE_CANDIDATES] = {0.0, -0.12, -0.08, -0.04, 0.04, 0.08};

// Sixteen groups: weights, and importances if WEIGHTED.
template <int GROUP>
struct Tile {
    F x[GROUP];
    F w[GROUP];
};

// Levels of an evenly spaced grid; the first SCANNED candidates are tried, in a brief scan no others.
template <int LO, int HI, int SCANNED>
struct Even {
    static constexpr int scanned = SCANNED, rounds = SCANNED < SCALE_CANDIDATES ? 0 : SCALE_ROUNDS;
    static constexpr float last = LO == -HI ? HI : LO;
    static float candidate(int i) {
        double margin = HI <= 1 ? COARSE_MARGINS[i] : SYMMETRIC_MARGINS[i];
        return float(double(last) + (last > 0 ? margin : -margin));
    }
    static INLINE F level(F t) { return clamp(round_even(t), LO, HI); }
};

// Levels of a sorted table: start at the first, climb by each gap whose middle t has reached.
template <class TABLE>
struct Levels {
    static constexpr int scanned = SCALE_CANDIDATES, rounds = SCALE_ROUNDS;
    static constexpr float last = TABLE::levels[0];
    static float candidate(int i) { return float(double(last) * (1.0 + TABLE_MARGINS[i])); }
    static INLINE F level(F t) {
        F v = splat(TABLE::levels[0]);
        for (int i = 1; i < TABLE::size; ++i) {
            float middle = (TABLE::levels[i] + TABLE::levels[i - 1]) * 0.5f;
            v += select(t >= middle, splat(TABLE::levels[i] - TABLE::levels[i - 1]), F{});
        }
        return v;
    }
};

template <int GROUP>
INLINE F extreme(const F* x) {
    F top = x[0], bottom = x[0];
    for (int i = 1; i < GROUP; ++i) {
        top = vmax(x[i], top);
        bottom = vmin(x[i], bottom);
    }
    return select(top >= -bottom, top, bottom);
}

template <int GROUP, class GRID>
INLINE F edge_of(const F* x) {
    if (GRID::last < 0) return extreme<GROUP>(x);
    F top = x[0], bottom = x[0];
    for (int i = 1; i < GROUP; ++i) {
        top = vmax(x[i], top);
        bottom = vmin(x[i], bottom);
    }
    return vmax(bottom * -1.0f, top);
}

// Sums w x v and w v^2 of the codes that N inverse scales lead to.
template <int GROUP, bool WEIGHTED, class GRID, int N>
INLINE void moments(const Tile<GROUP>& t, const F* inv, F* cross, F* square) {
    for (int c = 0; c < N; ++c) cross[c] = square[c] = F{};
    for (int i = 0; i < GROUP; ++i) {
        for (int c = 0; c < N; ++c) {
            F v = GRID::level(t.x[i] * inv[c]);
            F wv = WEIGHTED ? t.w[i] * v : v;
            cross[c] += wv * t.x[i];
            square[c] += wv * v;
        }
    }
}

INLINE void keep_better(F cross, F square, F& scale, F& best) {
    F fitted = cross / square, score = cross * fitted;
    Mask better = (square > 0.0f) & (score > best);
    scale = select(better, fitted, scale);
    best = select(better, score, best);
}

template <int GROUP, bool WEIGHTED, class GRID>
INLINE F fit_scale(const Tile<GROUP>& t, bool search) {
    F edge = edge_of<GROUP, GRID>(t.x), scale = edge / GRID::last;
    if (!search) return scale;
    F best = {}, inverse_edge = inverse(edge), inv[BATCH], cross[BATCH], square[BATCH];
    for (int first = 0; first < GRID::scanned; first += BATCH) {
        for (int c = 0; c < BATCH; ++c) inv[c] = GRID::candidate(first + c) * inverse_edge;
        moments<GROUP, WEIGHTED, GRID, BATCH>(t, inv, cross, square);
        for (int c = 0; c < BATCH; ++c) keep_better(cross[c], square[c], scale, best);
    }
    for (int round = 0; round < GRID::rounds; ++round) {
        inv[0] = inverse(scale);
        moments<GROUP, WEIGHTED, GRID, 1>(t, inv, cross, square);
        keep_better(cross[0], square[0], scale, best);
    }
    return scale;
}

struct Affine {
    F scale, offset;
};

// The state of an affine scan: y = x - low, scale * q + shift, and the sums that no candidate changes.
struct AffineScan {
    F scale, shift, best, sw, swy, room;
    bool bounded;

    INLINE void keep_better(F swq, F swqq, F swyq) {
        F det = sw * swqq - swq * swq;
        F a = (sw * swyq - swy * swq) / det;
        F b = (swy - a * swq) / sw;
        if (bounded) {
            b = vmin(b, room);
            a = (swyq - b * swq) / swqq;
        }
        F score = 2.0f * (a * swyq + b * swy) - (a * (a * swqq + 2.0f * (b * swq)) + b * (b * sw));
        Mask better = (det > 0.0f) & (a > 0.0f) & (score > best);
        scale = select(better, a, scale);
        shift = select(better, b, shift);
        best = select(better, score, best);
    }
};

template <int GROUP, bool WEIGHTED, int TOP, int N>
INLINE void affine_moments(const Tile<GROUP>& t, F low, F start, const F* inv, AffineScan& scan) {
    F sq[N] = {}, sqq[N] = {}, syq[N] = {};
    for (int i = 0; i < GROUP; ++i) {
        F y = t.x[i] - low, wy = WEIGHTED ? t.w[i] * y : y;
        for (int c = 0; c < N; ++c) {
            F q = clamp(round_even((y - start) * inv[c]), 0, TOP);
            F wq = WEIGHTED ? t.w[i] * q : q;
            sq[c] += wq;
            sqq[c] += wq * q;
            syq[c] += wy * q;
        }
    }
    for (int c = 0; c < N; ++c) scan.keep_better(sq[c], sqq[c], syq[c]);
}

// scale * q + offset, q in [0, TOP]; bounded: offset <= 0.
template <int GROUP, bool WEIGHTED, int TOP>
INLINE Affine fit_affine(const Tile<GROUP>& t, bool search, bool bounded) {
    F low = t.x[0], high = t.x[0];
    for (int i = 1; i < GROUP; ++i) {
        low = vmin(t.x[i], low);
        high = vmax(t.x[i], high);
    }
    if (bounded) low = vmin(low, F{});
    F span = high - low;
    AffineScan scan = {span / float(TOP), F{}, F{}, F{}, F{}, 0.0f - low, bounded};
    if (search) {
        for (int i = 0; i < GROUP; ++i) {
            F w = WEIGHTED ? t.w[i] : splat(1.0f);
            scan.sw += w;
            scan.swy += w * (t.x[i] - low);
        }
        F inverse_span = inverse(span), inv[BATCH];
        for (int first = 0; first < AFFINE_CANDIDATES; first += BATCH) {
            for (int c = 0; c < BATCH; ++c)
                inv[c] = float(TOP + AFFINE_MARGINS[first + c]) * inverse_span;
            affine_moments<GROUP, WEIGHTED, TOP, BATCH>(t, low, F{}, inv, scan);
        }
        for (int round = 0; round < AFFINE_ROUNDS; ++round) {
            inv[0] = inverse(scan.scale);
            affine_moments<GROUP, WEIGHTED, TOP, 1>(t, low, scan.shift, inv, scan);
        }
    }
    F offset = scan.shift + low;
    if (bounded) offset = vmin(offset, F{});
    return {scan.scale, offset};
}

}  // namespace FEWBITS_ISA
