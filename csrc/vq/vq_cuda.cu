// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Vector quantisation on the GPU.
//
// Nearest code. The answer is the fp64 argmin over the given inputs, ties to the lowest index, at the price of one fp16 matrix product
// (twice the tensor rate of tf32, six times that of 3xTF32) that never reaches memory. With e* = code - mean and x* = row - mean (l2) or
// x* = row (cosine, inner product: x.mean is the same for every code), and x^, e^ their fp16 roundings under power-of-two scales,
//     score_j = n_j - 2 x^.e^_j,      n_j = ||e*_j||^2 for l2, 0 otherwise,
// differs from what is minimised, up to a constant of the row, by at most
//     2 (||x^|| R + (r + g ||x^||) E) + c      R = max ||e* - e^||, E = max ||e*||, ||e^|| over a panel of codes,  r = ||x* - x^||,
// where g covers the accumulation and c the remaining roundings: linear in two scalars a row and three a panel, so an outlier code loosens
// its own panel only. Each lane keeps, over the codes that it meets, the smallest lower bound, its code, and the second smallest bound.
// U = min over lanes (smallest bound + 2 radius) is above the minimum, so the argmin is among the codes with a bound <= U: lanes whose
// smallest bound is <= U name their code; a lane whose second one is <= U too may hide others, and is gone through again: those of its
// codes with a bound <= U are compared as well. (These bounds come from a second sum of the same products in another order, which g covers
// as it covers any.) Anything not finite hides everything. Every bound is rounded outwards; nothing depends on the order of a
// floating-point atomic, as there is none.
//
// The kernels, in order:
//   code_factor, code_mean, code_largest, code_pack   a warp a code, a block a panel: shift, scales, fp16 codes, radii; K D work, small
//   row_pack    a block 32 rows, any layout and type: fp16 rows, their scale and radius. Costs one read of x (the second comes from a
//               cache) and a half-size write, and leaves the screen a single instance that copies nothing but ready-made 8 KB tiles.
//   screen      a CTA 128 rows x a run of panels (all of them unless rows are few), four warps of 64 x 64; rows stay in shared memory while
//               D <= 256, codes stream through cp.async. The epilogue is six instructions an element in registers; two CTAs a
//               multiprocessor overlap it with each other's products. Bound by the tensor pipe; codes come from L2.
//   decide      8 to 32 threads a row: merge the lanes, and compare in fp64 where a few lanes name a code each. Rows with a lane that may
//               hide codes are listed, so that they spread over the device instead of waiting for the block that found them.
//   search      a block a listed row: the bounds of all codes of those lanes once more, and in fp64 those <= U, usually two.
//   emit        a block 32 rows: reads x once more for the quantised output, distances and squared error, whose partial sums mean_error
//               adds in a fixed order.
// The list's order is whatever the atomic counter gave; its rows do not know of each other.
//
// Statistics. A stable counting sort of the indices (a warp a run of rows, no atomics), then a walk through the sorted rows in equal
// spans, whatever the sizes of the clusters: a collapsed codebook costs no more than a balanced one. Codes that cross a span's border are
// put together from the spans' partial sums in order. All sums in fp64; bound by reading x once.
//
// Sources: Higham, Accuracy and Stability of Numerical Algorithms, ch. 3 (inner product error); VQ-VAE (arXiv:1711.00937); the rotation
// trick (arXiv:2410.06424).
#include "../common/cuda.cuh"
#include "vq.h"

namespace mmfast {
namespace {

constexpr int kTile = 128;  // rows of a CTA, codes of a panel
constexpr int kStep = 32;   // depth of one pipeline step: 64 bytes a row
constexpr int kTileBytes = kTile * kStep * 2;
constexpr int kScreenThreads = 128;
constexpr int kMaxResidentDepth = 256;
constexpr int kLanes = 8;  // lanes that share a row: 2 warps x 4 columns of the mma fragment
constexpr int kLaneCodes = kTile / kLanes;
constexpr int64_t kChunkWaves = 4;  // rows whose fp16 copies and lanes are alive at a time: as many as keep the device busy four times over
constexpr int kBlockRows = 32;      // rows of a block in the memory-bound kernels
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWideThreads = 1024, kWideWarps = kWideThreads / 32;  // of kernels with fewer blocks than there are multiprocessors
constexpr float kInf = __builtin_inff();
constexpr double kNaN = __builtin_nan("");
constexpr double kLargestDouble = 0x1.fffffffffffffp1023;

// A row as the screen sees it. state: why a row is special.
enum RowState : int { kSearch = 0, kMasked = 1, kNotFinite = 2, kAllEqual = 3 };
struct RowScalars {
  float alpha, beta, multiplier;
  int state;
};
struct PanelScalars {
  float residual, norm, slack, multiplier;
};
__device__ float radius(const RowScalars& row, const PanelScalars& panel) {
  return fmaf(row.alpha, panel.residual, fmaf(row.beta, panel.norm, panel.slack));
}

// Where element (row, k) of a 128 x 32 tile lies, in halves. Rows of 64 bytes, their 16-byte chunks exchanged so that the 8 rows of an
// ldmatrix fall on different banks; tiles are stored in this order, so a copy to shared memory is linear.
__device__ int tile_at(int row, int k) { return row * kStep + ((((k >> 3) ^ (row >> 1)) & 3) << 3) + (k & 7); }

// ---- loads of any type

// out[u] = data[offset[u]], 0 where the offset is negative. One branch on the type for all of them, so that the loads overlap.
template <int U>
__device__ void gather(const void* data, DType type, const int64_t (&offset)[U], double (&out)[U]) {
  switch (type) {
    case DType::f32:
#pragma unroll
      for (int u = 0; u < U; ++u) out[u] = offset[u] < 0 ? 0.0 : double(static_cast<const float*>(data)[offset[u]]);
      break;
    case DType::f16:
#pragma unroll
      for (int u = 0; u < U; ++u) out[u] = offset[u] < 0 ? 0.0 : double(f16_to_float(static_cast<const uint16_t*>(data)[offset[u]]));
      break;
    case DType::bf16:
#pragma unroll
      for (int u = 0; u < U; ++u) out[u] = offset[u] < 0 ? 0.0 : double(bf16_to_float(static_cast<const uint16_t*>(data)[offset[u]]));
      break;
    default:
#pragma unroll
      for (int u = 0; u < U; ++u) out[u] = offset[u] < 0 ? 0.0 : static_cast<const double*>(data)[offset[u]];
  }
}

// How a block deals out its rows: a thread takes kRuns runs of kRun columns of a row at a time. Where columns are contiguous, `width` lanes
// share a row and meet by shuffles alone; else a lane is a row, so that the loads of a warp are contiguous, and the warps share its
// columns.
constexpr int kRun = 4, kRuns = 2, kValues = kRun * kRuns;
struct Walk {
  int width;  // 0: a lane is a row
  __device__ explicit Walk(const VqRows& x) : width(x.stride_d != 1 ? 0 : x.D > 16 * kRun ? 32 : x.D > 8 * kRun ? 16 : 8) {}
  __device__ int turns() const { return width ? kBlockRows * width / kThreads : 1; }
  __device__ int row(int turn) const { return width ? turn * (kThreads / width) + int(threadIdx.x) / width : int(threadIdx.x) % 32; }
  __device__ bool speaks() const { return width ? threadIdx.x % width == 0 : threadIdx.x < 32; }  // one thread a row
  // First column, distance of the second run from the first, distance of the next pair.
  __device__ int column() const { return width ? int(threadIdx.x) % width * kRun : int(threadIdx.x) / 32 * kValues; }
  __device__ int apart() const { return width ? width * kRun : kRun; }
  __device__ int step() const { return (width ? width : kWarps) * kValues; }

  using Scratch = double[kWarps][32];
  template <class Combine>
  __device__ double reduce(double v, Scratch& scratch, Combine combine) const {
    if (width) {
      for (int m = width / 2; m; m /= 2) v = combine(v, __shfl_xor_sync(kFullWarp, v, m));
      return v;
    }
    const int lane = int(threadIdx.x) % 32;
    __syncthreads();
    scratch[threadIdx.x / 32][lane] = v;
    __syncthreads();
    v = scratch[0][lane];
    for (int w = 1; w < kWarps; ++w) v = combine(v, scratch[w][lane]);
    return v;
  }
  __device__ double sum(double v, Scratch& scratch) const {
    return reduce(v, scratch, [](double a, double b) { return a + b; });
  }
  __device__ double max(double v, Scratch& scratch) const {
    return reduce(v, scratch, [](double a, double b) { return a > b ? a : b; });
  }
};

// Whether the row's runs can be moved as a whole. offset < 0 marks a row that is not there.
__device__ bool in_one_piece(const VqRows& x, int64_t offset) {
  return x.stride_d == 1 && (x.D | offset) % kRun == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// The runs at columns d and d + apart, 0 where there is nothing.
__device__ void load_runs(const VqRows& x, int64_t offset, int64_t d, int apart, double (&v)[kValues]) {
  if (x.dtype == DType::f64 || !in_one_piece(x, offset)) {
    int64_t at[kValues];
#pragma unroll
    for (int u = 0; u < kValues; ++u) {
      const int64_t column = d + u / kRun * apart + u % kRun;
      at[u] = offset >= 0 && column < x.D ? offset + column * x.stride_d : -1;
    }
    gather(x.data, x.dtype, at, v);
    return;
  }
  if (x.dtype == DType::f32) {
    float4 run[kRuns];
#pragma unroll
    for (int r = 0; r < kRuns; ++r)
      run[r] = d + r * apart < x.D ? *reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + offset + d + r * apart)
                                   : float4{0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < kRuns; ++r) v[4 * r] = run[r].x, v[4 * r + 1] = run[r].y, v[4 * r + 2] = run[r].z, v[4 * r + 3] = run[r].w;
    return;
  }
  uint2 run[kRuns];
#pragma unroll
  for (int r = 0; r < kRuns; ++r)
    run[r] =
        d + r * apart < x.D ? *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x.data) + offset + d + r * apart) : uint2{0, 0};
#pragma unroll
  for (int u = 0; u < kValues; ++u) {
    const uint32_t word = u % kRun < 2 ? run[u / kRun].x : run[u / kRun].y;
    const uint16_t half = uint16_t(u % 2 ? word >> 16 : word);
    v[u] = x.dtype == DType::f16 ? widen_f16(half) : bf16_to_float(half);
  }
}

__device__ void store_runs(const VqRows& x, int64_t offset, int64_t d, int apart, const double (&v)[kValues]) {
  if (offset < 0) return;
  if (x.dtype == DType::f64 || !in_one_piece(x, offset)) {
#pragma unroll
    for (int u = 0; u < kValues; ++u) {
      const int64_t column = d + u / kRun * apart + u % kRun;
      if (column < x.D) store_double(x.data, x.dtype, offset + column * x.stride_d, v[u]);
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    if (d + r * apart >= x.D) continue;
    const int64_t at = offset + d + r * apart;
    float part[kRun];
    for (int u = 0; u < kRun; ++u) part[u] = float(v[r * kRun + u]);
    if (x.dtype == DType::f32) *reinterpret_cast<float4*>(static_cast<float*>(x.data) + at) = float4{part[0], part[1], part[2], part[3]};
    else
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(x.data) + at) =
          x.dtype == DType::f16 ? uint2{pack_f16(part[0], part[1]), pack_f16(part[2], part[3])}
                                : uint2{pack_bf16(part[0], part[1]), pack_bf16(part[2], part[3])};
  }
}

__device__ VqRows code_rows(const void* codebook, DType type, int64_t K, int64_t D, int64_t stride_k) {
  return {const_cast<void*>(codebook), type, 1, K, D, 0, stride_k, 1};
}

// 2^e for |e| <= 1022, exactly.
__device__ double power_of_two(int e) {
  const uint64_t bits = uint64_t(e + 1023) << 52;
  double v;
  memcpy(&v, &bits, 8);
  return v;
}
// The exponent e with |v| in [2^(e-1), 2^e), held to +-1000; -1000 for 0.
__device__ int exponent_of(double v) {
  int e = 0;
  frexp(v, &e);
  return v == 0 ? -1000 : e < -1000 ? -1000 : e > 1000 ? 1000 : e;
}
__device__ bool is_finite(double v) { return v * 0.0 == 0.0; }

// ---- preparing the codes

struct Codes {
  const void* data;
  DType dtype;
  int64_t K, D, stride_k;
  VqMetric metric;
  int64_t depth, panels;  // D rounded up to whole steps, K to whole panels
  double* factor;         // [K] a code is used as factor * code: 1, or 1 / norm for cosine (0 for a zero code); NaN: never chosen
  float* mean;            // [depth] the shift, 0 from D on; any value is correct, one near the codes' mean is good
  double* largest;        // [K] largest magnitude of the shifted code
  int* exponent;          // [1] the common unit is 2^exponent
  uint16_t* packed;       // [panels][depth / 32] tiles of fp16
  float* norms;           // [panels][128] n_j, +Inf for codes never to be chosen
  PanelScalars* scalars;  // [panels]
};

// Columns lane, lane + 32, lane + 64, lane + 96 after d0 of a code.
__device__ void load_code(const Codes& c, int64_t j, int64_t d0, double (&v)[4]) {
  int64_t at[4];
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const int64_t d = d0 + 32 * u + int(threadIdx.x) % 32;
    at[u] = d < c.D ? j * c.stride_k + d : -1;
  }
  gather(c.data, c.dtype, at, v);
}

__global__ void __launch_bounds__(kThreads, 4) code_factor_kernel(Codes c) {
  const int64_t j = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (j >= c.K) return;
  double largest = 0, v[4];
  bool finite = true;
  for (int64_t d = 0; d < c.D; d += 128) {
    load_code(c, j, d, v);
    for (int u = 0; u < 4; ++u) {
      finite &= is_finite(v[u]);
      largest = fabs(v[u]) > largest ? fabs(v[u]) : largest;
    }
  }
  finite = __all_sync(kFullWarp, finite);
  double factor = 1;
  if (c.metric == VqMetric::cosine) {
    const double scale = power_of_two(-exponent_of(warp_max(largest)));  // squares must neither overflow nor vanish
    double sum = 0;
    for (int64_t d = 0; d < c.D; d += 128) {
      load_code(c, j, d, v);
      for (int u = 0; u < 4; ++u) sum += (v[u] * scale) * (v[u] * scale);
    }
    sum = warp_sum(sum);
    factor = sum > 0 ? scale * rsqrt(sum) : 0.0;
  }
  if (threadIdx.x % 32 == 0) c.factor[j] = finite ? factor : kNaN;
}

// The mean of up to 256 codes, a block 32 columns.
__global__ void __launch_bounds__(kWideThreads) code_mean_kernel(Codes c) {
  MMFAST_SHARED(double[kWideWarps][32], sums);
  MMFAST_SHARED(int[kWideWarps], counts);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t d = int64_t(blockIdx.x) * 32 + lane, samples = c.K < 256 ? c.K : 256, step = c.K / samples;
  double sum = 0;
  int count = 0;
  for (int64_t s = warp; s < samples; s += 4 * kWideWarps) {
    int64_t at[4];
    double v[4], factor[4];
    for (int u = 0; u < 4; ++u) {
      const int64_t j = (s + kWideWarps * u) * step;
      factor[u] = s + kWideWarps * u < samples ? c.factor[j] : kNaN;
      at[u] = is_finite(factor[u]) && d < c.D ? j * c.stride_k + d : -1;
    }
    gather(c.data, c.dtype, at, v);
    for (int u = 0; u < 4; ++u)
      if (is_finite(factor[u])) sum += factor[u] * v[u], ++count;
  }
  sums[warp][lane] = sum;
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  if (warp == 0) {
    double total = 0;
    int n = 0;
    for (int w = 0; w < kWideWarps; ++w) total += sums[w][lane], n += counts[w];
    const float mean = n ? float(total / n) : 0.0f;
    c.mean[d] = is_finite(mean) ? mean : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) code_largest_kernel(Codes c) {
  const int64_t j = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (j >= c.K) return;
  const double factor = c.factor[j];
  double largest = 0, v[4];
  if (is_finite(factor))
    for (int64_t d = 0; d < c.D; d += 128) {
      load_code(c, j, d, v);
      for (int u = 0; u < 4; ++u) {
        const int64_t column = d + 32 * u + int(threadIdx.x) % 32;
        const double shifted = column < c.D ? fabs(factor * v[u] - c.mean[column]) : 0.0;
        largest = shifted > largest ? shifted : largest;
      }
    }
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) c.largest[j] = largest;
}

template <int Warps>
__device__ double block_max(double v, double (&shared)[Warps]) {
  v = warp_max(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  for (int w = 0; w < Warps; ++w) v = shared[w] > v ? shared[w] : v;
  return v;
}

// One panel: fp16 codes in tiles, n_j, and the panel's share of the error bound.
__global__ void __launch_bounds__(kWideThreads) code_pack_kernel(Codes c) {
  MMFAST_SHARED(double[kWideWarps], scratch);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t panel = blockIdx.x;
  double largest = 0;
  for (int64_t j = threadIdx.x; j < c.K; j += kWideThreads) largest = c.largest[j] > largest ? c.largest[j] : largest;
  const int unit = exponent_of(block_max(largest, scratch));
  largest = 0;
  if (int(threadIdx.x) < kTile && panel * kTile + threadIdx.x < c.K) largest = c.largest[panel * kTile + threadIdx.x];
  // In units of 2^unit the panel's values are below 2^height; kept where 2^(height - 8) and the codes' fp16 images are normal numbers.
  int height = exponent_of(block_max(largest, scratch)) - unit;
  height = height < -100 ? -100 : height;
  const double to_unit = power_of_two(-unit), to_half = power_of_two(8 - height), from_half = power_of_two(height - 8);
  double most_norm2 = 0, most_residual2 = 0;
  for (int row = warp; row < kTile; row += kWideWarps) {
    const int64_t j = panel * kTile + row;
    const double factor = j < c.K ? c.factor[j] : kNaN;
    const bool real = is_finite(factor);
    double norm2 = 0, residual2 = 0, v[4] = {};
    for (int64_t d0 = 0; d0 < c.depth; d0 += 128) {
      if (j < c.K) load_code(c, j, d0, v);  // whether real or not, so as not to wait for the factor
      for (int u = 0; u < 4; ++u) {
        const int64_t d = d0 + 32 * u + lane;
        if (d >= c.depth) continue;
        const double shifted = real && d < c.D ? (factor * v[u] - c.mean[d]) * to_unit : 0.0;
        const uint16_t half = uint16_t(pack_f16(float(shifted * to_half), 0));
        const double lost = shifted - double(widen_f16(half)) * from_half;
        norm2 += shifted * shifted;
        residual2 += lost * lost;
        c.packed[(panel * (c.depth / kStep) + d / kStep) * (kTile * kStep) + tile_at(row, int(d % kStep))] = half;
      }
    }
    norm2 = warp_sum(norm2);
    residual2 = warp_sum(residual2);
    if (lane == 0) c.norms[panel * kTile + row] = !real ? kInf : c.metric == VqMetric::l2 ? float(norm2) : 0.0f;
    most_norm2 = norm2 > most_norm2 ? norm2 : most_norm2;
    most_residual2 = residual2 > most_residual2 ? residual2 : most_residual2;
  }
  most_norm2 = block_max(most_norm2, scratch);
  most_residual2 = block_max(most_residual2, scratch);
  if (threadIdx.x == 0) {
    constexpr double kUp = 1 + 0x1p-10;  // the fp64 arithmetic above is this much better at least
    double residual = sqrt(most_residual2) + sqrt(most_norm2) * 0x1p-50;
    if (c.metric == VqMetric::cosine) residual += 0x1p-50 * to_unit;  // normalising a code rounds by that
    residual *= kUp;
    const double norm = sqrt(most_norm2) * kUp + residual;
    PanelScalars s;
    s.residual = __double2float_ru(residual);
    s.norm = __double2float_ru(norm);
    // n_j rounds, and so do the two additions after the product as far as n_j goes (g covers their other part); 2^-100: products that
    // vanish.
    s.slack = __double2float_ru((c.metric == VqMetric::l2 ? 0x1p-20 * norm * norm : 0.0) + 0x1p-100);
    s.multiplier = float(from_half);
    c.scalars[panel] = s;
    if (panel == 0) *c.exponent = unit;
  }
}

// ---- preparing the rows

struct Rows {
  VqRows x;
  const uint8_t* mask;
  int64_t row0, count;  // this chunk: rows [row0, row0 + count)
  uint16_t* packed;     // [tiles][depth / 32] tiles of fp16
  RowScalars* scalars;  // [tiles * 128]
  int* opened;          // [1] set to 0: the list of open rows starts anew with each chunk
};

__global__ void __launch_bounds__(kThreads, 4) row_pack_kernel(Rows a, Codes c) {
  MMFAST_SHARED(int64_t[kBlockRows], offsets);
  MMFAST_SHARED(Walk::Scratch, scratch);
  const int64_t first = int64_t(blockIdx.x) * kBlockRows;
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.opened = 0;
  if (threadIdx.x < kBlockRows) {
    const int64_t row = first + threadIdx.x;
    const bool there = row < a.count && (!a.mask || a.mask[a.row0 + row]);
    offsets[threadIdx.x] = there ? a.x.offset(a.row0 + row) : -1;
  }
  __syncthreads();
  const Walk walk(a.x);
  const bool shift = c.metric == VqMetric::l2;
  const int unit = *c.exponent, apart = walk.apart();
  const auto load = [&](int64_t offset, int64_t d, double (&v)[kValues], float (&mean)[kValues]) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const bool inside = shift && d + r * apart < c.depth;
      const float4 m = inside ? *reinterpret_cast<const float4*>(c.mean + d + r * apart) : float4{0, 0, 0, 0};
      mean[4 * r] = m.x, mean[4 * r + 1] = m.y, mean[4 * r + 2] = m.z, mean[4 * r + 3] = m.w;
    }
    load_runs(a.x, offset, d, apart, v);
  };
  for (int turn = 0; turn < walk.turns(); ++turn) {
    const int r = walk.row(turn);
    const int64_t offset = offsets[r], row = first + r;
    double v[kValues], largest = 0;  // Inf when the row holds something that is not finite
    float mean[kValues];
    for (int64_t d = walk.column(); d < a.x.D; d += walk.step()) {
      load(offset, d, v, mean);
#pragma unroll
      for (int u = 0; u < kValues; ++u) {
        const double shifted = fmin(fabs(v[u] - double(mean[u])), kLargestDouble);
        largest = !is_finite(v[u]) ? double(kInf) : shifted > largest ? shifted : largest;
      }
    }
    largest = walk.max(largest, scratch);
    const bool finite = largest < kInf, use = finite && offset >= 0;
    const int exponent = exponent_of(largest);
    // Under l2 rows and codes share a unit; otherwise the row's length does not matter and its own magnitude is the unit.
    int height = shift ? exponent - unit : 0;
    height = height < -100 ? -100 : height;
    const int e = shift ? 8 - height - unit : 8 - exponent;
    const double to_half = power_of_two(e < -1022 ? -1022 : e > 1022 ? 1022 : e);
    double kept2 = 0, norm2 = 0, residual2 = 0;
    for (int64_t d = walk.column(); d < c.depth; d += walk.step()) {
      load(offset, d, v, mean);
#pragma unroll
      for (int p = 0; p < kRuns; ++p) {
        uint32_t words[kRun / 2];
#pragma unroll
        for (int u = 0; u < kRun; u += 2) {
          double pair[2];
          for (int i = 0; i < 2; ++i) {
            const int at = p * kRun + u + i;
            pair[i] = use ? (v[at] - double(mean[at])) * to_half : 0.0;
          }
          words[u / 2] = pack_f16(float(pair[0]), float(pair[1]));
          for (int i = 0; i < 2; ++i) {
            const double kept = widen_f16(uint16_t(words[u / 2] >> (16 * i))), lost = pair[i] - kept;
            kept2 += kept * kept;
            norm2 += pair[i] * pair[i];
            residual2 += lost * lost;
          }
        }
        const int64_t column = d + p * apart;
        if (column >= c.depth) continue;
        uint16_t* tile = a.packed + ((row / kTile) * (c.depth / kStep) + column / kStep) * (kTile * kStep);
        *reinterpret_cast<uint2*>(tile + tile_at(int(row % kTile), int(column % kStep))) = uint2{words[0], words[1]};
      }
    }
    const double kept = sqrt(walk.sum(kept2, scratch)), norm = sqrt(walk.sum(norm2, scratch)), lost = sqrt(walk.sum(residual2, scratch));
    if (!walk.speaks()) continue;
    // Twice the classical bound for fp32 sums, so that adders that truncate are covered as well.
    const double g = double(c.depth + 16) * 0x1p-22 + 0x1p-21;
    constexpr double kUp = 2 * (1 + 0x1p-9);
    const double from_half = ldexp(1.0, height - 8);
    RowScalars s;
    s.alpha = __double2float_ru(kUp * kept * from_half);
    s.beta = __double2float_ru(kUp * (lost + norm * 0x1p-50 + g * kept) * from_half);
    s.multiplier = float(-2 * from_half);
    s.state = offset < 0 ? kMasked : !finite ? kNotFinite : !shift && norm == 0 ? kAllEqual : kSearch;
    a.scalars[row] = s;
  }
}

// ---- the screen

struct Lanes {
  float *best, *second;  // [rows][splits][8] lower bounds
  int32_t* index;        // code of `best`
  int splits;
  int64_t split_panels;  // panels of every split but the last
};
// The i-th code that lane l of a split meets.
__device__ int64_t lane_code(int64_t first_panel, int l, int64_t i) {
  const int at = int(i % kLaneCodes);
  return (first_panel + i / kLaneCodes) * kTile + (l / 4) * 64 + (at / 2) * 8 + (l % 4) * 2 + at % 2;
}

template <bool kResident>
struct Screen {
  static constexpr int kStages = kResident ? 3 : 4;
  // A stage: a tile of codes, when rows stream too a tile of rows, and 128 norms (filled at the last step of a panel).
  static constexpr int kStageBytes = kTileBytes * (kResident ? 1 : 2) + kTile * 4;
  static size_t shared_bytes(int64_t depth) {
    return size_t(kTile) * sizeof(RowScalars) + size_t(kStages) * kStageBytes + (kResident ? size_t(depth / kStep) * kTileBytes : 0);
  }
};

template <bool kResident>
__global__ void __launch_bounds__(kScreenThreads, 2)
    screen_kernel(Codes c, const uint16_t* rows, const RowScalars* row_scalars, Lanes out) {
  using S = Screen<kResident>;
  MMFAST_DYNAMIC_SHARED(shared);
  RowScalars* scalars = reinterpret_cast<RowScalars*>(shared);
  unsigned char* stages = shared + kTile * sizeof(RowScalars);
  unsigned char* resident = stages + S::kStages * S::kStageBytes;

  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warp_row = (warp % 2) * 64, warp_code = (warp / 2) * 64;
  const int steps = int(c.depth / kStep);
  const int64_t panel0 = int64_t(blockIdx.y) * out.split_panels;
  const int panels = int(c.panels - panel0 < out.split_panels ? c.panels - panel0 : out.split_panels);
  const uint16_t* row_tiles = rows + int64_t(blockIdx.x) * steps * (kTile * kStep);
  const uint16_t* code_tiles = c.packed + panel0 * steps * (kTile * kStep);
  const float* norms = c.norms + panel0 * kTile;

  // The step to fetch next: tile `fetch` of the run of codes, step `fetch_k` of panel `fetch_panel`.
  int fetch_k = 0, fetch_panel = 0, fetch_stage = 0;
  const auto copy_tile = [&](unsigned char* to, const uint16_t* tile) {
#pragma unroll
    for (int i = 0; i < kTileBytes / 16 / kScreenThreads; ++i) {
      const int chunk = thread + i * kScreenThreads;
      cp_async<16>(to + chunk * 16, tile + chunk * 8);
    }
  };
  const auto fetch = [&] {
    if (fetch_panel < panels) {
      unsigned char* stage = stages + fetch_stage * S::kStageBytes;
      copy_tile(stage, code_tiles + (int64_t(fetch_panel) * steps + fetch_k) * (kTile * kStep));
      if (!kResident) copy_tile(stage + kTileBytes, row_tiles + fetch_k * (kTile * kStep));
      if (kResident && fetch_panel == 0) copy_tile(resident + fetch_k * kTileBytes, row_tiles + fetch_k * (kTile * kStep));
      if (fetch_k == steps - 1 && thread < kTile / 4)
        cp_async<16>(stage + S::kStageBytes - kTile * 4 + thread * 16, norms + fetch_panel * kTile + thread * 4);
      if (++fetch_k == steps) fetch_k = 0, ++fetch_panel;
    }
    fetch_stage = fetch_stage + 1 == S::kStages ? 0 : fetch_stage + 1;
    cp_async_commit();  // an empty group at the end keeps the count
  };

  scalars[thread] = row_scalars[int64_t(blockIdx.x) * kTile + thread];
  for (int s = 0; s < S::kStages - 1; ++s) fetch();

  float best[8], second[8];
  int index[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) best[r] = second[r] = kInf, index[r] = 0;

  // ldmatrix addresses: of A the lane's row in a 16 x 16 block, of B its code in a 16-code x 16-deep block; the chunk is exchanged as in
  // tile_at, which for rows that are a multiple of 8 apart only depends on the lane.
  const int a_row = warp_row + lane % 16, a_chunk = lane / 16, b_row = warp_code + lane % 8 + (lane / 16) * 8, b_chunk = (lane / 8) % 2;
  int stage_index = 0;
  for (int panel = 0; panel < panels; ++panel) {
    float sum[4][8][4] = {};
    const unsigned char* stage = stages;
    for (int k = 0; k < steps; ++k) {
      cp_async_wait<S::kStages - 2>();
      __syncthreads();  // everybody's copies have landed, and nobody reads the stage that is overwritten next
      fetch();
      stage = stages + stage_index * S::kStageBytes;
      stage_index = stage_index + 1 == S::kStages ? 0 : stage_index + 1;
      const unsigned char* a_tile = kResident ? resident + k * kTileBytes : stage + kTileBytes;
#pragma unroll
      for (int half = 0; half < kStep / 16; ++half) {
        uint32_t a[4][4], b[4][4];
#pragma unroll
        for (int m = 0; m < 4; ++m) ldmatrix<4>(a[m], a_tile + 2 * tile_at(a_row + m * 16, (half * 2 + a_chunk) * 8));
#pragma unroll
        for (int n = 0; n < 4; ++n) ldmatrix<4>(b[n], stage + 2 * tile_at(b_row + n * 16, (half * 2 + b_chunk) * 8));
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
            mma_f16(sum[m][n], a[m], pair);
          }
      }
    }

    // Lower bounds of the panel's 16 codes that this lane holds of each of its 8 rows, folded into the running ones.
    const PanelScalars scale = c.scalars[panel0 + panel];
    float norm[16];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(stage + S::kStageBytes - kTile * 4 + (warp_code + n * 8 + lane % 4 * 2) * 4);
      norm[2 * n] = pair.x;
      norm[2 * n + 1] = pair.y;
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const RowScalars row = scalars[warp_row + (r / 2) * 16 + (r % 2) * 8 + lane / 4];
      const float multiplier = row.multiplier * scale.multiplier, b = radius(row, scale);
      float low = kInf, next = kInf;
      int at = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float score = fmaf(sum[r / 2][i / 2][(r % 2) * 2 + i % 2], multiplier, norm[i]);
        next = fminf(next, fmaxf(low, score));
        at = score < low ? i : at;
        low = fminf(low, score);
      }
      low -= b;
      next -= b;
      second[r] = fminf(second[r], fminf(next, fmaxf(low, best[r])));
      if (low < best[r]) {
        best[r] = low;
        index[r] = int((panel0 + panel) * kTile) + warp_code + (at / 2) * 8 + lane % 4 * 2 + at % 2;
      }
      if (!(b < kInf)) second[r] = -kInf;  // the panel says nothing about this row
    }
  }

#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int64_t row = int64_t(blockIdx.x) * kTile + warp_row + (r / 2) * 16 + (r % 2) * 8 + lane / 4;
    const int64_t at = (row * out.splits + blockIdx.y) * kLanes + (warp / 2) * 4 + lane % 4;
    out.best[at] = best[r];
    out.second[at] = second[r];
    out.index[at] = index[r];
  }
}

// ---- deciding in fp64, and the outputs

struct Open {
  int32_t row;  // within the chunk
  float upper;  // NaN: the bounds say nothing, any code may be the nearest
};
struct Finish {
  VqNearestArgs args;
  int64_t row0, count;
  const RowScalars* rows;
  const uint16_t* packed;
  Lanes lanes;
  Open* open;  // [chunk] rows with lanes that hide codes, in whatever order: each is settled by itself
  int* opened;
  double* error;  // [blocks of all chunks][2]: squared error, number of valid rows
};

// What the search minimises for one row and C codes, in fp64 over the given values; every lane gets it. A negative code costs Inf.
template <int C>
__device__ void exact_costs(const VqNearestArgs& a, const double* factor, int64_t x_offset, const int64_t (&code)[C], double (&cost)[C]) {
  const int lane = int(threadIdx.x) % 32;
  double sum[C] = {};
  for (int64_t d0 = 0; d0 < a.x.D; d0 += 128) {
    int64_t at[4];
    double x[4], e[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) at[u] = d0 + 32 * u + lane < a.x.D ? x_offset + (d0 + 32 * u + lane) * a.x.stride_d : -1;
    gather(a.x.data, a.x.dtype, at, x);
#pragma unroll
    for (int i = 0; i < C; ++i) {
#pragma unroll
      for (int u = 0; u < 4; ++u) at[u] = code[i] >= 0 && d0 + 32 * u + lane < a.x.D ? code[i] * a.stride_k + d0 + 32 * u + lane : -1;
      gather(a.codebook, a.codebook_dtype, at, e);
      const double f = a.metric == VqMetric::cosine && code[i] >= 0 ? factor[code[i]] : 1.0;
#pragma unroll
      for (int u = 0; u < 4; ++u) sum[i] += a.metric == VqMetric::l2 ? (x[u] - e[u]) * (x[u] - e[u]) : -(x[u] * (e[u] * f));
    }
  }
#pragma unroll
  for (int i = 0; i < C; ++i) {
    sum[i] = warp_sum(sum[i]);
    cost[i] = code[i] >= 0 ? sum[i] : double(kInf);
  }
}

struct Choice {
  double cost;
  int64_t code;  // -1: none yet
  __device__ void offer(double other_cost, int64_t other) {
    if (other >= 0 && (code < 0 || other_cost < cost || (other_cost == cost && other < code))) cost = other_cost, code = other;
  }
};

// Merges the lanes of each row: `width` neighbouring lanes of a warp a row, as many as it has entries, 32 at most.
__global__ void __launch_bounds__(kThreads, 4) decide_kernel(Finish f, Codes c, int width) {
  const VqNearestArgs& a = f.args;
  const int lane = int(threadIdx.x) % 32;
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x - lane) / width, row = first + lane / width;
  const int entries = f.lanes.splits * kLanes;
  const int64_t base = row * entries;
  const bool there = row < f.count;
  const RowScalars scalars = there ? f.rows[row] : RowScalars{0, 0, 0, kMasked};
  const bool search = scalars.state == kSearch;
  const unsigned group = (width == 32 ? kFullWarp : (1u << width) - 1) << (lane / width * width);
  float upper = kInf;
  bool bad = false;
  for (int e = search ? lane % width : entries; e < entries; e += width) {
    const float low = f.lanes.best[base + e];
    if (low == kInf) continue;  // a lane that met no code
    const float u = low + 2.01f * radius(scalars, c.scalars[f.lanes.index[base + e] / kTile]) + fabsf(low) * 0x1p-22f;
    bad |= !(fabsf(u) < 1e37f);
    upper = fminf(upper, u);
  }
  for (int m = width / 2; m; m /= 2) upper = fminf(upper, __shfl_xor_sync(kFullWarp, upper, m));
  // What could be wrong with the bounds: nothing finite at all, or near the end of the range.
  bad = (__ballot_sync(kFullWarp, bad) & group) != 0;
  int named = 0, only = -1;
  bool hiding = false;
  for (int e = search ? lane % width : entries; e < entries; e += width) {
    const float low = f.lanes.best[base + e], next = f.lanes.second[base + e];
    const bool candidate = low <= upper && low < kInf;
    named += candidate;
    hiding |= next <= upper && next < kInf;
    only = candidate ? f.lanes.index[base + e] : only;
  }
  for (int m = width / 2; m; m /= 2) {
    named += __shfl_xor_sync(kFullWarp, named, m);
    only = max(only, __shfl_xor_sync(kFullWarp, only, m));
  }
  hiding = (__ballot_sync(kFullWarp, hiding) & group) != 0;
  const bool open = bad || hiding, leader = there && lane % width == 0;
  if (leader && open) f.open[atomicAdd(f.opened, 1)] = {int32_t(row), bad ? float(kNaN) : upper};
  if (leader && !open && named <= 1) {
    int64_t j = only;
    if (scalars.state == kAllEqual) {
      for (j = 0; j < a.K && !is_finite(c.factor[j]);) ++j;
      j = j < a.K ? j : -1;
    }
    a.indices[f.row0 + row] = j;
  }
  // Rows with several candidates, none of them hidden: the warp compares those.
  for (unsigned left = __ballot_sync(kFullWarp, leader && !open && named > 1); left; left &= left - 1) {
    const int from = __ffs(int(left)) - 1;
    const int64_t r = first + from / width;
    const float limit = __shfl_sync(kFullWarp, upper, from);
    Choice choice{kInf, -1};
    for (int e0 = 0; e0 < entries; e0 += 32) {
      const int64_t e = e0 + lane < entries ? r * entries + e0 + lane : -1;
      const bool candidate = e >= 0 && f.lanes.best[e] <= limit && f.lanes.best[e] < kInf;
      const int mine = candidate ? f.lanes.index[e] : -1;
      for (unsigned some = __ballot_sync(kFullWarp, candidate); some; some &= some - 1) {
        const int64_t code[1] = {__shfl_sync(kFullWarp, mine, __ffs(int(some)) - 1)};
        double cost[1];
        exact_costs(a, c.factor, a.x.offset(f.row0 + r), code, cost);
        choice.offer(cost[0], code[0]);
      }
    }
    if (lane == 0) a.indices[f.row0 + r] = choice.code;
  }
}

// Eight fp16 values as four words.
__device__ void load_halves(const uint16_t* from, uint32_t (&words)[4]) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

// The products of a row's fp16 image with those of C codes, by one thread: each is given by its first tile and the place in it. The bound
// covers this order of the sum as it covers any.
template <int C>
__device__ void products(const uint16_t* row_tiles, int row, const uint16_t* const (&code_tiles)[C], const int (&code)[C], int64_t depth,
                         float (&sum)[C]) {
#pragma unroll
  for (int u = 0; u < C; ++u) sum[u] = 0;
#pragma unroll 2
  for (int64_t k = 0; k < depth; k += 8) {
    const int64_t tile = k / kStep * (kTile * kStep);
    const int within = int(k % kStep);
    uint32_t x[4], e[C][4];
    load_halves(row_tiles + tile + tile_at(row, within), x);
#pragma unroll
    for (int u = 0; u < C; ++u) load_halves(code_tiles[u] + tile + tile_at(code[u], within), e[u]);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float low = widen_f16(uint16_t(x[w])), high = widen_f16(uint16_t(x[w] >> 16));
#pragma unroll
      for (int u = 0; u < C; ++u) {
        sum[u] = fmaf(low, widen_f16(uint16_t(e[u][w])), sum[u]);
        sum[u] = fmaf(high, widen_f16(uint16_t(e[u][w] >> 16)), sum[u]);
      }
    }
  }
}

// Rows with lanes that hide codes, a block a row: the lower bounds of all codes of those lanes once more, and in fp64 those that are at
// most `upper`.
__global__ void __launch_bounds__(kThreads, 2) search_kernel(Finish f, Codes c) {
  MMFAST_SHARED(Choice[kWarps], choices);
  const VqNearestArgs& a = f.args;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, entries = f.lanes.splits * kLanes, opened = *f.opened;
  for (int item = int(blockIdx.x); item < opened; item += int(gridDim.x)) {
    const int64_t row = f.open[item].row, base = row * entries, x_offset = a.x.offset(f.row0 + row);
    const float upper = f.open[item].upper;
    const bool everything = !(upper == upper);
    const RowScalars scalars = f.rows[row];
    const uint16_t* row_tiles = f.packed + row / kTile * (c.depth * kTile);
    Choice choice{kInf, -1};
    for (int e = 0; e < entries; ++e) {
      const bool hides = everything || f.lanes.second[base + e] <= upper;
      if (!hides && !(f.lanes.best[base + e] <= upper)) continue;
      const int64_t panel0 = int64_t(e / kLanes) * f.lanes.split_panels;
      const int64_t panels = c.panels - panel0 < f.lanes.split_panels ? c.panels - panel0 : f.lanes.split_panels;
      const int64_t items = hides ? panels * kLaneCodes : 1;
      const auto code_at = [&](int64_t i) {
        const int64_t j = i >= items ? -1 : hides ? lane_code(panel0, e % kLanes, i) : int64_t(f.lanes.index[base + e]);
        return j >= 0 && j < a.K && is_finite(c.factor[j]) ? j : -1;
      };
      constexpr int kCodes = 4;  // of a thread
      for (int64_t i0 = warp * 32 + lane; i0 - lane < items; i0 += kCodes * kThreads) {
        unsigned above = 0;  // bit u: the bound of code i0 + u kThreads is above `upper`
        if (hides && !everything) {
          const uint16_t* tiles[kCodes];
          int at[kCodes];
          int64_t code[kCodes];
          float sum[kCodes];
#pragma unroll
          for (int u = 0; u < kCodes; ++u) {
            const int64_t i = i0 + u * kThreads;
            code[u] = lane_code(panel0, e % kLanes, i < items ? i : 0);  // below panels * kTile: packed, if not real
            tiles[u] = c.packed + code[u] / kTile * (c.depth * kTile);
            at[u] = int(code[u] % kTile);
          }
          products(row_tiles, int(row % kTile), tiles, at, c.depth, sum);
#pragma unroll
          for (int u = 0; u < kCodes; ++u) {
            const PanelScalars panel = c.scalars[code[u] / kTile];
            const float low = fmaf(sum[u], scalars.multiplier * panel.multiplier, c.norms[code[u]]) - radius(scalars, panel);
            above |= unsigned(low > upper) << u;
          }
        }
#pragma unroll 1
        for (int u = 0; u < kCodes; ++u) {
          const int64_t mine = above >> u & 1 ? -1 : code_at(i0 + u * kThreads);
          for (unsigned left = __ballot_sync(kFullWarp, mine >= 0); left;) {
            int64_t some[4];
            double cost[4];
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              const int64_t other = __shfl_sync(kFullWarp, mine, left ? __ffs(int(left)) - 1 : 0);
              some[v] = left ? other : -1;
              left &= left - 1;
            }
            exact_costs(a, c.factor, x_offset, some, cost);
#pragma unroll
            for (int v = 0; v < 4; ++v) choice.offer(cost[v], some[v]);
          }
        }
      }
    }
    if (lane == 0) choices[warp] = choice;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) choice.offer(choices[w].cost, choices[w].code);
      a.indices[f.row0 + row] = choice.code;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 3) emit_kernel(Finish f, Codes c) {
  MMFAST_SHARED(int64_t[kBlockRows], chosen);
  MMFAST_SHARED(int64_t[kBlockRows], x_offset);
  MMFAST_SHARED(int64_t[kBlockRows], q_offset);
  MMFAST_SHARED(int[kBlockRows], state);
  MMFAST_SHARED(double[kBlockRows], row_error);
  MMFAST_SHARED(Walk::Scratch, scratch);
  const VqNearestArgs& a = f.args;
  const int64_t first = int64_t(blockIdx.x) * kBlockRows;
  if (threadIdx.x < kBlockRows) {
    const int64_t row = first + threadIdx.x;
    const bool there = row < f.count;
    x_offset[threadIdx.x] = there ? a.x.offset(f.row0 + row) : -1;
    q_offset[threadIdx.x] = there && a.quantized.data ? a.quantized.offset(f.row0 + row) : -1;
    state[threadIdx.x] = there ? f.rows[row].state : int(kMasked);
    chosen[threadIdx.x] = there ? a.indices[f.row0 + row] : -1;
  }
  __syncthreads();
  const Walk walk(a.x);
  const VqRows codes = code_rows(a.codebook, a.codebook_dtype, a.K, a.x.D, a.stride_k);
  for (int turn = 0; turn < walk.turns(); ++turn) {
    const int r = walk.row(turn);
    const int64_t k = chosen[r], at = k >= 0 ? k * a.stride_k : -1;
    const bool masked = state[r] == kMasked;
    double error = 0, dot = 0, x2 = 0;
    for (int64_t d = walk.column(); d < a.x.D; d += walk.step()) {
      double x[kValues], q[kValues];
      load_runs(a.x, x_offset[r], d, walk.apart(), x);
      load_runs(codes, at, d, walk.apart(), q);
#pragma unroll
      for (int u = 0; u < kValues; ++u) {
        error += (x[u] - q[u]) * (x[u] - q[u]);
        dot += x[u] * q[u];
        x2 += x[u] * x[u];
        if (masked) q[u] = x[u];  // a masked row comes back as it is
      }
      store_runs(a.quantized, q_offset[r], d, walk.apart(), q);
    }
    error = walk.sum(error, scratch);
    dot = walk.sum(dot, scratch);
    x2 = walk.sum(x2, scratch);
    if (!walk.speaks()) continue;
    // A row that is not finite makes the mean NaN: training that diverges must show.
    row_error[r] = k >= 0 ? error : masked ? 0.0 : kNaN;
    if (a.distance && first + r < f.count) {
      double value = kNaN;
      if (k >= 0) {
        value = a.metric == VqMetric::l2 ? error : -dot;
        if (a.metric == VqMetric::cosine) value = 1 + (x2 > 0 ? value * c.factor[k] * rsqrt(x2) : 0.0);
      }
      store_double(a.distance, a.x.dtype == DType::f64 ? DType::f64 : DType::f32, f.row0 + first + r, value);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0, valid = 0;
    for (int r = 0; r < kBlockRows; ++r) {
      total += row_error[r];
      valid += chosen[r] >= 0;
    }
    double* out = f.error + (f.row0 / kBlockRows + blockIdx.x) * 2;
    out[0] = total;
    out[1] = valid;
  }
}

__global__ void __launch_bounds__(kThreads) mean_error_kernel(const double* error, int64_t blocks, int64_t D, DType type, void* mse) {
  MMFAST_SHARED(double[kWarps], scratch);
  double total = 0, valid = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads) {
    total += error[2 * b];
    valid += error[2 * b + 1];
  }
  total = block_sum(total, scratch);
  valid = block_sum(valid, scratch);
  // 0 when nothing is valid, NaN when a row is not finite.
  if (threadIdx.x == 0) store_double(mse, type, 0, valid > 0 ? total / (valid * double(D)) : total);
}

struct NearestPlan {
  NearestPlan(const VqNearestArgs& a, void* workspace) {
    Carver carve(workspace);
    const int64_t N = a.x.rows();
    slots = 2 * multiprocessor_count();
    const int64_t chunks = ceil_div(N, kChunkWaves * slots * kTile);
    tiles = chunks ? ceil_div(ceil_div(N, chunks), kTile) : 0;
    chunk = tiles * kTile;
    codes = {a.codebook, a.codebook_dtype, a.K, a.x.D, a.stride_k, a.metric};
    codes.depth = ceil_div(a.x.D, kStep) * kStep;
    codes.panels = ceil_div(a.K, kTile);
    const int64_t tile_halves = codes.depth * kTile;
    codes.factor = carve.take<double>(a.K);
    codes.mean = carve.take<float>(codes.depth);
    codes.largest = carve.take<double>(a.K);
    codes.exponent = carve.take<int>(1);
    codes.packed = carve.take<uint16_t>(codes.panels * tile_halves);
    codes.norms = carve.take<float>(codes.panels * kTile);
    codes.scalars = carve.take<PanelScalars>(codes.panels);
    rows = carve.take<uint16_t>(tiles * tile_halves);
    scalars = carve.take<RowScalars>(tiles * kTile);
    lanes.split_panels = split(tiles, codes.panels, slots);
    lanes.splits = int(ceil_div(codes.panels, lanes.split_panels));
    lanes.best = carve.take<float>(tiles * kTile * kLanes * lanes.splits);
    lanes.second = carve.take<float>(tiles * kTile * kLanes * lanes.splits);
    lanes.index = carve.take<int32_t>(tiles * kTile * kLanes * lanes.splits);
    open = carve.take<Open>(chunk);
    opened = carve.take<int>(1);
    error = carve.take<double>(2 * ceil_div(N, kBlockRows));
    bytes = carve.bytes();
  }

  // Panels a CTA: few enough that every multiprocessor has work, many enough that starting is not the work: a CTA costs its panels plus
  // about one for start and end.
  static int64_t split(int64_t tiles, int64_t panels, int64_t slots) {
    int64_t best = panels, best_cost = ceil_div(tiles, slots) * (panels + 1);
    for (int64_t s = 2; s <= 64 && s <= panels; ++s) {
      const int64_t run = ceil_div(panels, s), cost = ceil_div(tiles * ceil_div(panels, run), slots) * (run + 1);
      if (cost < best_cost) best = run, best_cost = cost;
    }
    return best;
  }

  int64_t slots;  // CTAs of the screen that run at a time, and blocks of the search
  int64_t chunk, tiles;
  Codes codes;
  uint16_t* rows;
  RowScalars* scalars;
  Lanes lanes;
  Open* open;
  int* opened;
  double* error;
  size_t bytes;
};

template <bool kResident>
int launch_screen(const NearestPlan& p, int64_t tiles, void* stream) {
  return launch(screen_kernel<kResident>, dim3(unsigned(tiles), unsigned(p.lanes.splits)), dim3(kScreenThreads),
                Screen<kResident>::shared_bytes(p.codes.depth), stream, p.codes, p.rows, p.scalars, p.lanes);
}

// ---- gradients

struct Backward {
  VqBackwardArgs args;
  const unsigned long long* valid;  // [1] rows with an index
  __device__ bool is_code(int64_t k) const { return k >= 0 && k < args.K; }
  // d(loss) / d(x - q) is this times (x - q), before the share of either side.
  __device__ double loss_factor() const {
    if (!args.grad_loss || *valid == 0) return 0.0;
    return load_double(args.grad_loss, args.x.dtype == DType::f64 ? DType::f64 : DType::f32, 0) * 2 / (double(*valid) * double(args.x.D));
  }
};

__global__ void __launch_bounds__(kThreads) count_valid_kernel(const int64_t* indices, int64_t N, int64_t K, unsigned long long* valid) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int count = __syncthreads_count(row < N && indices[row] >= 0 && indices[row] < K);
  if (threadIdx.x == 0 && count) atomicAdd(valid, static_cast<unsigned long long>(count));
}

__global__ void __launch_bounds__(kThreads, 2) grad_x_kernel(Backward b) {
  MMFAST_SHARED(int64_t[kBlockRows], codes);
  MMFAST_SHARED(int64_t[kBlockRows], x_offset);
  MMFAST_SHARED(int64_t[kBlockRows], g_offset);
  MMFAST_SHARED(int64_t[kBlockRows], out_offset);
  MMFAST_SHARED(Walk::Scratch, scratch);
  const VqBackwardArgs& a = b.args;
  const int64_t first = int64_t(blockIdx.x) * kBlockRows, N = a.x.rows();
  if (threadIdx.x < kBlockRows) {
    const int64_t row = first + threadIdx.x;
    const bool there = row < N;
    codes[threadIdx.x] = there && b.is_code(a.indices[row]) ? a.indices[row] : -1;
    x_offset[threadIdx.x] = there ? a.x.offset(row) : -1;
    g_offset[threadIdx.x] = there && a.grad_q.data ? a.grad_q.offset(row) : -1;
    out_offset[threadIdx.x] = there ? a.grad_x.offset(row) : -1;
  }
  __syncthreads();
  const Walk walk(a.x);
  const VqRows codebook = code_rows(a.codebook, a.codebook_dtype, a.K, a.x.D, a.stride_k);
  const double loss = b.loss_factor() * a.w_commit;
  for (int turn = 0; turn < walk.turns(); ++turn) {
    const int r = walk.row(turn);
    const int64_t code = codes[r];
    double x[kValues], q[kValues], g[kValues];
    const auto load = [&](int64_t d) {
      load_runs(a.x, x_offset[r], d, walk.apart(), x);
      load_runs(a.grad_q, g_offset[r], d, walk.apart(), g);
      load_runs(codebook, code >= 0 ? code * a.stride_k : -1, d, walk.apart(), q);
    };
    // The rule is  scale * (g + along_x * x + along_q * q); straight-through by default.
    double scale = a.gradient == VqGradient::none && code >= 0 ? 0.0 : 1.0, along_x = 0, along_q = 0;
    if (a.gradient == VqGradient::rotation && a.grad_q.data) {
      double xx = 0, qq = 0, xq = 0, xg = 0, qg = 0;
      for (int64_t d = walk.column(); d < a.x.D; d += walk.step()) {
        load(d);
#pragma unroll
        for (int u = 0; u < kValues; ++u) {
          xx += x[u] * x[u];
          qq += q[u] * q[u];
          xq += x[u] * q[u];
          xg += x[u] * g[u];
          qg += q[u] * g[u];
        }
      }
      const double nx = sqrt(walk.sum(xx, scratch)), nq = sqrt(walk.sum(qq, scratch));
      const double cross = walk.sum(xq, scratch), xg_all = walk.sum(xg, scratch), qg_all = walk.sum(qg, scratch);
      if (code >= 0 && nx > 0 && nq > 0) {  // else there is no direction to turn: straight through
        // u = x / |x|, p = q / |q|, w = (u + p) / |u + p|:  |q| / |x| (g - 2 w (w.g) + 2 u (p.g)); opposite directions have no w.
        const double ug = xg_all / nx, pg = qg_all / nq, sum2 = 2 + 2 * cross / (nx * nq);
        const double wg = sum2 > 1e-12 ? 2 * (ug + pg) / sum2 : 0.0;
        scale = nq / nx;
        along_x = (2 * pg - wg) / nx;
        along_q = -wg / nq;
      }
    }
    for (int64_t d = walk.column(); d < a.x.D; d += walk.step()) {
      load(d);
#pragma unroll
      for (int u = 0; u < kValues; ++u)  // a row without a code passes its gradient on, untouched by what it holds
        if (code >= 0) g[u] = (scale == 0 ? 0.0 : scale * (g[u] + along_x * x[u] + along_q * q[u])) + loss * (x[u] - q[u]);
      store_runs(a.grad_x, out_offset[r], d, walk.apart(), g);
    }
  }
}

// ---- sums over the rows of each code

// The stable counting sort. A unit is a warp's run of rows.
struct Sort {
  Sort(Carver& carve, int64_t N, int64_t K) : N(N), K(K) {
    units = ceil_div(N, 256);
    const int64_t most = (int64_t{1} << 24) / K;
    units = units > 256 ? 256 : units;
    units = units > most ? most : units;
    units = units < 1 ? 1 : units;
    unit_rows = ceil_div(ceil_div(N, units), 32) * 32;
    span = N / 1024 > 32 ? ceil_div(N, 1024) : 32;
    spans = ceil_div(N, span);
    table = carve.take<uint32_t>(units * K);
    start = carve.take<uint32_t>(K + 1);
    order = carve.take<uint32_t>(N);
  }
  int64_t N, K, units, unit_rows, span, spans;
  uint32_t* table;  // [units][K] rows of the code in the unit, then their offset within the code
  uint32_t* start;  // [K + 1] where the code's rows begin in `order`
  uint32_t* order;  // [N] rows by code, ascending within one
};

// Visits a unit's rows 32 at a time: visit(row, code or -1, lanes with the same code).
template <class Visit>
__device__ void for_unit(const Sort& s, const int64_t* indices, int64_t unit, Visit visit) {
  const int64_t begin = unit * s.unit_rows, end = begin + s.unit_rows < s.N ? begin + s.unit_rows : s.N;
  for (int64_t r0 = begin; r0 < end; r0 += 32) {
    const int64_t row = r0 + int(threadIdx.x) % 32;
    int64_t code = row < end ? indices[row] : -1;
    code = code >= 0 && code < s.K ? code : -1;
    visit(row, code, __match_any_sync(kFullWarp, (long long)code));
    __syncwarp();  // the next 32 rows may touch the same entry of the table from another lane
  }
}

__global__ void __launch_bounds__(kThreads) sort_count_kernel(Sort s, const int64_t* indices) {
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= s.units) return;
  uint32_t* table = s.table + unit * s.K;
  for_unit(s, indices, unit, [&](int64_t, int64_t code, unsigned same) {
    if (code >= 0 && __ffs(int(same)) - 1 == int(threadIdx.x) % 32) table[code] += uint32_t(__popc(same));
  });
}

// Counts to offsets within the code; start[k] holds the code's total for the moment.
__global__ void __launch_bounds__(kThreads) sort_offset_kernel(Sort s) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= s.K) return;
  uint32_t total = 0;
  int64_t unit = 0;
  for (; unit + 8 <= s.units; unit += 8) {
    uint32_t count[8];
#pragma unroll
    for (int u = 0; u < 8; ++u) count[u] = s.table[(unit + u) * s.K + k];
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      s.table[(unit + u) * s.K + k] = total;
      total += count[u];
    }
  }
  for (; unit < s.units; ++unit) {
    const uint32_t count = s.table[unit * s.K + k];
    s.table[unit * s.K + k] = total;
    total += count;
  }
  s.start[k] = total;
}

// Exclusive prefix sum of start in place, one block, a thread a run of codes.
__global__ void __launch_bounds__(1024) sort_scan_kernel(Sort s) {
  MMFAST_SHARED(uint32_t[32], warp_total);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t run = (s.K + 1023) / 1024, begin = run * threadIdx.x < s.K ? run * threadIdx.x : s.K,
                end = begin + run < s.K ? begin + run : s.K;
  uint32_t total = 0;
  for (int64_t k = begin; k < end; ++k) total += s.start[k];
  uint32_t inclusive = total;
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, inclusive, d);
    if (lane >= d) inclusive += other;
  }
  if (lane == 31) warp_total[warp] = inclusive;
  __syncthreads();
  uint32_t before = inclusive - total;
  for (int w = 0; w < warp; ++w) before += warp_total[w];
  for (int64_t k = begin; k < end; ++k) {
    const uint32_t count = s.start[k];
    s.start[k] = before;
    before += count;
  }
  if (threadIdx.x == 1023) s.start[s.K] = before;
}

__global__ void __launch_bounds__(kThreads) sort_scatter_kernel(Sort s, const int64_t* indices) {
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= s.units) return;
  uint32_t* table = s.table + unit * s.K;
  for_unit(s, indices, unit, [&](int64_t row, int64_t code, unsigned same) {
    const int lane = int(threadIdx.x) % 32, leader = __ffs(int(same)) - 1;
    uint32_t at = 0;
    if (code >= 0 && lane == leader) {
      at = table[code];
      table[code] = at + uint32_t(__popc(same));
    }
    at = __shfl_sync(kFullWarp, at, leader);
    if (code >= 0) s.order[s.start[code] + at + uint32_t(__popc(same & ((1u << lane) - 1)))] = uint32_t(row);
  });
}

int sort_rows(const Sort& s, const int64_t* indices, void* stream) {
  const dim3 units(unsigned(ceil_div(s.units, kWarps))), block(kThreads);
  return Sequence()
      .then([&] { return fill_zero(s.table, size_t(s.units * s.K) * sizeof(uint32_t), stream); })
      .then([&] { return launch(sort_count_kernel, units, block, 0, stream, s, indices); })
      .then([&] { return launch(sort_offset_kernel, dim3(unsigned(ceil_div(s.K, kThreads))), block, 0, stream, s); })
      .then([&] { return launch(sort_scan_kernel, dim3(1), dim3(1024), 0, stream, s); })
      .then([&] { return launch(sort_scatter_kernel, units, block, 0, stream, s, indices); })
      .status();
}

// What is summed: columns() values of a row under its code, and where a code's sum goes. A row comes with its place in x, which takes a
// division to find.
struct StatsTerm {
  VqStatsArgs a;
  __device__ int64_t offset(int64_t row) const { return a.x.offset(row); }
  __device__ __host__ int64_t columns() const { return a.x.D + 1; }  // the last one counts
  template <int U>
  __device__ void values(const int64_t (&row)[U], const int64_t (&offset)[U], const int64_t (&)[U], int64_t column,
                         double (&out)[U]) const {
    int64_t at[U];
#pragma unroll
    for (int u = 0; u < U; ++u) at[u] = row[u] >= 0 && column < a.x.D ? offset[u] + column * a.x.stride_d : -1;
    gather(a.x.data, a.x.dtype, at, out);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const double weight = row[u] >= 0 && a.weight ? double(a.weight[row[u]]) : 1.0;
      out[u] = column < a.x.D ? weight * out[u] : weight;
    }
  }
  __device__ void store(int64_t k, int64_t column, double sum) const {
    const DType type = a.x.dtype == DType::f64 ? DType::f64 : DType::f32;
    if (column < a.x.D) store_double(a.sums, type, k * a.x.D + column, sum);
    else store_double(a.counts, type, k, sum);
  }
};
struct GradCodebookTerm {
  Backward b;
  __device__ int64_t offset(int64_t row) const { return b.args.x.offset(row); }
  __device__ __host__ int64_t columns() const { return b.args.x.D; }
  template <int U>
  __device__ void values(const int64_t (&row)[U], const int64_t (&offset)[U], const int64_t (&code)[U], int64_t column,
                         double (&out)[U]) const {
    int64_t at[U];
    double e[U];
#pragma unroll
    for (int u = 0; u < U; ++u) at[u] = row[u] >= 0 ? offset[u] + column * b.args.x.stride_d : -1;
    gather(b.args.x.data, b.args.x.dtype, at, out);
#pragma unroll
    for (int u = 0; u < U; ++u) at[u] = row[u] >= 0 ? code[u] * b.args.stride_k + column : -1;
    gather(b.args.codebook, b.args.codebook_dtype, at, e);
#pragma unroll
    for (int u = 0; u < U; ++u) out[u] = e[u] - out[u];
  }
  __device__ void store(int64_t k, int64_t column, double sum) const {
    store_double(b.args.grad_codebook, b.args.codebook_dtype, k * b.args.x.D + column, b.loss_factor() * b.args.w_code * sum);
  }
};

// Most threads of a block that has one for each column.
constexpr int kSumThreads = 512;
constexpr int kJoinCodes = 8;  // codes that a block joins

// One span of the sorted rows, a thread a column. Codes that lie in the span altogether are finished; of the one that began before it
// (slot 0) and of the one that goes on after it (slot 1) partial sums are left in partial [spans][2][columns].
template <class Term>
__global__ void __launch_bounds__(kSumThreads) span_sums_kernel(Term term, Sort s, const int64_t* indices, double* partial) {
  constexpr int kBatch = 64;
  MMFAST_SHARED(int64_t[kBatch], rows);
  MMFAST_SHARED(int64_t[kBatch], offsets);
  MMFAST_SHARED(int64_t[kBatch], codes);
  const int64_t columns = term.columns(), column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x, total = s.start[s.K];
  const int64_t begin = int64_t(blockIdx.x) * s.span, end = begin + s.span < total ? begin + s.span : total;
  if (begin >= end) return;
  // Codes on either side of the span's borders; rows of `order` all have one.
  const int64_t before = begin > 0 ? indices[s.order[begin - 1]] : -1, after = end < total ? indices[s.order[end]] : -1;
  double sum = 0;
  int64_t current = -1;
  const auto flush = [&] {
    if (current < 0 || column >= columns) return;
    const bool from_before = current == before, goes_on = current == after;
    if (from_before || goes_on) partial[(int64_t(blockIdx.x) * 2 + (from_before ? 0 : 1)) * columns + column] = sum;
    else term.store(current, column, sum);
  };
  for (int64_t batch = begin; batch < end; batch += kBatch) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < kBatch; i += int(blockDim.x)) {
      rows[i] = batch + i < end ? int64_t(s.order[batch + i]) : -1;
      offsets[i] = rows[i] >= 0 ? term.offset(rows[i]) : -1;
      codes[i] = rows[i] >= 0 ? indices[rows[i]] : -1;
    }
    __syncthreads();
    if (column >= columns) continue;
    for (int i = 0; i < kBatch && batch + i < end; i += 4) {
      int64_t row[4], offset[4], code[4];
      double v[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) row[u] = rows[i + u], offset[u] = offsets[i + u], code[u] = codes[i + u];
      term.values(row, offset, code, column, v);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (row[u] < 0) continue;
        if (code[u] != current) {
          flush();
          current = code[u];
          sum = 0;
        }
        sum += v[u];
      }
    }
  }
  flush();
}

// Codes without rows get 0, those that cross spans the sum of their parts in order; the others are done.
template <class Term>
__global__ void __launch_bounds__(kSumThreads) join_sums_kernel(Term term, Sort s, const double* partial) {
  const int64_t columns = term.columns(), column = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  for (int i = 0; i < kJoinCodes; ++i) {
    const int64_t k = int64_t(blockIdx.x) * kJoinCodes + i;
    if (k >= s.K) return;
    const int64_t begin = s.start[k], end = s.start[k + 1];
    const int64_t first = begin / s.span, last = end > begin ? (end - 1) / s.span : first;
    if (end > begin && first == last) continue;
    double sum = 0;
    if (end > begin) sum = partial[(first * 2 + 1) * columns + column];
#pragma unroll 8
    for (int64_t span = first + 1; span <= last; ++span) sum += partial[span * 2 * columns + column];
    term.store(k, column, sum);
  }
}

template <class Term>
int code_sums(const Term& term, const Sort& s, const int64_t* indices, double* partial, void* stream) {
  const int64_t columns = term.columns(), parts = ceil_div(columns, kSumThreads);
  const dim3 spans(unsigned(s.spans), unsigned(parts)), codes(unsigned(ceil_div(s.K, kJoinCodes)), unsigned(parts));
  const dim3 block(unsigned(ceil_div(ceil_div(columns, parts), 32) * 32));
  return Sequence()
      .then([&] { return sort_rows(s, indices, stream); })
      .then([&] { return launch(span_sums_kernel<Term>, spans, block, 0, stream, term, s, indices, partial); })
      .then([&] { return launch(join_sums_kernel<Term>, codes, block, 0, stream, term, s, partial); })
      .status();
}

struct StatsPlan {
  StatsPlan(const VqStatsArgs& a, void* workspace) : carve(workspace), sort(carve, a.x.rows(), a.K) {
    partial = carve.take<double>(sort.spans * 2 * (a.x.D + 1));
  }
  Carver carve;
  Sort sort;
  double* partial;
};

struct BackwardPlan {
  BackwardPlan(const VqBackwardArgs& a, void* workspace) : carve(workspace), sort(carve, a.grad_codebook ? a.x.rows() : 0, a.K) {
    partial = carve.take<double>(sort.spans * 2 * a.x.D);
    valid = carve.take<unsigned long long>(1);
  }
  Carver carve;
  Sort sort;
  double* partial;
  unsigned long long* valid;
};

// ---- moving averages

// size <- decay size + (1 - decay) counts, and the total of it: one block, K is small.
__global__ void __launch_bounds__(kWideThreads) ema_size_kernel(VqEmaArgs a, double* total) {
  MMFAST_SHARED(double[kWideWarps], scratch);
  double sum = 0;
  for (int64_t k = threadIdx.x; k < a.K; k += kWideThreads) {
    const double size = a.decay * load_double(a.cluster_size, a.dtype, k) + (1 - a.decay) * load_double(a.counts, a.dtype, k);
    store_double(a.cluster_size, a.dtype, k, size);
    sum += size;
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *total = sum;
}

// A warp a code: its average, then the code itself.
__global__ void __launch_bounds__(kThreads) ema_code_kernel(VqEmaArgs a, const double* total) {
  const int64_t k = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (k >= a.K) return;
  const double n = *total, divisor = (load_double(a.cluster_size, a.dtype, k) + a.eps) / (n + double(a.K) * a.eps) * n;
  double square = 0;
  for (int64_t d = threadIdx.x % 32; d < a.D; d += 32) {
    const int64_t at = k * a.D + d;
    store_double(a.embed_avg, a.dtype, at,
                 a.decay * load_double(a.embed_avg, a.dtype, at) + (1 - a.decay) * load_double(a.sums, a.dtype, at));
    const double code = load_double(a.embed_avg, a.dtype, at) / divisor;
    square += code * code;
  }
  if (!(divisor > 0)) return;
  const double norm = sqrt(warp_sum(square)), factor = a.normalize && norm > 0 ? 1 / norm : 1.0;
  for (int64_t d = threadIdx.x % 32; d < a.D; d += 32)  // each lane reads back only what it wrote
    store_double(a.codebook, a.dtype, k * a.D + d, load_double(a.embed_avg, a.dtype, k * a.D + d) / divisor * factor);
}

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

}  // namespace

size_t vq_nearest_cuda_workspace(const VqNearestArgs& a) { return NearestPlan(a, nullptr).bytes; }

int vq_nearest_cuda(const VqNearestArgs& a, void* workspace, void* stream) {
  const NearestPlan p(a, workspace);
  const Codes& c = p.codes;
  const int64_t N = a.x.rows();
  const dim3 block(kThreads), wide(kWideThreads), code_grid(unsigned(ceil_div(c.K, kWarps)));
  Sequence run;
  if (N > 0)
    run.then([&] { return launch(code_factor_kernel, code_grid, block, 0, stream, c); })
        .then([&] { return launch(code_mean_kernel, dim3(unsigned(c.depth / 32)), wide, 0, stream, c); })
        .then([&] { return launch(code_largest_kernel, code_grid, block, 0, stream, c); })
        .then([&] { return launch(code_pack_kernel, dim3(unsigned(c.panels)), wide, 0, stream, c); });
  for (int64_t row0 = 0; row0 < N; row0 += p.chunk) {
    const int64_t count = N - row0 < p.chunk ? N - row0 : p.chunk, tiles = ceil_div(count, kTile);
    const Rows rows{a.x, a.mask, row0, count, p.rows, p.scalars, p.opened};
    const Finish finish{a, row0, count, p.scalars, p.rows, p.lanes, p.open, p.opened, p.error};
    const int width = p.lanes.splits >= 4 ? 32 : p.lanes.splits >= 2 ? 16 : 8;
    run.then([&] { return launch(row_pack_kernel, dim3(unsigned(tiles * (kTile / kBlockRows))), block, 0, stream, rows, c); })
        .then([&] { return c.depth <= kMaxResidentDepth ? launch_screen<true>(p, tiles, stream) : launch_screen<false>(p, tiles, stream); })
        .then([&] { return launch(decide_kernel, dim3(unsigned(ceil_div(count * width, kThreads))), block, 0, stream, finish, c, width); })
        .then([&] { return launch(search_kernel, dim3(unsigned(count < p.slots ? count : p.slots)), block, 0, stream, finish, c); });
    if (a.quantized.data || a.distance || a.mse)
      run.then([&] { return launch(emit_kernel, dim3(unsigned(ceil_div(count, kBlockRows))), block, 0, stream, finish, c); });
  }
  if (a.mse)
    run.then([&] {
      return launch(mean_error_kernel, dim3(1), block, 0, stream, p.error, ceil_div(N, kBlockRows), a.x.D,
                    a.x.dtype == DType::f64 ? DType::f64 : DType::f32, a.mse);
    });
  return run.status();
}

size_t vq_backward_cuda_workspace(const VqBackwardArgs& a) { return BackwardPlan(a, nullptr).carve.bytes(); }

int vq_backward_cuda(const VqBackwardArgs& a, void* workspace, void* stream) {
  const BackwardPlan p(a, workspace);
  const int64_t N = a.x.rows();
  if (N > int64_t{0xffffffff}) return kInvalidValue;
  const Backward b{a, p.valid};
  const dim3 block(kThreads);
  Sequence run;
  run.then([&] { return fill_zero(p.valid, sizeof(*p.valid), stream); }).then([&] {
    return launch(count_valid_kernel, dim3(unsigned(ceil_div(N, kThreads))), block, 0, stream, a.indices, N, a.K, p.valid);
  });
  if (a.grad_x.data) run.then([&] { return launch(grad_x_kernel, dim3(unsigned(ceil_div(N, kBlockRows))), block, 0, stream, b); });
  if (a.grad_codebook) run.then([&] { return code_sums(GradCodebookTerm{b}, p.sort, a.indices, p.partial, stream); });
  return run.status();
}

size_t vq_code_stats_cuda_workspace(const VqStatsArgs& a) { return StatsPlan(a, nullptr).carve.bytes(); }

int vq_code_stats_cuda(const VqStatsArgs& a, void* workspace, void* stream) {
  if (a.x.rows() > int64_t{0xffffffff}) return kInvalidValue;
  const StatsPlan p(a, workspace);
  return code_sums(StatsTerm{a}, p.sort, a.indices, p.partial, stream);
}

size_t vq_ema_cuda_workspace(const VqEmaArgs&) { return 256; }

int vq_ema_cuda(const VqEmaArgs& a, void* workspace, void* stream) {
  double* total = static_cast<double*>(workspace);
  return Sequence()
      .then([&] { return launch(ema_size_kernel, dim3(1), dim3(kWideThreads), 0, stream, a, total); })
      .then([&] { return launch(ema_code_kernel, dim3(unsigned(ceil_div(a.K, kWarps))), dim3(kThreads), 0, stream, a, total); })
      .status();
}

}  // namespace mmfast
