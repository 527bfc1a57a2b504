// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// torch's current CUDA stream and device guard through its stable C interface, with no CUDA header and no link to libtorch_cuda.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "check.h"

// Lives in libtorch_cuda, which a CPU build of torch lacks: bound weakly, so that one binary loads under both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace mmfast {

inline void* current_stream(const char* op, const Tensor& t) {
  MMFAST_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

}  // namespace mmfast
