#include <algorithm>
#include <cmath>

#include "../cpu/runtime.h"
#include "../cpu/simd.h"

using namespace rootgraft;

// Mirrored by `_SelectArgs` in __init__.py.
struct SelectArgs {
  const float* logits;  // [T, num_experts]
  int64_t num_experts;
  int64_t num_chosen;
  int64_t normalize;  // weights of a row sum to 1
  int32_t* experts;   // [T, num_chosen]
  float* weights;     // [T, num_chosen]
};

extern "C" void rootgraft_select_experts(const void* args, const Step& step, Worker& worker) {
  const SelectArgs& a = *static_cast<const SelectArgs*>(args);
  for (int64_t row; (row = worker.take(step.num_rows)) >= 0;) {
    const float* const logits = a.logits + row * a.num_experts;
    int32_t* const experts = a.experts + row * a.num_chosen;
    float* const weights = a.weights + row * a.num_chosen;
    // The largest so far, in order; of equal ones the first expert wins.
    int64_t num_found = 0;
    for (int64_t e = 0; e < a.num_experts; ++e) {
      int64_t place = num_found;
      while (place > 0 && logits[e] > logits[experts[place - 1]]) --place;
      if (place == a.num_chosen) continue;
      num_found = std::min(num_found + 1, a.num_chosen);
      std::copy_backward(experts + place, experts + num_found - 1, experts + num_found);
      experts[place] = static_cast<int32_t>(e);
    }
    const float peak = logits[experts[0]];
    float all = 0.0f, chosen = 0.0f;
    for (int64_t e = 0; e < a.num_experts; ++e) all += std::exp(logits[e] - peak);
    for (int64_t i = 0; i < a.num_chosen; ++i) chosen += weights[i] = std::exp(logits[experts[i]] - peak);
    const float total = a.normalize ? chosen : all;
    for (int64_t i = 0; i < a.num_chosen; ++i) weights[i] /= total;
  }
}

// Mirrored by `_GroupArgs` in __init__.py.
struct GroupArgs {
  const int32_t* experts;  // [T, num_chosen]
  int64_t num_experts;
  int64_t num_chosen;
  int64_t* starts;  // [num_experts + 1]
  int32_t* tokens;  // [T * num_chosen]
  int32_t* places;  // [T, num_chosen]
};

// A counting sort by one thread: some thousand pairs at most.
extern "C" void rootgraft_group_by_expert(const void* args, const Step& step, Worker& worker) {
  const GroupArgs& a = *static_cast<const GroupArgs*>(args);
  if (worker.take(1) < 0) return;
  const int64_t num_pairs = step.num_rows * a.num_chosen;
  std::fill_n(a.starts, a.num_experts + 1, 0);
  for (int64_t i = 0; i < num_pairs; ++i) ++a.starts[a.experts[i] + 1];
  for (int64_t e = 0; e < a.num_experts; ++e) a.starts[e + 1] += a.starts[e];
  for (int64_t i = num_pairs - 1; i >= 0; --i) {  // from the end of each expert's part towards its start
    const int32_t expert = a.experts[i];
    const int64_t place = --a.starts[expert + 1];
    a.tokens[place] = static_cast<int32_t>(i / a.num_chosen);
    a.places[i] = static_cast<int32_t>(place);
  }
  // Each start has moved down to that of its own expert: one entry to the right of where it belongs.
  std::copy(a.starts + 1, a.starts + a.num_experts + 1, a.starts);
  a.starts[a.num_experts] = num_pairs;
}

// Mirrored by `_GatherArgs` in __init__.py.
struct GatherArgs {
  const float* x;  // [T, size], rows x_stride apart
  int64_t x_stride;
  int64_t size;
  int64_t num_chosen;
  const int32_t* tokens;  // [T * num_chosen]
  float* out;             // [T * num_chosen, size]
};

extern "C" void rootgraft_gather_rows(const void* args, const Step& step, Worker& worker) {
  const GatherArgs& a = *static_cast<const GatherArgs*>(args);
  for (int64_t i; (i = worker.take(step.num_rows * a.num_chosen)) >= 0;) {
    std::copy_n(a.x + a.tokens[i] * a.x_stride, a.size, a.out + i * a.size);
  }
}

// Mirrored by `_CombineArgs` in __init__.py.
struct CombineArgs {
  const float* y;  // [T * num_chosen, size]
  int64_t size;
  int64_t num_chosen;
  const int32_t* places;  // [T, num_chosen]
  const float* weights;   // [T, num_chosen]
  float* out;             // [T, size], rows out_stride apart
  int64_t out_stride;
  float alpha;
};

extern "C" void rootgraft_combine_experts(const void* args, const Step& step, Worker& worker) {
  const CombineArgs& a = *static_cast<const CombineArgs*>(args);
  for (int64_t row; (row = worker.take(step.num_rows)) >= 0;) {
    float* const out = a.out + row * a.out_stride;
    for (int64_t i = 0; i < a.num_chosen; ++i) {
      const float* const y = a.y + a.places[row * a.num_chosen + i] * a.size;
      const float weight = a.weights[row * a.num_chosen + i] * a.alpha;
      int64_t k = 0;
      for (; k + kLanes <= a.size; k += kLanes) store(out + k, load(out + k) + load(y + k) * weight);
      for (; k < a.size; ++k) out[k] += y[k] * weight;
    }
  }
}
