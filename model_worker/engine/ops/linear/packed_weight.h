// The packed weights that linear layers and embeddings read; packed_weight.py draws the layouts.
#pragma once

#include "../cpu/simd.h"

namespace rootgraft {

constexpr int kPanel = 32;  // outputs
constexpr int kGroup = 32;  // weights along K that share a scale

using PanelSums = Floats[kPanel / kLanes];  // of one row

// Numbers as in packed_weight.py.
enum WeightFormat : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4 };

struct Int8Group {
  Float16 scale[kPanel];
  uint8_t values[kGroup / 4][kPanel][4];  // weight / scale + 128
};
struct Int4Group {
  Float16 scale[kPanel];
  Float16 minimum[kPanel];
  uint8_t values[kGroup / 8][kPanel][4];  // low halves: inputs 0..15, high halves: inputs 16..31 of the group
};
static_assert(sizeof(Int8Group) == 64 + 1024 && sizeof(Int4Group) == 128 + 512);

}  // namespace rootgraft
