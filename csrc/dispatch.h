#pragma once

#include "kernels.h"

namespace fewbits {

const Kernels& select(const char* cap);
const TypeKernels* find(const Kernels& kernels, const char* name);

}  // namespace fewbits
