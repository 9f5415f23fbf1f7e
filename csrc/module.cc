// fewbits._core: the kernels behind plain pointers, spread over threads. Buffers belong to the caller
// (fewbits/core.py), which knows their lengths; every length is checked again here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace nb = nanobind;
using namespace fewbits;

namespace {

const Kernels& kernels() {
    static const Kernels& chosen = select(std::getenv("FEWBITS_ISA"));
    return chosen;
}

const TypeKernels& type(const std::string& name) {
    const TypeKernels* found = find(kernels(), name.c_str());
    if (!found) throw std::invalid_argument("the core has no type " + name);
    return *found;
}

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

using Work = void (*)(const Job&, int64_t, Error*);

// All units of a job, their errors added in order whatever the number of threads.
Error run(const TypeKernels& t, Work work, const Job& job, int64_t bytes, int threads) {
    if (job.weights % t.block || bytes != job.weights / t.block * t.nbytes)
        throw std::invalid_argument(std::string(t.name) + ": lengths of weights and blocks do not fit");
    if (job.importance && (job.importances <= 0 || job.weights % job.importances))
        throw std::invalid_argument(std::string(t.name) + ": importances do not fit the weights");
    int64_t units = (job.weights + UNIT - 1) / UNIT;
    constexpr int64_t RUN = 16;  // units that a thread takes at once
    std::vector<Error> errors((units + RUN - 1) / RUN);
    {
        nb::gil_scoped_release release;
        parallel(int64_t(errors.size()), threads, [&](int64_t run) {
            for (int64_t u = run * RUN; u < std::min(units, (run + 1) * RUN); ++u)
                work(job, u, &errors[run]);
        });
    }
    Error total{};
    for (const Error& e : errors) {
        total.squared += e.squared;
        total.energy += e.energy;
        total.largest = std::max(total.largest, e.largest);
        total.refused += e.refused;
    }
    return total;
}

// -> the number of units refused, since a weight is NaN, infinite or huge.
int64_t encode(const std::string& name, uintptr_t src, int dtype, int64_t weights, uintptr_t importance,
               int64_t importances, bool search, uintptr_t blocks, int64_t bytes, int threads) {
    const TypeKernels& t = type(name);
    Job job{reinterpret_cast<const void*>(src), dtype, weights, reinterpret_cast<const float*>(importance),
            importances, search, reinterpret_cast<uint8_t*>(blocks)};
    return run(t, t.encode, job, bytes, threads).refused;
}

// -> (sum of squared errors, sum of squares, largest error)
std::tuple<double, double, double> measure(const std::string& name, uintptr_t src, int dtype,
                                           int64_t weights, uintptr_t blocks, int64_t bytes, int threads) {
    const TypeKernels& t = type(name);
    Job job{reinterpret_cast<const void*>(src), dtype, weights, nullptr, 0, false,
            reinterpret_cast<uint8_t*>(blocks)};
    Error e = run(t, t.measure, job, bytes, threads);
    return {e.squared, e.energy, e.largest};
}

void decode(const std::string& name, uintptr_t src, int64_t src_bytes, uintptr_t dst, int64_t weights,
            int threads) {
    const TypeKernels& t = type(name);
    if (weights % t.block || src_bytes != weights / t.block * t.nbytes)
        throw std::invalid_argument(name + ": lengths of source and destination do not fit");
    int64_t blocks = weights / t.block, run = UNIT * 16 / t.block;
    const uint8_t* in = reinterpret_cast<const uint8_t*>(src);
    float* out = reinterpret_cast<float*>(dst);
    nb::gil_scoped_release release;
    parallel((blocks + run - 1) / run, threads, [&](int64_t i) {
        int64_t first = i * run, n = std::min(run, blocks - first);
        t.decode(in + first * t.nbytes, n, out + first * t.block);
    });
}

// levels f32, points u8 (count, dim), starts f32 (the plain one first): of a type of lattice points.
void teach(const std::string& name, std::tuple<uintptr_t, int> levels, std::tuple<uintptr_t, int, int> points,
           std::tuple<uintptr_t, int> starts) {
    const Teach& t = type(name).teach;
    auto [values, n_levels] = levels;
    auto [digits, count, dim] = points;
    auto [steps, n_starts] = starts;
    if (!t.teach || n_levels != t.levels || dim != t.dim || count < 4 || count % 4 || count > t.most_points || n_starts < 1 ||
        n_starts > t.most_starts)
        throw std::invalid_argument(name + ": these points are not of its lattice");
    const uint8_t* digit = reinterpret_cast<const uint8_t*>(digits);
    for (int i = 0; i < count * dim; ++i)
        if (digit[i] >= n_levels) throw std::invalid_argument(name + ": a point has a level that is none");
    t.teach(reinterpret_cast<const float*>(values), digit, count, reinterpret_cast<const float*>(steps),
            n_starts);
}

template <class T>
const T* at(uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

// Addresses by name; 0 for what is absent. fewbits/core.py has checked every shape.
void walk(std::tuple<int64_t, int64_t, int64_t> sizes,
          std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t> given,
          std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, float, int> affine,
          std::tuple<int, uintptr_t, uintptr_t, uintptr_t> table,
          std::tuple<uintptr_t, uintptr_t, uintptr_t> out, int threads) {
    auto [k, n, stride] = sizes;
    auto [state, coupling, pivot, old, group] = given;
    auto [step, inverse, base, zeros, zero, top] = affine;
    auto [count, boundaries, levels, level_codes] = table;
    auto [codes, values, moves] = out;
    Walk job{k, n, at<float>(state), at<float>(coupling), stride, at<float>(pivot), at<float>(old),
             at<int64_t>(group), at<float>(step), at<float>(inverse), at<float>(base), at<float>(zeros),
             zero, top, count, at<float>(boundaries), at<float>(levels), at<float>(level_codes),
             reinterpret_cast<uint8_t*>(codes), reinterpret_cast<float*>(values),
             reinterpret_cast<float*>(moves)};
    nb::gil_scoped_release release;
    parallel((n + 15) / 16, threads, [&](int64_t tile) { kernels().walk(job, tile); });
}

}  // namespace

NB_MODULE(_core, m) {
    m.def("isa", [] { return std::string(kernels().isa); });
    m.def("encode", &encode);
    m.def("measure", &measure);
    m.def("decode", &decode);
    m.def("teach", &teach);
    m.def("walk", &walk);
}
