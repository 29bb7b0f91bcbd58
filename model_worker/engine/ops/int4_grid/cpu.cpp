// The grid of each group of 32 weights for 4 bits; compression/int4.py says which, and this gives the same bits.

// Products are rounded before they are added, as torch rounds them: the result must not depend on who computed it.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "../cpu/runtime.h"
#include "../cpu/simd.h"

#include <algorithm>

namespace rootgraft {
namespace {

constexpr int kGroup = 32;
constexpr int64_t kTile = 256;          // groups
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a small number added to it is rounded to an integer, ties to even

// Mirrored by `_FitArgs` in __init__.py.
struct FitArgs {
  const float* weights;  // [G, 32]
  int8_t* values;        // [G, 32]
  uint16_t* scales;      // [G] float16
  uint16_t* minimums;    // [G] float16
  int32_t* refused;      // set to 1 where a group holds what is not finite, or its grid is beyond float16
};

struct Grid {
  Floats scale, minimum;  // numbers that float16 holds
};

inline void store_float16(uint16_t* destination, Floats value) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(destination, &halves, sizeof(halves));
#elif defined(__F16C__)
  const __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(destination, &halves, sizeof(halves));
#else
  for (int i = 0; i < kLanes; ++i) destination[i] = to_float16(value[i]).bits;
#endif
}

inline Floats rounded(Floats value) {
  Float16 halves[kLanes];
  store_float16(reinterpret_cast<uint16_t*>(halves), value);
  return load(halves);
}

inline Floats inverse_of(const Grid& grid) { return grid.scale > 0.0f ? 1.0f / grid.scale : Floats{}; }

inline Floats value_of(Floats weight, const Grid& grid, Floats inverse) {
  Floats value = (weight - grid.minimum) * inverse;
  value = value > 0.0f ? value : Floats{};
  value = value < 15.0f ? value : broadcast(15.0f);
  return value + kRounder - kRounder;
}

// The sum over a group of what `term` gives for each input, in the order in which torch adds: by halves.
template <typename Term>
inline Floats sum_of(Term term) {
  Floats halves[2];
  for (int half = 0; half < 2; ++half) {
    Floats total = term(16 * half);
    for (int i = 16 * half + 1; i < 16 * half + 16; ++i) total += term(i);
    halves[half] = total;
  }
  return halves[0] + halves[1];
}

inline Floats squared_error(const Floats* weights, const Grid& grid) {
  const Floats inverse = inverse_of(grid);
  return sum_of([&](int i) {
    const Floats error = value_of(weights[i], grid, inverse) * grid.scale + grid.minimum - weights[i];
    return error * error;
  });
}

// The grid with the least squared error when the weights have the values that `grid` gives them.
inline Grid fit(const Floats* weights, Floats low, Floats mean_weight, const Grid& grid) {
  const Floats inverse = inverse_of(grid);
  Floats total{}, squares{};  // of small integers: exact in any order
  const Floats products = sum_of([&](int i) {
    const Floats value = value_of(weights[i], grid, inverse);
    total += value;
    squares += value * value;
    return value * (weights[i] - low);
  });
  const Floats mean_value = total / 32.0f;
  const Floats covariance = products / 32.0f - mean_value * mean_weight;
  const Floats variance = squares / 32.0f - mean_value * mean_value;
  Floats scale = variance > 0.0f ? covariance / variance : Floats{};
  scale = scale > 0.0f ? scale : Floats{};
  return {rounded(scale), rounded(low + mean_weight - scale * mean_value)};
}

inline Grid best_grid(const Floats* weights, Floats low, Floats high) {
  const Floats range = high - low;
  Grid best{rounded(range / 15.0f), rounded(low)};
  Floats least = squared_error(weights, best);
  const Floats mean_weight = sum_of([&](int i) { return weights[i] - low; }) / 32.0f;
  for (int num_steps = 14; num_steps <= 16; ++num_steps) {
    const Floats scale = range / static_cast<float>(num_steps);
    Grid fitted{rounded(scale), rounded(num_steps > 15 ? low + 0.5f * scale : low)};
    for (int i = 0; i < 2; ++i) fitted = fit(weights, low, mean_weight, fitted);
    const Floats error = squared_error(weights, fitted);
    best.scale = error < least ? fitted.scale : best.scale;
    best.minimum = error < least ? fitted.minimum : best.minimum;
    least = error < least ? error : least;
  }
  return best;
}

// kLanes groups, one in each lane; those from num_groups on repeat the last one, and are not kept.
void fit_groups(const FitArgs& a, int64_t first, int num_groups) {
  alignas(64) float columns[kGroup][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const float* const group = a.weights + (first + std::min(lane, num_groups - 1)) * kGroup;
    for (int i = 0; i < kGroup; ++i) columns[i][lane] = group[i];
  }
  Floats weights[kGroup], not_finite{};
  for (int i = 0; i < kGroup; ++i) {
    weights[i] = load(columns[i]);
    not_finite += weights[i] * 0.0f;
  }
  Floats low = weights[0], high = weights[0];
  for (int i = 1; i < kGroup; ++i) {
    low = weights[i] < low ? weights[i] : low;
    high = weights[i] > high ? weights[i] : high;
  }
  const Floats largest = max(max(low, -low), (high - low) / 15.0f);
  const Ints is_right = (not_finite == 0.0f) & (largest < 65520.0f);
  for (int lane = 0; lane < num_groups; ++lane) {
    if (is_right[lane] == 0) __atomic_store_n(a.refused, 1, __ATOMIC_RELAXED);
  }
  const Grid grid = best_grid(weights, low, high);
  const Floats inverse = inverse_of(grid);
  for (int i = 0; i < kGroup; ++i) store(columns[i], value_of(weights[i], grid, inverse));
  uint16_t scales[kLanes], minimums[kLanes];
  store_float16(scales, grid.scale);
  store_float16(minimums, grid.minimum);
  for (int lane = 0; lane < num_groups; ++lane) {
    int8_t* const values = a.values + (first + lane) * kGroup;
    for (int i = 0; i < kGroup; ++i) values[i] = static_cast<int8_t>(columns[i][lane]);
    a.scales[first + lane] = scales[lane];
    a.minimums[first + lane] = minimums[lane];
  }
}

}  // namespace
}  // namespace rootgraft

using namespace rootgraft;

extern "C" void rootgraft_fit_int4_grids(const void* args, const Step& step, Worker& worker) {
  const FitArgs& a = *static_cast<const FitArgs*>(args);
  for (int64_t tile; (tile = worker.take((step.num_rows + kTile - 1) / kTile)) >= 0;) {
    const int64_t end = std::min(step.num_rows, (tile + 1) * kTile);
    for (int64_t group = tile * kTile; group < end; group += kLanes) {
      fit_groups(a, group, static_cast<int>(std::min<int64_t>(kLanes, end - group)));
    }
  }
}
