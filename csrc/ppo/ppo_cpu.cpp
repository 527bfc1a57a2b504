// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// PPO on the CPU. The elementwise kernels walk runs of a fixed length, whatever the number of threads, widen a few hundred values at a time
// into arrays on the stack, and compute on short vectors of doubles. Sums are kept by position in
// that array (a vertical addition needs no shuffle), then by run, then in the order of the runs: the same bits for any number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/parallel.h"
#include "ppo.h"

namespace mmfast {
namespace {

constexpr int kLanes = 2;  // every x86-64 has these
typedef double Vec __attribute__((vector_size(8 * kLanes)));
typedef uint64_t VecBits __attribute__((vector_size(8 * kLanes)));

}  // namespace
template <>
struct PpoBits<Vec> {
  using type = VecBits;
};
namespace {

Vec load(const double* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
void store(double* p, Vec v) { memcpy(p, &v, sizeof(v)); }

constexpr int64_t kRun = 4096;   // elements of a task
constexpr int64_t kBlock = 128;  // of them alive as doubles

// out[i] = in[first + i] for i in [0, count). Absent inputs are `fill`.
void widen(const PpoInput& in, int64_t first, int64_t count, double fill, double* out) {
  if (!in.data) {
    std::fill(out, out + count, fill);
    return;
  }
  switch (in.dtype) {
    case DType::f32:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<const float*>(in.data)[first + i];
      break;
    case DType::f16:
      for (int64_t i = 0; i < count; ++i) out[i] = f16_to_float(static_cast<const uint16_t*>(in.data)[first + i]);
      break;
    case DType::bf16:
      for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(static_cast<const uint16_t*>(in.data)[first + i]);
      break;
    case DType::f64:
      std::copy_n(static_cast<const double*>(in.data) + first, count, out);
  }
}

// The mask as 1 and 0; absent: all 1.
void widen(const uint8_t* mask, int64_t first, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = !mask || mask[first + i] ? 1.0 : 0.0;
}

void narrow(const double* in, void* out, DType type, int64_t first, int64_t count) {
  if (type == DType::f64) std::copy_n(in, count, static_cast<double*>(out) + first);
  else
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[first + i] = float(in[i]);
}

// f(first, count) on blocks of run `run` of n elements.
template <class F>
void blocks_of(int64_t run, int64_t n, F f) {
  const int64_t end = std::min(n, (run + 1) * kRun);
  for (int64_t first = run * kRun; first < end; first += kBlock) f(first, std::min(kBlock, end - first));
}

int64_t runs(int64_t n) { return (n + kRun - 1) / kRun; }

template <PpoLoss kind, PpoKl kl>
void loss_runs(const PpoLossArgs& args, double (*partial)[kPpoSums]) {
  parallel_for(runs(args.n), 1, [&](int64_t begin, int64_t end) {
    const PpoLossArgs a = args;  // a copy that no store can alias
    double x[kPpoInputs][kBlock] = {}, keep[kBlock], grad[kBlock];
    for (int64_t run = begin; run < end; ++run) {
      double sums[kPpoSums][kBlock] = {};
      blocks_of(run, a.n, [&](int64_t first, int64_t count) {
        for (int j = 0; j < kPpoInputs; ++j) widen(a.in[j], first, count, 1.0, x[j]);
        widen(a.mask, first, count, keep);
        std::fill(keep + count, keep + kBlock, 0.0);
        for (int64_t i = 0; i < count; i += kLanes) {
          const auto at = [&](int j) { return load(x[j] + i); };
          const auto t = kind == PpoLoss::policy ? ppo_policy_token<Vec>(a, kl, at(0), at(1), at(2), at(3), at(4))
                                                 : ppo_value_token<Vec>(a, at(0), at(1), at(2));
          // Selected, not multiplied: what stands outside the mask may be NaN.
          const auto in = load(keep + i) != 0.0;
          const auto add = [&](int s, Vec v) { store(sums[s] + i, load(sums[s] + i) + v); };
          store(grad + i, in ? t.grad : Vec{});
          add(0, in ? t.loss : Vec{});
          for (int s = 0; s < kPpoStats; ++s) add(1 + s, in ? t.stats[s] : Vec{});
          add(kPpoSums - 1, load(keep + i));
        }
        narrow(grad, a.grad, a.out, first, count);
      });
      for (int s = 0; s < kPpoSums; ++s) {
        double total = 0;
        for (double v : sums[s]) total += v;
        partial[run][s] = total;
      }
    }
  });
}

}  // namespace

void gae_cpu(const GaeArgs& a) {
  parallel_for(a.B, std::max<int64_t>(1, kRun / std::max<int64_t>(a.T, 1)), [&](int64_t begin, int64_t end) {
    double reward[kBlock], value[kBlock], keep[kBlock], on[kBlock], advantage[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      double next_value = a.bootstrap.data ? a.bootstrap.at(b) : 0.0, next_advantage = 0;
      for (int64_t stop = a.T; stop > 0; stop -= std::min(kBlock, stop)) {
        const int64_t count = std::min(kBlock, stop), first = b * a.T + stop - count;
        widen(a.rewards, first, count, 0.0, reward);
        widen(a.values, first, count, 0.0, value);
        widen(a.mask, first, count, keep);
        for (int64_t i = 0; i < count; ++i) {
          reward[i] = keep[i] != 0 ? reward[i] : 0.0;
          value[i] = keep[i] != 0 ? value[i] : 0.0;
          on[i] = a.dones && a.dones[first + i] ? 0.0 : a.gamma;
        }
        for (int64_t i = count - 1; i >= 0; --i) {
          next_advantage = reward[i] + on[i] * next_value - value[i] + on[i] * a.lam * next_advantage;
          next_value = value[i];
          advantage[i] = next_advantage;
        }
        narrow(advantage, a.advantages, a.out, first, count);
        for (int64_t i = 0; i < count; ++i) value[i] += advantage[i];
        narrow(value, a.returns, a.out, first, count);
      }
    }
  });
}

void masked_whiten_cpu(const WhitenArgs& a) {
  // Mean and sum of squares around it of each run, then of all: sums of raw squares would lose what a large mean leaves of the variance.
  struct Moments {
    double count, mean, squares;
  };
  std::vector<Moments> moments(size_t(runs(a.n)));
  parallel_for(runs(a.n), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> x(kRun);
    for (int64_t run = begin; run < end; ++run) {
      int64_t count = 0;
      double sum = 0, squares = 0;
      blocks_of(run, a.n, [&](int64_t first, int64_t n) {
        double v[kBlock];
        widen(a.x, first, n, 0.0, v);
        for (int64_t i = 0; i < n; ++i) {
          if (a.mask && !a.mask[first + i]) continue;
          sum += x[size_t(count++)] = v[i];
        }
      });
      const double mean = count ? sum / double(count) : 0.0;
      for (int64_t i = 0; i < count; ++i) squares += (x[size_t(i)] - mean) * (x[size_t(i)] - mean);
      moments[size_t(run)] = {double(count), mean, squares};
    }
  });
  double count = 0, mean = 0, squares = 0;
  for (const Moments& m : moments) count += m.count;
  for (const Moments& m : moments) mean += m.mean * (m.count / std::max(count, 1.0));
  for (const Moments& m : moments) squares += m.squares + m.count * (m.mean - mean) * (m.mean - mean);
  const double factor = a.factor(count, squares), back = a.shift_mean ? 0.0 : mean;
  parallel_for(runs(a.n), 1, [&](int64_t begin, int64_t end) {
    double v[kBlock], keep[kBlock];
    for (int64_t run = begin; run < end; ++run)
      blocks_of(run, a.n, [&](int64_t first, int64_t n) {
        widen(a.x, first, n, 0.0, v);
        widen(a.mask, first, n, keep);
        for (int64_t i = 0; i < n; ++i) v[i] = keep[i] != 0 ? (v[i] - mean) * factor + back : 0.0;
        narrow(v, a.out, a.out_type, first, n);
      });
  });
}

void ppo_loss_cpu(const PpoLossArgs& a) {
  std::vector<double> partial(size_t(runs(a.n) * kPpoSums));
  auto* rows = reinterpret_cast<double (*)[kPpoSums]>(partial.data());
  if (a.kind == PpoLoss::value) loss_runs<PpoLoss::value, PpoKl::none>(a, rows);
  else switch (a.kl) {
      case PpoKl::none:
        loss_runs<PpoLoss::policy, PpoKl::none>(a, rows);
        break;
      case PpoKl::k1:
        loss_runs<PpoLoss::policy, PpoKl::k1>(a, rows);
        break;
      case PpoKl::k1_clamped:
        loss_runs<PpoLoss::policy, PpoKl::k1_clamped>(a, rows);
        break;
      case PpoKl::k2:
        loss_runs<PpoLoss::policy, PpoKl::k2>(a, rows);
        break;
      case PpoKl::k3:
        loss_runs<PpoLoss::policy, PpoKl::k3>(a, rows);
    }
  double sums[kPpoSums] = {};
  for (int64_t run = 0; run < runs(a.n); ++run)
    for (int s = 0; s < kPpoSums; ++s) sums[s] += rows[run][s];
  const double count = sums[kPpoSums - 1];
  // All masked: 0, not 0 / 0.
  store_double(a.loss, a.out, 0, count > 0 ? sums[0] / count : 0.0);
  for (int s = 0; s < kPpoStats; ++s) store_double(a.stats, a.out, s, count > 0 ? sums[1 + s] / count : 0.0);
  store_double(a.stats, a.out, kPpoStats, count);
}

}  // namespace mmfast
