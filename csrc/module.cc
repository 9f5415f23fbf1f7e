// fewbits._core: the kernels behind plain addresses. Buffers belong to the caller (fewbits/core), which
// checks device, type and layout of each; every length is checked again here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstdlib>
#include <tuple>

#include "huffman.h"
#include "rans.h"
#include "run.h"

namespace nb = nanobind;
using namespace fewbits;

namespace {

using Address = uintptr_t;  // 0 if absent
using Release = nb::call_guard<nb::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

const Kernels& kernels() {
    static const Kernels& chosen = select(std::getenv("FEWBITS_ISA"));
    return chosen;
}

const TypeKernels& type(const std::string& name) {
    const TypeKernels* known = find(kernels(), name.c_str());
    if (!known) throw std::invalid_argument("the core has no type " + name);
    return *known;
}

// -> the number of units refused, because a weight is NaN, infinite or too large.
int64_t encode_weights(const std::string& name, Address src, int dtype, int64_t weights, Address importance,
                       int64_t importances, bool search, Address blocks, int64_t bytes, int threads) {
    const TypeKernels& t = type(name);
    Job job{at<void>(src), dtype, weights, at<float>(importance), importances, search, at<uint8_t>(blocks)};
    return run(t, t.encode, job, bytes, threads).refused;
}

// -> (sum of squared errors, sum of squares, largest error)
std::tuple<double, double, double> measure(const std::string& name, Address src, int dtype, int64_t weights,
                                           Address blocks, int64_t bytes, int threads) {
    const TypeKernels& t = type(name);
    Job job{at<void>(src), dtype, weights, nullptr, 0, false, at<uint8_t>(blocks)};
    Error e = run(t, t.measure, job, bytes, threads);
    return {e.squared, e.energy, e.largest};
}

void decode_blocks(const std::string& name, Address src, int64_t bytes, Address dst, int64_t weights,
                   int threads) {
    decode(type(name), at<uint8_t>(src), bytes, at<float>(dst), weights, threads);
}

void register_points(const std::string& name, std::tuple<Address, int> levels,
                     std::tuple<Address, int, int> points, std::tuple<Address, int> starts) {
    auto [values, n_levels] = levels;
    auto [digits, count, dim] = points;
    auto [shares, n_starts] = starts;
    register_table(type(name), at<float>(values), n_levels, at<uint8_t>(digits), count, dim,
                   at<float>(shares), n_starts);
}

void round_columns(std::tuple<int64_t, int64_t> sizes,
                   std::tuple<Address, Address, Address, Address, Address> given,
                   std::tuple<Address, Address, Address, Address, float, int> affine,
                   std::tuple<int, Address, Address, Address> table,
                   std::tuple<Address, Address, Address> out, int threads) {
    auto [k, n] = sizes;
    auto [state, coupling, pivot, old, group] = given;
    auto [scale, inverse, offset, zeros, zero, top] = affine;
    auto [count, boundaries, levels, level_codes] = table;
    auto [codes, values, moves] = out;
    Columns columns{k, n, at<float>(state), at<float>(coupling), at<float>(pivot), at<float>(old),
                    at<int64_t>(group), at<float>(scale), at<float>(inverse), at<float>(offset),
                    at<float>(zeros), zero, top, count, at<float>(boundaries), at<float>(levels),
                    at<float>(level_codes), at<uint8_t>(codes), at<float>(values), at<float>(moves)};
    quantize_columns(kernels(), columns, threads);
}

// -> bytes written, or -1
int64_t encode_bytes(Address in, int64_t count, std::tuple<Address, int, Address> given, Address out,
                     int64_t room) {
    auto [frequency, tables, of] = given;
    RansTables known{at<uint16_t>(frequency), tables, at<uint8_t>(of)};
    return rans_encode(at<uint8_t>(in), count, known, at<uint8_t>(out), room);
}

bool decode_bytes(Address in, int64_t bytes, std::tuple<Address, int, Address> given, Address out,
                  int64_t count) {
    auto [frequency, tables, of] = given;
    RansTables known{at<uint16_t>(frequency), tables, at<uint8_t>(of)};
    return rans_decode(at<uint8_t>(in), bytes, known, at<uint8_t>(out), count,
                       std::string(kernels().isa) != "portable");
}

bool decode_huffman(Address in, int64_t bytes, std::tuple<Address, int, Address> given, Address out,
                    int64_t count) {
    auto [lengths, tables, of] = given;
    return huffman_decode(at<uint8_t>(in), bytes, at<uint8_t>(lengths), tables, at<uint8_t>(of),
                          at<uint8_t>(out), count);
}

}  // namespace

NB_MODULE(_core, m) {
    m.def("isa", [] { return std::string(kernels().isa); });
    m.def("encode", &encode_weights, Release());
    m.def("measure", &measure, Release());
    m.def("decode", &decode_blocks, Release());
    m.def("register_table", &register_points);
    m.def("quantize_columns", &round_columns, Release());
    m.def("rans_encode", &encode_bytes, Release());
    m.def("rans_decode", &decode_bytes, Release());
    m.def("huffman_decode", &decode_huffman, Release());
}
