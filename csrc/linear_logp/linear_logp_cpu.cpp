// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Log-probabilities on the CPU: rows in parallel, each row's block read once; fp64 takes the plain loops.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "../common/cpu_isa.h"
#include "../common/parallel.h"
#include "linear_logp.h"
#include "linear_logp_cpu_isa.h"

namespace mmfast {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

const LogpCpuKernels& kernels() { return MMFAST_CPU_KERNELS(logp_cpu_kernels); }

const char* row_of(const LogpBlock& b, DType dtype, int64_t r) {
  return b.data ? static_cast<const char*>(b.data) + r * b.stride * dtype_size(dtype) : nullptr;
}

// z and dz/dlogit of one logit; the label's are worked out here, outside the vector loops, and with their rounding of z.
struct Capped {
  double z, slope;
};
template <class T>
Capped capped(const LogpRows& rows, double logit) {
  double slope = 1 / rows.temperature;
  if (rows.softcap != 0) {
    const double t = std::tanh(logit / rows.softcap);
    logit = rows.softcap * t;
    slope *= 1 - t * t;
  }
  return {double(T(logit) * (T(1) / T(rows.temperature))), slope};
}

// T: the type of state and out.
template <class T>
struct Row {
  T* data;
  int64_t n;
  T& operator[](int row) const { return data[row * n]; }
};

void update_double(const LogpUpdateArgs& a, const double* z, const double* z0, int64_t at, const Row<double>& s) {
  for (int64_t c = 0; c < a.rows.columns; ++c) {
    const double v = capped<double>(a.rows, z[c]).z;
    if (c == at) s[kLabel] = v;
    if (v > s[kTop] || (v != v)) {
      const double shrink = s[kTop] == -kInf ? 0.0 : std::exp(s[kTop] - v);
      s[kDot] = s[kSum] > 0 ? (s[kDot] + s[kSum] * (s[kTop] - v)) * shrink : 0.0;
      s[kSum] *= shrink, s[kSquare] *= shrink * shrink;
      s[kTop] = v;
      s[kBest] = double(a.rows.first + c);
    }
    const double e = v == -kInf ? 0.0 : std::exp(v - s[kTop]);
    s[kSum] += e, s[kDot] += v == -kInf ? 0.0 : e * (v - s[kTop]), s[kSquare] += e * e;
    if (!z0) continue;
    const double v0 = capped<double>(a.rows, z0[c]).z;
    if (c == at) s[kLabel0] = v0;
    if (v0 > s[kTop0]) {
      const double shrink = s[kTop0] == -kInf ? 0.0 : std::exp(s[kTop0] - v0);
      s[kSum0] *= shrink, s[kCross] *= shrink;
      s[kTop0] = v0;
    }
    const double e0 = v0 == -kInf ? 0.0 : std::exp(v0 - s[kTop0]);
    s[kSum0] += e0, s[kCross] += v0 == -kInf ? 0.0 : e0 * (v0 - v);
  }
}

template <class T>
void finish(const LogpUpdateArgs& a, int64_t label, const Row<T>& s, const Row<T>& out) {
  const T log_sum = std::log(s[kSum]), logp = (s[kLabel] - s[kTop]) - log_sum;
  out[kLogp] = logp > T(0) ? T(0) : logp;
  out[kLse] = s[kTop] + log_sum;
  out[kShift] = s[kTop], out[kLogSum] = log_sum;
  if (a.wants_more) {
    out[kEntropy] = log_sum - s[kDot] / s[kSum];
    out[kSquares] = s[kSquare] / (s[kSum] * s[kSum]);
    out[kHit] = T(int64_t(s[kBest]) == label);
  }
  if (a.z0.data) {
    const T log_sum0 = std::log(s[kSum0]), logp0 = (s[kLabel0] - s[kTop0]) - log_sum0;
    out[kLogp0] = logp0 > T(0) ? T(0) : logp0;
    out[kLse0] = s[kTop0] + log_sum0;
    out[kShift0] = s[kTop0], out[kLogSum0] = log_sum0;
    out[kKl] = s[kCross] / s[kSum0] + (s[kTop] - s[kTop0]) + (log_sum - log_sum0);
  }
}

// Rows that are worth waking a thread for.
int64_t grain(const LogpRows& rows) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, rows.columns)); }

template <class T>
void update(const LogpUpdateArgs& a) {
  const LogpRows& rows = a.rows;
  const LogpCpuKernels& k = kernels();
  parallel_for(rows.n, grain(rows), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> s{static_cast<T*>(a.state) + r, rows.n}, out{static_cast<T*>(a.out) + r, rows.n};
      const int64_t label = rows.labels[r], at = label - rows.first;
      if (label == rows.ignore_index) {
        if (a.ends)
          for (int i = 0; i < kLogpOutputs; ++i) out[i] = 0;
        continue;
      }
      if (a.begins) {
        for (int i = 0; i < kLogpStates; ++i) s[i] = 0;
        s[kTop] = s[kTop0] = T(-kInf);
      }
      const char *z = row_of(a.z, rows.dtype, r), *z0 = row_of(a.z0, rows.dtype, r);
      if constexpr (sizeof(T) == 8) {
        update_double(a, reinterpret_cast<const double*>(z), reinterpret_cast<const double*>(z0), at, s);
      } else {
        LogpRowState state{s[kTop], s[kSum], s[kDot], s[kSquare], int64_t(s[kBest]), s[kTop0], s[kSum0], s[kCross], s[kLabel], s[kLabel0]};
        k.update(z, z0, rows.dtype, rows.columns, rows.first, at, float(rows.temperature), float(rows.softcap), a.wants_more, &state);
        s[kTop] = state.top, s[kSum] = state.sum, s[kDot] = state.dot, s[kSquare] = state.square, s[kBest] = T(state.best);
        s[kTop0] = state.top0, s[kSum0] = state.sum0, s[kCross] = state.cross;
        s[kLabel] = state.label, s[kLabel0] = state.label0;
      }
      if (a.ends) finish(a, label, s, out);
    }
  });
}

template <class T>
void grad(const LogpGradArgs& a) {
  const LogpRows& rows = a.rows;
  const LogpCpuKernels& kernel = kernels();
  const auto value = [](const void* p, int64_t r) { return p ? static_cast<const T*>(p)[r] : T(0); };
  parallel_for(rows.n, grain(rows), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<const T> out{static_cast<const T*>(a.out) + r, rows.n};
      char* to = const_cast<char*>(row_of(a.grad, rows.dtype, r));
      const int64_t at = rows.labels[r] - rows.first;
      const T g = value(a.g, r), e = value(a.e, r), q = value(a.q, r), k = a.z0.data ? value(a.k, r) : T(0);
      const T top = out[kShift], log_sum = out[kLogSum];
      const double A =
          double(k) + value(a.r, r) - g - (e != 0 ? double(e) * (out[kEntropy] - log_sum) : 0.0) - (q != 0 ? 2.0 * q * out[kSquares] : 0.0);
      const T B = -e, C = 2 * q;
      if (rows.labels[r] == rows.ignore_index || (A == 0 && B == 0 && C == 0 && g == 0 && k == 0)) {
        std::fill_n(to, rows.columns * dtype_size(rows.dtype), char(0));
        continue;
      }
      const char *z = row_of(a.z, rows.dtype, r), *z0 = k != 0 ? row_of(a.z0, rows.dtype, r) : nullptr;
      const T top0 = z0 ? out[kShift0] : T(0), log_sum0 = z0 ? out[kLogSum0] : T(0);
      const auto slope_at = [&](double logit, double logit0, double one) {
        const Capped v = capped<T>(rows, logit);
        const double y = v.z - top, p = std::exp(y - log_sum), p0 = z0 ? std::exp(capped<T>(rows, logit0).z - top0 - log_sum0) : 0.0;
        return (p * (A + (B == 0 || v.z == -kInf ? 0.0 : B * y) + C * p) + one - k * p0) * v.slope;
      };
      const bool here = at >= 0 && at < rows.columns;
      const double label = here ? load_double(z, rows.dtype, at) : 0.0, label0 = here && z0 ? load_double(z0, rows.dtype, at) : 0.0;
      if constexpr (sizeof(T) == 8) {
        const double *from = reinterpret_cast<const double*>(z), *from0 = reinterpret_cast<const double*>(z0);
        for (int64_t c = 0; c < rows.columns; ++c) reinterpret_cast<double*>(to)[c] = slope_at(from[c], z0 ? from0[c] : 0.0, 0.0);
      } else {
        kernel.grad(z, z0, to, rows.dtype, rows.columns, float(rows.temperature), float(rows.softcap), top, log_sum, top0, log_sum0, A, B,
                    C, k);
      }
      // The label's own, anew from the logit read before it was overwritten: adding 1 to a rounded p would lose bits.
      if (here) store_double(to, rows.dtype, at, slope_at(label, label0, g));
    }
  });
}

// ---- products

constexpr int64_t kDepth = 192;          // of a packed block: a panel of b (24 KB) stays in L1
constexpr int64_t kRowPanels = 12;       // of a task: its packed block of a (110 KB) stays in L2
constexpr int64_t kColumns = 512;        // of a task: its packed block of b (390 KB) stays in L2
constexpr int64_t kGroup = kDepth * 20;  // depth that is packed at a time where one side is packed whole

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// A thread's scratch memory, kept for the next task.
float* scratch(int64_t count) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> data;
  thread_local int64_t size = 0;
  if (count > size) {
    data.reset(static_cast<float*>(std::aligned_alloc(64, size_t(round_up(count * 4, 64)))));
    if (!data) throw std::bad_alloc();
    size = count;
  }
  return data.get();
}

struct AlignedFloats {
  explicit AlignedFloats(int64_t count)
      : data(static_cast<float*>(std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(count, 1) * 4, 64))))) {
    if (!data) throw std::bad_alloc();
  }
  ~AlignedFloats() { std::free(data); }
  AlignedFloats(const AlignedFloats&) = delete;
  float* data;
};

// Few rows, many columns (logits): a is packed whole, tasks own columns and pack their part of b.
void product_by_columns(const LogpCpuKernels& kernel, const LogpProductArgs& p) {
  const int64_t height = round_up(p.m, kernel.tile_rows), panels = height / kernel.tile_rows;
  const AlignedFloats a(height * std::min(p.k, kGroup));
  for (int64_t g = 0; g < p.k; g += kGroup) {
    const int64_t group = std::min(kGroup, p.k - g), steps = (group + kDepth - 1) / kDepth;
    parallel_for(steps * panels, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / panels * kDepth, depth = std::min(kDepth, group - t), row = i % panels * kernel.tile_rows;
        kernel.pack_a(p.a + row * p.a_row + (g + t) * p.a_col, p.a_row, p.a_col, std::min<int64_t>(kernel.tile_rows, p.m - row), depth,
                      a.data + t * height + row * depth);
      }
    });
    const int64_t width =
        std::min(kColumns, std::max<int64_t>(kernel.tile_columns, round_up(p.n / (2 * num_threads()), kernel.tile_columns)));
    parallel_for((p.n + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
      float* b = scratch(width * kDepth);
      for (int64_t j = begin * width; j < std::min(p.n, end * width); j += width) {
        const int64_t columns = std::min(width, p.n - j);
        for (int64_t t = 0; t < group; t += kDepth) {
          const int64_t depth = std::min(kDepth, group - t);
          kernel.pack_b(p.b + (g + t) * p.b_row + j * p.b_col, p.b_row, p.b_col, depth, columns, b);
          kernel.block(p.m, columns, depth, a.data + t * height, b, p.c + j, p.c_row, p.accumulate || g + t > 0, true);
        }
      }
    });
  }
}

// Few columns (gradients, as wide as a hidden state): b is packed whole, tasks own rows and pack their part of a.
void product_by_rows(const LogpCpuKernels& kernel, const LogpProductArgs& p) {
  const int64_t width = round_up(p.n, kernel.tile_columns), panels = width / kernel.tile_columns;
  const AlignedFloats b(width * std::min(p.k, kGroup));
  for (int64_t g = 0; g < p.k; g += kGroup) {
    const int64_t group = std::min(kGroup, p.k - g), steps = (group + kDepth - 1) / kDepth;
    parallel_for(steps * panels, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / panels * kDepth, depth = std::min(kDepth, group - t), column = i % panels * kernel.tile_columns;
        kernel.pack_b(p.b + (g + t) * p.b_row + column * p.b_col, p.b_row, p.b_col, depth,
                      std::min<int64_t>(kernel.tile_columns, p.n - column), b.data + t * width + column * depth);
      }
    });
    const int64_t most = kRowPanels * kernel.tile_rows;
    const int64_t height = std::min(most, std::max<int64_t>(kernel.tile_rows, round_up(p.m / (2 * num_threads()), kernel.tile_rows)));
    parallel_for((p.m + height - 1) / height, 1, [&](int64_t begin, int64_t end) {
      float* a = scratch(height * kDepth);
      for (int64_t i = begin * height; i < std::min(p.m, end * height); i += height) {
        const int64_t rows = std::min(height, p.m - i);
        for (int64_t t = 0; t < group; t += kDepth) {
          const int64_t depth = std::min(kDepth, group - t);
          kernel.pack_a(p.a + i * p.a_row + (g + t) * p.a_col, p.a_row, p.a_col, rows, depth, a);
          kernel.block(rows, p.n, depth, a, b.data + t * width, p.c + i * p.c_row, p.c_row, p.accumulate || g + t > 0, false);
        }
      }
    });
  }
}

}  // namespace

void logp_product_cpu(const LogpProductArgs& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) {
    if (!p.accumulate)
      for (int64_t i = 0; i < p.m; ++i) std::fill_n(p.c + i * p.c_row, p.n, 0.0f);
    return;
  }
  p.n > p.m ? product_by_columns(kernels(), p) : product_by_rows(kernels(), p);
}

void logp_update_cpu(const LogpUpdateArgs& a) { a.rows.dtype == DType::f64 ? update<double>(a) : update<float>(a); }
void logp_grad_cpu(const LogpGradArgs& a) { a.rows.dtype == DType::f64 ? grad<double>(a) : grad<float>(a); }

}  // namespace mmfast
