// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The torch side of the preference losses: schemas, checks, allocation, then the CPU or CUDA launcher of preference.h.
#include "preference.h"

#include <tuple>

#include "../common/device.h"

namespace mmfast {
namespace {

using std::optional;

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// Checks that `t` has logp's shape and place, and makes it contiguous.
void like_logp(const char* op, const Tensor& logp, const char* name, Tensor& t) {
  check_same_device(op, "logp", logp, name, t);
  MMFAST_CHECK(same_shape(t, logp), op, ": expected ", name, " ", shape_of(logp), " like logp, got ", shape_of(t));
  t = as_contiguous(t);
}

const int64_t* ids_like(const char* op, const Tensor& logp, const char* name, Tensor& ids) {
  MMFAST_CHECK(ids.scalar_type() == ScalarType::Long, op, ": expected ", name, " of type int64, got ",
               torch::headeronly::toString(ids.scalar_type()));
  like_logp(op, logp, name, ids);
  return static_cast<const int64_t*>(ids.data_ptr());
}

// The token side of the arguments; contiguous copies, where needed, stay alive in the tensors.
SegmentArgs segment_args(const char* op, Tensor& logp, Tensor& seq_ids, optional<Tensor>& segment_ids, optional<Tensor>& weights, int64_t S,
                         int64_t K, int64_t norm) {
  MMFAST_CHECK(norm >= 0 && norm <= 2, op, ": unknown norm number ", norm);
  MMFAST_CHECK(S >= 0 && K >= 0, op, ": expected at least 0 segments, got ", S, " sequences of ", K);
  MMFAST_CHECK(K == 0 || S <= int64_t{0x7fffffff} / K, op, ": more than 2^31 segments");
  SegmentArgs a{};
  logp = as_contiguous(logp);
  a.logp = logp.data_ptr();
  a.logp_dtype = dtype_of(op, "logp", logp);
  a.seq_ids = ids_like(op, logp, "seq_ids", seq_ids);
  if (segment_ids) a.segment_ids = ids_like(op, logp, "segment_ids", *segment_ids);
  if (weights) {
    a.weights_dtype = dtype_of(op, "token_weights", *weights);
    like_logp(op, logp, "token_weights", *weights);
    a.weights = weights->data_ptr();
  }
  a.N = logp.numel(), a.S = S, a.K = K;
  a.norm = SegmentNorm(norm);
  a.dtype = is_double(logp) ? DType::f64 : DType::f32;
  return a;
}

std::tuple<Tensor, Tensor> segment_logp(Tensor logp, Tensor seq_ids, optional<Tensor> segment_ids, optional<Tensor> token_weights,
                                        int64_t S, int64_t K, int64_t norm) {
  const char* op = "segment_logp";
  SegmentArgs a = segment_args(op, logp, seq_ids, segment_ids, token_weights, S, K, norm);
  const ScalarType type = a.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor values = allocate(logp, {S, K}, type), norms = allocate(logp, {S, K}, type);
  a.values = values.data_ptr();
  a.norms = norms.data_ptr();
  if (logp.is_cuda()) {
    if (S * K > 0) MMFAST_ON_CUDA(op, logp, a, segment_logp);
    return {values, norms};
  }
  const int64_t bad = segment_logp_cpu(a);
  MMFAST_CHECK(bad == -1, op, ": token ", bad, " belongs to sequence ", a.seq_ids[bad], ", segment ",
               a.segment_ids ? a.segment_ids[bad] : 0, "; expected ids below ", S, " and ", K, " (negative: none)");
  return {values, norms};
}

std::tuple<Tensor, Tensor> segment_logp_backward(Tensor grad, Tensor logp, Tensor seq_ids, optional<Tensor> segment_ids,
                                                 optional<Tensor> token_weights, Tensor values, Tensor norms, int64_t norm, bool need_logp,
                                                 bool need_weights) {
  const char* op = "segment_logp_backward";
  MMFAST_CHECK(values.dim() == 2, op, ": expected values [S, K], got ", shape_of(values));
  SegmentBackwardArgs b{};
  b.forward = segment_args(op, logp, seq_ids, segment_ids, token_weights, values.size(0), values.size(1), norm);
  const ScalarType type = b.forward.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  using Named = std::pair<const char*, Tensor*>;
  for (const auto& [name, t] : {Named{"grad", &grad}, Named{"values", &values}, Named{"norms", &norms}}) {
    check_same_device(op, "logp", logp, name, *t);
    MMFAST_CHECK(same_shape(*t, values), op, ": expected ", name, " ", shape_of(values), " like values, got ", shape_of(*t));
    *t = as_contiguous(as_type(*t, type));
  }
  MMFAST_CHECK(!need_weights || token_weights, op, ": there are no token_weights to find a gradient for");
  b.forward.values = values.data_ptr();
  b.forward.norms = norms.data_ptr();
  b.grad = grad.data_ptr();
  const Tensor nothing = allocate(logp, {0});
  Tensor grad_logp = need_logp ? allocate(logp, logp.sizes()) : nothing;
  Tensor grad_weights = need_weights ? allocate(*token_weights, logp.sizes()) : allocate(token_weights ? *token_weights : logp, {0});
  b.grad_logp = need_logp ? grad_logp.data_ptr() : nullptr;
  b.grad_weights = need_weights ? grad_weights.data_ptr() : nullptr;
  if (logp.numel() == 0 || !(need_logp || need_weights)) return {grad_logp, grad_weights};
  if (logp.is_cuda()) {
    MMFAST_ON_CUDA(op, logp, b, segment_logp_backward);
  } else {
    segment_logp_backward_cpu(b);
  }
  return {grad_logp, grad_weights};
}

// A column beside chosen [P]; `one_for_all` allows a single value too.
Column column(const char* op, const Tensor& chosen, const char* name, optional<Tensor>& t, bool one_for_all = false) {
  if (!t) return {};
  check_same_device(op, "chosen", chosen, name, *t);
  const bool single = one_for_all && t->numel() == 1;
  MMFAST_CHECK(single || (t->dim() == 1 && t->size(0) == chosen.size(0)), op, ": expected ", name, " [P=", chosen.size(0),
               "] like chosen, got ", shape_of(*t));
  t = as_contiguous(*t);
  return {t->data_ptr(), dtype_of(op, name, *t), single ? 0 : 1};
}

std::tuple<Tensor, Tensor, Tensor> preference_pairs(Tensor chosen, optional<Tensor> rejected, optional<Tensor> ref_chosen,
                                                    optional<Tensor> ref_rejected, optional<Tensor> chosen_lens,
                                                    optional<Tensor> rejected_lens, optional<Tensor> rejected_scale,
                                                    optional<Tensor> margin, int64_t loss, int64_t divergence, double alpha, double beta,
                                                    double label_smoothing, double tau) {
  const char* op = "preference_loss";
  MMFAST_CHECK(chosen.dim() == 1, op, ": expected chosen [P], got ", shape_of(chosen));
  MMFAST_CHECK(loss >= 0 && loss < kPairLosses, op, ": unknown loss number ", loss);
  MMFAST_CHECK(divergence >= 0 && divergence <= 3, op, ": unknown divergence number ", divergence);
  PreferenceArgs a{};
  optional<Tensor> first = chosen;
  a.chosen = column(op, chosen, "chosen", first);
  a.rejected = column(op, chosen, "rejected", rejected);
  a.loss = PairLoss(loss);
  MMFAST_CHECK(rejected || loss >= int64_t(PairLoss::anchor), op, ": this loss compares pairs, rejected is missing");
  a.ref_chosen = column(op, chosen, "ref_chosen", ref_chosen);
  a.ref_rejected = column(op, chosen, "ref_rejected", ref_rejected);
  a.chosen_lens = column(op, chosen, "chosen_lens", chosen_lens);
  a.rejected_lens = column(op, chosen, "rejected_lens", rejected_lens);
  a.rejected_scale = column(op, chosen, "rejected_scale", rejected_scale);
  a.margin = column(op, chosen, "margin", margin, true);
  a.P = chosen.size(0);
  a.divergence = Divergence(divergence);
  a.alpha = alpha, a.beta = beta, a.label_smoothing = label_smoothing, a.tau = tau;
  a.dtype = is_double(chosen) ? DType::f64 : DType::f32;
  const ScalarType type = a.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor losses = allocate(chosen, {a.P}, type);
  Tensor rewards = allocate(chosen, {2, a.P}, type), slopes = allocate(chosen, {2, a.P}, type);
  if (a.P == 0) return {losses, rewards, slopes};
  a.losses = losses.data_ptr();
  a.rewards = rewards.data_ptr();
  a.slopes = slopes.data_ptr();
  if (chosen.is_cuda()) {
    MMFAST_ON_CUDA(op, chosen, a, preference_pairs);
  } else {
    preference_pairs_cpu(a);
  }
  return {losses, rewards, slopes};
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def(
      "segment_logp(Tensor logp, Tensor seq_ids, Tensor? segment_ids, Tensor? token_weights, SymInt num_sequences, SymInt num_segments, "
      "int "
      "norm) -> (Tensor, Tensor)");
  m.def(
      "segment_logp_backward(Tensor grad, Tensor logp, Tensor seq_ids, Tensor? segment_ids, Tensor? token_weights, Tensor values, Tensor "
      "norms, int norm, bool need_logp, bool need_weights) -> (Tensor, Tensor)");
  m.def(
      "preference_pairs(Tensor chosen, Tensor? rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? chosen_lens, Tensor? "
      "rejected_lens, Tensor? rejected_scale, Tensor? margin, int loss, int divergence, float alpha, float beta, float label_smoothing, "
      "float tau) -> (Tensor, Tensor, Tensor)");
}

// The same functions serve both devices: they branch on the tensor. Without CUDA code they say how to rebuild.
#define MMFAST_PREFERENCE_IMPL(m)                                             \
  m.impl("segment_logp", TORCH_BOX(&mmfast::segment_logp));                   \
  m.impl("segment_logp_backward", TORCH_BOX(&mmfast::segment_logp_backward)); \
  m.impl("preference_pairs", TORCH_BOX(&mmfast::preference_pairs));

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m){MMFAST_PREFERENCE_IMPL(m)} STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) {
  MMFAST_PREFERENCE_IMPL(m)
}
