// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Vector quantisation on the CPU.
//
// Nearest code. The answer is the fp64 argmin over the given inputs, ties to the lowest index, yet almost all the work is a
// low-precision matrix product. With x* the row and e* the codes, both shifted by the codebook's mean (l2 only moves x; the shift
// changes no comparison) and scaled by a power of two, and x^, e^ what is left of them in fp32 or bf16,
//     score_j = n_j - 2 x*.e*_j,      n_j = ||e*_j||^2 for l2, 0 for cosine (codes normalised) and inner product,
// and the computed score is off by at most
//     2 ( ||x^|| R + (r + g ||x^||)(E + R) ) + a little for the roundings outside the product,
// r = ||x* - x^||, R = max ||e*_j - e^_j|| and E = max ||e*_j|| over a panel of codes, g = (D + 4) units of rounding. That is linear
// in two numbers a row (alpha, beta) and three a panel, so each lane keeps lower bounds score - radius at the price of one addition.
// U = min over lanes of (best bound + 2 radius) is an upper bound of the minimum. Lanes whose best bound is <= U hold candidates, which
// are compared in fp64. If a lane's second bound is <= U too, or anything is not finite, the row goes to the next stage:
//     bf16 products -> fp32 products -> all codes in fp64.
// Memory beyond the inputs is O(N + K): the codebook is packed a few MB at a time and rows are searched in blocks.
//
// Sources: the certificate is the classical forward error bound of an inner product (Higham, Accuracy and Stability of Numerical
// Algorithms, ch. 3); the quantisation rules are VQ-VAE (arXiv:1711.00937), taming-transformers (arXiv:2012.09841) and the rotation
// trick (arXiv:2410.06424).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "../common/cpu_isa.h"
#include "../common/parallel.h"
#include "vq.h"
#include "vq_cpu_isa.h"

namespace mmfast {
namespace {

constexpr int64_t kRowBlock = 8192;                   // rows whose lanes are alive at a time: 1.5 MB
constexpr int64_t kPackBytes = int64_t{4} << 20;      // packed codes alive at a time; stays in the last-level cache
constexpr int64_t kFallbackBytes = int64_t{1} << 20;  // the same for the few rows that a second stage sees
constexpr double kUnit = 0x1p-24;                     // rounding unit of fp32
constexpr float kInf = std::numeric_limits<float>::infinity();

const VqCpuKernels& kernels() { return MMFAST_CPU_KERNELS(vq_cpu_kernels); }

// 64-byte aligned scratch without initialisation.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(size_t(n) * sizeof(T) + 64, std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

float round_up(double v) {
  float f = float(v);
  return f < v ? std::nextafter(f, kInf) : f;
}

// Rows as doubles, [count, D]. Channel-first tensors are read along their contiguous direction.
void load_rows(const VqCpuKernels& k, const VqRows& x, const int64_t* row, int64_t count, double* out) {
  if (x.stride_d == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) k.load_row(x.data, x.dtype, x.offset(row[i]), x.stride_d, x.D, out + i * x.D);
    return;
  }
  constexpr int64_t kRun = 64;
  double run[kRun];
  for (int64_t i = 0; i < count;) {
    int64_t n = 1;
    while (i + n < count && n < kRun && row[i + n] == row[i] + n && (row[i] % x.n_inner) + n < x.n_inner) ++n;
    for (int64_t d = 0; d < x.D; ++d) {
      k.load_row(x.data, x.dtype, x.offset(row[i]) + d * x.stride_d, x.stride_inner, n, run);
      for (int64_t r = 0; r < n; ++r) out[(i + r) * x.D + d] = run[r];
    }
    i += n;
  }
}

// The codebook as the search sees it: shift, scale and, for cosine, inverse norms.
class Codebook {
 public:
  Codebook(const VqNearestArgs& a, const VqCpuKernels& k) : a_(a), k_(k), mean_(a.x.D, 0.0) {}

  // Shift and scale from a sample: any shift is valid, one near the common mean is good; any scale that keeps the products in range is.
  void prepare() {
    const int64_t D = a_.x.D, K = a_.K, sample = std::min<int64_t>(K, 256), step = K / sample;
    std::vector<double> rows(sample * D);
    for (int64_t s = 0; s < sample; ++s) {
      load(s * step, rows.data() + s * D);
      for (int64_t d = 0; d < D; ++d) mean_[d] += rows[s * D + d] / double(sample);
    }
    for (double& m : mean_) m = std::isfinite(m) ? m : 0.0;
    double largest = 0;
    for (int64_t s = 0; s < sample; ++s) {
      const double norm = k_.square_distance(rows.data() + s * D, mean_.data(), D);
      if (std::isfinite(norm)) largest = std::max(largest, norm);
    }
    int exponent = 0;
    if (largest > 0) std::frexp(std::sqrt(largest), &exponent);
    scale_ = std::ldexp(1.0, std::clamp(-exponent, -1000, 1000));
    mean_rounding_ = std::sqrt(k_.dot(mean_.data(), mean_.data(), D)) * scale_ * 0x1p-52;
  }

  // Code j as the metric compares it: normalised for cosine (a zero code stays zero), as it is otherwise.
  void load(int64_t j, double* e) const {
    k_.load_row(a_.codebook, a_.codebook_dtype, j * a_.stride_k, 1, a_.x.D, e);
    if (a_.metric == VqMetric::cosine) {
      const double norm = std::sqrt(k_.dot(e, e, a_.x.D));
      if (norm > 0)
        for (int64_t d = 0; d < a_.x.D; ++d) e[d] /= norm;
    }
  }
  const double* mean() const { return mean_.data(); }
  // Cosine and inner product do not move the row: x.mean is the same for every code.
  const double* row_mean() const { return a_.metric == VqMetric::l2 ? mean_.data() : nullptr; }
  double scale() const { return scale_; }
  // What the fp64 subtraction e - mean may lose, in scaled units: 2^-52 of the mean's length.
  double mean_rounding() const { return mean_rounding_; }
  // What the search minimises, in fp64 over the given values.
  double exact(const double* x, const double* e) const {
    return a_.metric == VqMetric::l2 ? k_.square_distance(x, e, a_.x.D) : -k_.dot(x, e, a_.x.D);
  }

 private:
  const VqNearestArgs& a_;
  const VqCpuKernels& k_;
  std::vector<double> mean_;
  double scale_ = 1, mean_rounding_ = 0;
};

// A run of codes in the screen's layout: [panels][depth][panel width] words of -2 e^, a word being an fp32 or two bf16 along D.
class Panels {
 public:
  Panels(const VqNearestArgs& a, const VqCpuKernels& k, const Codebook& codes, bool bf16, int64_t bytes)
      : bf16(bf16),
        depth(bf16 ? (a.x.D + 1) / 2 : a.x.D),
        width(k.panel_width),
        total((a.K + width - 1) / width),
        capacity(std::clamp<int64_t>(bytes / (depth * width * 4), 1, total)),
        words(capacity * depth * width),
        norms(capacity * width),
        radius_a(total),
        radius_b(total),
        radius_c(total),
        a_(a),
        k_(k),
        codes_(codes) {}

  // Packs panels [first_panel, first_panel + panel_count), at most `capacity`.
  void pack(int64_t first_panel, int64_t panel_count) {
    if (first_panel == first && panel_count == count) return;
    first = first_panel;
    count = panel_count;
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> e(a_.x.D);
      Buffer<uint32_t> rows(width * depth);
      for (int64_t p = begin; p < end; ++p) {
        double norm2 = 0, residual2 = 0;
        for (int64_t c = 0; c < width; ++c) {
          const int64_t j = (first + p) * width + c;
          norms[p * width + c] = kInf;  // padding is never a candidate
          if (j >= a_.K) {
            std::fill(rows.get() + c * depth, rows.get() + (c + 1) * depth, 0u);
            continue;
          }
          codes_.load(j, e.data());
          const VqLowered code =
              (bf16 ? k_.lower_bf16 : k_.lower_f32)(e.data(), codes_.mean(), codes_.scale(), -2.0f, a_.x.D, rows.get() + c * depth);
          norms[p * width + c] = a_.metric == VqMetric::l2 ? float(code.norm2) : 0.0f;
          // A code that is not finite, or too far out of the sample's range for fp32: the screen says nothing then.
          if (!(code.norm2 < 0x1p120)) usable.store(false, std::memory_order_relaxed);
          norm2 = std::max(norm2, code.norm2);
          residual2 = std::max(residual2, code.residual2);
        }
        k_.transpose_panel(rows.get(), depth, words.get() + p * depth * width);
        // A subtraction of the mean in fp64 rounds as well, relative to the larger of the two.
        const double R = std::sqrt(residual2) * 1.001 + std::sqrt(norm2) * 0x1p-50 + codes_.mean_rounding(), E = std::sqrt(norm2) * 1.001;
        radius_a[first + p] = round_up(R);
        radius_b[first + p] = round_up(E + R);
        // Roundings of n_j and of the two additions after the product, and what flushing subnormals may lose.
        radius_c[first + p] = round_up(8 * kUnit * E * E + 2 * E * codes_.mean_rounding() + double(a_.x.D) * 0x1p-120);
      }
    });
  }

  const bool bf16;
  const int64_t depth, width, total, capacity;
  int64_t first = -1, count = 0;
  Buffer<uint32_t> words;  // of the packed run
  Buffer<float> norms;
  std::vector<float> radius_a, radius_b, radius_c;  // of every panel packed so far
  std::atomic<bool> usable{true};

 private:
  const VqNearestArgs& a_;
  const VqCpuKernels& k_;
  const Codebook& codes_;
};

class Search {
 public:
  explicit Search(const VqNearestArgs& a) : a_(a), k_(kernels()), codes_(a, k_) {}

  int64_t run() {
    codes_.prepare();
    const int64_t N = a_.x.rows();
    std::unique_ptr<Panels> bf16, fp32;
    if (k_.screen_bf16) bf16 = std::make_unique<Panels>(a_, k_, codes_, true, kPackBytes / 2);
    std::vector<int64_t> rows;
    double error = 0;
    int64_t valid = 0;
    for (int64_t begin = 0; begin < N; begin += kRowBlock) {
      const int64_t end = std::min(N, begin + kRowBlock);
      rows.clear();
      for (int64_t r = begin; r < end; ++r)
        if (!a_.mask || a_.mask[r]) rows.push_back(r);
        else a_.indices[r] = -1;
      const int64_t count = int64_t(rows.size());
      valid += count;
      if (bf16 && count) {
        rows = screen(*bf16, rows);
        // Codes too close for bf16: spare the following blocks the attempt.
        if (int64_t(rows.size()) * 2 > count) bf16.reset();
      }
      if (!rows.empty()) {
        if (!fp32) fp32 = std::make_unique<Panels>(a_, k_, codes_, false, bf16 ? kFallbackBytes : kPackBytes);
        rows = screen(*fp32, rows);
      }
      if (!rows.empty())
        if (const int64_t bad = scan(rows); bad != -1) return bad;
      error += emit(begin, end);
    }
    if (a_.mse) {
      const double mse = valid ? error / (double(valid) * double(a_.x.D)) : 0.0;
      store_double(a_.mse, a_.x.dtype == DType::f64 ? DType::f64 : DType::f32, 0, mse);
    }
    return -1;
  }

 private:
  // Searches the rows with low-precision products, writes the certified indices, and returns the rows left undecided.
  std::vector<int64_t> screen(Panels& panels, const std::vector<int64_t>& rows) {
    const int64_t n = int64_t(rows.size()), D = a_.x.D, T = k_.tile_rows, tiles = (n + T - 1) / T;
    Buffer<VqLanes> lanes(n);
    Buffer<float> alpha(n), beta(n);
    VqLanes empty{};
    for (int l = 0; l < kVqMaxLanes; ++l) empty.best[l] = empty.second[l] = kInf;
    const int64_t run =
        std::max<int64_t>(1, (int64_t{16} << 10) / (panels.depth * panels.width * 4));  // panels that share the first-level cache
    for (int64_t first = 0; first < panels.total; first += panels.capacity) {
      panels.pack(first, std::min(panels.capacity, panels.total - first));
      if (!panels.usable) return rows;
      parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
        constexpr int64_t kGroup = 8;  // tiles that share a pass over the packed codes
        const int64_t ldx = panels.depth;
        Buffer<double> wide(T * D);
        Buffer<uint32_t> low(kGroup * T * ldx);
        for (int64_t g = begin; g < end; g += kGroup) {
          const int64_t group = std::min(kGroup, end - g);
          for (int64_t t = 0; t < group; ++t) {
            const int64_t row0 = (g + t) * T, count = std::min(T, n - row0);
            load_rows(k_, a_.x, rows.data() + row0, count, wide.get());
            for (int64_t r = 0; r < count; ++r) {
              const VqLowered row = (panels.bf16 ? k_.lower_bf16 : k_.lower_f32)(wide.get() + r * D, codes_.row_mean(), codes_.scale(),
                                                                                 1.0f, D, low.get() + (t * T + r) * ldx);
              bound(row, panels.bf16, alpha[row0 + r], beta[row0 + r]);
              if (first == 0) lanes[row0 + r] = empty;
            }
          }
          for (int64_t p = 0; p < panels.count; p += run)
            for (int64_t t = 0; t < group; ++t) {
              const int64_t row0 = (g + t) * T;
              VqScreenTile tile;
              tile.x = low.get() + t * T * ldx;
              tile.ldx = ldx;
              tile.panels = panels.words.get() + p * panels.depth * panels.width;
              tile.depth = panels.depth;
              tile.norms = panels.norms.get() + p * panels.width;
              tile.radius_a = panels.radius_a.data() + first + p;
              tile.radius_b = panels.radius_b.data() + first + p;
              tile.radius_c = panels.radius_c.data() + first + p;
              tile.alpha = alpha.get() + row0;
              tile.beta = beta.get() + row0;
              tile.panel_count = std::min(run, panels.count - p);
              tile.first_code = int32_t((first + p) * panels.width);
              tile.rows = int(std::min(T, n - row0));
              tile.lanes = lanes.get() + row0;
              (panels.bf16 ? k_.screen_bf16 : k_.screen_f32)(tile);
            }
        }
      });
    }
    std::vector<uint8_t> open(n, 0);
    parallel_for(n, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> x(D), e(D);
      for (int64_t i = begin; i < end; ++i) open[i] = !decide(panels, lanes[i], alpha[i], beta[i], rows[i], x.data(), e.data());
    });
    std::vector<int64_t> undecided;
    for (int64_t i = 0; i < n; ++i)
      if (open[i]) undecided.push_back(rows[i]);
    return undecided;
  }

  // A row's two coefficients of the error bound.
  void bound(const VqLowered& row, bool bf16, float& alpha, float& beta) const {
    const double kept = std::sqrt(row.kept2);
    const double r = std::sqrt(row.residual2) * 1.001 + std::sqrt(row.norm2) * 0x1p-50 + codes_.mean_rounding();
    // bf16 products get two units an addition: their inner rounding is the processor's own.
    const double g = double(a_.x.D + 4) * kUnit * (bf16 ? 2 : 1) * 1.01 + 8 * kUnit;
    alpha = round_up(2.004 * kept);
    beta = round_up(2.004 * (r + g * kept));
  }

  // Picks the winner among the certified candidates; false when the lanes cannot settle it. A lane that may hide a further candidate is
  // searched in fp64, code by code, as long as there are few of them.
  bool decide(const Panels& panels, const VqLanes& lanes, float alpha, float beta, int64_t row, double* x, double* e) const {
    const int width = int(panels.width);
    float upper = kInf;
    for (int l = 0; l < width; ++l) {
      const int64_t p = lanes.index[l] / width;
      const float radius = alpha * panels.radius_a[p] + beta * panels.radius_b[p] + panels.radius_c[p];
      const float u = lanes.best[l] + 2.001f * radius;
      upper = u < upper ? u : upper;
    }
    if (!(upper < kInf) || !std::isfinite(alpha) || !std::isfinite(beta)) return false;
    upper += std::fabs(upper) * float(4 * kUnit);
    constexpr int kMostHiding = 2;
    int candidates = 0, hiding = 0, only = 0;
    for (int l = 0; l < width; ++l)
      if (lanes.best[l] <= upper) only = l, ++candidates, hiding += lanes.second[l] <= upper;
    if (hiding > kMostHiding) return false;
    if (candidates == 1 && !hiding) {
      a_.indices[row] = lanes.index[only];
      return true;
    }
    load_rows(k_, a_.x, &row, 1, x);
    double best = std::numeric_limits<double>::infinity();
    int64_t index = a_.K;
    for (int l = 0; l < width; ++l) {
      if (!(lanes.best[l] <= upper)) continue;
      const bool all = lanes.second[l] <= upper;
      for (int64_t j = all ? l : lanes.index[l]; j < a_.K; j += width) {
        codes_.load(j, e);
        const double value = codes_.exact(x, e);
        if (value < best || (value == best && j < index)) best = value, index = j;
        if (!all) break;
      }
    }
    if (index == a_.K) return false;
    a_.indices[row] = index;
    return true;
  }

  // Every code in fp64, for a few rows at a time so that a code is read once for all of them. Here the rows and codes that are not
  // finite end up: returns the first such row r as r, or code k as -2 - k, or -1.
  int64_t scan(const std::vector<int64_t>& rows) const {
    constexpr int64_t kGroup = 16;
    const int64_t n = int64_t(rows.size()), D = a_.x.D, groups = (n + kGroup - 1) / kGroup;
    auto finite = [D](const double* v) {
      double sum = 0;  // stays 0 exactly as long as every value is finite
      for (int64_t d = 0; d < D; ++d) sum += v[d] * 0.0;
      return sum == 0.0;
    };
    std::atomic<int64_t> bad_row{a_.x.rows()}, bad_code{a_.K};
    auto lower_to = [](std::atomic<int64_t>& target, int64_t v) {
      int64_t seen = target.load();
      while (v < seen && !target.compare_exchange_weak(seen, v)) {
      }
    };
    parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
      Buffer<double> x(kGroup * D), e(D);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t count = std::min(kGroup, n - g * kGroup);
        const int64_t* row = rows.data() + g * kGroup;
        load_rows(k_, a_.x, row, count, x.get());
        double best[kGroup];
        std::fill(best, best + kGroup, std::numeric_limits<double>::infinity());
        for (int64_t r = 0; r < count; ++r) {
          a_.indices[row[r]] = 0;
          if (!finite(x.get() + r * D)) lower_to(bad_row, row[r]);
        }
        for (int64_t j = 0; j < a_.K; ++j) {
          codes_.load(j, e.get());
          if (!finite(e.get())) lower_to(bad_code, j);
          for (int64_t r = 0; r < count; ++r) {
            const double value = codes_.exact(x.get() + r * D, e.get());
            if (value < best[r]) best[r] = value, a_.indices[row[r]] = j;
          }
        }
      }
    });
    if (bad_row < a_.x.rows()) return bad_row;
    return bad_code < a_.K ? -2 - bad_code : -1;
  }

  // Distances, quantised rows and the squared error of rows [begin, end), whose indices are final. The error is summed in row order.
  double emit(int64_t begin, int64_t end) const {
    const bool quantise = a_.quantized.data != nullptr;
    if (!quantise && !a_.distance) return 0;
    const int64_t D = a_.x.D;
    const DType wide = a_.x.dtype == DType::f64 ? DType::f64 : DType::f32;
    std::vector<double> error(quantise ? end - begin : 0, 0.0);
    parallel_for(end - begin, 64, [&](int64_t b, int64_t e) {
      constexpr int64_t kTile = 64;
      Buffer<double> x(kTile * D), q(kTile * D);
      std::vector<double> code(D);
      int64_t row[kTile];
      for (int64_t i = begin + b; i < begin + e; i += kTile) {
        const int64_t count = std::min(kTile, begin + e - i);
        for (int64_t r = 0; r < count; ++r) row[r] = i + r;
        load_rows(k_, a_.x, row, count, x.get());
        for (int64_t r = 0; r < count; ++r) {
          const int64_t k = a_.indices[i + r];
          const double* xr = x.get() + r * D;
          if (a_.distance) {
            double value = std::numeric_limits<double>::quiet_NaN();
            if (k >= 0) {
              codes_.load(k, code.data());
              value = codes_.exact(xr, code.data());
              if (a_.metric == VqMetric::cosine) {
                const double norm = std::sqrt(k_.dot(xr, xr, D));
                value = 1 + (norm > 0 ? value / norm : 0.0);
              }
            }
            store_double(a_.distance, wide, i + r, value);
          }
          if (quantise) {
            double* qr = q.get() + r * D;
            if (k < 0) {
              std::copy(xr, xr + D, qr);
            } else {
              k_.load_row(a_.codebook, a_.codebook_dtype, k * a_.stride_k, 1, D, qr);
              error[i + r - begin] = k_.square_distance(xr, qr, D);
            }
          }
        }
        if (quantise) store_rows(a_.quantized, i, count, q.get());
      }
    });
    double total = 0;
    for (double v : error) total += v;
    return total;
  }

 public:
  static void store_rows(const VqRows& out, int64_t first, int64_t count, const double* values) {
    const int64_t D = out.D;
    if (out.stride_d == 1 && out.dtype == DType::f32) {
      for (int64_t r = 0; r < count; ++r) {
        float* p = static_cast<float*>(out.data) + out.offset(first + r);
        for (int64_t d = 0; d < D; ++d) p[d] = float(values[r * D + d]);
      }
      return;
    }
    for (int64_t d0 = 0; d0 < D; d0 += 16)
      for (int64_t r = 0; r < count; ++r) {
        const int64_t offset = out.offset(first + r);
        for (int64_t d = d0; d < std::min(D, d0 + 16); ++d) store_double(out.data, out.dtype, offset + d * out.stride_d, values[r * D + d]);
      }
  }

 private:
  const VqNearestArgs& a_;
  const VqCpuKernels& k_;
  Codebook codes_;
};

// Hands emit(k, c, sum) the sum of value(r, k, c, x[r, c]) over the rows r of code k, added in row order. A task owns a strip of channels
// and a [K, strip] table of fp64 sums that fits the second-level cache, so x is read along its rows in either layout and the result does
// not depend on threads.
template <class Value, class Emit>
void segment_sums(const VqRows& x, const int64_t* indices, int64_t K, const VqCpuKernels& k, Value value, Emit emit) {
  const int64_t D = x.D, N = x.rows();
  const int64_t strip = std::clamp<int64_t>((int64_t{1} << 17) / std::max<int64_t>(K, 1), 1, 16), strips = (D + strip - 1) / strip;
  parallel_for(strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> table(K * strip), row(strip);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t c0 = s * strip, width = std::min(strip, D - c0);
      std::fill(table.begin(), table.end(), 0.0);
      for (int64_t r = 0; r < N; ++r) {
        const int64_t code = indices[r];
        if (code < 0 || code >= K) continue;
        k.load_row(x.data, x.dtype, x.offset(r) + c0 * x.stride_d, x.stride_d, width, row.data());
        double* sum = table.data() + code * strip;
        for (int64_t c = 0; c < width; ++c) sum[c] += value(r, code, c0 + c, row[c]);
      }
      for (int64_t code = 0; code < K; ++code)
        for (int64_t c = 0; c < width; ++c) emit(code, c0 + c, table[code * strip + c]);
    }
  });
}

// The moving averages of the cluster sizes, and what each code's average is to be divided by (0: leave the code alone).
std::vector<double> ema_sizes(const VqEmaArgs& a, const double* counts) {
  double n = 0;
  for (int64_t k = 0; k < a.K; ++k) {
    const double size = a.decay * load_double(a.cluster_size, a.dtype, k) + (1 - a.decay) * counts[k];
    store_double(a.cluster_size, a.dtype, k, size);
    n += size;
  }
  std::vector<double> divisor(a.K);
  for (int64_t k = 0; k < a.K; ++k) divisor[k] = (load_double(a.cluster_size, a.dtype, k) + a.eps) / (n + double(a.K) * a.eps) * n;
  return divisor;
}

void ema_element(const VqEmaArgs& a, const std::vector<double>& divisor, int64_t k, int64_t c, double sum) {
  const int64_t at = k * a.D + c;
  const double avg = a.decay * load_double(a.embed_avg, a.dtype, at) + (1 - a.decay) * sum;
  store_double(a.embed_avg, a.dtype, at, avg);
  if (divisor[k] > 0) store_double(a.codebook, a.dtype, at, avg / divisor[k]);
}

void ema_normalize(const VqEmaArgs& a, const std::vector<double>& divisor) {
  if (!a.normalize) return;
  const VqCpuKernels& kernel = kernels();
  parallel_for(a.K, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> code(a.D);
    for (int64_t k = begin; k < end; ++k) {
      if (!(divisor[k] > 0)) continue;
      kernel.load_row(a.codebook, a.dtype, k * a.D, 1, a.D, code.data());
      const double norm = std::sqrt(kernel.dot(code.data(), code.data(), a.D));
      for (int64_t d = 0; norm > 0 && d < a.D; ++d) store_double(a.codebook, a.dtype, k * a.D + d, code[d] / norm);
    }
  });
}

// Returns the first row whose index is outside [-1, K), or -1.
int64_t count_codes(const VqRows& x, const int64_t* indices, const float* weight, std::vector<double>& counts) {
  const int64_t N = x.rows(), K = int64_t(counts.size());
  for (int64_t r = 0; r < N; ++r) {
    if (indices[r] < -1 || indices[r] >= K) return r;
    if (indices[r] >= 0) counts[indices[r]] += weight ? double(weight[r]) : 1.0;
  }
  return -1;
}

}  // namespace

int64_t vq_nearest_cpu(const VqNearestArgs& a) { return Search(a).run(); }

int64_t vq_code_stats_cpu(const VqStatsArgs& a) {
  const DType wide = a.x.dtype == DType::f64 ? DType::f64 : DType::f32;
  std::vector<double> counts(a.K, 0.0);
  if (const int64_t bad = count_codes(a.x, a.indices, a.weight, counts); bad != -1) return bad;
  for (int64_t k = 0; k < a.K; ++k) store_double(a.counts, wide, k, counts[k]);
  segment_sums(
      a.x, a.indices, a.K, kernels(), [&](int64_t r, int64_t, int64_t, double v) { return a.weight ? double(a.weight[r]) * v : v; },
      [&](int64_t k, int64_t c, double sum) { store_double(a.sums, wide, k * a.x.D + c, sum); });
  return -1;
}

void vq_ema_cpu(const VqEmaArgs& a) {
  std::vector<double> counts(a.K);
  for (int64_t k = 0; k < a.K; ++k) counts[k] = load_double(a.counts, a.dtype, k);
  const std::vector<double> divisor = ema_sizes(a, counts.data());
  parallel_for(a.K, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t c = 0; c < a.D; ++c) ema_element(a, divisor, k, c, load_double(a.sums, a.dtype, k * a.D + c));
  });
  ema_normalize(a, divisor);
}

int64_t vq_ema_update_cpu(const VqEmaArgs& a, const VqStatsArgs& rows) {
  std::vector<double> counts(a.K, 0.0);
  if (const int64_t bad = count_codes(rows.x, rows.indices, rows.weight, counts); bad != -1) return bad;
  const std::vector<double> divisor = ema_sizes(a, counts.data());
  segment_sums(
      rows.x, rows.indices, a.K, kernels(),
      [&](int64_t r, int64_t, int64_t, double v) { return rows.weight ? double(rows.weight[r]) * v : v; },
      [&](int64_t k, int64_t c, double sum) { ema_element(a, divisor, k, c, sum); });
  ema_normalize(a, divisor);
  return -1;
}

void vq_backward_cpu(const VqBackwardArgs& a) {
  const VqCpuKernels& k = kernels();
  const int64_t N = a.x.rows(), D = a.x.D;
  const DType wide = a.x.dtype == DType::f64 ? DType::f64 : DType::f32;
  int64_t valid = 0;
  for (int64_t r = 0; r < N; ++r) valid += a.indices[r] >= 0 && a.indices[r] < a.K;
  const double loss = a.grad_loss && valid ? load_double(a.grad_loss, wide, 0) * 2 / (double(valid) * double(D)) : 0.0;
  if (a.grad_x.data) {
    parallel_for(N, 16, [&](int64_t begin, int64_t end) {
      constexpr int64_t kTile = 64;
      Buffer<double> xs(kTile * D), gs(kTile * D), out(kTile * D);
      std::vector<double> q(D);
      int64_t row[kTile];
      for (int64_t i = begin; i < end; i += kTile) {
        const int64_t count = std::min(kTile, end - i);
        for (int64_t r = 0; r < count; ++r) row[r] = i + r;
        load_rows(k, a.x, row, count, xs.get());
        if (a.grad_q.data) load_rows(k, a.grad_q, row, count, gs.get());
        else std::fill(gs.get(), gs.get() + count * D, 0.0);
        for (int64_t r = 0; r < count; ++r) {
          const double *x = xs.get() + r * D, *g = gs.get() + r * D;
          double* o = out.get() + r * D;
          const int64_t code = a.indices[i + r];
          if (code < 0 || code >= a.K) {
            std::copy(g, g + D, o);
            continue;
          }
          k.load_row(a.codebook, a.codebook_dtype, code * a.stride_k, 1, D, q.data());
          const double nx = std::sqrt(k.dot(x, x, D)), nq = std::sqrt(k.dot(q.data(), q.data(), D));
          if (a.gradient == VqGradient::none) {
            std::fill(o, o + D, 0.0);
          } else if (a.gradient == VqGradient::rotation && nx > 0 && nq > 0) {
            // u = x / |x|, p = q / |q|, w = (u + p) / |u + p|:  grad = |q| / |x| (g - 2 w (w.g) + 2 u (p.g))
            const double c = k.dot(x, q.data(), D) / (nx * nq), ug = k.dot(x, g, D) / nx, pg = k.dot(q.data(), g, D) / nq;
            const double sum2 = 2 + 2 * c, wg = sum2 > 1e-12 ? 2 * (ug + pg) / sum2 : 0.0;
            for (int64_t d = 0; d < D; ++d) {
              const double u = x[d] / nx, p = q[d] / nq;
              o[d] = nq / nx * (g[d] - wg * (u + p) + 2 * u * pg);
            }
          } else {
            std::copy(g, g + D, o);
          }
          for (int64_t d = 0; d < D; ++d) o[d] += loss * a.w_commit * (x[d] - q[d]);
        }
        Search::store_rows(a.grad_x, i, count, out.get());
      }
    });
  }
  if (a.grad_codebook) {
    auto difference = [&](int64_t, int64_t code, int64_t c, double v) {
      return load_double(a.codebook, a.codebook_dtype, code * a.stride_k + c) - v;
    };
    segment_sums(a.x, a.indices, a.K, k, difference, [&](int64_t code, int64_t c, double sum) {
      store_double(a.grad_codebook, a.codebook_dtype, code * a.x.D + c, loss * a.w_code * sum);
    });
  }
}

}  // namespace mmfast
