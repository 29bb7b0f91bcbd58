// Rows of floats to 8 bits, with a scale for each group of 32; the package's docstring has the formula.

#include "../cpu/runtime.h"
#include "../cpu/simd.h"
#include "packed_weight.h"

namespace rootgraft {
namespace {

constexpr float kSmallestPeak = 0x1p-120f;  // 127 / peak is finite; smaller groups are zeros

// Mirrored by `_QuantizeArgs` in __init__.py.
struct QuantizeArgs {
  const float* x;  // [T, K], rows x_stride apart
  int64_t x_stride;
  int64_t num_inputs;
  int8_t* values;  // [T, padded K]
  float* scales;   // [T, K groups]
  int32_t* sums;   // [T, K groups]
  int64_t rows_per_token;
};

// One group; 2^23 * 1.5 added to a small number rounds it to an integer, ties to even.
inline void quantize_group(const float* x, int8_t* values, float* scale, int32_t* total) {
  Ints peaks{};  // as bits of magnitudes, whose order is that of the numbers, with NaN above infinity
  for (int i = 0; i < kGroup; i += kLanes) peaks = max(peaks, bits_of<Ints>(x + i) & 0x7fffffff);
  const int32_t peak_bits = max(peaks);
  const float peak = bits_of<float>(&peak_bits), inverse = peak >= kSmallestPeak ? 127.0f / peak : 0.0f;
  Ints sums{};
  for (int i = 0; i < kGroup; i += kLanes) {
    const Floats shifted = load(x + i) * inverse + 12582912.0f;
    const Ints value = reinterpret_cast<Ints>(shifted) - 0x4b400000;
    const Bytes bytes = narrow(value);
    std::memcpy(values + i, &bytes, sizeof(bytes));
    sums += value << 24 >> 24;  // as kept, in case x is not finite
  }
  *scale = peak / 127.0f;
  *total = sum(sums);
}

}  // namespace
}  // namespace rootgraft

using namespace rootgraft;

extern "C" void rootgraft_quantize_rows(const void* args, const Step& step, Worker& worker) {
  const QuantizeArgs& a = *static_cast<const QuantizeArgs*>(args);
  const int64_t num_whole = a.num_inputs / kGroup, num_groups = (a.num_inputs + kGroup - 1) / kGroup;
  for (int64_t row; (row = worker.take(step.num_rows * a.rows_per_token)) >= 0;) {
    const float* const x = a.x + row * a.x_stride;
    int8_t* const values = a.values + row * num_groups * kGroup;
    float* const scales = a.scales + row * num_groups;
    int32_t* const sums = a.sums + row * num_groups;
    for (int64_t g = 0; g < num_whole; ++g) quantize_group(x + g * kGroup, values + g * kGroup, scales + g, sums + g);
    if (num_whole < num_groups) {
      float padded[kGroup] = {};
      std::memcpy(padded, x + num_whole * kGroup, (a.num_inputs - num_whole * kGroup) * sizeof(float));
      quantize_group(padded, values + num_whole * kGroup, scales + num_whole, sums + num_whole);
    }
  }
}
