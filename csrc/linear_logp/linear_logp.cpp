// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The torch side of log-probabilities: schemas, checks, then the CPU or CUDA launcher of linear_logp.h. The walk over the vocabulary, its
// products and its autograd rule are in mmfast/ops/linear_logp.py.
#include "linear_logp.h"

#include <utility>

#include "../common/device.h"

namespace mmfast {
namespace {

using std::optional;

LogpBlock block(const char* op, const char* name, const Tensor& t, const Tensor& z) {
  check_same_device(op, "z", z, name, t);
  MMFAST_CHECK(t.dim() == 2 && t.size(0) == z.size(0) && t.size(1) == z.size(1) && t.scalar_type() == z.scalar_type(), op, ": expected ",
               name, " ", shape_of(z), " ", torch::headeronly::toString(z.scalar_type()), " like z, got ", shape_of(t), " ",
               torch::headeronly::toString(t.scalar_type()));
  MMFAST_CHECK(t.size(1) <= 1 || t.stride(1) == 1, op, ": expected the vocabulary of ", name, " contiguous");
  return {t.data_ptr(), t.stride(0)};
}

LogpRows rows(const char* op, const Tensor& z, const Tensor& labels, int64_t first, int64_t V, double temperature, double softcap,
              int64_t ignore_index) {
  MMFAST_CHECK(z.dim() == 2, op, ": expected z [n, C], got ", shape_of(z));
  check_same_device(op, "z", z, "labels", labels);
  MMFAST_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == z.size(0), op,
               ": expected labels int64 [n=", z.size(0), "], got ", torch::headeronly::toString(labels.scalar_type()), " ",
               shape_of(labels));
  MMFAST_CHECK(labels.size(0) <= 1 || labels.stride(0) == 1, op, ": expected contiguous labels");
  MMFAST_CHECK(first >= 0 && first + z.size(1) <= V && V < (int64_t(1) << 24), op, ": columns ", first, " to ", first + z.size(1),
               " are not within a vocabulary of ", V, " (at most 2^24)");
  MMFAST_CHECK(temperature > 0 && softcap >= 0, op, ": expected temperature > 0 and softcap >= 0, got ", temperature, " and ", softcap);
  const auto* values = static_cast<const int64_t*>(labels.data_ptr());
  if (!z.is_cuda() && first == 0)
    for (int64_t i = 0; i < labels.size(0); ++i)
      MMFAST_CHECK(values[i] == ignore_index || (values[i] >= 0 && values[i] < V), op, ": label ", values[i], " of row ", i,
                   " is outside the vocabulary of ", V, " and is not ignore_index ", ignore_index);
  return {dtype_of(op, "z", z), z.size(0), z.size(1), first, V, temperature, softcap, values, ignore_index};
}

void* wide(const char* op, const char* name, const Tensor& t, const Tensor& z, int64_t count) {
  check_same_device(op, "z", z, name, t);
  const ScalarType type = wide_type(z);
  MMFAST_CHECK(t.scalar_type() == type && t.numel() == count * z.size(0) && t.is_contiguous(), op, ": expected ", name, " contiguous ",
               torch::headeronly::toString(type), " with ", count, " numbers a row, got ", shape_of(t));
  return t.data_ptr();
}

void update(Tensor z, optional<Tensor> z0, Tensor labels, int64_t first, int64_t V, bool wants_more, double temperature, double softcap,
            int64_t ignore_index, Tensor state, Tensor out) {
  const char* op = "logp_update_";
  LogpUpdateArgs a{rows(op, z, labels, first, V, temperature, softcap, ignore_index),
                   block(op, "z", z, z),
                   z0 ? block(op, "z0", *z0, z) : LogpBlock{},
                   wants_more,
                   first == 0,
                   first + z.size(1) == V,
                   wide(op, "state", state, z, kLogpStates),
                   wide(op, "out", out, z, kLogpOutputs)};
  if (a.rows.n == 0) return;
  if (z.is_cuda()) {
    MMFAST_ON_CUDA_PLAIN(op, z, a, logp_update);
  } else {
    logp_update_cpu(a);
  }
}

void grad(Tensor z, optional<Tensor> z0, Tensor to, Tensor labels, int64_t first, int64_t V, double temperature, double softcap,
          int64_t ignore_index, Tensor out, optional<Tensor> g, optional<Tensor> r, optional<Tensor> e, optional<Tensor> q,
          optional<Tensor> k) {
  const char* op = "logp_grad_";
  const auto upstream = [&](const char* name, const optional<Tensor>& t) { return t ? wide(op, name, *t, z, 1) : nullptr; };
  LogpGradArgs a{rows(op, z, labels, first, V, temperature, softcap, ignore_index),
                 block(op, "z", z, z),
                 z0 ? block(op, "z0", *z0, z) : LogpBlock{},
                 block(op, "grad", to, z),
                 wide(op, "out", out, z, kLogpOutputs),
                 upstream("the gradient of logp", g),
                 upstream("the gradient of lse", r),
                 upstream("the gradient of entropy", e),
                 upstream("the gradient of squares", q),
                 upstream("the gradient of kl", k)};
  if (a.rows.n == 0) return;
  if (z.is_cuda()) {
    MMFAST_ON_CUDA_PLAIN(op, z, a, logp_grad);
  } else {
    logp_grad_cpu(a);
  }
}

// CUDA only: on the CPU looking at the factor costs nothing, and plain torch does.
void scale(Tensor values, Tensor factor) {
  const char* op = "logp_scale_";
  check_same_device(op, "values", values, "factor", factor);
  MMFAST_CHECK(values.is_contiguous() && reinterpret_cast<uintptr_t>(values.data_ptr()) % 16 == 0, op,
               ": expected contiguous values on a boundary of 16 bytes, got ", shape_of(values));
  MMFAST_CHECK(factor.numel() == 1 && factor.scalar_type() == wide_type(values), op, ": expected one factor in ",
               torch::headeronly::toString(wide_type(values)), ", got ", torch::headeronly::toString(factor.scalar_type()), " ",
               shape_of(factor));
  const LogpScaleArgs a{dtype_of(op, "values", values), values.numel(), values.data_ptr(), factor.data_ptr()};
  if (a.count > 0) MMFAST_ON_CUDA_PLAIN(op, values, a, logp_scale);
}

// The CPU's fp32 products; the torch side of logp_product_cpu.
void product(Tensor a, Tensor b, Tensor c, bool accumulate) {
  const char* op = "logp_product_";
  for (auto [name, t] : {std::pair{"a", &a}, {"b", &b}, {"c", &c}}) {
    MMFAST_CHECK(!t->is_cuda() && t->scalar_type() == ScalarType::Float && t->dim() == 2, op, ": expected ", name,
                 " a float32 matrix on the CPU, got ", torch::headeronly::toString(t->scalar_type()), " ", shape_of(*t));
    MMFAST_CHECK(t == &c ? t->size(1) <= 1 || t->stride(1) == 1 : t->stride(0) == 1 || t->stride(1) == 1, op, ": expected ", name,
                 " contiguous along ", t == &c ? "its rows" : "one side");
  }
  MMFAST_CHECK(a.size(1) == b.size(0) && c.size(0) == a.size(0) && c.size(1) == b.size(1), op,
               ": expected a [m, k], b [k, n], c [m, n], got ", shape_of(a), ", ", shape_of(b), ", ", shape_of(c));
  logp_product_cpu({a.size(0), b.size(1), a.size(1), static_cast<const float*>(a.data_ptr()), a.stride(0), a.stride(1),
                    static_cast<const float*>(b.data_ptr()), b.stride(0), b.stride(1), static_cast<float*>(c.data_ptr()), c.stride(0),
                    accumulate});
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def(
      "logp_update_(Tensor z, Tensor? z0, Tensor labels, int first, int V, bool wants_more, float temperature, float softcap, int "
      "ignore_index, Tensor(a!) state, Tensor(b!) out) -> ()");
  m.def(
      "logp_grad_(Tensor z, Tensor? z0, Tensor(a!) to, Tensor labels, int first, int V, float temperature, float softcap, int "
      "ignore_index, "
      "Tensor out, Tensor? g, Tensor? r, Tensor? e, Tensor? q, Tensor? k) -> ()");
  m.def("logp_product_(Tensor a, Tensor b, Tensor(a!) c, bool accumulate) -> ()");
  m.def("logp_scale_(Tensor(a!) values, Tensor factor) -> ()");
}

#define MMFAST_LOGP_IMPL(m)                           \
  m.impl("logp_update_", TORCH_BOX(&mmfast::update)); \
  m.impl("logp_grad_", TORCH_BOX(&mmfast::grad));

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  MMFAST_LOGP_IMPL(m)
  m.impl("logp_product_", TORCH_BOX(&mmfast::product));
}
STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) {
  MMFAST_LOGP_IMPL(m)
  m.impl("logp_scale_", TORCH_BOX(&mmfast::scale));
}
