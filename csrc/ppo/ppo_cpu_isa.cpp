// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The inner loop of the CPU losses in the compiler's portable vectors, compiled per instruction set: CMake defines MMFAST_ISA (the suffix)
// and MMFAST_LANES (floats a register) and sets the flags. A hundred or so elements at a time are widened to arrays of doubles on the
// stack; ppo.h has the formulas. Sums are kept by lane until the run is over.
#include "ppo_cpu_isa.h"

#define MMFAST_INLINE inline __attribute__((always_inline))

namespace mmfast {
namespace {

constexpr int W = MMFAST_LANES / 2;
constexpr int64_t kBlock = 128;

typedef double Vec __attribute__((vector_size(8 * W)));
typedef Vec VecM __attribute__((aligned(8), may_alias));
typedef uint64_t VecBits __attribute__((vector_size(8 * W)));

MMFAST_INLINE Vec load(const double* p) { return *reinterpret_cast<const VecM*>(p); }
MMFAST_INLINE void store(double* p, Vec v) { *reinterpret_cast<VecM*>(p) = v; }

template <class T, class Convert>
MMFAST_INLINE void widen_as(const void* data, int64_t first, int64_t count, double* out, Convert convert) {
  const T* p = static_cast<const T*>(data) + first;
  for (int64_t i = 0; i < count; ++i) out[i] = convert(p[i]);
}

// out[i] = in[first + i].
void widen(const PpoInput& in, int64_t first, int64_t count, double* out) {
  switch (in.dtype) {
    case DType::f32:
      return widen_as<float>(in.data, first, count, out, [](float v) { return v; });
    case DType::f16:
      return widen_as<uint16_t>(in.data, first, count, out, [](uint16_t v) { return f16_to_float(v); });
    case DType::bf16:
      return widen_as<uint16_t>(in.data, first, count, out, [](uint16_t v) { return bf16_to_float(v); });
    case DType::f64:
      return widen_as<double>(in.data, first, count, out, [](double v) { return v; });
  }
}

}  // namespace

template <>
struct PpoBits<Vec> {
  using type = VecBits;
};

namespace {

template <PpoLoss kind, PpoKl kl>
void loss_run(const PpoLossArgs& args, int64_t run, double* out) {
  const PpoLossArgs a = args;  // a copy that no store can alias
  const int64_t end = (run + 1) * kPpoRun < a.n ? (run + 1) * kPpoRun : a.n;
  double x[kPpoInputs][kBlock], keep[kBlock], grad[kBlock];
  for (int j = 0; j < kPpoInputs; ++j)
    for (int64_t i = 0; i < kBlock; ++i) x[j][i] = 1;  // what an absent input stays
  Vec sums[kPpoSums] = {};
  for (int64_t first = run * kPpoRun; first < end; first += kBlock) {
    const int64_t count = end - first < kBlock ? end - first : kBlock;
    for (int j = 0; j < kPpoInputs; ++j)
      if (a.in[j].data) widen(a.in[j], first, count, x[j]);
    for (int64_t i = 0; i < kBlock; ++i) keep[i] = i < count;
    if (a.mask)
      for (int64_t i = 0; i < count; ++i) keep[i] = a.mask[first + i] ? 1.0 : 0.0;
    for (int64_t i = 0; i < count; i += W) {
      const auto at = [&](int j) { return load(x[j] + i); };
      PpoToken<Vec> t;
      if constexpr (kind == PpoLoss::policy) t = ppo_policy_token<Vec>(a, kl, at(0), at(1), at(2), at(3), at(4));
      else t = ppo_value_token<Vec>(a, at(0), at(1), at(2));
      // Selected, not multiplied: what stands outside the mask may be NaN.
      const auto in = load(keep + i) != Vec{};
      store(grad + i, in ? t.grad : Vec{});
      sums[0] += in ? t.loss : Vec{};
      for (int s = 0; s < kPpoStats; ++s) sums[1 + s] += in ? t.stats[s] : Vec{};
      sums[kPpoSums - 1] += load(keep + i);
    }
    if (a.out == DType::f64)
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(a.grad)[first + i] = grad[i];
    else
      for (int64_t i = 0; i < count; ++i) static_cast<float*>(a.grad)[first + i] = float(grad[i]);
  }
  for (int s = 0; s < kPpoSums; ++s) {
    out[s] = 0;
    for (int l = 0; l < W; ++l) out[s] += sums[s][l];
  }
}

}  // namespace

#define MMFAST_CONCAT_(a, b) a##b
#define MMFAST_CONCAT(a, b) MMFAST_CONCAT_(a, b)
void MMFAST_CONCAT(ppo_loss_run_, MMFAST_ISA)(const PpoLossArgs& a, int64_t run, double* sums) {
  if (a.kind == PpoLoss::value) return loss_run<PpoLoss::value, PpoKl::none>(a, run, sums);
  switch (a.kl) {
    case PpoKl::none:
      return loss_run<PpoLoss::policy, PpoKl::none>(a, run, sums);
    case PpoKl::k1:
      return loss_run<PpoLoss::policy, PpoKl::k1>(a, run, sums);
    case PpoKl::k1_clamped:
      return loss_run<PpoLoss::policy, PpoKl::k1_clamped>(a, run, sums);
    case PpoKl::k2:
      return loss_run<PpoLoss::policy, PpoKl::k2>(a, run, sums);
    case PpoKl::k3:
      return loss_run<PpoLoss::policy, PpoKl::k3>(a, run, sums);
  }
}

}  // namespace mmfast
