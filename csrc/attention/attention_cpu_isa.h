// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The inner loops of CPU attention, one instance per instruction set (attention_cpu_isa.cpp is compiled once for each).
// This header is shared with code compiled for newer machines: keep it free of inline functions and of the standard library's
// templates, or the linker may pick the AVX-512 copy of something that a baseline machine also runs.
//
// A tile is n rows of q (n one or two vectors long) against up to kAttentionMostKeys keys, held transposed: s[key * n + row]. So a row's
// softmax runs along the keys with a row in each lane, and no sum crosses lanes.
#pragma once
#include <cstdint>

#include "../common/dtype.h"

namespace mmfast {

// Keys are walked in blocks of 64, the last one a little longer rather than followed by a sliver (a class token makes 257 keys of 256).
constexpr int kAttentionKeys = 64;
constexpr int kAttentionMostKeys = kAttentionKeys + 16;

// Which elements of a tile count, and with what factor.
struct AttentionTileMask {
  const int32_t* limit;  // [n] or null: lane i sees keys before limit[i] of this block
  const uint8_t* valid;  // [keys] or null
  const float* keep;     // [keys, n] or null: dropout's factor
};

// One step of the online softmax, in units of log2: weights exp2(c s - m) replace s.
struct AttentionSoftmaxTile {
  float* s;  // [keys, n]
  int64_t keys, n;
  float c;  // scale log2(e), not 0
  AttentionTileMask mask;
  float* top;       // [n] running maximum of c s
  float* total;     // [n] running sum of the weights (before dropout)
  float* rescale;   // [n] out: what the accumulated output must be multiplied by
  uint32_t* pairs;  // null, or [(keys + 1) / 2, n]: weights as bf16, keys 2 j and 2 j + 1 in the low and high half
};

// Weights and their gradient from the recomputed scores.
struct AttentionGradTile {
  float* s;   // [keys, n] in: scores; out: dropped weights
  float* dp;  // [keys, n] in: grad_out . v; out: gradient of the scores before scaling
  int64_t keys, n;
  float c;
  AttentionTileMask mask;
  const float* lse2;   // [n] lse log2(e); +inf where a row sees no key
  const float* delta;  // [n] out . grad_out - grad_lse
  uint16_t* p_rows;    // null, or [keys, n] bf16
  uint16_t* ds_rows;   // null, or [keys, n] bf16
  uint32_t* ds_pairs;  // null, or [(keys + 1) / 2, n] bf16 pairs along the keys
};

struct AttentionCpuKernels {
  int lanes;  // floats a vector; a tile has at most 2 * lanes rows
  // c[i, j] = or += sum_t a[i * row + t * col] b[t * ldb + j];  n a multiple of lanes
  void (*gemm)(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, float* c,
               int64_t ldc, bool accumulate);
  // The same with a bf16 pair for each a and b: k counts pairs. Null where there is no bf16 dot product.
  void (*gemm_bf16)(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t row, int64_t col, const uint32_t* b, int64_t ldb, float* c,
                    int64_t ldc, bool accumulate);
  bool (*softmax)(const AttentionSoftmaxTile&);  // whether any rescale differs from 1
  void (*grad)(const AttentionGradTile&);
  // keep[j * n + i] for keys first_key + j (first_key a multiple of 32) and rows first_row + i; see attention_random.
  void (*dropout)(float* keep, int64_t keys, int64_t n, int64_t seed, int64_t bh, int64_t first_row, int64_t first_key, int segment,
                  uint32_t threshold);
  // rows of D elements, `stride` apart -> float [padded_rows, width], zero beyond
  void (*load_rows)(const void* data, DType, int64_t stride, int64_t rows, int64_t D, float* to, int64_t padded_rows, int64_t width);
  // the same for bf16, unconverted; width in elements, even
  void (*copy_rows)(const uint16_t* data, int64_t stride, int64_t rows, int64_t D, uint16_t* to, int64_t padded_rows, int64_t width);
  // to[c * rows + r] = from[r * width + c], 32-bit words; rows a multiple of lanes
  void (*transpose)(const uint32_t* from, int64_t rows, int64_t width, uint32_t* to);
  // to[r / 2 * columns + c] = from[r, c] | from[r + 1, c] << 16, for r even; from is [rows, width] with rows even
  void (*interleave)(const uint16_t* from, int64_t rows, int64_t width, int64_t columns, uint32_t* to);
  // a row of floats times factor -> D elements
  void (*store_row)(const float* from, float factor, int64_t D, DType, void* to, int64_t offset);
  void (*scale_rows)(float* rows, int64_t count, int64_t width, const float* factor);
  float (*dot)(const float* a, const float* b, int64_t count);
};

const AttentionCpuKernels* attention_cpu_kernels_baseline();
const AttentionCpuKernels* attention_cpu_kernels_avx2();
const AttentionCpuKernels* attention_cpu_kernels_avx512();
const AttentionCpuKernels* attention_cpu_kernels_avx512_bf16();

}  // namespace mmfast
