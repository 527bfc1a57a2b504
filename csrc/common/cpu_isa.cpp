// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
#include "cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mmfast {
namespace {

constexpr const char* kNames[kCpuIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};

CpuIsa detect() {
#if defined(__x86_64__) && defined(MMFAST_X86_KERNELS)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return CpuIsa::baseline;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return CpuIsa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? CpuIsa::avx512_bf16 : CpuIsa::avx512;
#else
  return CpuIsa::baseline;
#endif
}

CpuIsa parse(const std::string& name) {
  if (name == "auto") return cpu_isa_best();
  std::string known = "auto";
  for (int i = 0; i < kCpuIsaCount; ++i) {
    if (name == kNames[i]) {
      if (i > int(cpu_isa_best()))
        throw std::invalid_argument("MMFAST_CPU_ISA: this machine or build has no '" + name + "' kernels, the best is '" +
                                    cpu_isa_name(cpu_isa_best()) + "'");
      return CpuIsa(i);
    }
    known += std::string(", ") + kNames[i];
  }
  throw std::invalid_argument("MMFAST_CPU_ISA: unknown level '" + name + "', expected one of " + known);
}

std::atomic<int>& active() {
  static std::atomic<int> level = [] {
    const char* env = std::getenv("MMFAST_CPU_ISA");
    return int(env && *env ? parse(env) : cpu_isa_best());
  }();
  return level;
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) { return kNames[int(isa)]; }

CpuIsa cpu_isa_best() {
  static const CpuIsa best = detect();
  return best;
}

CpuIsa cpu_isa_active() { return CpuIsa(active().load(std::memory_order_relaxed)); }

void force_cpu_isa(const std::string& name) { active().store(int(parse(name)), std::memory_order_relaxed); }

}  // namespace mmfast
