// Vectors of floats of the width that the machine level has, on top of the compiler's vector extension.
//
// One source serves all levels: the compiler is told the level by flags (build.py), never by the machine it runs on.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rootgraft {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// v - 0 is v for every v, so that the compiler leaves only the broadcast; v + 0 is not, for -0.
inline Floats broadcast(float value) { return value - Floats{}; }

template <typename Vector>
inline Vector bits_of(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

inline Floats load(const float* source) { return bits_of<Floats>(source); }

inline Floats load(const BFloat16* source) {
#if defined(__AVX512F__)  // what the compiler makes of the lines below is half as fast
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  return reinterpret_cast<Floats>(_mm512_slli_epi32(wide, 16));
#else
  const Ints wide = __builtin_convertvector(bits_of<Halves>(source), Ints) << 16;
  return reinterpret_cast<Floats>(wide);
#endif
}

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float widen(float value) { return value; }

inline float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13) + 0x70000000 : (magnitude << 13) + 0x38000000;
  float result;
  if (magnitude < 0x0400) {  // zero or subnormal: magnitude * 2^-24
    result = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &result, 4);
  }
  bits |= sign;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline Floats load(const Float16* source) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = widen(source[i]);
  return result;
#endif
}

inline Floats load(const int8_t* source) {
#if defined(__AVX512F__)  // the compiler would convert one number after the other
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
  return __builtin_convertvector(bits_of<Bytes>(source), Floats);
#endif
}

inline void store(float* destination, Floats value) { std::memcpy(destination, &value, sizeof(value)); }

// Round to nearest, ties to even, NaN stays NaN.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Round to nearest, ties to even, too large becomes infinity, NaN stays NaN.
inline Float16 to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520, halfway past the largest
  if (magnitude < 0x38800000) {  // below 2^-14: the sum's last bit is worth 2^-24
    float small;
    std::memcpy(&small, &magnitude, 4);
    const float shifted = small + 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Ints max(Ints a, Ints b) { return a > b ? a : b; }

#if defined(__AVX512F__)  // what the compiler makes of the loops below is several times slower
inline float sum(Floats value) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value)); }
inline int32_t sum(Ints value) { return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(value)); }
inline float max(Floats value) { return _mm512_reduce_max_ps(reinterpret_cast<__m512>(value)); }
inline int32_t max(Ints value) { return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(value)); }
inline Bytes narrow(Ints value) {
  return reinterpret_cast<Bytes>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(value)));
}
#else
template <typename Vector>
inline auto sum(Vector value) {
  auto total = value[0];
  for (int i = 1; i < kLanes; ++i) total += value[i];
  return total;
}
template <typename Vector>
inline auto max(Vector value) {
  auto result = value[0];
  for (int i = 1; i < kLanes; ++i) result = value[i] > result ? value[i] : result;
  return result;
}
inline Bytes narrow(Ints value) { return __builtin_convertvector(value, Bytes); }
#endif

// e^x to about 2 units in the last place; 0 below -87, infinity above 88.7, NaN for NaN.
// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2; Taylor series of e^r up to r^7 (error below 6e-9).
inline Floats exp(Floats x) {
  constexpr float kHigh = 88.72283f, kLow = -87.33654f;
  const Floats limited = x > kHigh ? broadcast(kHigh) : (x < kLow ? broadcast(kLow) : x);
  const Floats shifted = limited * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
  const Floats n = shifted - 12582912.0f;
  const Floats r = limited - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = broadcast(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, because n may be 128.
  const Ints exponent = __builtin_convertvector(n, Ints);
  const Ints half = exponent >> 1;
  const Floats first = reinterpret_cast<Floats>((half + 127) << 23);
  const Floats second = reinterpret_cast<Floats>((exponent - half + 127) << 23);
  const Floats result = p * first * second;
  return x < kLow ? Floats{} : (x > kHigh ? broadcast(__builtin_inff()) : (x != x ? x : result));
}

}  // namespace rootgraft
