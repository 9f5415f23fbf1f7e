// Encodes blocks of one type: fits sixteen groups at a time, codes their scales, rounds, packs.
// Reference: fit_values and below in fewbits/formats/ggml_fit.py.
#pragma once

#include "ggml_types.h"

namespace FEWBITS_ISA {

constexpr int RECODE_ROUNDS = 2;

// 2^(e - 128), denormal for the two smallest e.
inline float exponent_scale(int e) {
    uint32_t bits = e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// A one-level type gets the brief scan unless there are importances.
template <class T, bool WEIGHTED>
using EvenOf = Even<-T::zero, T::top - T::zero, T::two_level || WEIGHTED ? SCALE_CANDIDATES : BATCH>;

template <class T, bool WEIGHTED>
using GridOf = std::conditional_t<T::kind == Kind::table, Levels<Iq4>,
                                  std::conditional_t<T::kind == Kind::exponent, Levels<Mxfp4>,
                                                     EvenOf<T, WEIGHTED>>>;

// Group parameters of the blocks in a tile, by lane.
struct Groups {
    float group_scale[LANES], group_offset[LANES], scale[LANES], minimum[LANES];
};

inline float extreme_of(const float* x, int n) {
    float top = x[0], bottom = x[0];
    for (int i = 1; i < n; ++i) {
        top = x[i] > top ? x[i] : top;
        bottom = x[i] < bottom ? x[i] : bottom;
    }
    return top >= -bottom ? top : bottom;
}

template <class T, bool WEIGHTED>
void code_scales_symmetric(const Tile<T::group>& t, bool search, Groups& g, float* d) {
    constexpr int N = T::groups, BLOCKS = LANES / N;
    for (int b = 0; b < BLOCKS; ++b) {
        float *group_scale = g.group_scale + b * N, *scale = g.scale + b * N;
        d[b] = to_half(extreme_of(group_scale, N) / float(T::scale_lo));
        for (int j = 0; j < N; ++j)
            scale[j] = clamp(round_even(group_scale[j] * inverse(d[b])), T::scale_lo, T::scale_hi);
    }
    for (int round = 0; round < (search ? RECODE_ROUNDS : 0); ++round) {
        for (int i = 0; i < LANES; ++i) g.group_scale[i] = d[i / N] * g.scale[i];
        F inv = inverse(load(g.group_scale)), cross, square;
        moments<T::group, WEIGHTED, GridOf<T, WEIGHTED>, 1>(t, &inv, &cross, &square);
        for (int b = 0; b < BLOCKS; ++b) {
            float up = 0, down = 0;
            for (int j = 0; j < N; ++j) {
                int i = b * N + j;
                if (square[i] > 0)
                    g.scale[i] = clamp(round_even(cross[i] / square[i] * inverse(d[b])), T::scale_lo,
                                       T::scale_hi);
                up += g.scale[i] * cross[i];
                down += g.scale[i] * g.scale[i] * square[i];
            }
            if (down > 0) d[b] = to_half(up / down);
        }
    }
}

struct AffineMoments {
    F sqq, sq, sw, sxq, sx;
};

template <class T, bool WEIGHTED>
INLINE AffineMoments moments_of_codes(const Tile<T::group>& t, F group_scale, F drop) {
    AffineMoments s = {};
    F inv = inverse(group_scale);
    for (int i = 0; i < T::group; ++i) {
        F q = clamp(round_even((t.x[i] + drop) * inv), 0, T::top);
        F wq = WEIGHTED ? t.w[i] * q : q, wx = WEIGHTED ? t.w[i] * t.x[i] : t.x[i];
        s.sqq += wq * q;
        s.sq += wq;
        s.sw += WEIGHTED ? t.w[i] : splat(1.0f);
        s.sxq += wx * q;
        s.sx += wx;
    }
    return s;
}

inline void recode_affine(const AffineMoments& s, int i, float d, float dmin, float hi, Groups& g) {
    float sqq = s.sqq[i], sq = s.sq[i], sw = s.sw[i], sxq = s.sxq[i], sx = s.sx[i];
    float a = (sw * sxq - sx * sq) / (sw * sqq - sq * sq);
    float scale = clamp(round_even(a * inverse(d)), 0, hi), group_scale = d * scale;
    float minimum = clamp(round_even((group_scale * sq - sx) / sw * inverse(dmin)), 0, hi);
    auto error = [&](float st, float drop) {
        return st * (st * sqq - 2.0f * (drop * sq + sxq)) + drop * (drop * sw + 2.0f * sx);
    };
    if (error(group_scale, dmin * minimum) < error(d * g.scale[i], dmin * g.minimum[i])) {
        g.scale[i] = scale;
        g.minimum[i] = minimum;
    }
}

inline void refit_affine(const AffineMoments& s, int first, int n, const Groups& g, float& d, float& dmin) {
    float a = 0, b = 0, c = 0, p = 0, r = 0;
    for (int i = first; i < first + n; ++i) {
        float scale = g.scale[i], minimum = g.minimum[i];
        a += scale * scale * s.sqq[i];
        b += scale * minimum * s.sq[i];
        c += minimum * minimum * s.sw[i];
        p += scale * s.sxq[i];
        r += minimum * s.sx[i];
    }
    float det = a * c - b * b;
    bool both = det > 1e-6f * (a * c);
    float new_d = both ? (p * c - r * b) / det : (p + dmin * b) / a;
    float new_min = both ? (p * b - r * a) / det : dmin;
    if (a > 0 && new_d > 0 && new_min >= 0) {
        d = to_half(new_d);
        dmin = to_half(new_min);
    }
}

template <class T, bool WEIGHTED>
void code_scales_affine(const Tile<T::group>& t, bool search, Groups& g, float* d, float* dmin) {
    constexpr int N = T::groups, BLOCKS = LANES / N;
    for (int b = 0; b < BLOCKS; ++b) {
        float group_scale = g.group_scale[b * N], drop = -g.group_offset[b * N];
        for (int i = b * N; i < (b + 1) * N; ++i) {
            group_scale = g.group_scale[i] > group_scale ? g.group_scale[i] : group_scale;
            drop = -g.group_offset[i] > drop ? -g.group_offset[i] : drop;
        }
        d[b] = to_half(group_scale / float(T::scale_hi));
        dmin[b] = to_half(drop / float(T::scale_hi));
        for (int i = b * N; i < (b + 1) * N; ++i) {
            g.scale[i] = clamp(round_even(g.group_scale[i] * inverse(d[b])), 0, T::scale_hi);
            g.minimum[i] = clamp(round_even(-g.group_offset[i] * inverse(dmin[b])), 0, T::scale_hi);
        }
    }
    for (int round = 0; round < (search ? RECODE_ROUNDS : 0); ++round) {
        for (int i = 0; i < LANES; ++i) {
            g.group_scale[i] = d[i / N] * g.scale[i];
            g.group_offset[i] = dmin[i / N] * g.minimum[i];
        }
        AffineMoments s = moments_of_codes<T, WEIGHTED>(t, load(g.group_scale), load(g.group_offset));
        for (int i = 0; i < LANES; ++i) recode_affine(s, i, d[i / N], dmin[i / N], T::scale_hi, g);
        for (int b = 0; b < BLOCKS; ++b) refit_affine(s, b * N, N, g, d[b], dmin[b]);
    }
}

// floor(log2(amax)) - 2 as in the MX specification, or a better neighbour.
template <class T, bool WEIGHTED>
void fit_exponent(const Tile<T::group>& t, bool search, uint8_t* exponent) {
    F best = splat(-INFINITY), amax = {};
    for (int i = 0; i < T::group; ++i) amax = vmax(vmax(t.x[i], -t.x[i]), amax);
    int spec[LANES];
    for (int i = 0; i < LANES; ++i) {
        int e = 0;
        std::frexp(amax[i], &e);
        spec[i] = amax[i] > 0 ? std::min(std::max(e - 1 - 2 + 127, 0), 254) : 0;
    }
    for (int change : {0, 1, -1}) {
        float group_scale[LANES];
        int e[LANES];
        for (int i = 0; i < LANES; ++i) {
            e[i] = std::min(std::max(spec[i] + change, 0), 254);
            group_scale[i] = exponent_scale(e[i]);
        }
        F s = load(group_scale), inv = inverse(s), cross, square;
        moments<T::group, WEIGHTED, GridOf<T, WEIGHTED>, 1>(t, &inv, &cross, &square);
        F score = s * (2.0f * cross - s * square);
        for (int i = 0; i < LANES; ++i)
            if (score[i] > best[i]) exponent[i] = uint8_t(e[i]);
        best = vmax(score, best);
        if (!search) break;
    }
}

// Up to here codes are small integers stored as floats.
INLINE void store_bytes(F q, uint8_t* out) {
    typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
    for (int p = 0; p < PARTS; ++p) {
        Bytes b = __builtin_convertvector(__builtin_convertvector(q.part[p], NativeMask), Bytes);
        std::memcpy(out + p * WIDTH, &b, WIDTH);
    }
}

// The final codes of one group; inv is the inverse of its scale.
template <class T>
INLINE void round_group(const float* __restrict x, float inv, float group_offset, uint8_t* __restrict code) {
    for (int i = 0; i < T::group; i += LANES) {
        F t = load(x + i), q;
        if constexpr (T::kind == Kind::table || T::kind == Kind::exponent) {
            using TABLE = std::conditional_t<T::kind == Kind::table, Iq4, Mxfp4>;
            t = t * inv;
            q = splat(TABLE::codes[0]);
            for (int l = 1; l < TABLE::size; ++l) {
                float middle = (TABLE::levels[l] + TABLE::levels[l - 1]) * 0.5f;
                q = select(t >= middle, splat(TABLE::codes[l]), q);
            }
        } else {
            t = T::kind == Kind::affine ? (t - group_offset) * inv : t * inv;
            q = clamp(round_even(t) + float(T::zero), 0, T::top);
        }
        store_bytes(q, code + i);
    }
}

// The parameters of a tile's groups as decoding computes them: scale and offset.
template <class T>
INLINE void decoded_parameters(Groups& g, const float* d, const float* dmin, const uint8_t* exponent) {
    constexpr int N = T::groups;
    for (int i = 0; i < LANES; ++i) {
        if (T::kind == Kind::exponent) g.group_scale[i] = exponent_scale(exponent[i]);
        if (T::two_level) g.group_scale[i] = d[i / N] * g.scale[i];
        if (T::two_level && T::kind == Kind::affine) g.group_offset[i] = -(dmin[i / N] * g.minimum[i]);
    }
}

// LANES groups of x (already f32) -> blocks.
template <class T, bool WEIGHTED>
void encode_tile(const float* x, const float* w, bool search, int blocks, uint8_t* out) {
    constexpr int N = T::groups;
    Tile<T::group> t;
    transpose<T::group>(x, t.x);
    if (WEIGHTED) transpose<T::group>(w, t.w);
    Groups g = {};
    float d[LANES] = {}, dmin[LANES] = {}, inv[LANES];
    uint8_t exponent[LANES] = {};
    if constexpr (T::kind == Kind::exponent) {
        fit_exponent<T, WEIGHTED>(t, search, exponent);
    } else if constexpr (T::kind == Kind::affine) {
        Affine fit = fit_affine<T::group, WEIGHTED, T::top>(t, search, T::two_level);
        store(g.group_scale, T::two_level ? fit.scale : to_half(fit.scale));
        store(g.group_offset, T::two_level ? fit.offset : to_half(fit.offset));
        if constexpr (T::two_level) code_scales_affine<T, WEIGHTED>(t, search, g, d, dmin);
    } else {
        F group_scale = fit_scale<T::group, WEIGHTED, GridOf<T, WEIGHTED>>(t, search);
        store(g.group_scale, T::two_level ? group_scale : to_half(group_scale));
        if constexpr (T::two_level) code_scales_symmetric<T, WEIGHTED>(t, search, g, d);
    }
    decoded_parameters<T>(g, d, dmin, exponent);
    store(inv, inverse(load(g.group_scale)));
    Block b;
    for (int at = 0; at < blocks; ++at) {
        b.exponent[0] = exponent[at];
        b.d = T::two_level ? d[at] : g.group_scale[at];
        b.m = g.group_offset[at];
        b.dmin = dmin[at];
        for (int j = 0; j < N; ++j) {
            int i = at * N + j;
            if (T::two_level) b.scale[j] = uint8_t(int(g.scale[i]) - T::scale_lo);
            if (T::two_level && T::kind == Kind::affine) b.minimum[j] = uint8_t(g.minimum[i]);
            round_group<T>(x + i * T::group, inv[i], g.group_offset[i], b.code + j * T::group);
        }
        T::pack(b, out + at * T::nbytes());
    }
}

template <class T>
void decode_blocks(const uint8_t* in, int64_t blocks, float* out) {
    Block b;
    for (int64_t at = 0; at < blocks; ++at) {
        T::unpack(in + at * T::nbytes(), b);
        for (int j = 0; j < T::groups; ++j) {
            float group_scale = b.d, group_offset = T::kind == Kind::affine ? b.m : 0;
            if constexpr (T::kind == Kind::exponent) group_scale = exponent_scale(b.exponent[0]);
            if constexpr (T::two_level) {
                group_scale = b.d * float(b.scale[j] + T::scale_lo);
                if (T::kind == Kind::affine) group_offset = -(b.dmin * float(b.minimum[j]));
            }
            const uint8_t* code = b.code + j * T::group;
            float* value = out + at * T::block + j * T::group;
            if constexpr (T::kind == Kind::table || T::kind == Kind::exponent) {
                using TABLE = std::conditional_t<T::kind == Kind::table, Iq4, Mxfp4>;
                static const auto by_code = [] {
                    std::array<float, 16> a{};
                    for (int l = 0; l < TABLE::size; ++l) a[TABLE::codes[l]] = TABLE::levels[l];
                    return a;
                }();
                for (int i = 0; i < T::group; ++i) value[i] = group_scale * by_code[code[i]];
            } else if constexpr (T::kind == Kind::affine) {
                for (int i = 0; i < T::group; ++i) value[i] = group_scale * float(code[i]) + group_offset;
            } else {
                for (int i = 0; i < T::group; ++i) value[i] = group_scale * (float(code[i]) - float(T::zero));
            }
        }
    }
}

}  // namespace FEWBITS_ISA
