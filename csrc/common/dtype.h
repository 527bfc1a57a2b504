// Copyright the mmfast authors. SPDX-License-Identifier: Apache-2.0
//
// Element types and their conversion to float, one formula for host and device.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MMFAST_HD __host__ __device__ __forceinline__
#else
#define MMFAST_HD inline
#endif

namespace mmfast {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

MMFAST_HD int dtype_size(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

MMFAST_HD uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
MMFAST_HD float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

MMFAST_HD float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

// Round to nearest even; NaN stays NaN.
MMFAST_HD uint16_t float_to_bf16(float f) {
  uint32_t u = float_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// Exact, subnormals included: shift into place, then repair the exponent by a multiplication that is exact.
MMFAST_HD float f16_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, body = uint32_t(h & 0x7fffu) << 13;
  float v = bits_float(body) * 5.192296858534828e33f;  // 2^112
  if ((h & 0x7c00u) == 0x7c00u) v = bits_float(0x7f800000u | body);
  return bits_float(float_bits(v) | sign);
}

// Round to nearest even, overflow to Inf, subnormals kept.
MMFAST_HD uint16_t float_to_f16(float f) {
  uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (a < 0x38800000u) {  // below 2^-14: adding 0.5 lets the adder round at the subnormal step of 2^-24
    float r = bits_float(a) + 0.5f;
    return uint16_t(sign | (float_bits(r) - 0x3f000000u));
  }
  return uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}

// Element i of a buffer of runtime type.
MMFAST_HD float load_float(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f32:
      return static_cast<const float*>(p)[i];
    case DType::f16:
      return f16_to_float(static_cast<const uint16_t*>(p)[i]);
    case DType::bf16:
      return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
    default:
      return float(static_cast<const double*>(p)[i]);
  }
}
MMFAST_HD double load_double(const void* p, DType t, int64_t i) {
  return t == DType::f64 ? static_cast<const double*>(p)[i] : double(load_float(p, t, i));
}
// f16 and bf16 are reached through float: one extra rounding, only from fp64 values.
MMFAST_HD void store_double(void* p, DType t, int64_t i, double v) {
  switch (t) {
    case DType::f32:
      static_cast<float*>(p)[i] = float(v);
      break;
    case DType::f16:
      static_cast<uint16_t*>(p)[i] = float_to_f16(float(v));
      break;
    case DType::bf16:
      static_cast<uint16_t*>(p)[i] = float_to_bf16(float(v));
      break;
    default:
      static_cast<double*>(p)[i] = v;
  }
}

}  // namespace mmfast
