// A job spread over threads: the same result for any number of them. Throws std::invalid_argument if
// lengths do not match, before any buffer is accessed.
#pragma once

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"

namespace fewbits {

template <class WORK>
void parallel(int64_t jobs, int threads, WORK work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        for (int64_t job; (job = next.fetch_add(1)) < jobs;) work(job);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < std::min<int64_t>(threads, jobs); ++i) others.emplace_back(run);
    run();
    for (auto& t : others) t.join();
}

// TypeKernels::encode or ::measure over all units of a job, their errors added in order.
inline Error run(const TypeKernels& t, void (*work)(const Job&, int64_t, Error*), const Job& job,
                 int64_t bytes, int threads) {
    if (job.weights % t.block || bytes != job.weights / t.block * t.nbytes)
        throw std::invalid_argument(std::string(t.name) + ": lengths of weights and blocks do not fit");
    if (job.importance && (job.importances <= 0 || job.weights % job.importances))
        throw std::invalid_argument(std::string(t.name) + ": importances do not fit the weights");
    int64_t units = (job.weights + UNIT - 1) / UNIT;
    constexpr int64_t RUN = 16;  // units that a thread takes at once
    std::vector<Error> errors((units + RUN - 1) / RUN);
    parallel(int64_t(errors.size()), threads, [&](int64_t run) {
        for (int64_t u = run * RUN; u < std::min(units, (run + 1) * RUN); ++u) work(job, u, &errors[run]);
    });
    Error total{};
    for (const Error& e : errors) {
        total.squared += e.squared;
        total.energy += e.energy;
        total.largest = std::max(total.largest, e.largest);
        total.refused += e.refused;
    }
    return total;
}

inline void decode(const TypeKernels& t, const uint8_t* in, int64_t bytes, float* out, int64_t weights,
                   int threads) {
    if (weights % t.block || bytes != weights / t.block * t.nbytes)
        throw std::invalid_argument(std::string(t.name) + ": lengths of source and destination do not fit");
    int64_t blocks = weights / t.block, run = UNIT * 16 / t.block;
    parallel((blocks + run - 1) / run, threads, [&](int64_t i) {
        int64_t first = i * run, n = std::min(run, blocks - first);
        t.decode(in + first * t.nbytes, n, out + first * t.block);
    });
}

inline void quantize_columns(const Kernels& kernels, const Columns& columns, int threads) {
    parallel((columns.n + 15) / 16, threads, [&](int64_t tile) { kernels.quantize_columns(columns, tile); });
}

// levels f32, points u8 (count, dim), starts f32 (the plain one first).
inline void register_table(const TypeKernels& t, const float* levels, int n_levels, const uint8_t* points,
                           int count, int dim, const float* starts, int n_starts) {
    const Table& table = t.table;
    if (!table.set || n_levels != table.levels || dim != table.dim || count < 4 || count % 4 ||
        count > table.most_points || n_starts < 1 || n_starts > table.most_starts)
        throw std::invalid_argument(std::string(t.name) + ": these points are not of its lattice");
    for (int i = 0; i < count * dim; ++i)
        if (points[i] >= n_levels)
            throw std::invalid_argument(std::string(t.name) + ": a point has a level that is none");
    table.set(levels, points, count, starts, n_starts);
}

}  // namespace fewbits
