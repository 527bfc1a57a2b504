// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Log-probabilities of labels from blocks of logits: what the host code and both kernels agree on. Plain C++, no torch, no CUDA header.
//
// Letters: n rows (tokens), V vocabulary, C columns of a block. The product hidden @ weight^T is torch's (or, in fp32 on a CPU, the
// matrix library's); a walk over the vocabulary calls `update` once a block and, for gradients, `grad` once a block. Half types are
// widened, sums are fp32 (fp64 for fp64 logits), and the label's logit is read from the same block as everything else, so that a
// log-probability is never above 0.
//
// The value that softmax sees is  z = softcap tanh(logit / softcap) / temperature.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace mmfast {

// Rows of `state`, [kLogpStates, n]: what a walk carries from block to block. `top` is the largest z so far, sums are of
// e = exp(z - top). Reference (a second model's logits z0 over the same vocabulary): only with z0.
enum LogpState : int {
  kTop,
  kSum,     // sum e
  kLabel,   // z of the label
  kDot,     // sum e (z - top)
  kSquare,  // sum e^2
  kBest,    // index of the largest z, the lowest on ties
  kTop0,
  kSum0,
  kLabel0,
  kCross,  // sum e0 (z0 - z)
  kLogpStates
};
// Rows of `out`, [kLogpOutputs, n], written by the last block. A row whose label is ignored gets 0 everywhere, one whose label is out of
// range NaN.
enum LogpOutput : int {
  kLogp,     // z[label] - lse
  kLse,      // log sum exp z
  kEntropy,  // - sum p log p
  kSquares,  // sum p^2
  kHit,      // 1 if the label is the largest
  kLogp0,
  kLse0,
  kKl,  // sum p0 (log p0 - log p)
  // Where the gradient starts from: exp(z - lse) is formed as exp((z - top) - log sum), for lse alone is rounded where z is large.
  kShift,   // top
  kLogSum,  // log sum e
  kShift0,
  kLogSum0,
  kLogpOutputs
};

// A block of logits: element (r, c) at data[r * stride + c], standing for vocabulary index first + c.
struct LogpBlock {
  void* data;
  int64_t stride;
};

struct LogpRows {
  DType dtype;                // of the logits
  int64_t n, columns, first;  // rows, columns of the block, vocabulary index of its first column
  int64_t V;
  double temperature, softcap;  // softcap 0: none
  const int64_t* labels;        // [n]
  int64_t ignore_index;
};

struct LogpUpdateArgs {
  LogpRows rows;
  LogpBlock z, z0;  // z0.data null without a reference
  bool wants_more;  // also dot, square and best
  bool begins, ends;
  void* state;  // [kLogpStates, n]   fp32, or fp64 for fp64 logits
  void* out;    // [kLogpOutputs, n]  the same type
};

// dz_j = [ p_j (a + b (z_j - top) + c p_j) + g [j = label] - k p0_j ] dz/dlogit,  from the gradients g of logp, r of lse, e of entropy, q
// of squares, k of kl:   a = k + r - g - e (H - log sum) - 2 q S,   b = -e,   c = 2 q,   H the entropy, S the sum of squares.
struct LogpGradArgs {
  LogpRows rows;
  LogpBlock z, z0;
  LogpBlock grad;                 // the logits' type; may be z itself
  const void* out;                // [kLogpOutputs, n] from the forward walk
  const void *g, *r, *e, *q, *k;  // [n] or null, the type of out
};

// CPU. Labels are checked by the caller.
void logp_update_cpu(const LogpUpdateArgs&);
void logp_grad_cpu(const LogpGradArgs&);

// c [m, n] = or += a [m, k] b [k, n] in fp32: a's element (i, t) at a[i * a_row + t * a_col], b's (t, j) at b[t * b_row + j * b_col], one
// of each pair of strides 1; c's rows contiguous. Sums in an order that neither the number of threads nor m and n change.
struct LogpProductArgs {
  int64_t m, n, k;
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  int64_t b_row, b_col;
  float* c;
  int64_t c_row;
  bool accumulate;
};
void logp_product_cpu(const LogpProductArgs&);

// CUDA. Results are cudaError_t (0 = success).
int logp_update_cuda(const LogpUpdateArgs&, void* stream);
int logp_grad_cuda(const LogpGradArgs&, void* stream);

// values *= *factor, which only the device knows; values are on 16 bytes, the factor fp32 (fp64 for fp64 values).
struct LogpScaleArgs {
  DType dtype;
  int64_t count;
  void* values;
  const void* factor;
};
int logp_scale_cuda(const LogpScaleArgs&, void* stream);

}  // namespace mmfast
