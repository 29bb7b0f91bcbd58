#include "../cpu/runtime.h"
#include "../cpu/simd.h"
#include "../cpu/variants.h"

#include <cmath>

using namespace rootgraft;

// Mirrored by `_RMSNormArgs` in __init__.py.
struct RMSNormArgs {
  const float* x;       // [T, heads, size], rows x_stride apart
  int64_t x_stride;
  float* out;           // the same shape, rows out_stride apart; may be x
  int64_t out_stride;
  const float* weight;  // [heads or 1, size]
  int64_t weight_stride;
  int64_t num_heads;
  int64_t size;
  float epsilon;
  int64_t accumulate;   // add to `out`
  float alpha;
  int64_t index;        // of the norm in a variant's table; -1: rows have no variants
};

extern "C" void rootgraft_rms_norm(const void* args, const Step& step, Worker& worker) {
  const RMSNormArgs& a = *static_cast<const RMSNormArgs*>(args);
  for (int64_t row; (row = worker.take(step.num_rows)) >= 0;) {
    const float* row_weight = a.weight;
    if (a.index >= 0) {
      for_segments(*step.variants, nullptr, row, 1, [&](const Segment& segment, int64_t, int64_t) {
        const float* const changed = segment.variant->norms[a.index];
        if (changed != nullptr) row_weight = changed;
      });
    }
    for (int64_t head = 0; head < a.num_heads; ++head) {
      const float* const x = a.x + row * a.x_stride + head * a.size;
      float* const out = a.out + row * a.out_stride + head * a.size;
      const float* const weight = row_weight + head * a.weight_stride;
      Floats squares{};
      int64_t i = 0;
      for (; i + kLanes <= a.size; i += kLanes) squares += load(x + i) * load(x + i);
      float total = sum(squares);
      for (; i < a.size; ++i) total += x[i] * x[i];
      const float factor = 1.0f / std::sqrt(total / static_cast<float>(a.size) + a.epsilon);
      for (i = 0; i + kLanes <= a.size; i += kLanes) {
        const Floats value = load(x + i) * factor * load(weight + i) * a.alpha;
        store(out + i, a.accumulate ? load(out + i) + value : value);
      }
      for (; i < a.size; ++i) {
        const float value = x[i] * factor * weight[i] * a.alpha;
        out[i] = a.accumulate ? out[i] + value : value;
      }
    }
  }
}
