// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Argument checks of the torch side: each failure is one sentence that names the op, what it expected and what came.
#pragma once
#include <torch/csrc/stable/library.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "tensor.h"

namespace mmfast {

// Like torch's check, without the source location that torch puts in front of the sentence.
#define MMFAST_CHECK(cond, ...) \
  if (!(cond)) throw std::runtime_error(::mmfast::sentence(__VA_ARGS__))

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  return s.str();
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ']';
  return s.str();
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      return DType::f64;
    default:
      MMFAST_CHECK(false, op, ": expected ", name, " of type float32, float16, bfloat16 or float64, got ",
                   torch::headeronly::toString(t.scalar_type()));
  }
  return DType::f32;
}

inline void check_same_device(const char* op, const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  MMFAST_CHECK(a.is_cuda() == b.is_cuda() && (!a.is_cuda() || a.get_device_index() == b.get_device_index()), op, ": ", a_name, " and ",
               b_name, " are on different devices; move one to the other's");
}

}  // namespace mmfast
