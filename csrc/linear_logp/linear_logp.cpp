// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The torch side of log-probabilities: schemas, checks, then the CPU or CUDA launcher of linear_logp.h. The walk over the vocabulary, its
// products and its autograd rule are in mmfast/ops/linear_logp.py.
#include "linear_logp.h"

#include "../common/check.h"
#ifdef MMFAST_CUDA_LINEAR_LOGP
#include "../common/stream.h"
#endif

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
  const ScalarType type = z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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
#ifdef MMFAST_CUDA_LINEAR_LOGP
    torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    const int status = logp_update_cuda(a, current_stream(op, z));
    MMFAST_CHECK(status == 0, op, ": CUDA launch failed with error ", status);
#else
    MMFAST_CHECK(false, op, ": mmfast was built without CUDA; rebuild with nvcc on PATH (MMFAST_CUDA=on)");
#endif
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
#ifdef MMFAST_CUDA_LINEAR_LOGP
    torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    const int status = logp_grad_cuda(a, current_stream(op, z));
    MMFAST_CHECK(status == 0, op, ": CUDA launch failed with error ", status);
#else
    MMFAST_CHECK(false, op, ": mmfast was built without CUDA; rebuild with nvcc on PATH (MMFAST_CUDA=on)");
#endif
  } else {
    logp_grad_cpu(a);
  }
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
}

#define MMFAST_LOGP_IMPL(m)                           \
  m.impl("logp_update_", TORCH_BOX(&mmfast::update)); \
  m.impl("logp_grad_", TORCH_BOX(&mmfast::grad));

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m){MMFAST_LOGP_IMPL(m)} STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) { MMFAST_LOGP_IMPL(m) }
