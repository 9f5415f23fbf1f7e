// Selects the instruction set: the best of this processor, limited by FEWBITS_ISA.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#if defined(FEWBITS_X86)
#include <cpuid.h>
#endif

namespace portable { extern const fewbits::Kernels kernels; }
#if defined(FEWBITS_X86)
namespace avx2 { extern const fewbits::Kernels kernels; }
namespace avx512 { extern const fewbits::Kernels kernels; }
#endif

namespace fewbits {

#if defined(FEWBITS_X86)
static bool has_f16c() {  // Clang 14 does not know this name in __builtin_cpu_supports
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Kernels& select(const char* cap) {
    const Kernels* chosen = &portable::kernels;
#if defined(FEWBITS_X86)
    auto allowed = [&](const char* isa) {
        if (!cap || !*cap) return true;
        return !std::strcmp(cap, isa) || (!std::strcmp(cap, "avx512") && !std::strcmp(isa, "avx2"));
    };
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && has_f16c())
        chosen = &avx2::kernels;
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        chosen = &avx512::kernels;
#endif
    (void)cap;
    return *chosen;
}

const TypeKernels* find(const Kernels& kernels, const char* name) {
    for (int i = 0; i < kernels.count; ++i)
        if (!std::strcmp(kernels.types[i].name, name)) return &kernels.types[i];
    return nullptr;
}

}  // namespace fewbits
