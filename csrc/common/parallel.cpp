// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mmfast {

int64_t num_threads() { return torch::stable::get_num_threads(); }

// The loop runs inside libtorch: an extension's own OpenMP pragma would depend on flags and on which runtime it linked.
void parallel_for_impl(int64_t n, int64_t grain, RangeFn f) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { f(begin, end); });
}

}  // namespace mmfast
