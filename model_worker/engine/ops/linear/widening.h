// Packed weights as panels of float32.
#pragma once

#include "panel_products.h"

namespace rootgraft {
namespace {  // known to this file alone, so that the compiler makes a version of each for its arguments

inline Ints quad_byte(const uint8_t (*values)[4], int v, int byte) {
  return (bits_of<Ints>(values[v * kLanes]) >> (8 * byte)) & 0xff;
}

void widen_group(const Int8Group& group, float* out) {
  for (int v = 0; v < kVectors; ++v) {
    const Floats scale = load(group.scale + v * kLanes);
    for (int k = 0; k < kGroup; ++k) {
      const Ints value = quad_byte(group.values[k / 4], v, k % 4) - 128;
      store(out + k * kPanel + v * kLanes, __builtin_convertvector(value, Floats) * scale);
    }
  }
}

void widen_group(const Int4Group& group, float* out) {
  for (int v = 0; v < kVectors; ++v) {
    const Floats scale = load(group.scale + v * kLanes), minimum = load(group.minimum + v * kLanes);
    for (int k = 0; k < kGroup; ++k) {
      const Ints both = quad_byte(group.values[k % 16 / 4], v, k % 4);
      const Ints value = k < 16 ? both & 0xf : both >> 4;
      store(out + k * kPanel + v * kLanes, __builtin_convertvector(value, Floats) * scale + minimum);
    }
  }
}

template <typename W>
void widen_dense(const void* weight, int64_t num_inputs, int64_t panel, int64_t first_input, int64_t count, float* out) {
  const W* const source = static_cast<const W*>(weight) + (panel * num_inputs + first_input) * kPanel;
  for (int64_t i = 0; i < count * kPanel; i += kLanes) store(out + i, load(source + i));
}

template <typename Group>
inline void widen_groups(const void* weight, int64_t num_inputs, int64_t panel, int64_t first_input, int64_t count, float* out) {
  const Group* const groups = static_cast<const Group*>(weight) + panel * ((num_inputs + kGroup - 1) / kGroup);
  for (int64_t i = 0; i < count; i += kGroup) widen_group(groups[(first_input + i) / kGroup], out + i * kPanel);
}

// out = inputs [first_input, first_input + count) of a panel. [count][kPanel]; first_input is a multiple of kGroup.
inline void widen_panel(WeightFormat format, const void* weight, int64_t num_inputs, int64_t panel, int64_t first_input,
                        int64_t count, float* out) {
  switch (format) {
    case kFloat32: widen_dense<float>(weight, num_inputs, panel, first_input, count, out); break;
    case kBFloat16: widen_dense<BFloat16>(weight, num_inputs, panel, first_input, count, out); break;
    case kFloat16: widen_dense<Float16>(weight, num_inputs, panel, first_input, count, out); break;
    case kInt8: widen_groups<Int8Group>(weight, num_inputs, panel, first_input, count, out); break;
    case kInt4: widen_groups<Int4Group>(weight, num_inputs, panel, first_input, count, out); break;
  }
}

}  // namespace
}  // namespace rootgraft
