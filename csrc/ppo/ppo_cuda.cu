// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// PPO on CUDA. Everything here moves a few megabytes once an update: what counts is launches and passes over memory, not arithmetic.
//
// gae: a warp a sequence, one launch. Step t maps the advantage of its successor by A -> b + a A with b = delta_t, a = gamma lam (1 -
// done_t);
//   such maps compose, (a, b) after (a', b') is (a a', b + a b'). A warp composes 32 of them by five shuffles, from the last tile of
//   columns to the first, and applies the result to the advantage that the tile after it left. The next tile's loads are under way
//   meanwhile.
// loss: a thread computes four tokens, value and gradient together; a block leaves its sums, and a block of one more launch adds them up.
// whiten: a block leaves count, mean and squares around that mean; a second launch makes them one; a third applies it.
//
// Sums are in double, in an order that the sizes alone decide: no atomics, the same bits on every run and every device.
#include "../common/cuda.cuh"
#include "ppo.h"

namespace mmfast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kEach = 4, kSpan = kThreads * kEach;  // elements of a block

// ---- advantages

struct Step {
  double reward, value, on;  // on: 1 - done
};
__device__ Step load_step(const GaeArgs& a, int64_t row, int64_t t) {
  Step s{0, 0, 1};
  if (t < 0 || t >= a.T) return s;
  const int64_t i = row * a.T + t;
  if (!a.mask || a.mask[i]) s.reward = a.rewards.at(i), s.value = a.values.at(i);
  s.on = a.dones && a.dones[i] ? 0 : 1;
  return s;
}

__global__ void __launch_bounds__(kThreads) gae_kernel(GaeArgs args) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= args.B) return;
  double last_value = args.bootstrap.data ? args.bootstrap.at(row) : 0, last_advantage = 0;  // of the column after the tile
  int64_t t = (args.T + 31) / 32 * 32 - 32 + lane;
  for (Step step = load_step(args, row, t), next; t >= lane; t -= 32, step = next) {
    next = load_step(args, row, t - 32);
    const bool real = t < args.T;
    double next_value = __shfl_down_sync(kFullWarp, step.value, 1);
    if (lane == 31 || t == args.T - 1) next_value = last_value;
    // Past the end: the identity.
    double a = real ? args.gamma * args.lam * step.on : 1;
    double b = real ? step.reward + args.gamma * step.on * next_value - step.value : 0;
    for (int m = 1; m < 32; m *= 2) {
      const double a_next = __shfl_down_sync(kFullWarp, a, m), b_next = __shfl_down_sync(kFullWarp, b, m);
      if (lane + m < 32) b += a * b_next, a *= a_next;
    }
    const double advantage = b + a * last_advantage;
    if (real) {
      store_double(args.advantages, args.out, row * args.T + t, advantage);
      store_double(args.returns, args.out, row * args.T + t, advantage + step.value);
    }
    last_advantage = __shfl_sync(kFullWarp, advantage, 0);
    last_value = __shfl_sync(kFullWarp, step.value, 0);
  }
}

// ---- sums

// ---- losses

__device__ PpoToken<double> loss_token(const PpoLossArgs& a, int64_t i) {
  if (a.kind == PpoLoss::value) return ppo_value_token(a, a.in[0].at(i), a.in[1].at(i), a.in[2].at(i));
  return ppo_policy_token(a, a.kl, a.in[0].at(i), a.in[1].at(i), a.in[2].at(i), a.in[3].data ? a.in[3].at(i) : 1.0,
                          a.in[4].data ? a.in[4].at(i) : 0.0);
}

__global__ void __launch_bounds__(kThreads) loss_kernel(PpoLossArgs a, double* partial) {
  MMFAST_SHARED(double[kWarps], scratch);
  double sums[kPpoSums] = {};
  for (int u = 0; u < kEach; ++u) {
    const int64_t i = int64_t(blockIdx.x) * kSpan + u * kThreads + threadIdx.x;
    if (i >= a.n) break;
    const bool in = !a.mask || a.mask[i];
    const PpoToken<double> token = in ? loss_token(a, i) : PpoToken<double>{};
    store_double(a.grad, a.out, i, token.grad);
    sums[0] += token.loss;
    for (int s = 0; s < kPpoStats; ++s) sums[1 + s] += token.stats[s];
    sums[kPpoSums - 1] += in;
  }
  for (int s = 0; s < kPpoSums; ++s) {
    const double total = block_sum(sums[s], scratch);
    if (threadIdx.x == 0) partial[int64_t(blockIdx.x) * kPpoSums + s] = total;
  }
}

__global__ void __launch_bounds__(kThreads) mean_kernel(PpoLossArgs a, const double* partial, int64_t blocks) {
  MMFAST_SHARED(double[kWarps], scratch);
  double sums[kPpoSums] = {};
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads)
    for (int s = 0; s < kPpoSums; ++s) sums[s] += partial[b * kPpoSums + s];
  for (int s = 0; s < kPpoSums; ++s) sums[s] = block_sum(sums[s], scratch);
  if (threadIdx.x == 0) ppo_finish(a, sums);
}

// ---- whitening

struct Moments {
  double count, mean, squares;  // squares around the mean
};

__global__ void __launch_bounds__(kThreads) moments_kernel(WhitenArgs a, Moments* partial) {
  MMFAST_SHARED(double[kWarps], scratch);
  double x[kEach], count = 0, sum = 0, squares = 0;
  bool in[kEach];
  for (int u = 0; u < kEach; ++u) {
    const int64_t i = int64_t(blockIdx.x) * kSpan + u * kThreads + threadIdx.x;
    in[u] = i < a.n && (!a.mask || a.mask[i]);
    x[u] = in[u] ? a.x.at(i) : 0;
    count += in[u];
    sum += x[u];
  }
  count = block_sum(count, scratch);
  const double mean = count > 0 ? block_sum(sum, scratch) / count : 0;
  for (int u = 0; u < kEach; ++u) squares += in[u] ? (x[u] - mean) * (x[u] - mean) : 0;
  squares = block_sum(squares, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = {count, mean, squares};
}

// Leaves in `all` the mean and the factor.
__global__ void __launch_bounds__(kThreads) join_kernel(WhitenArgs a, const Moments* partial, int64_t blocks, Moments* all) {
  MMFAST_SHARED(double[kWarps], scratch);
  double count = 0, mean = 0, squares = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) count += partial[b].count;
  count = block_sum(count, scratch);
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) mean += partial[b].mean * (partial[b].count / (count > 1 ? count : 1));
  mean = block_sum(mean, scratch);
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) {
    const double apart = partial[b].mean - mean;
    squares += partial[b].squares + partial[b].count * apart * apart;
  }
  squares = block_sum(squares, scratch);
  if (threadIdx.x == 0) *all = {count, mean, a.factor(count, squares)};
}

__global__ void __launch_bounds__(kThreads) whiten_kernel(WhitenArgs a, const Moments* all) {
  const double mean = all->mean, factor = all->squares, back = a.shift_mean ? 0 : mean;
  for (int u = 0; u < kEach; ++u) {
    const int64_t i = int64_t(blockIdx.x) * kSpan + u * kThreads + threadIdx.x;
    if (i >= a.n) return;
    store_double(a.out, a.out_type, i, !a.mask || a.mask[i] ? (a.x.at(i) - mean) * factor + back : 0.0);
  }
}

}  // namespace

size_t gae_cuda_workspace(const GaeArgs&) { return 0; }

int gae_cuda(const GaeArgs& a, void*, void* stream) {
  return launch(gae_kernel, dim3(unsigned(ceil_div(a.B, kWarps))), dim3(kThreads), 0, stream, a);
}

size_t ppo_loss_cuda_workspace(const PpoLossArgs& a) { return size_t(ceil_div(a.n, kSpan)) * kPpoSums * sizeof(double); }

int ppo_loss_cuda(const PpoLossArgs& a, void* workspace, void* stream) {
  auto* partial = static_cast<double*>(workspace);
  const int64_t blocks = ceil_div(a.n, kSpan);
  return Sequence()
      .then([&] { return launch(loss_kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, a, partial); })
      .then([&] { return launch(mean_kernel, dim3(1), dim3(kThreads), 0, stream, a, partial, blocks); })
      .status();
}

size_t masked_whiten_cuda_workspace(const WhitenArgs& a) { return size_t(ceil_div(a.n, kSpan) + 1) * sizeof(Moments); }

int masked_whiten_cuda(const WhitenArgs& a, void* workspace, void* stream) {
  auto* all = static_cast<Moments*>(workspace);
  Moments* partial = all + 1;
  const int64_t blocks = ceil_div(a.n, kSpan);
  return Sequence()
      .then([&] { return launch(moments_kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, a, partial); })
      .then([&] { return launch(join_kernel, dim3(1), dim3(kThreads), 0, stream, a, partial, blocks, all); })
      .then([&] { return launch(whiten_kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, a, all); })
      .status();
}

}  // namespace mmfast
