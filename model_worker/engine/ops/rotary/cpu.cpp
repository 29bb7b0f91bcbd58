#include <algorithm>
#include <cmath>

#include "../cpu/runtime.h"
#include "../cpu/simd.h"
#include "../paged_attention/kv_block.h"

namespace rootgraft {
namespace {

// Mirrored by `_RotaryTableArgs` in __init__.py.
struct RotaryTableArgs {
  const float* inverse_frequencies;  // [half]
  int64_t half;
  float attention_scaling;
  float* cos;  // [T, half]
  float* sin;  // [T, half]
};

// Mirrored by `_RotaryKVArgs` in __init__.py.
struct RotaryKVArgs {
  float* query;  // [T, num_heads, key_dim], rows `stride` apart, as those of key and value
  float* key;    // [T, num_kv_heads, key_dim]
  float* value;  // [T, num_kv_heads, value_dim]
  int64_t stride;
  int64_t num_heads;
  const float* cos;  // [T, half], or null
  const float* sin;
  int64_t half;
  KVBlocks kv;
  int64_t layer_group;  // whose slots are written
};

// x[i], x[i + half] -> x[i] cos[i] - x[i + half] sin[i], x[i + half] cos[i] + x[i] sin[i]
void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  float* const y = x + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Floats first = load(x + i), second = load(y + i), c = load(cos + i), s = load(sin + i);
    store(x + i, first * c - second * s);
    store(y + i, second * c + first * s);
  }
  for (; i < half; ++i) {
    const float first = x[i], second = y[i];
    x[i] = first * cos[i] - second * sin[i];
    y[i] = second * cos[i] + first * sin[i];
  }
}

template <typename T>
constexpr float kLargest = sizeof(T) == 1 ? 127.0f : 1.0f;
template <>
constexpr float kLargest<Float8> = 448.0f;

constexpr float kSmallestPeak = 0x1p-100f;  // kLargest / peak is finite; what is smaller becomes zeros

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, BFloat16& out) { out = to_bfloat16(value); }
inline void narrow(float value, Float16& out) { out = to_float16(value); }
inline void narrow(float value, Float8& out) { out = to_float8(value); }
inline void narrow(float value, int8_t& out) { out = static_cast<int8_t>(std::lrint(value)); }

// max |x|. Compared as bits, whose order is that of the numbers, with NaN above infinity.
float largest_magnitude(const float* x, int64_t size) {
  Ints peaks{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) peaks = max(peaks, bits_of<Ints>(x + i) & 0x7fffffff);
  int32_t peak = max(peaks);
  for (; i < size; ++i) peak = std::max(peak, bits_of<int32_t>(x + i) & 0x7fffffff);
  return bits_of<float>(&peak);
}

// Writes x[0:size] to out[0], out[stride], ...; scaled so that the largest becomes kLargest where the format has
// scales. What is not finite makes the scale not finite.
template <typename T>
void write(const float* x, int64_t size, T* out, int64_t stride, float* scale) {
  if constexpr (kHasScales<T>) {
    const float peak = largest_magnitude(x, size);
    const float inverse = peak >= kSmallestPeak ? kLargest<T> / peak : 0.0f;
    for (int64_t i = 0; i < size; ++i) narrow(x[i] * inverse, out[i * stride]);
    *scale = peak / kLargest<T>;
  } else {
    for (int64_t i = 0; i < size; ++i) narrow(x[i], out[i * stride]);
  }
}

template <typename T>
void write_token(const RotaryKVArgs& a, int64_t token, int64_t slot) {
  const int64_t block = slot / a.kv.block_size, offset = slot % a.kv.block_size;
  for (int64_t head = 0; head < a.kv.num_kv_heads; ++head) {
    const HeadBlock<T> to = head_block<T>(a.kv, block, head);
    float* const key_scale = kHasScales<T> ? to.key_scales + offset : nullptr;
    float* const value_scale = kHasScales<T> ? to.value_scales + offset : nullptr;
    const float* const key = a.key + token * a.stride + head * a.kv.key_dim;
    const float* const value = a.value + token * a.stride + head * a.kv.value_dim;
    write(key, a.kv.key_dim, to.keys + offset, a.kv.block_size, key_scale);
    write(value, a.kv.value_dim, to.values + offset * a.kv.padded_value_dim, 1, value_scale);
  }
}

constexpr int64_t kMaxTileTokens = 16;  // neighbours, which share cache lines of keys

}  // namespace
}  // namespace rootgraft

using namespace rootgraft;

extern "C" void rootgraft_rotary_table(const void* args, const Step& step, Worker& worker) {
  const RotaryTableArgs& a = *static_cast<const RotaryTableArgs*>(args);
  for (int64_t token; (token = worker.take(step.num_rows)) >= 0;) {
    const float position = static_cast<float>(step.positions[token]);
    for (int64_t i = 0; i < a.half; ++i) {
      const float angle = position * a.inverse_frequencies[i];
      a.cos[token * a.half + i] = std::cos(angle) * a.attention_scaling;
      a.sin[token * a.half + i] = std::sin(angle) * a.attention_scaling;
    }
  }
}

extern "C" void rootgraft_rotary_kv(const void* args, const Step& step, Worker& worker) {
  const RotaryKVArgs& a = *static_cast<const RotaryKVArgs*>(args);
  const int64_t* const slots = step.slot_mapping + a.layer_group * step.num_rows;
  const int64_t num_tokens = std::clamp<int64_t>(step.num_rows / 16, 1, kMaxTileTokens);
  const int64_t num_tiles = (step.num_rows + num_tokens - 1) / num_tokens;
  for (int64_t tile; (tile = worker.take(num_tiles)) >= 0;) {
    for (int64_t t = tile * num_tokens; t < std::min(step.num_rows, (tile + 1) * num_tokens); ++t) {
      if (a.cos != nullptr) {
        const float* const cos = a.cos + t * a.half;
        const float* const sin = a.sin + t * a.half;
        for (int64_t h = 0; h < a.num_heads; ++h) rotate(a.query + t * a.stride + h * a.kv.key_dim, cos, sin, a.half);
        for (int64_t h = 0; h < a.kv.num_kv_heads; ++h) {
          rotate(a.key + t * a.stride + h * a.kv.key_dim, cos, sin, a.half);
        }
      }
      switch (a.kv.format) {
        case KVFormat::kFloat32: write_token<float>(a, t, slots[t]); break;
        case KVFormat::kBFloat16: write_token<BFloat16>(a, t, slots[t]); break;
        case KVFormat::kFloat16: write_token<Float16>(a, t, slots[t]); break;
        case KVFormat::kInt8: write_token<int8_t>(a, t, slots[t]); break;
        case KVFormat::kFloat8: write_token<Float8>(a, t, slots[t]); break;
      }
    }
  }
}
