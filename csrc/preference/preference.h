// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Preference losses: what the host code and both kernels (CPU, CUDA) agree on. Plain C++, no torch, no CUDA header.
//
// Letters: N tokens, S sequences, K segments of a sequence, P pairs.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace mmfast {

// What the sum over a segment is divided by: nothing, its number of tokens, the sum of its weights.
enum class SegmentNorm : int { none = 0, count = 1, weight = 2 };

// values[s, k] = sum_{t: segment of t = (s, k)} w_t logp_t / norms[s, k], in fp64 and in token order up to a fixed grouping. Tokens come
// in any order; those of no segment are not read, whatever they hold. A segment without tokens, or of norm 0, gets 0.
struct SegmentArgs {
  const void* logp;  // [N]
  DType logp_dtype;
  const int64_t* seq_ids;      // [N], negative: none
  const int64_t* segment_ids;  // [N] or null (K = 1), negative: none
  const void* weights;         // [N] or null (= 1)
  DType weights_dtype;
  int64_t N, S, K;
  SegmentNorm norm;
  DType dtype;   // of the three below: f32, or f64
  void* values;  // [S, K]
  void* norms;   // [S, K], 1 for SegmentNorm::none
};

// grad_logp[t] = g w_t / n,   grad_weights[t] = g (logp_t - [norm is weight] value) / n   with g, n, value of t's segment; 0 without one.
struct SegmentBackwardArgs {
  SegmentArgs forward;
  const void* grad;    // [S, K] in forward.dtype
  void* grad_logp;     // [N] in logp's type, or null
  void* grad_weights;  // [N] in the weights' type, or null
};

// The segment of token t as a number in [0, S K), -1 for none, -2 for an id out of range.
MMFAST_HD int64_t segment_of(const SegmentArgs& a, int64_t t) {
  const int64_t s = a.seq_ids[t], k = a.segment_ids ? a.segment_ids[t] : 0;
  if (s < 0 || k < 0) return -1;
  return s < a.S && k < a.K ? s * a.K + k : -2;
}

// Formulas: preference_pair.h. The last two look at the chosen side alone.
enum class PairLoss : int {
  sigmoid = 0,
  hinge = 1,
  ipo = 2,
  exo = 3,
  nca = 4,
  robust = 5,
  bco = 6,
  sppo = 7,
  apo_zero = 8,
  apo_down = 9,
  discopop = 10,
  odds_ratio = 11,
  anchor = 12,
  prospect = 13
};
constexpr int kPairLosses = 14;
enum class Divergence : int { reverse_kl = 0, forward_kl = 1, js = 2, alpha = 3 };

// [P] values, or one for all pairs, or none.
struct Column {
  const void* data;
  DType dtype;
  int64_t stride;  // 1 or 0
  MMFAST_HD double at(int64_t p, double otherwise) const { return data ? load_double(data, dtype, p * stride) : otherwise; }
};

struct PreferenceArgs {
  Column chosen, rejected;            // log-probabilities under the policy; rejected may be missing for one-sided losses
  Column ref_chosen, ref_rejected;    // under the reference, 0 when missing
  Column chosen_lens, rejected_lens;  // what scores are divided by, 1 when missing
  Column rejected_scale;              // a factor on the rejected log-ratio, 1 when missing
  Column margin;                      // 0 when missing
  int64_t P;
  PairLoss loss;
  Divergence divergence;
  double alpha, beta, label_smoothing, tau;
  DType dtype;    // of all outputs: f32, or f64
  void* losses;   // [P]
  void* rewards;  // [2, P]: beta times the log-ratio of chosen and rejected
  void* slopes;   // [2, P]: d loss / d chosen, d loss / d rejected
};

// CPU. segment_logp_cpu returns -1, or the first token whose id is out of range.
int64_t segment_logp_cpu(const SegmentArgs&);
void segment_logp_backward_cpu(const SegmentBackwardArgs&);
void preference_pairs_cpu(const PreferenceArgs&);

// CUDA. `workspace` holds the bytes that the matching *_workspace asks for; results are cudaError_t (0 = success). A token whose id is out
// of range belongs to no segment.
size_t segment_logp_cuda_workspace(const SegmentArgs&);
int segment_logp_cuda(const SegmentArgs&, void* workspace, void* stream);
size_t segment_logp_backward_cuda_workspace(const SegmentBackwardArgs&);
int segment_logp_backward_cuda(const SegmentBackwardArgs&, void* workspace, void* stream);
size_t preference_pairs_cuda_workspace(const PreferenceArgs&);
int preference_pairs_cuda(const PreferenceArgs&, void* workspace, void* stream);

}  // namespace mmfast
