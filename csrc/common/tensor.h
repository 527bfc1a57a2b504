// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// New tensors, and tensors brought into order. Each of torch::stable's own functions for it looks an op up by name, and a call of ours
// makes several: together they cost more than a small kernel. Here memory comes from torch's C function, and what is in order is left
// alone.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace mmfast {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Uninitialised and contiguous, on x's device.
inline Tensor allocate(const Tensor& x, Sizes sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), code, device, x.get_device_index(), &made));
  return Tensor(made);
}
inline Tensor allocate(const Tensor& x, Sizes sizes) { return allocate(x, sizes, x.scalar_type()); }

inline void fill_zero(const Tensor& t) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get())); }

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor as_type(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const Sizes x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

}  // namespace mmfast
