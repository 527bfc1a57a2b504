// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Proximal policy optimisation: what the host code and both kernels (CPU, CUDA) agree on, the formula of one token included. Plain C++, no
// torch, no CUDA header.
//
// Letters: B sequences, T tokens (columns), n = all elements of a tensor whose shape does not matter.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

namespace mmfast {

// Contiguous values of a runtime type; null when absent. All arithmetic is in double: a token costs some fifty operations, once an update,
// and the memory traffic is the same.
struct PpoInput {
  const void* data;
  DType dtype;
  MMFAST_HD double at(int64_t i) const { return load_double(data, dtype, i); }
};

// Generalised advantage estimation (arXiv:1506.02438, eq. 16), from the last column to the first, with A_T = 0, V_T = bootstrap:
//   delta_t = r_t + gamma (1 - done_t) V_{t+1} - V_t,   A_t = delta_t + gamma lam (1 - done_t) A_{t+1},   G_t = A_t + V_t
// r and V are 0 where the mask is.
struct GaeArgs {
  PpoInput rewards, values;  // [B, T]
  PpoInput bootstrap;        // [B] or null (= 0)
  const uint8_t* mask;       // [B, T] or null
  const uint8_t* dones;      // [B, T] or null
  int64_t B, T;
  double gamma, lam;
  void *advantages, *returns;  // [B, T] of type `out`: f32 or f64
  DType out;
};

// x made to mean 0 and standard deviation 1 over the elements inside the mask; 0 outside.
struct WhitenArgs {
  PpoInput x;           // [n]
  const uint8_t* mask;  // [n] or null
  int64_t n;
  bool shift_mean;  // false: the mean is added back
  bool unbiased;    // variance over count - 1
  bool eps_on_std;  // (x - mean) / (std + eps)  instead of  (x - mean) / sqrt(var + eps)
  double eps;
  void* out;  // [n] of type out_type: f32 or f64
  DType out_type;

  MMFAST_HD double factor(double count, double squares) const {
    const double degrees = count - (unbiased ? 1 : 0), variance = squares / (degrees > 1 ? degrees : 1);
    return eps_on_std ? 1 / (sqrt(variance) + eps) : 1 / sqrt(variance + eps);
  }
};

// Estimates of KL(policy || reference) from one sample, d = logp - ref:  k1: d,  k1_clamped: max(d, 0),  k2: d^2 / 2,  k3: e^-d - 1 + d.
enum class PpoKl : int { none = 0, k1 = 1, k1_clamped = 2, k2 = 3, k3 = 4 };
enum class PpoLoss : int { policy = 0, value = 1 };

constexpr int kPpoInputs = 5, kPpoStats = 4, kPpoSums = kPpoStats + 2;

// Mean of a loss over the elements inside the mask, four means beside it and, from the same pass, the gradient.
//   policy: in = logp, old logp, advantage, weight or null (= 1), reference logp or null; stats = clipped, KL(old || new), ratio, KL to
//   reference value:  in = value, old value, return; stats = clipped, squared error, 0, 0
struct PpoLossArgs {
  PpoLoss kind;
  PpoInput in[kPpoInputs];  // [n]
  const uint8_t* mask;      // [n] or null
  int64_t n;
  double clip_low, clip_high, dual_clip, kl_coef;
  PpoKl kl;
  DType out;    // f32 or f64, of everything below
  void* loss;   // [1]
  void* stats;  // [kPpoStats]
  void* scale;  // [1]: 1 / how many elements the means are over, 0 for none
  void* grad;   // [n]: of the SUM; `scale` is not known before the pass is over
};

// The formulas below are written for V = double, one token (CUDA), or a vector of doubles in the compiler's vector extension, a few tokens
// at a time (CPU): comparisons give one bool or one mask a lane, and ?: selects.
template <class V>
struct PpoBits {
  using type = uint64_t;  // V's values as unsigned integers; vectors specialise it
};
template <class V>
MMFAST_HD V ppo_all(double v) {
  return V{} + v;
}

// One element: its loss, the derivative by its first input, and what is averaged beside.
template <class V>
struct PpoToken {
  V loss, grad, stats[kPpoStats];
};

template <class V>
struct PpoExp {
  V value, excess;  // e^x and e^x - 1 - x
};
// e^x = 2^k (1 + r + r^2 P(r)), |r| <= ln 2 / 2, P the Taylor polynomial up to r^13 (next term below 2^-57). Where k = 0 the excess is r^2
// P(r) itself: no cancellation for the small x of a young policy. Inf from 2^1023.5 on; below e^-708 the value stays at that.
template <class V>
MMFAST_HD PpoExp<V> ppo_exp(V x) {
  constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, which then stands in the low bits
  V y = x < ppo_all<V>(-708.0) ? ppo_all<V>(-708.0) : x;
  y = y > ppo_all<V>(710.0) ? ppo_all<V>(710.0) : y;  // NaN passes through both
  const V rounded = y * 1.4426950408889634 + kRound, k = rounded - kRound;
  const V r = (y - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  V p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  const V tail = r * r * p;
  typename PpoBits<V>::type bits;
  memcpy(&bits, &rounded, sizeof(V));
  bits = (bits + 1023) << 52;
  V scale;
  memcpy(&scale, &bits, sizeof(V));
  const V value = scale * (1 + (r + tail));
  return {value, k == ppo_all<V>(0) ? tail : value - 1 - x};
}

// -min(ratio A, clip(ratio) A), held above -dual_clip |A| for A < 0 (PPO, arXiv:1707.06347, eq. 7; dual clip, arXiv:1912.09729, eq. 5),
// plus kl_coef times the KL estimate. Where a bound is active the derivative of the first part is 0.
template <class V>
MMFAST_HD PpoToken<V> ppo_policy_token(const PpoLossArgs& a, PpoKl kl, V logp, V old_logp, V advantage, V weight, V ref_logp) {
  const V zero = ppo_all<V>(0), one = ppo_all<V>(1), low = ppo_all<V>(1 - a.clip_low), high = ppo_all<V>(1 + a.clip_high);
  const PpoExp<V> e = ppo_exp<V>(logp - old_logp);
  V ratio = e.value < low ? low : e.value;
  ratio = ratio > high ? high : ratio;
  // No advantage, no loss, however large the ratio: not Inf * 0.
  const V plain = advantage == zero ? zero : e.value * advantage, clipped = ratio * advantage;
  const V lower = plain > clipped ? clipped : plain;
  const V floor = advantage < zero ? advantage * a.dual_clip : lower;
  const V surrogate = lower < floor ? floor : lower;
  const V bound = (plain > clipped) | (lower < floor) ? one : zero;
  V penalty = zero, slope = zero;
  if (kl != PpoKl::none) {
    const V d = logp - ref_logp;
    penalty = d;
    slope = one;
    if (kl == PpoKl::k1_clamped) {
      penalty = d > zero ? d : zero;
      slope = d > zero ? one : zero;
    } else if (kl == PpoKl::k2) {
      penalty = d * d / 2;
      slope = d;
    } else if (kl == PpoKl::k3) {
      penalty = ppo_exp<V>(-d).excess;
      slope = d - penalty;  // 1 - e^-d
    }
  }
  const V steep = bound == one ? zero : -plain;
  return {weight * (penalty * a.kl_coef - surrogate), weight * (slope * a.kl_coef + steep), {bound, e.excess, e.value, penalty}};
}

// max((V - G)^2, (V_old + clip(V - V_old) - G)^2) / 2: the value loss of PPO's reference implementation.
template <class V>
MMFAST_HD PpoToken<V> ppo_value_token(const PpoLossArgs& a, V value, V old_value, V target) {
  const V zero = ppo_all<V>(0), one = ppo_all<V>(1), error = value - target, moved = value - old_value;
  // Inside the range V itself and not V_old + (V - V_old): the same value, but for a rounding that would count as clipped.
  V held = moved < ppo_all<V>(-a.clip_low) ? old_value - a.clip_low : value;
  held = moved > ppo_all<V>(a.clip_high) ? old_value + a.clip_high : held;
  const V plain = error * error, clipped = (held - target) * (held - target);
  const V bound = clipped > plain ? one : zero;
  return {(clipped > plain ? clipped : plain) / 2, clipped > plain ? zero : error, {bound, plain, zero, zero}};
}

// The outputs but the gradient, from the sums of all elements: loss, statistics, count. All masked: 0, not 0 / 0.
MMFAST_HD void ppo_finish(const PpoLossArgs& a, const double (&sums)[kPpoSums]) {
  const double scale = sums[kPpoSums - 1] > 0 ? 1 / sums[kPpoSums - 1] : 0.0;
  store_double(a.loss, a.out, 0, sums[0] * scale);
  for (int s = 0; s < kPpoStats; ++s) store_double(a.stats, a.out, s, sums[1 + s] * scale);
  store_double(a.scale, a.out, 0, scale);
}

// CPU.
void gae_cpu(const GaeArgs&);
void masked_whiten_cpu(const WhitenArgs&);
void ppo_loss_cpu(const PpoLossArgs&);

// CUDA. `workspace` holds the bytes that the matching *_workspace asks for; results are cudaError_t (0 = success).
size_t gae_cuda_workspace(const GaeArgs&);
int gae_cuda(const GaeArgs&, void* workspace, void* stream);
size_t masked_whiten_cuda_workspace(const WhitenArgs&);
int masked_whiten_cuda(const WhitenArgs&, void* workspace, void* stream);
size_t ppo_loss_cuda_workspace(const PpoLossArgs&);
int ppo_loss_cuda(const PpoLossArgs&, void* workspace, void* stream);

}  // namespace mmfast
