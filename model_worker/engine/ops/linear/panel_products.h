// Rows times a panel of weights, in float32.
#pragma once

#include "../cpu/simd.h"
#include "../lora/tile_terms.h"
#include "packed_weight.h"

namespace rootgraft {
namespace {  // known to this file alone, so that the compiler makes a version of each for its arguments

constexpr int kVectors = kPanel / kLanes;   // of one row of a panel
constexpr int kMaxRows = kLanes == 16 ? 12 : (kLanes == 8 ? 3 : 1);  // rows whose sums fit the registers

// Asks for weights that are used some microseconds later: the machine's own prefetching ends at each page. They go to
// the second level of cache, because requests for the first one wait for a few buffers, up to the memory's whole latency.
inline void fetch_ahead(const void* weights, int num_bytes) {
  constexpr int kAhead = 8192, kForRead = 0, kSecondLevel = 2;
  const char* const start = static_cast<const char*>(weights) + kAhead;
  for (int i = 0; i < num_bytes; i += 64) __builtin_prefetch(start + i, kForRead, kSecondLevel);
}

// What a product asks for each time that it has used some weights: more weights, where they come from memory and not from
// the cache, and a line of what its tile needs at the end. So the memory is busy while the product is computed.
template <bool kFromMemory>
struct Fetch {
  TileTerms& terms;
  void operator()(const void* used, int num_bytes) const {
    if constexpr (kFromMemory) fetch_ahead(used, num_bytes);
    terms.fetch_line();
  }
};
using FetchFromMemory = Fetch<true>;
using FetchFromCache = Fetch<false>;

using Sums = PanelSums;

// sums[r] += x[r, 0:K] * panel[0:K], for R rows. The widened weights are kept in `wide`, unless that is null.
// Each sum is one chain in the order of K, for every R: a row's result does not depend on how many others there are.
template <int R, typename W, typename Fetch>
inline void multiply(const W* panel, const float* x, int64_t x_stride, int64_t num_inputs, Sums* sums, Fetch fetch,
                     float* wide) {
  Floats local[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) local[r][v] = sums[r][v];
  // Four rows share a pointer: twelve of them would not fit the integer registers.
  const float* rows[(R + 3) / 4];
  for (int i = 0; i < (R + 3) / 4; ++i) rows[i] = x + 4 * i * x_stride;
  for (int64_t k = 0; k < num_inputs; ++k) {
    Floats w[kVectors];
    fetch(panel + k * kPanel, kPanel * sizeof(W));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = load(panel + k * kPanel + v * kLanes);
    if (wide != nullptr) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(wide + k * kPanel + v * kLanes, w[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats value = broadcast(rows[r / 4][r % 4 * x_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) local[r][v] += value * w[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = local[r][v];
}

template <typename W, typename Fetch, int R = kMaxRows>
void multiply_rows(int rows, const W* panel, const float* x, int64_t x_stride, int64_t num_inputs, Sums* sums,
                   Fetch fetch, float* wide = nullptr) {
  if constexpr (R > 1) {
    if (rows < R) {
      return multiply_rows<W, Fetch, R - 1>(rows, panel, x, x_stride, num_inputs, sums, fetch, wide);
    }
  }
  multiply<R>(panel, x, x_stride, num_inputs, sums, fetch, wide);
}

// Cuts `rows` into blocks of nearly equal size, at most `most` each, and calls f(first row, number of rows).
template <typename F>
inline void for_blocks(int rows, int most, F&& f) {
  const int num_blocks = (rows + most - 1) / most;
  for (int block = 0; block < num_blocks; ++block) {
    const int first = rows * block / num_blocks;
    f(first, rows * (block + 1) / num_blocks - first);
  }
}

}  // namespace
}  // namespace rootgraft
