// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// How the torch side of an op reaches its CUDA launcher: device guard, torch's current stream, workspace, status; with no CUDA header and
// no link to libtorch_cuda. Without CUDA code the same line says how to rebuild.
#pragma once
#include "check.h"

namespace mmfast {

inline ScalarType wide_type(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

}  // namespace mmfast

#ifdef MMFAST_CUDA
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace mmfast {

// The function lives in libtorch_cuda, which a CPU build of torch lacks and which Python loads for itself alone, so that neither a strong
// nor a weak reference from here would find it: it is asked of the library that is loaded already.
inline void* current_stream(const char* op, int32_t device) {
  using Get = AOTITorchError (*)(int32_t device, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  MMFAST_CHECK(get, op, ": this torch was built without CUDA; install a CUDA build of torch, or move the tensors to the CPU");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// Runs a launcher on x's device; the first form gives it the workspace that it asks for.
template <class Args>
void launch_on_cuda(const char* op, const Tensor& x, const Args& args, size_t (*bytes)(const Args&),
                    int (*launch)(const Args&, void*, void*)) {
  const int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t size = int64_t(bytes(args));
  std::optional<Tensor> workspace;
  if (size) workspace = allocate(x, {size}, ScalarType::Byte);
  const int status = launch(args, size ? workspace->data_ptr() : nullptr, current_stream(op, device));
  MMFAST_CHECK(status == 0, op, ": CUDA launch failed with error ", status);
}
template <class Args>
void launch_on_cuda(const char* op, const Tensor& x, const Args& args, int (*launch)(const Args&, void*)) {
  const int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const int status = launch(args, current_stream(op, device));
  MMFAST_CHECK(status == 0, op, ": CUDA launch failed with error ", status);
}

}  // namespace mmfast

#define MMFAST_ON_CUDA(op, x, args, name) ::mmfast::launch_on_cuda(op, x, args, &name##_cuda_workspace, &name##_cuda)
#define MMFAST_ON_CUDA_PLAIN(op, x, args, name) ::mmfast::launch_on_cuda(op, x, args, &name##_cuda)
#else
#define MMFAST_ON_CUDA(op, x, args, name)                                                                                 \
  MMFAST_CHECK(false, op,                                                                                                 \
               ": the tensors are on a CUDA device but this mmfast was built without CUDA; rebuild it with nvcc on PATH " \
               "(MMFAST_CUDA=on pip install --no-build-isolation --force-reinstall .) or move them to the CPU")
#define MMFAST_ON_CUDA_PLAIN(op, x, args, name) MMFAST_ON_CUDA(op, x, args, name)
#endif
