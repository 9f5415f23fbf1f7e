// Encodes IQ blocks, sixteen groups at a time. Reference: fewbits/formats/iq_fit.py.
#pragma once

#include "iq_search.h"

namespace FEWBITS_ISA {

constexpr int IQ_ROUNDS = 2;
constexpr float IQ_DELTA = 0.125f;

// Sixteen groups: weights without their signs, importances, their products; sign masks of vectors.
template <class T>
struct IqTile {
    F x[T::group], w[T::group], wx[T::group];
    uint8_t sign[T::group / 8][LANES];
};

// The best points under a scale: by lane their places, levels and shifts.
template <class T>
struct IqPoints {
    float place[T::group / T::dim][LANES], shift[T::group / 8][LANES];
    F level[T::group], cross, square;
};

template <class T>
void take_signs(IqTile<T>& t) {
    for (int v = 0; v < T::group; v += 8) {
        F minus[8], parity = splat(1.0f), least = splat(INFINITY), at = {};
        for (int i = 0; i < 8; ++i) {
            F& x = t.x[v + i];
            Mask negative = x < 0.0f;
            minus[i] = select(negative, splat(1.0f), F{});
            x = select(negative, -x, x);
            if (T::signs != Signs::even) continue;
            F cost = t.w[v + i] * x;
            parity = parity * (1.0f - 2.0f * minus[i]);
            at = select(cost < least, splat(float(i)), at);
            least = vmin(cost, least);
        }
        F mask = {};
        for (int i = 0; i < 8; ++i) {
            if (T::signs == Signs::even) {
                Mask flip = (at >= float(i)) & (at <= float(i)) & (parity < 0.0f);
                t.x[v + i] = select(flip, -t.x[v + i], t.x[v + i]);
                minus[i] = select(flip, 1.0f - minus[i], minus[i]);
            }
            mask += minus[i] * float(1 << i);
        }
        for (int lane = 0; lane < LANES; ++lane) t.sign[v / 8][lane] = uint8_t(mask[lane]);
    }
}

// -1/8 or 1/8 of the vector, by lane.
template <class T>
INLINE F lift(const IqPoints<T>& f, int vector) { return (1.0f - 2.0f * load(f.shift[vector])) * IQ_DELTA; }

template <class T>
void points_of_shifts(const IqTile<T>& t, F scale, IqPoints<T>& f) {
    constexpr int EACH = T::shift / 8;
    F place[2][EACH], cost[2][EACH];
    for (int first = 0; first < T::group / 8; first += EACH) {
        F total[2] = {};
        for (int s = 0; s < 2; ++s) {
            for (int j = 0; j < EACH; ++j) {
                int v = (first + j) * 8;
                search_points<T>(t.wx + v, t.w + v, scale, s ? -IQ_DELTA : IQ_DELTA, &place[s][j],
                                 &cost[s][j]);
                total[s] = j ? total[s] + cost[s][j] : cost[s][j];
            }
        }
        Mask lower = total[1] < total[0];
        for (int j = 0; j < EACH; ++j) {
            store(f.place[first + j], select(lower, place[1][j], place[0][j]));
            store(f.shift[first + j], select(lower, splat(1.0f), F{}));
        }
    }
}

// The points under a scale; and the shifts, unless the earlier ones are kept.
template <class T>
void points_of(const IqTile<T>& t, F scale, IqPoints<T>& f, bool shifts) {
    if (T::shift != 0 && shifts) {
        if constexpr (T::shift != 0) points_of_shifts<T>(t, scale, f);
    } else {
        for (int v = 0; v < T::group; v += T::dim) {
            F place, cost;
            if constexpr (T::shift != 0)
                search_points<T>(t.wx + v, t.w + v, scale, lift(f, v / 8), &place, &cost);
            else
                search_points<T>(t.wx + v, t.w + v, scale, 0.0f, &place, &cost);
            store(f.place[v / T::dim], place);
        }
    }
    for (int v = 0; v < T::group; v += LANES) {
        float rows[LANES][LANES];
        for (int i = 0; i < LANES; i += T::dim)
            for (int lane = 0; lane < LANES; ++lane)
                std::memcpy(&rows[lane][i], Known<T>::lattice.value[int(f.place[(v + i) / T::dim][lane])],
                            T::dim * sizeof(float));
        transpose<LANES>(rows[0], f.level + v);
    }
    f.cross = f.square = F{};
    for (int i = 0; i < T::group; ++i) {
        F level = f.level[i];
        if constexpr (T::shift != 0) level = level + lift(f, i / 8);
        F cross = t.wx[i] * level, square = t.w[i] * level * level;
        f.cross = i ? f.cross + cross : cross;
        f.square = i ? f.square + square : square;
    }
}

template <class T>
F fit_scales(const IqTile<T>& t, bool search, IqPoints<T>& f) {
    F edge = vmax(t.x[0], -t.x[0]);
    for (int i = 1; i < T::group; ++i) edge = vmax(vmax(t.x[i], -t.x[i]), edge);
    F scale = edge / splat(Known<T>::last), best = {};
    for (int c = 0; search && c < Known<T>::count; ++c) {
        points_of<T>(t, edge * Known<T>::starts[c], f, c == 0);
        F fitted = f.cross / f.square, score = f.cross * fitted;
        Mask better = (f.cross > 0.0f) & (score > best);
        scale = select(better, fitted, scale);
        best = select(better, score, best);
    }
    return scale;
}

inline float nearest_odd(float scale, float unit, int hi) {
    float half = round_even((scale * inverse(unit) - 1.0f) * 0.5f);
    return clamp(half, 0.0f, float((hi - 1) / 2)) * 2.0f + 1.0f;
}

// Scales by lane -> d of each block and the odd integer of each group.
template <class T>
void code_scales(const IqTile<T>& t, F fitted, bool search, IqPoints<T>& f, float* d, float* odd) {
    constexpr int N = T::groups, BLOCKS = LANES / N, HI = T::scale_hi;
    for (int b = 0; b < BLOCKS; ++b) {
        float most = fitted[b * N];
        for (int i = b * N; i < (b + 1) * N; ++i) most = fitted[i] > most ? fitted[i] : most;
        d[b] = to_half(most / (float(HI) * T::unit));
        for (int i = b * N; i < (b + 1) * N; ++i) odd[i] = nearest_odd(fitted[i], d[b] * T::unit, HI);
    }
    for (int round = 0; round < (search ? IQ_ROUNDS : 0); ++round) {
        float scale[LANES];
        for (int i = 0; i < LANES; ++i) scale[i] = d[i / N] * T::unit * odd[i];
        points_of<T>(t, load(scale), f, round == 0);
        for (int b = 0; b < BLOCKS; ++b) {
            float up = 0, down = 0;
            for (int i = b * N; i < (b + 1) * N; ++i) {
                float cross = f.cross[i], square = f.square[i];
                if (square > 0) odd[i] = nearest_odd(cross / square, d[b] * T::unit, HI);
                up += odd[i] * cross;
                down += odd[i] * odd[i] * square;
            }
            if (up > 0 && down > 0) d[b] = to_half(up / down / T::unit);
        }
    }
}

template <class T>
void fill_block(const IqTile<T>& t, const IqPoints<T>& f, const float* odd, int at, IqBlock& b) {
    for (int j = 0; j < T::groups; ++j) {
        int lane = at * T::groups + j;
        b.scale[j] = uint8_t((int(odd[lane]) - 1) / 2);
        for (int v = 0; v < T::group / T::dim; ++v)
            b.index[j * (T::group / T::dim) + v] = uint16_t(f.place[v][lane]);
        for (int v = 0; v < T::group / 8; ++v) {
            if (T::signs != Signs::none) b.sign[j * (T::group / 8) + v] = t.sign[v][lane];
            if constexpr (T::shift != 0)
                b.shift[(j * T::group + v * 8) / T::shift] = uint8_t(f.shift[v][lane]);
        }
    }
}

// LANES groups of x -> blocks. w: importances, or null if all are equal.
template <class T>
void encode_lattice(const float* x, const float* w, bool search, int blocks, uint8_t* out) {
    IqTile<T> t;
    IqPoints<T> f;
    transpose<T::group>(x, t.x);
    if (w) transpose<T::group>(w, t.w);
    else for (int i = 0; i < T::group; ++i) t.w[i] = splat(1.0f);
    if constexpr (T::signs != Signs::none) take_signs<T>(t);
    for (int i = 0; i < T::group; ++i) t.wx[i] = t.w[i] * t.x[i];
    float d[LANES] = {}, odd[LANES], scale[LANES];
    code_scales<T>(t, fit_scales<T>(t, search, f), search, f, d, odd);
    for (int i = 0; i < LANES; ++i) scale[i] = d[i / T::groups] * T::unit * odd[i];
    points_of<T>(t, load(scale), f, !search);
    for (int at = 0; at < blocks; ++at) {
        IqBlock b = {};
        b.d = d[at];
        uint16_t h = half_bits(b.d);
        for (int i = 0; i < 4; ++i) b.nibble[i] = (h >> (4 * i)) & 15;
        fill_block<T>(t, f, odd, at, b);
        T::pack(b, out + at * T::nbytes());
    }
}

template <class T>
void decode_lattice(const uint8_t* in, int64_t blocks, float* out) {
    IqBlock b;
    const Lattice& known = Known<T>::lattice;
    for (int64_t at = 0; at < blocks; ++at, out += T::block) {
        T::unpack(in + at * T::nbytes(), b);
        uint16_t h = 0;
        for (int i = 0; i < 4; ++i) h |= uint16_t(b.nibble[i] << (4 * i));
        float d = T::nibbles ? half_value(h) : b.d;
        for (int i = 0; i < T::block; i += 8) {
            float scale = d * T::unit * float(2 * b.scale[i / T::group] + 1), level[8];
            for (int j = 0; j < 8; j += T::dim)
                std::memcpy(level + j, known.value[b.index[(i + j) / T::dim]], T::dim * sizeof(float));
            int sign = b.sign[i / 8];
            if (T::signs == Signs::even) sign = (sign & 127) | (__builtin_parity(sign & 127) << 7);
            float lift = 0;
            if constexpr (T::shift != 0) lift = b.shift[i / T::shift] ? -IQ_DELTA : IQ_DELTA;
            for (int j = 0; j < 8; ++j) {
                float signed_level = (sign >> j) & 1 ? -level[j] : level[j];
                out[i + j] = scale * (T::shift != 0 ? level[j] + lift : signed_level);
            }
        }
    }
}

// points: indices of levels. starts: the level of the plain fit, then the shares of the largest weight.
template <class T>
void set_table(const float* levels, const uint8_t* points, int count, const float* starts, int n_starts) {
    Lattice& l = Known<T>::lattice;
    std::memcpy(l.level, levels, T::levels * sizeof(float));
    for (int k = 0; k < count; ++k) {
        int half[2] = {};
        for (int i = T::dim - 1; i >= 0; --i) {
            int digit = points[k * T::dim + i], side = i >= T::dim / 2;
            half[side] = half[side] * T::levels + digit;
            l.value[k][i] = levels[digit];
        }
        l.low[k] = uint16_t(half[0] * LANES);
        l.high[k] = uint16_t(half[1] * LANES);
    }
    l.count = count;
    fill_rows<T>(l.rows, l.low, l.high, count);
    Known<T>::last = starts[0];
    Known<T>::count = n_starts - 1;
    std::memcpy(Known<T>::starts, starts + 1, (n_starts - 1) * sizeof(float));
}

}  // namespace FEWBITS_ISA
