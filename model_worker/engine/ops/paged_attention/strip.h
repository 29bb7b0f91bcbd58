// A strip of 64 positions, and the products of rows with its keys and values. Part of cpu.cpp.
#pragma once

#include <algorithm>

#include "../cpu/simd.h"

namespace rootgraft {

constexpr int kSpan = 16;          // keys side by side in a block: the smallest unit of the fast way
constexpr int kPanel = 2 * kSpan;  // keys, or value dimensions, whose sums are in registers at a time
constexpr int kVectors = kPanel / kLanes;
constexpr int kStrip = 64;         // positions between two looks at the maximum

// Where 16 consecutive positions lie.
template <typename W>
struct Span {
  const W* keys;
  const W* values;
  const float* key_scales;  // null where W has none
  const float* value_scales;
};

// Whether a strip is read once from the cache itself: then the next one is fetched meanwhile.
template <typename W>
constexpr bool kIsFetched = sizeof(W) < sizeof(float);

// A strip, and the one after it.
template <typename W>
struct Strip {
  Span<W> span[kStrip / kSpan];
  Span<W> next[kStrip / kSpan];
  int64_t key_stride;    // from one dimension of a key to the next
  int64_t value_stride;  // from one position's value to the next
};

// scores[r, 0:32] = rows[r] . keys of spans i and i + 1, for R rows.
template <int R, typename W>
static inline void multiply_keys(const Strip<W>& strip, int i, const float* rows, int64_t dim, float* scores) {
  const int64_t stride = strip.key_stride;
  const W* const first = strip.span[i].keys;
  const W* const second = strip.span[i + 1].keys;
  const W* const next_first = strip.next[i].keys;
  const W* const next_second = strip.next[i + 1].keys;
  Floats local[R][kVectors] = {};
  const float* fours[(R + 3) / 4];  // four rows share a pointer: twelve would not fit the integer registers
  for (int i = 0; i < (R + 3) / 4; ++i) fours[i] = rows + 4 * i * dim;
  for (int64_t d = 0; d < dim; ++d) {
    Floats key[kVectors];
    if constexpr (kIsFetched<W>) {
      __builtin_prefetch(next_first + d * stride);
      __builtin_prefetch(next_second + d * stride);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      key[v] = load(v < kVectors / 2 ? first + d * stride + v * kLanes : second + d * stride + v * kLanes - kSpan);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats value = broadcast(fours[r / 4][r % 4 * dim + d]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) local[r][v] += value * key[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(scores + r * kStrip + v * kLanes, local[r][v]);
}

// sums[r, 0:32] += weights[r, begin:end] * values[begin:end, column:column + 32], for R rows.
template <int R, typename W>
static inline void multiply_values(const Strip<W>& strip, int64_t column, const float* weights, int begin, int end,
                            float* sums, int64_t sums_stride) {
  Floats local[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) local[r][v] = load(sums + r * sums_stride + v * kLanes);
  for (int i = begin; i < end;) {
    const int span_end = std::min(end, (i / kSpan + 1) * kSpan);
    const int64_t start = i % kSpan * strip.value_stride + column;
    const W* values = strip.span[i / kSpan].values + start;
    const W* next_values = strip.next[i / kSpan].values + start;
    for (; i < span_end; ++i, values += strip.value_stride, next_values += strip.value_stride) {
      if constexpr (kIsFetched<W>) __builtin_prefetch(next_values);
      Floats value[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) value[v] = load(values + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats weight = broadcast(weights[r * kStrip + i]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) local[r][v] += weight * value[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(sums + r * sums_stride + v * kLanes, local[r][v]);
}

}  // namespace rootgraft
