// Rounds the columns of a weight one after the other, for error feedback and coordinate descent: the error of
// column j changes every later column. Sixteen rows of the weight in parallel.
//
//     code  = nearest of the grid to state[j]            value = scale * (code - zero) + offset
//     move  = (state[j] - value) / pivot[j]              or value - old[j], without pivots
//     state[i] -= coupling[j, i] * move                  for i > j
//
// Reference: fewbits/algorithms/columns.py, equal to it bit for bit.
#pragma once

#include <memory>

#include "kernels.h"
#include "lanes.h"

namespace FEWBITS_ISA {

using fewbits::Columns;

INLINE F lanes_of(const float* row, int64_t first, int count) {
    if (count == LANES) return load(row + first);
    alignas(64) float part[LANES] = {};
    std::memcpy(part, row + first, count * sizeof(float));
    return load(part);
}

// One column of sixteen rows: the code, as a float, and its value.
INLINE void round_affine(const Columns& c, int64_t at, int count, F x, F* code, F* value) {
    F scale = lanes_of(c.scale, at, count), inverse = lanes_of(c.inverse, at, count);
    F zero = c.zeros ? lanes_of(c.zeros, at, count) : splat(c.zero);
    if (c.offset) {
        F offset = lanes_of(c.offset, at, count);
        *code = clamp(round_even((x - offset) * inverse) + zero, 0.0f, float(c.top));
        *value = scale * (*code - zero) + offset;
    } else {
        *code = clamp(round_even(x * inverse) + zero, 0.0f, float(c.top));
        *value = scale * (*code - zero);
    }
}

INLINE void round_table(const Columns& c, int64_t at, int count, F x, F* code, F* value) {
    F scale = lanes_of(c.scale, at, count), t = x * lanes_of(c.inverse, at, count);
    F level = splat(c.levels[0]);
    *code = splat(c.level_codes[0]);
    for (int i = 1; i < c.count; ++i) {
        Mask above = t >= c.boundaries[i - 1];
        level = select(above, splat(c.levels[i]), level);
        *code = select(above, splat(c.level_codes[i]), *code);
    }
    *value = scale * level;
}

void quantize_columns(const Columns& c, int64_t tile) {
    std::unique_ptr<F[]> state(new F[c.k]);
    int64_t first = tile * LANES;
    int count = int(c.n - first < LANES ? c.n - first : LANES);
    for (int64_t j = 0; j < c.k; ++j) state[j] = lanes_of(c.state + j * c.n, first, count);
    for (int64_t j = 0; j < c.k; ++j) {
        int64_t at = c.group[j] * c.n + first;
        F code, value, x = state[j];
        if (c.count) round_table(c, at, count, x, &code, &value);
        else round_affine(c, at, count, x, &code, &value);
        F move = c.pivot ? (x - value) / c.pivot[j] : value - lanes_of(c.old + j * c.n, first, count);
        const float* coupling = c.coupling + j * c.k;
        for (int64_t i = j + 1; i < c.k; ++i) state[i] = state[i] - coupling[i] * move;
        for (int lane = 0; lane < count; ++lane) {
            c.codes[j * c.n + first + lane] = uint8_t(code[lane]);
            c.values[j * c.n + first + lane] = value[lane];
            c.moves[j * c.n + first + lane] = move[lane];
        }
    }
}

}  // namespace FEWBITS_ISA
