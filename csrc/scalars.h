// The element types a tensor may have, and how each is widened for arithmetic.
//
// Half and BFloat16 are bare bit patterns so that the host build needs neither CUDA headers nor
// compiler extensions. All arithmetic on them is done in float.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace rat {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type in which a tensor's arithmetic and its search state are kept.
template <typename S>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename S>
using wide_t = typename Wide<S>::type;

// The distance from 1 to the next number of the type.
template <typename S>
inline constexpr double kSpacing = 0x1p-23;
template <>
inline constexpr double kSpacing<double> = 0x1p-52;
template <>
inline constexpr double kSpacing<Half> = 0x1p-10;
template <>
inline constexpr double kSpacing<BFloat16> = 0x1p-7;

// The least step that a search looks at: smaller numbers have fewer digits.
template <typename T>
inline constexpr double kTiny = 0x1p-126;
template <>
inline constexpr double kTiny<double> = 0x1p-1022;

namespace detail {
RAT_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
RAT_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace detail

RAT_HD float widen(float value) { return value; }
RAT_HD double widen(double value) { return value; }
RAT_HD float widen(BFloat16 value) { return detail::bits_float(uint32_t{value.bits} << 16); }
RAT_HD float widen(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return detail::bits_float(sign | 0x7f800000u | (magnitude << 13));
  // A half subnormal has no implicit bit: its value is the integer magnitude times 2^-24.
  const float absolute = magnitude < 0x0400u ? static_cast<float>(magnitude) * 0x1p-24f
                                             : detail::bits_float((magnitude << 13) + 0x38000000u);
  return detail::bits_float(sign | detail::float_bits(absolute));
#endif
}

template <typename S>
RAT_HD S narrow(wide_t<S> value) {
  return value;
}
template <>
RAT_HD BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = detail::float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // NaN stays NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
RAT_HD Half narrow<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = detail::float_bits(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 aligns the mantissa so that the FPU does the rounding to even.
    const uint32_t rounded = detail::float_bits(detail::bits_float(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (rounded - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

}  // namespace rat
