// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The kernels of attention_tile.cuh for bf16; a file a type, so that they compile side by side.
#define MMFAST_ATTENTION_KERNELS
#include "attention_tile.cuh"

namespace mmfast {
MMFAST_ATTENTION_INSTANCES(DType::bf16)
}
