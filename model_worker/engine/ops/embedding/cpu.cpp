#include <algorithm>

#include "../cpu/runtime.h"
#include "../cpu/simd.h"
#include "../linear/packed_weight.h"

using namespace rootgraft;

namespace {

// Mirrored by `_EmbeddingArgs` in __init__.py.
struct EmbeddingArgs {
  const void* weight;  // packed as for linear layers: an embedding may also be the head
  int64_t format;
  int64_t num_rows;
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

// The groups of one token's panel.
template <typename Group>
const Group* panel_of(const EmbeddingArgs& a, int64_t token) {
  return static_cast<const Group*>(a.weight) + token / kPanel * (a.size / kGroup);
}

void int8_row(const EmbeddingArgs& a, int64_t token, float* out) {
  const Int8Group* group = panel_of<Int8Group>(a, token);
  const int64_t lane = token % kPanel;
  for (const float* const end = out + a.size; out < end; out += kGroup, ++group) {
    const float scale = widen(group->scale[lane]) * a.multiplier;
    for (int k = 0; k < kGroup; ++k) out[k] = static_cast<float>(group->values[k / 4][lane][k % 4] - 128) * scale;
  }
}

void int4_row(const EmbeddingArgs& a, int64_t token, float* out) {
  const Int4Group* group = panel_of<Int4Group>(a, token);
  const int64_t lane = token % kPanel;
  for (const float* const end = out + a.size; out < end; out += kGroup, ++group) {
    const float scale = widen(group->scale[lane]) * a.multiplier;
    const float minimum = widen(group->minimum[lane]) * a.multiplier;
    for (int k = 0; k < kGroup; ++k) {
      const int both = group->values[k % 16 / 4][lane][k % 4];
      out[k] = static_cast<float>(k < 16 ? both & 0xf : both >> 4) * scale + minimum;
    }
  }
}

}  // namespace

extern "C" void rootgraft_embedding(const void* args, const Step& step, Worker& worker) {
  const EmbeddingArgs& a = *static_cast<const EmbeddingArgs*>(args);
  for (int64_t row; (row = worker.take(step.num_rows)) >= 0;) {
    const int64_t token = step.input_ids[row];
    float* const out = a.out + row * a.out_stride;
    if (token >= a.num_rows) {
      std::fill_n(out, a.size, 0.0f);
      continue;
    }
    switch (a.format) {
      case kFloat32: dense_row<float>(a, token, out); break;
      case kBFloat16: dense_row<BFloat16>(a, token, out); break;
      case kFloat16: dense_row<Float16>(a, token, out); break;
      case kInt8: int8_row(a, token, out); break;
      case kInt4: int4_row(a, token, out); break;
    }
  }
}
