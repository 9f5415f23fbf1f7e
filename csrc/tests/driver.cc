// Every kernel of the core over weights of odd shapes and hard values, without Python. Under sanitizers it
// finds memory errors and undefined behaviour. It prints one digest per case, which is the same for every
// compiler, processor, instruction set and number of threads.
//
//     driver THREADS [ISA]        the best instruction set of this processor, or at most ISA
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "run.h"

using namespace fewbits;

namespace {

// Plain arithmetic only: <random> and the functions of <cmath> differ from library to library.
struct Random {
    uint64_t state;
    uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 33);
    }
    float uniform() { return float(next() >> 7) / float(1 << 24); }
    float bell() {
        float sum = 0;
        for (int i = 0; i < 4; ++i) sum += uniform() - 0.5f;
        return sum;
    }
};

uint64_t digest(const void* data, size_t bytes, uint64_t hash = 14695981039346656037u) {
    const uint8_t* at = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < bytes; ++i) hash = (hash ^ at[i]) * 1099511628211u;
    return hash;
}

template <class T>
uint64_t digest(const std::vector<T>& v, uint64_t hash = 14695981039346656037u) {
    return digest(v.data(), v.size() * sizeof(T), hash);
}

enum Values { BELL, ZERO, EQUAL, POSITIVE, SPARSE, HUGE_VALUES, TINY, SPREAD, KINDS };

std::vector<float> weights(int kind, int64_t count) {
    Random random{uint64_t(kind) + 1};
    std::vector<float> w(count);
    for (float& x : w) {
        float bell = random.bell();
        switch (kind) {
            case BELL: x = 0.02f * bell; break;
            case ZERO: x = 0; break;
            case EQUAL: x = -0.3f; break;
            case POSITIVE: x = 3 + std::fabs(bell); break;
            case SPARSE: x = bell > 0.7f ? 5.0f : 0.0f; break;
            case HUGE_VALUES: x = 1e12f * bell; break;
            case TINY: x = 1e-40f * bell; break;
            default: x = std::ldexp(bell, int(random.next() % 12) - 6);
        }
    }
    return w;
}

// The first `count` points, evenly chosen, of a lattice in the order that the search expects.
void register_points(const TypeKernels& t) {
    if (!t.table.set) return;
    constexpr int COUNT = 512;
    int64_t every = 1;
    for (int i = 0; i < t.table.dim; ++i) every *= t.table.levels;
    std::vector<uint8_t> points;
    for (int64_t k = 0; k < COUNT; ++k) {
        int64_t number = k * every / COUNT;
        for (int i = 0; i < t.table.dim; ++i, number /= t.table.levels)
            points.push_back(uint8_t(number % t.table.levels));
    }
    std::vector<float> levels;
    for (int i = 0; i < t.table.levels; ++i) levels.push_back(float(2 * i + 1));
    const float starts[] = {levels.back(), 1 / levels.back(), 0.8f / levels.back()};
    register_table(t, levels.data(), t.table.levels, points.data(), COUNT, t.table.dim, starts, 3);
}

void use_type(const TypeKernels& t, int kind, int64_t n, int64_t k, int threads) {
    std::vector<float> w = weights(kind, n * k), decoded(w.size());
    std::vector<uint16_t> upper(w.size());
    for (size_t i = 0; i < w.size(); ++i) upper[i] = uint16_t(w[i] == 0 ? 0 : (i % 2) << 15 | (0x3400 + i * 37 % 2000));
    Random random{7};
    std::vector<float> importance(k);
    for (float& x : importance) x = random.uniform() < 0.3f ? 0.0f : random.uniform();
    std::vector<uint8_t> blocks(w.size() / t.block * t.nbytes);
    for (int how = 0; how < 6; ++how) {  // dtypes, and with and without importances and search
        const void* src = how < 3 ? static_cast<const void*>(w.data()) : upper.data();
        Dtype dtype = how < 3 ? F32 : how < 5 ? F16 : BF16;
        Job job{src, dtype, int64_t(w.size()), how % 2 ? importance.data() : nullptr, k, how != 2, blocks.data()};
        Error encoded = run(t, t.encode, job, int64_t(blocks.size()), threads);
        decode(t, blocks.data(), int64_t(blocks.size()), decoded.data(), job.weights, threads);
        Error e = run(t, t.measure, job, int64_t(blocks.size()), threads);
        double lost[] = {e.squared, e.energy, e.largest, double(encoded.refused)};
        std::printf("%s %d %lldx%lld %d %016llx\n", t.name, kind, (long long)n, (long long)k, how,
                    (unsigned long long)digest(lost, sizeof lost, digest(decoded, digest(blocks))));
    }
}

// The result for a weight that is NaN or infinite, in the last and shorter unit of work.
void refuse(const TypeKernels& t, int threads) {
    int64_t count = UNIT + 3 * t.block;
    std::vector<float> w(count, 1.0f);
    std::vector<uint8_t> blocks(count / t.block * t.nbytes);
    w[count - 1] = INFINITY;
    Job job{w.data(), F32, count, nullptr, 0, true, blocks.data()};
    int64_t refused = run(t, t.encode, job, int64_t(blocks.size()), threads).refused;
    std::printf("%s refused %lld\n", t.name, (long long)refused);
    for (int64_t bytes : {int64_t(0), int64_t(blocks.size()) - 1}) {
        try {
            run(t, t.encode, job, bytes, threads);
            std::printf("%s took %lld bytes\n", t.name, (long long)bytes);
            std::exit(1);
        } catch (const std::invalid_argument&) {
        }
    }
}

void use_columns(const Kernels& kernels, int64_t k, int64_t n, int how, int threads) {
    bool table = how & 1, pivots = how & 2, affine = how & 4;
    Random random{uint64_t(k * 100 + n)};
    auto made = [&](int64_t count, float scale, float shift) {
        std::vector<float> v(count);
        for (float& x : v) x = shift + scale * random.bell();
        return v;
    };
    int64_t groups = (k + 2) / 3;
    std::vector<float> state = made(k * n, 0.05f, 0), coupling = made(k * k, 0.3f, 0), pivot = made(k, 0.1f, 1),
                       old = made(k * n, 0.05f, 0), scale = made(groups * n, 0.001f, 0.01f), inverse(groups * n),
                       offset = made(groups * n, 0.01f, 0), zeros(groups * n, 7.0f), values(k * n), moves(k * n);
    for (size_t i = 0; i < scale.size(); ++i) inverse[i] = 1 / scale[i];
    std::vector<int64_t> group(k);
    for (int64_t j = 0; j < k; ++j) group[j] = j / 3;
    const float levels[] = {-7, -3, -1, 0, 1, 2.5f, 8}, boundaries[] = {-5, -2, -0.5f, 0.5f, 1.75f, 5.25f};
    const float level_codes[] = {9, 1, 2, 3, 4, 5, 6};
    std::vector<uint8_t> codes(k * n);
    Columns columns{k, n, state.data(), coupling.data(), pivots ? pivot.data() : nullptr,
                    pivots ? nullptr : old.data(), group.data(), scale.data(), inverse.data(),
                    affine && !table ? offset.data() : nullptr, affine ? zeros.data() : nullptr, 8, 15,
                    table ? 7 : 0, boundaries, levels, level_codes, codes.data(), values.data(), moves.data()};
    quantize_columns(kernels, columns, threads);
    std::printf("columns %lldx%lld %d %016llx\n", (long long)k, (long long)n, how,
                (unsigned long long)digest(moves, digest(values, digest(codes))));
}

}  // namespace

int main(int argc, char** argv) {
    int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const Kernels& kernels = select(argc > 2 ? argv[2] : nullptr);
    std::fprintf(stderr, "%s, %d threads\n", kernels.isa, threads);
    for (int i = 0; i < kernels.count; ++i) {
        const TypeKernels& t = kernels.types[i];
        register_points(t);
        for (int kind = 0; kind < KINDS; ++kind) use_type(t, kind, 3, 3 * t.block, threads);
        use_type(t, SPREAD, 1, t.block, threads);
        use_type(t, BELL, 16 * UNIT / (5 * t.block) + 1, 5 * t.block, threads);  // work for two threads
        refuse(t, threads);
    }
    for (int64_t k : {1, 2, 64, 128})
        for (int64_t n : {1, 5, 16, 33, 100})
            for (int how = 0; how < 8; ++how) use_columns(kernels, k, n, how, threads);
}
