// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// PPO on the CPU. Work is cut into runs of a fixed length, whatever the number of threads, and sums are formed by run, then in the order of
// the runs: the same bits for any number of threads. The losses' inner loop is in ppo_cpu_isa.cpp; advantages are a chain of multiply-adds
// and whitening waits for memory, so neither gains from wider registers.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/cpu_isa.h"
#include "../common/parallel.h"
#include "ppo.h"
#include "ppo_cpu_isa.h"

namespace mmfast {
namespace {

constexpr int64_t kRun = kPpoRun;
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

// Sets to 0 what is outside the mask. On the bits: a compiler may make jumps of a choice between doubles, which a random mask mispredicts.
void hide(const uint8_t* mask, int64_t first, int64_t count, double* values) {
  if (!mask) return;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits;
    memcpy(&bits, values + i, 8);
    bits &= -uint64_t(mask[first + i] != 0);
    memcpy(values + i, &bits, 8);
  }
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

// f(0) + .. + f(n - 1), n up to kBlock, in eight chains: one would wait for each addition.
template <class F>
double sum(int64_t n, F f) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t l = 0; l < 8; ++l) part[l] += f(i + l);
  for (; i < n; ++i) part[i % 8] += f(i);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

PpoLossRun loss_run() {
#if defined(__x86_64__) && defined(MMFAST_X86_KERNELS)
  switch (cpu_isa_active()) {
    case CpuIsa::avx512_bf16:
      return &ppo_loss_run_avx512_bf16;
    case CpuIsa::avx512:
      return &ppo_loss_run_avx512;
    case CpuIsa::avx2:
      return &ppo_loss_run_avx2;
    case CpuIsa::baseline:
      break;
  }
#endif
  return &ppo_loss_run_baseline;
}

}  // namespace

// A step waits for the one after it, eight cycles a multiply-add: four sequences go in step to fill them.
void gae_cpu(const GaeArgs& a) {
  constexpr int64_t kRows = 4;
  const int64_t groups = (a.B + kRows - 1) / kRows;
  parallel_for(groups, std::max<int64_t>(1, kRun / std::max<int64_t>(a.T * kRows, 1)), [&](int64_t begin, int64_t end) {
    // A sequence that is not there is computed, from whatever its rows hold, and not stored.
    double delta[kRows][kBlock] = {}, decay[kRows][kBlock] = {}, value[kRows][kBlock + 1] = {}, last[kRows];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row0 = group * kRows, rows = std::min(kRows, a.B - row0);
      for (int64_t r = 0; r < kRows; ++r) {
        last[r] = 0;
        value[r][0] = r < rows && a.bootstrap.data ? a.bootstrap.at(row0 + r) : 0.0;
      }
      for (int64_t stop = a.T, count; stop > 0; stop -= count) {
        count = std::min(kBlock, stop);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t first = (row0 + r) * a.T + stop - count;
          value[r][count] = value[r][0];  // of the column after the block
          widen(a.rewards, first, count, 0.0, delta[r]);
          widen(a.values, first, count, 0.0, value[r]);
          hide(a.mask, first, count, delta[r]);
          hide(a.mask, first, count, value[r]);
          for (int64_t i = 0; i < count; ++i) {
            const double on = a.dones && a.dones[first + i] ? 0.0 : a.gamma;
            delta[r][i] += on * value[r][i + 1] - value[r][i];
            decay[r][i] = on * a.lam;
          }
        }
        for (int64_t i = count - 1; i >= 0; --i)
          for (int64_t r = 0; r < kRows; ++r) delta[r][i] = last[r] = delta[r][i] + decay[r][i] * last[r];
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t first = (row0 + r) * a.T + stop - count;
          narrow(delta[r], a.advantages, a.out, first, count);
          for (int64_t i = 0; i < count; ++i) delta[r][i] += value[r][i];
          narrow(delta[r], a.returns, a.out, first, count);
        }
      }
    }
  });
}

void masked_whiten_cpu(const WhitenArgs& a) {
  // Mean and sum of squares around it of each block, then of all: sums of raw squares would lose what a large mean leaves of the variance.
  struct Moments {
    double count, mean, squares;
  };
  std::vector<Moments> moments(size_t((a.n + kBlock - 1) / kBlock));
  parallel_for(runs(a.n), 1, [&](int64_t begin, int64_t end) {
    double v[kBlock];
    for (int64_t run = begin; run < end; ++run)
      blocks_of(run, a.n, [&](int64_t first, int64_t n) {
        widen(a.x, first, n, 0.0, v);
        hide(a.mask, first, n, v);
        int64_t count = n;
        if (a.mask) count = n - std::count(a.mask + first, a.mask + first + n, uint8_t{0});
        const double mean = count ? sum(n, [&](int64_t i) { return v[i]; }) / double(count) : 0.0;
        for (int64_t i = 0; i < n; ++i) v[i] -= mean;
        hide(a.mask, first, n, v);
        moments[size_t(first / kBlock)] = {double(count), mean, sum(n, [&](int64_t i) { return v[i] * v[i]; })};
      });
  });
  double count = 0, mean = 0, squares = 0;
  for (const Moments& m : moments) count += m.count;
  for (const Moments& m : moments) mean += m.mean * (m.count / std::max(count, 1.0));
  for (const Moments& m : moments) squares += m.squares + m.count * (m.mean - mean) * (m.mean - mean);
  const double factor = a.factor(count, squares), back = a.shift_mean ? 0.0 : mean;
  parallel_for(runs(a.n), 1, [&](int64_t begin, int64_t end) {
    double v[kBlock];
    for (int64_t run = begin; run < end; ++run)
      blocks_of(run, a.n, [&](int64_t first, int64_t n) {
        widen(a.x, first, n, 0.0, v);
        for (int64_t i = 0; i < n; ++i) v[i] = (v[i] - mean) * factor + back;
        hide(a.mask, first, n, v);
        narrow(v, a.out, a.out_type, first, n);
      });
  });
}

void ppo_loss_cpu(const PpoLossArgs& a) {
  const PpoLossRun run = loss_run();
  std::vector<double> partial(size_t(runs(a.n) * kPpoSums));
  parallel_for(runs(a.n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) run(a, r, partial.data() + r * kPpoSums);
  });
  double sums[kPpoSums] = {};
  for (size_t i = 0; i < partial.size(); ++i) sums[i % kPpoSums] += partial[i];
  ppo_finish(a, sums);
}

}  // namespace mmfast
