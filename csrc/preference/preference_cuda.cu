// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Preference losses on the GPU: three small kernels, each bound by its launch at the sizes of a training step.
//
// Segment sums. Rows of one sequence usually lie together, yet any order must give the right sum and the same bits each time, so a block
// owns a segment and looks for its tokens in the range where they lie:
//   segment_range   a thread a token: the ends of a run of equal ids widen their segment's range by an integer maximum, whose result does
//                   not depend on who comes first. Contiguous sequences cost two atomics each.
//   segment_sum     a block a segment: fp64 sums over the range, in an order that depends on the range alone. Reads every token once when
//                   segments are contiguous; interleaved ones read their neighbours' ids too.
// The backward pass is a thread a token, the pairs a thread a pair: value and derivatives at once (preference_pair.h).
#include "../common/cuda.cuh"
#include "preference.h"
#include "preference_pair.h"

namespace mmfast {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// Of segment s: tokens N - before[s] .. after[s] - 1. Zeros mean an empty range.
struct Ranges {
  unsigned long long *before, *after;
};

__global__ void __launch_bounds__(kThreads) segment_range_kernel(SegmentArgs a, Ranges ranges) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= a.N) return;
  const int64_t segment = segment_of(a, t);
  if (segment < 0) return;
  if (t == 0 || segment_of(a, t - 1) != segment) atomicMax(&ranges.before[segment], (unsigned long long)(a.N - t));
  if (t == a.N - 1 || segment_of(a, t + 1) != segment) atomicMax(&ranges.after[segment], (unsigned long long)(t + 1));
}

// The sum over the block, in a fixed order, in thread 0.
__device__ double block_sum(double v, double (&shared)[kWarps]) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared[w];
  return total;
}

__global__ void __launch_bounds__(kThreads) segment_sum_kernel(SegmentArgs a, Ranges ranges) {
  MMFAST_SHARED(double[kWarps], scratch);
  const int64_t segment = blockIdx.x, end = int64_t(ranges.after[segment]);
  const int64_t begin = end > 0 ? a.N - int64_t(ranges.before[segment]) : 0;
  double sum = 0, norm = 0;
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    if (segment_of(a, t) != segment) continue;
    const double weight = a.weights ? load_double(a.weights, a.weights_dtype, t) : 1.0;
    sum += weight * load_double(a.logp, a.logp_dtype, t);
    norm += a.norm == SegmentNorm::weight ? weight : 1.0;
  }
  sum = block_sum(sum, scratch);
  norm = block_sum(norm, scratch);
  if (threadIdx.x != 0) return;
  if (a.norm == SegmentNorm::none) norm = 1;
  store_double(a.values, a.dtype, segment, norm != 0 ? sum / norm : 0.0);
  store_double(a.norms, a.dtype, segment, norm);
}

__global__ void __launch_bounds__(kThreads) segment_backward_kernel(SegmentBackwardArgs b) {
  const SegmentArgs& a = b.forward;
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= a.N) return;
  const int64_t segment = segment_of(a, t);
  const double norm = segment < 0 ? 0.0 : load_double(a.norms, a.dtype, segment);
  const bool counts = norm != 0;  // otherwise gradient 0, whatever the token holds
  const double share = counts ? load_double(b.grad, a.dtype, segment) / norm : 0.0;
  if (b.grad_logp) {
    const double weight = a.weights && counts ? load_double(a.weights, a.weights_dtype, t) : 1.0;
    store_double(b.grad_logp, a.logp_dtype, t, share * weight);
  }
  if (b.grad_weights) {
    double logp = counts ? load_double(a.logp, a.logp_dtype, t) : 0.0;
    if (counts && a.norm == SegmentNorm::weight) logp -= load_double(a.values, a.dtype, segment);
    store_double(b.grad_weights, a.weights_dtype, t, share * logp);
  }
}

__global__ void __launch_bounds__(kThreads) preference_pairs_kernel(PreferenceArgs a) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= a.P) return;
  const PairResult r = pair_loss(a, p);
  store_double(a.losses, a.dtype, p, r.loss);
  store_double(a.rewards, a.dtype, p, r.chosen_reward);
  store_double(a.rewards, a.dtype, a.P + p, r.rejected_reward);
  store_double(a.slopes, a.dtype, p, r.chosen_slope);
  store_double(a.slopes, a.dtype, a.P + p, r.rejected_slope);
}

struct SegmentPlan {
  SegmentPlan(const SegmentArgs& a, void* workspace) : carve(workspace) {
    segments = a.S * a.K;
    ranges.before = carve.take<unsigned long long>(2 * segments);
    ranges.after = ranges.before + segments;
  }
  Carver carve;
  int64_t segments;
  Ranges ranges;
};

dim3 grid_of(int64_t threads) { return dim3(unsigned(ceil_div(threads, kThreads))); }

}  // namespace

size_t segment_logp_cuda_workspace(const SegmentArgs& a) { return SegmentPlan(a, nullptr).carve.bytes(); }

int segment_logp_cuda(const SegmentArgs& a, void* workspace, void* stream) {
  const SegmentPlan p(a, workspace);
  return Sequence()
      .then([&] { return fill_zero(p.ranges.before, size_t(2 * p.segments) * sizeof(unsigned long long), stream); })
      .then([&] { return launch(segment_range_kernel, grid_of(a.N), dim3(kThreads), 0, stream, a, p.ranges); })
      .then([&] { return launch(segment_sum_kernel, dim3(unsigned(p.segments)), dim3(kThreads), 0, stream, a, p.ranges); })
      .status();
}

size_t segment_logp_backward_cuda_workspace(const SegmentBackwardArgs&) { return 0; }

int segment_logp_backward_cuda(const SegmentBackwardArgs& b, void*, void* stream) {
  return launch(segment_backward_kernel, grid_of(b.forward.N), dim3(kThreads), 0, stream, b);
}

size_t preference_pairs_cuda_workspace(const PreferenceArgs&) { return 0; }

int preference_pairs_cuda(const PreferenceArgs& a, void*, void* stream) {
  return launch(preference_pairs_kernel, grid_of(a.P), dim3(kThreads), 0, stream, a);
}

}  // namespace mmfast
