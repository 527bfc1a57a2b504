// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// The inner loops of the CPU kernels, one instance per instruction set (vq_cpu_isa.cpp is compiled once for each).
// This header is shared with code compiled for newer machines: keep it free of inline functions and of the standard library's
// templates, or the linker may pick the AVX-512 copy of something that a baseline machine also runs.
#pragma once
#include <cstdint>

#include "../common/dtype.h"

namespace mmfast {

constexpr int kVqMaxLanes = 32;
constexpr int kVqMaxTileRows = 12;

// What a row knows after some panels: per lane (a code's index modulo the panel width) the smallest lower bound, its code, and the
// second smallest bound.
struct VqLanes {
  float best[kVqMaxLanes];
  float second[kVqMaxLanes];
  int32_t index[kVqMaxLanes];
};

// One tile of rows against a run of packed panels (see vq_cpu.cpp for the layout and the bound).
struct VqScreenTile {
  const void* x;          // [rows, ldx] float, or bf16 pairs as uint32 [rows, ldx]
  int64_t ldx;            // in floats / pairs
  const void* panels;     // [panel_count, depth, panel_width] float, or bf16 pairs
  int64_t depth;          // D floats / ceil(D / 2) pairs
  const float* norms;     // [panel_count, panel_width]
  const float* radius_a;  // [panel_count]   the bound of a panel for a row is  alpha * a + beta * b + c
  const float* radius_b;
  const float* radius_c;
  const float* alpha;  // [rows]
  const float* beta;   // [rows]
  int64_t panel_count;
  int32_t first_code;  // index of the first code of the first panel
  int rows;            // 1 .. tile_rows
  VqLanes* lanes;      // [rows]
};

// One vector lowered to what the products read.
struct VqLowered {
  double norm2;      // ||v||^2 of the given vector, shifted and scaled
  double kept2;      // ||v^||^2 of what is kept of it
  double residual2;  // ||v - v^||^2
};

struct VqCpuKernels {
  int panel_width;  // codes a panel: two vectors
  int tile_rows;    // rows a tile
  void (*screen_f32)(const VqScreenTile&);
  void (*screen_bf16)(const VqScreenTile&);  // null where there is no bf16 dot product
  // `count` strided elements -> double
  void (*load_row)(const void* data, DType, int64_t offset, int64_t stride, int64_t count, double* out);
  double (*square_distance)(const double* x, const double* y, int64_t count);
  double (*dot)(const double* x, const double* y, int64_t count);
  // factor * round((x - mean) * scale), mean may be null; fp32 words, or bf16 pairs in ceil(count / 2) words. The factor is a power of two.
  VqLowered (*lower_f32)(const double* x, const double* mean, double scale, float factor, int64_t count, uint32_t* out);
  VqLowered (*lower_bf16)(const double* x, const double* mean, double scale, float factor, int64_t count, uint32_t* out);
  // tile[d * panel_width + c] = rows[c * depth + d]
  void (*transpose_panel)(const uint32_t* rows, int64_t depth, uint32_t* tile);
};

const VqCpuKernels* vq_cpu_kernels_baseline();
const VqCpuKernels* vq_cpu_kernels_avx2();
const VqCpuKernels* vq_cpu_kernels_avx512();
const VqCpuKernels* vq_cpu_kernels_avx512_bf16();

}  // namespace mmfast
