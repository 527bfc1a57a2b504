// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Preference losses on the CPU. A batch has some hundred thousand tokens and some dozen pairs, against the billions of products that made
// them: the sums are one pass in token order over a table of fp64 sums, the pairs one loop.
#include <vector>

#include "../common/parallel.h"
#include "preference_pair.h"

namespace mmfast {

int64_t segment_logp_cpu(const SegmentArgs& a) {
  std::vector<double> sums(a.S * a.K), norms(a.S * a.K, a.norm == SegmentNorm::none ? 1.0 : 0.0);
  for (int64_t t = 0; t < a.N; ++t) {
    const int64_t segment = segment_of(a, t);
    if (segment == -2) return t;
    if (segment < 0) continue;
    const double weight = a.weights ? load_double(a.weights, a.weights_dtype, t) : 1.0;
    sums[segment] += weight * load_double(a.logp, a.logp_dtype, t);
    if (a.norm != SegmentNorm::none) norms[segment] += a.norm == SegmentNorm::count ? 1.0 : weight;
  }
  for (int64_t s = 0; s < a.S * a.K; ++s) {
    store_double(a.values, a.dtype, s, norms[s] != 0 ? sums[s] / norms[s] : 0.0);
    store_double(a.norms, a.dtype, s, norms[s]);
  }
  return -1;
}

void segment_logp_backward_cpu(const SegmentBackwardArgs& b) {
  const SegmentArgs& a = b.forward;
  parallel_for(a.N, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t segment = segment_of(a, t);
      const double norm = segment < 0 ? 0.0 : load_double(a.norms, a.dtype, segment);
      const double share = norm != 0 ? load_double(b.grad, a.dtype, segment) / norm : 0.0;
      if (b.grad_logp) {
        const double weight = a.weights && norm != 0 ? load_double(a.weights, a.weights_dtype, t) : 1.0;
        store_double(b.grad_logp, a.logp_dtype, t, share * weight);
      }
      if (b.grad_weights) {
        double logp = norm != 0 ? load_double(a.logp, a.logp_dtype, t) : 0.0;
        if (norm != 0 && a.norm == SegmentNorm::weight) logp -= load_double(a.values, a.dtype, segment);
        store_double(b.grad_weights, a.weights_dtype, t, share * logp);
      }
    }
  });
}

void preference_pairs_cpu(const PreferenceArgs& a) {
  parallel_for(a.P, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const PairResult r = pair_loss(a, p);
      store_double(a.losses, a.dtype, p, r.loss);
      store_double(a.rewards, a.dtype, p, r.chosen_reward);
      store_double(a.rewards, a.dtype, a.P + p, r.rejected_reward);
      store_double(a.slopes, a.dtype, p, r.chosen_slope);
      store_double(a.slopes, a.dtype, a.P + p, r.rejected_slope);
    }
  });
}

}  // namespace mmfast
