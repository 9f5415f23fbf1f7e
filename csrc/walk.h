// The walk over the columns of a weight that error feedback and coordinate descent share: round column
// j, and let the rounding move every later column. Sixteen rows of the weight side by side.
//
//     code  = nearest of the grid to state[j]            value = step * (code - zero) + base
//     move  = (state[j] - value) / pivot[j]              or value - old[j], where there are no pivots
//     state[i] -= coupling[j, i] * move                  for i > j
//
// Twin: fewbits/algorithms/walk.py, equal to it bit for bit.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace FEWBITS_ISA {

using fewbits::Walk;

constexpr int WALK_LEVELS = 16;

INLINE F lanes_of(const float* row, int64_t first, int count) {
    if (count == LANES) return load(row + first);
    alignas(64) float part[LANES] = {};
    std::memcpy(part, row + first, count * sizeof(float));
    return load(part);
}

// One column of sixteen rows: the code, as a float, and its value.
INLINE void settle_affine(const Walk& w, int64_t at, int count, F x, F* code, F* value) {
    F step = lanes_of(w.step, at, count), inverse = lanes_of(w.inverse, at, count);
    F zero = w.zeros ? lanes_of(w.zeros, at, count) : splat(w.zero);
    if (w.base) {
        F base = lanes_of(w.base, at, count);
        *code = clamp(round_even((x - base) * inverse) + zero, 0.0f, float(w.top));
        *value = step * (*code - zero) + base;
    } else {
        *code = clamp(round_even(x * inverse) + zero, 0.0f, float(w.top));
        *value = step * (*code - zero);
    }
}

INLINE void settle_table(const Walk& w, int64_t at, int count, F x, F* code, F* value) {
    F step = lanes_of(w.step, at, count), t = x * lanes_of(w.inverse, at, count);
    F level = splat(w.levels[0]);
    *code = splat(w.level_codes[0]);
    for (int i = 1; i < w.count; ++i) {
        Mask above = t >= w.boundaries[i - 1];
        level = select(above, splat(w.levels[i]), level);
        *code = select(above, splat(w.level_codes[i]), *code);
    }
    *value = step * level;
}

void walk(const Walk& w, int64_t tile) {
    thread_local F* state = nullptr;
    thread_local int64_t room = 0;
    if (room < w.k) {
        delete[] state;
        state = new F[room = w.k];
    }
    int64_t first = tile * LANES;
    int count = int(w.n - first < LANES ? w.n - first : LANES);
    for (int64_t j = 0; j < w.k; ++j) state[j] = lanes_of(w.state + j * w.n, first, count);
    for (int64_t j = 0; j < w.k; ++j) {
        int64_t at = w.group[j] * w.n + first;
        F code, value, x = state[j];
        if (w.count) settle_table(w, at, count, x, &code, &value);
        else settle_affine(w, at, count, x, &code, &value);
        F move = w.pivot ? (x - value) / w.pivot[j] : value - lanes_of(w.old + j * w.n, first, count);
        const float* coupling = w.coupling + j * w.stride;
        for (int64_t i = j + 1; i < w.k; ++i) state[i] = state[i] - coupling[i] * move;
        for (int lane = 0; lane < count; ++lane) {
            w.codes[j * w.n + first + lane] = uint8_t(code[lane]);
            w.values[j * w.n + first + lane] = value[lane];
            w.moves[j * w.n + first + lane] = move[lane];
        }
    }
}

}  // namespace FEWBITS_ISA
