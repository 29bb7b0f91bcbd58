// The blocks of the CPU kernels' KV cache and the numbers in them; native_kv.py draws the layout.
#pragma once

#include <cstddef>

#include "../cpu/simd.h"

namespace rootgraft {

// Numbers as in native_kv.py.
enum class KVFormat : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8 = 4 };

// e4m3fn: sign, 4 bits of exponent, 3 of mantissa; the largest number is 448, there is no infinity.
struct Float8 {
  uint8_t bits;
};

template <typename T>
constexpr bool kHasScales = sizeof(T) == 1;

// Mirrored by `KVBlocks` in native_kv.py.
struct KVBlocks {
  std::byte* data;           // [num_blocks][num_kv_heads][head_bytes]
  int64_t head_bytes;        // of one head in one block
  int64_t block_size;
  int64_t num_kv_heads;
  int64_t key_dim;
  int64_t value_dim;
  int64_t padded_value_dim;  // to a multiple of 32
  KVFormat format;
};

// One head in one block.
template <typename T>
struct HeadBlock {
  float* key_scales;    // [block_size]; null where T has none
  float* value_scales;  // [block_size]
  T* keys;              // [key_dim, block_size]
  T* values;            // [block_size, padded_value_dim]
};

template <typename T>
inline HeadBlock<T> head_block(const KVBlocks& kv, int64_t block, int64_t head) {
  std::byte* const start = kv.data + (block * kv.num_kv_heads + head) * kv.head_bytes;
  float* const scales = reinterpret_cast<float*>(start);
  T* const keys = reinterpret_cast<T*>(start + (kHasScales<T> ? 2 * kv.block_size * sizeof(float) : 0));
  T* const values = keys + kv.key_dim * kv.block_size;
  if constexpr (kHasScales<T>) return {scales, scales + kv.block_size, keys, values};
  return {nullptr, nullptr, keys, values};
}

// ------------------------------------------------------------------------------------ from floats and back

inline float widen(int8_t value) { return value; }

// With its bits where a float16 has them an e4m3 number is 2^-8 of itself, subnormal or not. NaN comes out as a number:
// where there was one, the scale is NaN.
inline float widen(Float8 value) {
  const int magnitude = (value.bits & 0x7f) << 7;
  return widen(Float16{static_cast<uint16_t>((value.bits & 0x80) << 8 | magnitude)}) * 256.0f;
}

inline Floats load(const Float8* source) {
#if defined(__AVX512F__) || defined(__F16C__)
  typedef int16_t Shorts __attribute__((vector_size(kLanes * 2)));
  const Shorts wide = __builtin_convertvector(bits_of<Bytes>(source), Shorts) << 7;
  const Shorts moved = wide & static_cast<int16_t>(0xbfff);
  return load(reinterpret_cast<const Float16*>(&moved)) * 256.0f;
#else
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = widen(source[i]);
  return result;
#endif
}

// For numbers up to 448 after rounding. Round to nearest, ties to even, NaN stays NaN.
inline Float8 to_float8(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x43e80000) return {static_cast<uint8_t>(sign | 0x7f)};  // 464, halfway past the largest
  if (magnitude < 0x3c800000) {  // below 2^-6: the sum's last bit is worth 2^-9
    float small;
    std::memcpy(&small, &magnitude, 4);
    const float shifted = small + 16384.0f;
    std::memcpy(&bits, &shifted, 4);
    return {static_cast<uint8_t>(sign | (bits - 0x46800000))};
  }
  return {static_cast<uint8_t>(sign | ((magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20))};
}

}  // namespace rootgraft
