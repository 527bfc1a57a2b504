// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Vector quantisation: what the host code and both kernels (CPU, CUDA) agree on. Plain C++, no torch, no CUDA header.
//
// Letters: N rows (tokens), D width, K codes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace mmfast {

// The index that minimises   l2: ||x - e||^2     cosine: 1 - x.e / (||x|| ||e||)     ip: -x.e
enum class VqMetric : int { l2 = 0, cosine = 1, ip = 2 };
// How the gradient of the quantised output reaches x.
enum class VqGradient : int { none = 0, ste = 1, rotation = 2 };

// N rows of D values seen inside a tensor of any layout: row r = o * n_inner + i sits at
// data[o * stride_outer + i * stride_inner + d * stride_d]   (strides in elements).
// Channel-last [.., D] has stride_d == 1; NCHW has n_inner = H * W, stride_inner = 1, stride_d = H * W.
struct VqRows {
  void* data;
  DType dtype;
  int64_t n_outer, n_inner, D;
  int64_t stride_outer, stride_inner, stride_d;
  MMFAST_HD int64_t rows() const { return n_outer * n_inner; }
  MMFAST_HD int64_t offset(int64_t r) const { return (r / n_inner) * stride_outer + (r % n_inner) * stride_inner; }
};

// Nearest code of every row and, when `quantized.data` is set, the fused quantisation.
struct VqNearestArgs {
  VqRows x;              // [N, D]
  const void* codebook;  // [K, D], row k at codebook + k * stride_k elements, last dim contiguous
  DType codebook_dtype;
  int64_t K, stride_k;
  VqMetric metric;
  const uint8_t* mask;  // [N] or null; rows with 0 are skipped: index -1, quantized = x, no error term
  int64_t* indices;     // [N]
  void* distance;       // [N] or null: the minimised quantity, fp64 when x is fp64, else fp32
  VqRows quantized;     // data null, or [N, D] in x's dtype: the chosen code
  void* mse;            // [1] with `quantized`: mean (x - q)^2 over the elements of valid rows; fp64 when x is fp64, else fp32
};

// Gradients of (quantized, loss) where loss = w_commit * mse(x, sg e) + w_code * mse(sg x, e).
//   grad_x[r]  = rule(grad_q[r]) + grad_loss * w_commit * 2 (x - q) / (N_valid D)
//   grad_codebook[k] = grad_loss * w_code * 2 sum_{r: idx = k} (q - x) / (N_valid D)
// rule is the identity (ste), the rotation of arXiv:2410.06424 (rotation) or zero (none); masked rows pass grad_q through.
struct VqBackwardArgs {
  VqRows x;
  const void* codebook;
  DType codebook_dtype;
  int64_t K, stride_k;
  const int64_t* indices;  // [N], -1 on masked rows
  VqRows grad_q;           // data null when the output was not used
  const void* grad_loss;   // [1] fp32 (fp64 when x is fp64) or null
  double w_commit, w_code;
  VqGradient gradient;
  VqRows grad_x;        // data null when not needed; x's dtype
  void* grad_codebook;  // [K, D] contiguous in the codebook's dtype, or null
};

// counts[k] = sum_{r: idx = k} w_r,  sums[k] = sum_{r: idx = k} w_r x_r,   rows with index -1 left out. Deterministic.
struct VqStatsArgs {
  VqRows x;
  const int64_t* indices;  // [N]
  const float* weight;     // [N] or null (= 1)
  int64_t K;
  void* counts;  // [K]    fp64 when x is fp64, else fp32
  void* sums;    // [K, D] the same type
};

// One exponential-moving-average step from statistics (which may have been all-reduced):
//   size <- decay size + (1 - decay) counts;  avg <- decay avg + (1 - decay) sums
//   n = sum size;  code_k = avg_k / ((size_k + eps) / (n + K eps) * n)      (normalised to unit length if asked)
// A code whose smoothed size is 0 (all sizes 0) is left unchanged.
struct VqEmaArgs {
  void* cluster_size;  // [K]
  void* embed_avg;     // [K, D] contiguous
  void* codebook;      // [K, D] contiguous
  const void* counts;  // [K]
  const void* sums;    // [K, D] contiguous
  DType dtype;         // of all five: f32 or f64
  int64_t K, D;
  double decay, eps;
  bool normalize;
};

// CPU. vq_nearest_cpu returns -1, or the first row of x that holds NaN or Inf, or -2 - k for such a row k of the codebook.
int64_t vq_nearest_cpu(const VqNearestArgs&);
void vq_backward_cpu(const VqBackwardArgs&);
// Returns -1, or the first row whose index is outside [-1, K).
int64_t vq_code_stats_cpu(const VqStatsArgs&);
void vq_ema_cpu(const VqEmaArgs&);
// Both in one pass, without the [K, D] sums: `counts` and `sums` of either argument are not used. Returns as vq_code_stats_cpu.
int64_t vq_ema_update_cpu(const VqEmaArgs&, const VqStatsArgs&);

// CUDA. `workspace` holds the bytes that the matching *_workspace asks for; results are cudaError_t (0 = success).
// A row of x that holds NaN or Inf gets index -1, a zero quantised row, NaN distance and a NaN mse; a code that holds one is never chosen,
// and if no code is left every row gets -1. Nothing is ever read out of range,
// whatever the indices hold.
size_t vq_nearest_cuda_workspace(const VqNearestArgs&);
int vq_nearest_cuda(const VqNearestArgs&, void* workspace, void* stream);
size_t vq_backward_cuda_workspace(const VqBackwardArgs&);
int vq_backward_cuda(const VqBackwardArgs&, void* workspace, void* stream);
size_t vq_code_stats_cuda_workspace(const VqStatsArgs&);
int vq_code_stats_cuda(const VqStatsArgs&, void* workspace, void* stream);
size_t vq_ema_cuda_workspace(const VqEmaArgs&);
int vq_ema_cuda(const VqEmaArgs&, void* workspace, void* stream);

}  // namespace mmfast
