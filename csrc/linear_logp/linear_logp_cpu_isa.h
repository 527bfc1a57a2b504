// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Inner loops of log-probabilities on the CPU, one instance per instruction set (linear_logp_cpu_isa.cpp is compiled once for each). Shared
// with code compiled for newer machines: no inline functions, no templates of the standard library here.
#pragma once
#include <cstdint>

#include "../common/dtype.h"

namespace mmfast {

// One row's share of a block, in units of z. `top` etc. as in LogpState; the row's own numbers are read and written in place.
struct LogpRowState {
  float top, sum, dot, square;
  int64_t best;
  float top0, sum0, cross;
  float label, label0;  // set by the block that holds the label
};

struct LogpCpuKernels {
  // Folds `count` logits (and z0's, or null) starting at vocabulary index `first` into the state; the label is logit `at`, if there.
  void (*update)(const void* z, const void* z0, DType, int64_t count, int64_t first, int64_t at, float temperature, float softcap,
                 bool wants_more, LogpRowState*);
  // grad[j] = (p (a + b y + c p) - k p0) dz/dlogit for one row's block, y = z - top, p = exp(y - log_sum); the label's own term is the
  // caller's.
  void (*grad)(const void* z, const void* z0, void* grad, DType, int64_t count, float temperature, float softcap, float top, float log_sum,
               float top0, float log_sum0, float a, float b, float c, float k);

  // Products of packed float matrices. a: panels of tile_rows rows, [panel][k][tile_rows]; b: panels of tile_columns columns,
  // [panel][k][tile_columns]; both filled up with zeros.
  int tile_rows, tile_columns;
  // from[i * row + t * col] for i < m, t < k
  void (*pack_a)(const float* from, int64_t row, int64_t col, int64_t m, int64_t k, float* to);
  // from[t * row + j * col] for t < k, j < n
  void (*pack_b)(const float* from, int64_t row, int64_t col, int64_t k, int64_t n, float* to);
  // c [m, n] = or += a b. `a_stays`: a panel of a meets all of b before the next one (else a panel of b all of a).
  void (*block)(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c, int64_t ldc, bool accumulate, bool a_stays);
};

const LogpCpuKernels* logp_cpu_kernels_baseline();
const LogpCpuKernels* logp_cpu_kernels_avx2();
const LogpCpuKernels* logp_cpu_kernels_avx512();
const LogpCpuKernels* logp_cpu_kernels_avx512_bf16();

}  // namespace mmfast
