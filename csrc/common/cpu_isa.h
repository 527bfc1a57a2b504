// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Which instruction set the CPU kernels use, decided once at run time.
#pragma once
#include <string>

namespace mmfast {

// Ordered: each level includes the ones before it. Only `baseline` exists off x86-64.
enum class CpuIsa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
inline constexpr int kCpuIsaCount = 4;

const char* cpu_isa_name(CpuIsa);
CpuIsa cpu_isa_best();    // the highest level that this machine and this build have
CpuIsa cpu_isa_active();  // what kernels use: the best, or what MMFAST_CPU_ISA / force_cpu_isa chose

// Throws std::invalid_argument when `name` is unknown or the machine lacks it. "auto" returns to the best.
void force_cpu_isa(const std::string& name);

}  // namespace mmfast

// The table of inner loops for the instruction set in use, from functions prefix_baseline, prefix_avx2, prefix_avx512, prefix_avx512_bf16.
#if defined(__x86_64__) && defined(MMFAST_X86_KERNELS)
#define MMFAST_CPU_KERNELS(prefix)                                                        \
  (*(::mmfast::cpu_isa_active() == ::mmfast::CpuIsa::avx512_bf16 ? prefix##_avx512_bf16() \
     : ::mmfast::cpu_isa_active() == ::mmfast::CpuIsa::avx512    ? prefix##_avx512()      \
     : ::mmfast::cpu_isa_active() == ::mmfast::CpuIsa::avx2      ? prefix##_avx2()        \
                                                                 : prefix##_baseline()))
#else
#define MMFAST_CPU_KERNELS(prefix) (*prefix##_baseline())
#endif
