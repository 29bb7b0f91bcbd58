#include "../cpu/runtime.h"
#include "../cpu/simd.h"

using namespace rootgraft;

namespace {

constexpr int64_t kPanel = 32;
constexpr int64_t kGroup = 32;

// Mirrored by `_EmbeddingArgs` in __init__.py.
struct EmbeddingArgs {
  const void* weight;  // packed as for linear layers (linear/packed_weight.py): an embedding may also be the head
  int64_t format;
  int64_t size;
  float* out;  // [T, size], rows out_stride apart
  int64_t out_stride;
  float multiplier;
};

template <typename W>
void dense_row(const EmbeddingArgs& a, int64_t token, float* out) {
  const W* const column = static_cast<const W*>(a.weight) + token / kPanel * a.size * kPanel + token % kPanel;
  for (int64_t k = 0; k < a.size; ++k) out[k] = widen(column[k * kPanel]) * a.multiplier;
}

void int8_row(const EmbeddingArgs& a, int64_t token, float* out) {
  constexpr int64_t kGroupBytes = 64 + kPanel * kGroup;
  const int64_t num_groups = a.size / kGroup, lane = token % kPanel;
  const uint8_t* group = static_cast<const uint8_t*>(a.weight) + token / kPanel * num_groups * kGroupBytes;
  for (int64_t g = 0; g < num_groups; ++g, group += kGroupBytes) {
    const float scale = widen(bits_of<Float16>(group + 2 * lane)) * a.multiplier;
    for (int64_t k = 0; k < kGroup; ++k) {
      const int value = group[64 + k / 4 * kPanel * 4 + lane * 4 + k % 4];
      out[g * kGroup + k] = static_cast<float>(value - 128) * scale;
    }
  }
}

void int4_row(const EmbeddingArgs& a, int64_t token, float* out) {
  constexpr int64_t kGroupBytes = 128 + kPanel * kGroup / 2;
  const int64_t num_groups = a.size / kGroup, lane = token % kPanel;
  const uint8_t* group = static_cast<const uint8_t*>(a.weight) + token / kPanel * num_groups * kGroupBytes;
  for (int64_t g = 0; g < num_groups; ++g, group += kGroupBytes) {
    const float scale = widen(bits_of<Float16>(group + 2 * lane)) * a.multiplier;
    const float minimum = widen(bits_of<Float16>(group + 64 + 2 * lane)) * a.multiplier;
    for (int64_t k = 0; k < kGroup; ++k) {
      const int both = group[128 + k % 16 / 4 * kPanel * 4 + lane * 4 + k % 4];
      out[g * kGroup + k] = static_cast<float>(k < 16 ? both & 0xf : both >> 4) * scale + minimum;
    }
  }
}

}  // namespace

extern "C" void rootgraft_embedding(const void* args, const Step& step, Worker& worker) {
  const EmbeddingArgs& a = *static_cast<const EmbeddingArgs*>(args);
  for (int64_t row; (row = worker.take(step.num_rows)) >= 0;) {
    const int64_t token = step.input_ids[row];
    float* const out = a.out + row * a.out_stride;
    switch (a.format) {  // as in linear/cpu.cpp
      case 0: dense_row<float>(a, token, out); break;
      case 1: dense_row<BFloat16>(a, token, out); break;
      case 2: dense_row<Float16>(a, token, out); break;
      case 3: int8_row(a, token, out); break;
      case 4: int4_row(a, token, out); break;
    }
  }
}
