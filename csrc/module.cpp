// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The Python module `mmfast._C`: facts about the build. Importing it runs every op's registration with torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/device.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of mmfast; the ops live in torch.ops.mmfast.";
  m.def(
      "build_info",
      [] {
        std::vector<std::string> isas;
        for (int i = 0; i <= int(mmfast::cpu_isa_best()); ++i) isas.emplace_back(mmfast::cpu_isa_name(mmfast::CpuIsa(i)));
        py::dict d;
        d["version"] = MMFAST_VERSION;
        d["compiler"] = MMFAST_COMPILER;
        d["torch_headers"] = MMFAST_TORCH_VERSION;
        d["torch_minimum"] = "2.10";
        d["cuda"] = MMFAST_CUDA_VERSION[0] ? py::object(py::str(MMFAST_CUDA_VERSION)) : py::none();
        d["cuda_archs"] = MMFAST_CUDA_ARCHS;
        d["cpu_isas"] = isas;
        d["cpu_isa"] = mmfast::cpu_isa_name(mmfast::cpu_isa_active());
        return d;
      },
      "What this binary holds, and which CPU instruction set its kernels use on this machine.");
  m.def("force_cpu_isa", &mmfast::force_cpu_isa, py::arg("name"),
        "Use the kernels of one instruction-set level ('baseline', 'avx2', 'avx512', 'avx512_bf16', or 'auto' for the best).");
#ifdef MMFAST_CUDA
  m.def(
      "cuda_stream", [](int32_t device) { return reinterpret_cast<uintptr_t>(mmfast::current_stream("cuda_stream", device)); },
      py::arg("device"), "The address of torch's current CUDA stream, as the kernels get it.");
#endif
}
