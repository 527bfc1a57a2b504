// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The torch side of attention: schema, checks, allocation, then the CPU or CUDA launcher of attention.h. mmfast/ops/attention.py gives the
// one op its public names.
#include "attention.h"

#include <limits>
#include <tuple>
#include <vector>

#include "../common/device.h"

namespace mmfast {
namespace {

using std::optional;

constexpr const char* kOp = "attention";

bool has_media(AttentionRule rule) { return rule == AttentionRule::media || rule == AttentionRule::media_all; }
bool has_text(AttentionRule rule) { return rule == AttentionRule::unimodal || rule == AttentionRule::multimodal_causal; }

Tensor last_dim_contiguous(const Tensor& t) { return t.size(-1) == 1 || t.stride(-1) == 1 ? t : as_contiguous(t); }

// [B, N, heads, D], or [N, heads, D] with packed sequences; `skip` leading rows are left out.
AttentionTensor view(const Tensor& t, int64_t skip = 0) {
  const bool packed = t.dim() == 3;
  const int64_t stride_n = t.stride(packed ? 0 : 1);
  char* data = static_cast<char*>(t.data_ptr());
  return {data + skip * stride_n * int64_t(t.element_size()), packed ? 0 : t.stride(0), stride_n, t.stride(packed ? 1 : 2)};
}

// The integers of one small tensor, checked on the CPU where reading them costs nothing.
const int32_t* integers(const char* name, const Tensor& q, optional<Tensor>& t, int64_t count) {
  if (!t) return nullptr;
  check_same_device(kOp, "q", q, name, *t);
  MMFAST_CHECK(t->scalar_type() == ScalarType::Int && t->numel() == count, kOp, ": expected ", count, " integers in ", name, ", got ",
               torch::headeronly::toString(t->scalar_type()), " ", shape_of(*t));
  t = as_contiguous(*t);
  return static_cast<const int32_t*>(t->data_ptr());
}

void check_range(const char* name, const int32_t* values, int64_t count, int64_t top, const char* why) {
  for (int64_t i = 0; i < count; ++i)
    MMFAST_CHECK(values[i] >= 0 && values[i] <= top, kOp, ": ", name, " holds ", values[i], " at position ", i, ", expected 0 to ", top,
                 ", ", why);
}

void check_offsets(const char* name, const int32_t* values, int64_t B, int64_t total, int64_t longest) {
  MMFAST_CHECK(values[0] == 0 && values[B] == total, kOp, ": expected ", name, " to start at 0 and end at the ", total,
               " packed rows, got ", values[0], " and ", values[B]);
  for (int64_t b = 0; b < B; ++b)
    MMFAST_CHECK(values[b] <= values[b + 1] && values[b + 1] - values[b] <= longest, kOp, ": expected ", name,
                 " ascending by at most the longest length ", longest, ", got ", values[b], " then ", values[b + 1], " at sequence ", b);
}

// Everything that forward and backward are called with; owns the contiguous copies that the arguments point into.
struct Inputs {
  Tensor q, k, v;
  optional<Tensor> k2, v2, lens, lens2, valid2, text_time, cu_q, cu_k, seed;
  AttentionRule rule;
  int64_t number, max_q, max_k;
  double scale;
  int64_t threshold;
  int64_t split = 0;  // keys of k that form segment 1 when segment 2 lies in the same tensor
  bool splits = false;

  AttentionArgs check() {
    const bool packed = cu_q.has_value();
    MMFAST_CHECK(packed == cu_k.has_value(), kOp, ": give cu_seqlens for both rows and keys");
    const int64_t dims = packed ? 3 : 4;
    MMFAST_CHECK(int64_t(rule) >= 0 && int64_t(rule) <= 4, kOp, ": unknown rule number ", int64_t(rule));
    MMFAST_CHECK(threshold >= 0 && threshold < 65536, kOp, ": dropout threshold ", threshold, " is not in [0, 65536)");
    Tensor *const k_second = k2 ? &*k2 : nullptr, *const v_second = v2 ? &*v2 : nullptr;
    for (auto [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}, {"k2", k_second}, {"v2", v_second}}) {
      if (!t) continue;
      check_same_device(kOp, "q", q, name, *t);
      MMFAST_CHECK(t->dim() == dims, kOp, ": expected ", name, packed ? " [total, heads, D]" : " [B, N, heads, D]", ", got ", shape_of(*t));
      MMFAST_CHECK(t->scalar_type() == q.scalar_type(), kOp, ": q is ", torch::headeronly::toString(q.scalar_type()), " but ", name, " is ",
                   torch::headeronly::toString(t->scalar_type()), "; cast one to the other's type");
      *t = last_dim_contiguous(*t);
    }
    MMFAST_CHECK(k2.has_value() == v2.has_value(), kOp, ": give both k2 and v2 or neither");
    AttentionArgs a{};
    a.dtype = dtype_of(kOp, "q", q);
    a.rule = rule;
    a.H = q.size(-2), a.D = q.size(-1), a.G = k.size(-2);
    a.scale = scale;
    MMFAST_CHECK(a.D >= 1, kOp, ": expected head width D >= 1, got q ", shape_of(q));
    for (auto [name, t, as] : {std::tuple{"k", &k, &q}, {"v", &v, &k}, {"k2", k_second, &k}, {"v2", v_second, k_second}}) {
      if (!t) continue;
      const bool value = name[0] == 'v';
      MMFAST_CHECK(t->size(-1) == a.D && (as == &q || t->size(-2) == a.G) && (packed || t->size(0) == q.size(0)) &&
                       (!value || t->size(dims - 3) == as->size(dims - 3)),
                   kOp, ": shapes do not fit: q ", shape_of(q), ", k ", shape_of(k), ", ", name, " ", shape_of(*t),
                   "; batch, head width and the keys' heads must agree, and v have as many rows as k");
    }
    MMFAST_CHECK(a.G == 0 ? a.H == 0 : a.H % a.G == 0, kOp, ": the ", a.H, " query heads are no multiple of the ", a.G, " key heads");
    const bool cpu = !q.is_cuda();
    if (packed) {
      a.B = cu_q->numel() - 1;
      MMFAST_CHECK(a.B >= 0, kOp, ": expected cu_seqlens [B + 1], got ", shape_of(*cu_q));
      a.Nq = max_q, a.N1 = max_k;
      a.cu_q = integers("cu_seqlens_q", q, cu_q, a.B + 1);
      a.cu_k = integers("cu_seqlens_k", q, cu_k, a.B + 1);
      MMFAST_CHECK(!k2 && !lens && !lens2 && !valid2 && rule == AttentionRule::lengths, kOp, ": packed sequences take no second segment");
      if (cpu) {
        check_offsets("cu_seqlens_q", a.cu_q, a.B, q.size(0), a.Nq);
        check_offsets("cu_seqlens_k", a.cu_k, a.B, k.size(0), a.N1);
      }
      a.lse_stride_h = q.size(0);
    } else {
      a.B = q.size(0), a.Nq = q.size(1), a.N1 = k.size(1), a.N2 = k2 ? k2->size(1) : 0;
      splits = !k2 && !has_media(rule) && (has_text(rule) || number > 0 || lens2 || valid2);
      split = splits ? number : a.N1;
      if (splits) {
        MMFAST_CHECK(number >= 0 && number <= a.N1, kOp, ": num_queries ", number, " is not within the ", a.N1, " keys");
        a.N2 = a.N1 - number, a.N1 = number;
      }
      MMFAST_CHECK(!has_text(rule) || a.Nq <= a.N1 + a.N2, kOp, ": expected at most as many rows as keys, got ", a.Nq, " and ",
                   a.N1 + a.N2);
      a.lse_stride_h = a.Nq;
      a.lse_stride_b = a.H * a.Nq;
    }
    MMFAST_CHECK(a.Nq < (int64_t(1) << 31) && a.N1 < (int64_t(1) << 31) && a.N2 < (int64_t(1) << 31), kOp, ": 2^31 rows or keys and more");
    a.q = view(q), a.k1 = view(k), a.v1 = view(v);
    a.k2 = k2 ? view(*k2) : view(k, split), a.v2 = v2 ? view(*v2) : view(v, split);
    a.len1 = integers("key_lens", q, lens, a.B);
    a.len2 = integers(k2 ? "key2_lens" : "text_lens", q, lens2, a.B);
    if (valid2) {
      check_same_device(kOp, "q", q, "text_mask", *valid2);
      MMFAST_CHECK(valid2->scalar_type() == ScalarType::Byte && valid2->numel() == a.B * a.N2, kOp, ": expected text_mask [B=", a.B,
                   ", S=", a.N2, "], got ", shape_of(*valid2));
      valid2 = as_contiguous(*valid2);
      a.key2_valid = static_cast<const uint8_t*>(valid2->data_ptr());
    }
    if (has_media(rule)) {
      MMFAST_CHECK(number >= 1 && a.N1 % number == 0, kOp, ": the ", a.N1, " keys are no multiple of latents_per_media ", number);
      MMFAST_CHECK(text_time.has_value(), kOp, ": text_time is missing");
      a.latents = number;
      a.text_time = integers("text_time", q, text_time, a.B * a.Nq);
      if (cpu) check_range("text_time", a.text_time, a.B * a.Nq, a.N1 / number, "the number of images in k");
    }
    if (cpu && a.len1) check_range("key_lens", a.len1, a.B, a.N1, "the keys of k");
    if (cpu && a.len2) check_range(k2 ? "key2_lens" : "text_lens", a.len2, a.B, a.N2, k2 ? "the keys of k2" : "the text's keys");
    a.dropout_threshold = uint32_t(threshold);
    if (threshold) {
      MMFAST_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, kOp, ": dropout needs an int64 seed [1]");
      check_same_device(kOp, "q", q, "seed", *seed);
      a.seed = static_cast<const int64_t*>(seed->data_ptr());
    }
    return a;
  }

  Tensor new_lse() const {
    const ScalarType type = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    if (cu_q) return allocate(q, {q.size(1), q.size(0)}, type);
    return allocate(q, {q.size(0), q.size(2), q.size(1)}, type);
  }
};

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, optional<Tensor> k2, optional<Tensor> v2, optional<Tensor> lens,
                                     optional<Tensor> lens2, optional<Tensor> valid2, optional<Tensor> text_time, optional<Tensor> cu_q,
                                     optional<Tensor> cu_k, optional<Tensor> seed, int64_t rule, int64_t number, int64_t max_q,
                                     int64_t max_k, double scale, int64_t threshold) {
  Inputs in{q, k, v, k2, v2, lens, lens2, valid2, text_time, cu_q, cu_k, seed, AttentionRule(rule), number, max_q, max_k, scale, threshold};
  AttentionArgs a = in.check();
  Tensor out = allocate(q, q.sizes()), lse = in.new_lse();
  a.out = view(out);
  a.lse = lse.data_ptr();
  if (out.numel() == 0) return {out, lse};
  if (q.is_cuda()) {
    MMFAST_ON_CUDA(kOp, in.q, a, attention);
  } else {
    attention_cpu(a);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(optional<Tensor> grad_out, optional<Tensor> grad_lse, Tensor q,
                                                                      Tensor k, Tensor v, optional<Tensor> k2, optional<Tensor> v2,
                                                                      Tensor out, Tensor lse, optional<Tensor> lens, optional<Tensor> lens2,
                                                                      optional<Tensor> valid2, optional<Tensor> text_time,
                                                                      optional<Tensor> cu_q, optional<Tensor> cu_k, optional<Tensor> seed,
                                                                      int64_t rule, int64_t number, int64_t max_q, int64_t max_k,
                                                                      double scale, int64_t threshold, bool need_q, bool need_kv) {
  Inputs in{q, k, v, k2, v2, lens, lens2, valid2, text_time, cu_q, cu_k, seed, AttentionRule(rule), number, max_q, max_k, scale, threshold};
  AttentionBackwardArgs args{};
  AttentionArgs& a = args.forward;
  a = in.check();
  MMFAST_CHECK(out.dim() == q.dim() && out.numel() == q.numel() && out.scalar_type() == q.scalar_type(), kOp, ": out ", shape_of(out),
               " is not forward's");
  out = last_dim_contiguous(out);
  lse = as_contiguous(lse);
  MMFAST_CHECK(lse.numel() * a.D == q.numel(), kOp, ": lse ", shape_of(lse), " is not forward's");
  a.out = view(out);
  a.lse = lse.data_ptr();
  if (grad_out) {
    MMFAST_CHECK(grad_out->dim() == q.dim() && grad_out->numel() == q.numel() && grad_out->scalar_type() == q.scalar_type(), kOp,
                 ": expected a gradient like out ", shape_of(q), ", got ", shape_of(*grad_out));
    grad_out = last_dim_contiguous(*grad_out);
    args.grad_out = view(*grad_out);
  }
  if (grad_lse) {
    grad_lse = as_contiguous(as_type(*grad_lse, lse.scalar_type()));
    MMFAST_CHECK(grad_lse->numel() == lse.numel(), kOp, ": expected a gradient like lse ", shape_of(lse), ", got ", shape_of(*grad_lse));
    args.grad_lse = grad_lse->data_ptr();
  }
  auto grad = [&](const optional<Tensor>& t, bool needed) { return needed && t ? allocate(*t, t->sizes()) : allocate(q, {0}); };
  Tensor grad_q = grad(q, need_q), grad_k = grad(k, need_kv), grad_v = grad(v, need_kv), grad_k2 = grad(k2, need_kv),
         grad_v2 = grad(v2, need_kv);
  const auto result = std::make_tuple(grad_q, grad_k, grad_v, grad_k2, grad_v2);
  if (q.numel() == 0) {  // no rows: nothing flows to the keys
    for (Tensor t : {grad_k, grad_v, grad_k2, grad_v2}) fill_zero(t);
    return result;
  }
  if (need_q) args.grad_q = view(grad_q);
  if (need_kv) {
    args.grad_k1 = view(grad_k), args.grad_v1 = view(grad_v);
    if (k2) args.grad_k2 = view(grad_k2), args.grad_v2 = view(grad_v2);
    else if (in.splits) args.grad_k2 = view(grad_k, in.split), args.grad_v2 = view(grad_v, in.split);
  }
  if (!need_q && !need_kv) return result;
  if (q.is_cuda()) {
    MMFAST_ON_CUDA(kOp, in.q, args, attention_backward);
  } else {
    attention_backward_cpu(args);
  }
  return result;
}

// Shapes of merge_attention, packed [total, H, D] as one batch.
AttentionMergeArgs merge_args(Tensor& out_a, Tensor& lse_a, Tensor& out_b, Tensor& lse_b) {
  const char* op = "merge_attention";
  const bool packed = out_a.dim() == 3;
  MMFAST_CHECK(packed || out_a.dim() == 4, op, ": expected out_a [B, Nq, H, D] or [total, H, D], got ", shape_of(out_a));
  AttentionMergeArgs a{};
  a.dtype = dtype_of(op, "out_a", out_a);
  a.B = packed ? 1 : out_a.size(0), a.Nq = out_a.size(packed ? 0 : 1), a.H = out_a.size(-2), a.D = out_a.size(-1);
  const ScalarType wide = a.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  MMFAST_CHECK(same_shape(out_a, out_b) && out_a.scalar_type() == out_b.scalar_type(), op, ": out_a ", shape_of(out_a), " and out_b ",
               shape_of(out_b), " differ in shape or type");
  for (auto [name, t] : {std::pair{"lse_a", &lse_a}, {"lse_b", &lse_b}}) {
    check_same_device(op, "out_a", out_a, name, *t);
    MMFAST_CHECK(t->numel() == a.B * a.H * a.Nq && t->dim() == out_a.dim() - 1 && t->size(-1) == a.Nq && t->scalar_type() == wide, op,
                 ": expected ", name, packed ? " [H, total]" : " [B, H, Nq]", " in ", torch::headeronly::toString(wide), " beside out ",
                 shape_of(out_a), ", got ", shape_of(*t));
    *t = as_contiguous(*t);
  }
  check_same_device(op, "out_a", out_a, "out_b", out_b);
  out_a = last_dim_contiguous(out_a), out_b = last_dim_contiguous(out_b);
  a.out_a = view(out_a), a.out_b = view(out_b);
  a.lse_a = lse_a.data_ptr(), a.lse_b = lse_b.data_ptr();
  return a;
}

std::tuple<Tensor, Tensor> merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  AttentionMergeArgs a = merge_args(out_a, lse_a, out_b, lse_b);
  Tensor out = allocate(out_a, out_a.sizes()), lse = allocate(lse_a, lse_a.sizes());
  a.out = view(out);
  a.lse = lse.data_ptr();
  if (lse.numel() == 0) return {out, lse};
  if (out_a.is_cuda()) {
    MMFAST_ON_CUDA_PLAIN("merge_attention", out_a, a, attention_merge);
  } else {
    attention_merge_cpu(a);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_backward(optional<Tensor> grad_out, optional<Tensor> grad_lse, Tensor out_a, Tensor lse_a,
                                                          Tensor out_b, Tensor lse_b, Tensor out, Tensor lse) {
  AttentionMergeArgs a = merge_args(out_a, lse_a, out_b, lse_b);
  Tensor grad_a = allocate(out_a, out_a.sizes()), grad_b = allocate(out_b, out_b.sizes());
  Tensor grad_lse_a = allocate(lse_a, lse_a.sizes()), grad_lse_b = allocate(lse_b, lse_b.sizes());
  out = last_dim_contiguous(out);
  lse = as_contiguous(lse);
  a.out = view(out);
  a.lse = lse.data_ptr();
  if (grad_out) {
    grad_out = last_dim_contiguous(*grad_out);
    a.grad_out = view(*grad_out);
  }
  if (grad_lse) {
    grad_lse = as_contiguous(as_type(*grad_lse, lse.scalar_type()));
    a.grad_lse = grad_lse->data_ptr();
  }
  a.grad_out_a = view(grad_a), a.grad_out_b = view(grad_b);
  a.grad_lse_a = grad_lse_a.data_ptr(), a.grad_lse_b = grad_lse_b.data_ptr();
  if (lse.numel() > 0) {
    if (out_a.is_cuda()) {
      MMFAST_ON_CUDA_PLAIN("merge_attention", out_a, a, attention_merge_backward);
    } else {
      attention_merge_backward_cpu(a);
    }
  }
  return {grad_a, grad_lse_a, grad_b, grad_lse_b};
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? k2, Tensor? v2, Tensor? lens, Tensor? lens2, Tensor? valid2, Tensor? text_time, "
      "Tensor? cu_q, Tensor? cu_k, Tensor? seed, int rule, int number, SymInt max_q, SymInt max_k, float scale, int threshold) -> (Tensor, "
      "Tensor)");
  m.def(
      "attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? k2, Tensor? v2, Tensor out, Tensor "
      "lse, "
      "Tensor? lens, Tensor? lens2, Tensor? valid2, Tensor? text_time, Tensor? cu_q, Tensor? cu_k, Tensor? seed, int rule, int number, "
      "SymInt max_q, SymInt max_k, float scale, int threshold, bool need_q, bool need_kv) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)");
  m.def(
      "merge_attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor out, "
      "Tensor lse) -> (Tensor, Tensor, Tensor, Tensor)");
}

#define MMFAST_ATTENTION_IMPL(m)                                        \
  m.impl("attention", TORCH_BOX(&mmfast::attention));                   \
  m.impl("attention_backward", TORCH_BOX(&mmfast::attention_backward)); \
  m.impl("merge_attention", TORCH_BOX(&mmfast::merge));                 \
  m.impl("merge_attention_backward", TORCH_BOX(&mmfast::merge_backward));

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m){MMFAST_ATTENTION_IMPL(m)} STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) { MMFAST_ATTENTION_IMPL(m) }
