// What a variant's terms make of the sums of a linear layer's tile: sums = e sums + t B^T + c.
#pragma once

#include "../cpu/simd.h"
#include "../cpu/variants.h"
#include "../linear/packed_weight.h"

namespace rootgraft {

using PanelSums = Floats[kPanel / kLanes];

constexpr int kUnitVectors = kUnit / kLanes;
constexpr int kExpandRows = kLanes == 16 ? 8 : (kLanes == 8 ? 2 : 1);  // rows whose sums fit the registers

// Asks for what a later panel will read. Inline at all costs: a compiler that sees a function without effects drops its
// calls.
__attribute__((always_inline)) inline void fetch_unit(const void* b, int64_t num_bytes) {
  constexpr int kUnitsAhead = 4, kForRead = 0, kSecondLevel = 2;
  const char* const start = static_cast<const char*>(b) + kUnitsAhead * num_bytes;
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(start + i, kForRead, kSecondLevel);
}

// Even and odd ranks are summed apart, each one after the other: a row's bits do not depend on how many rows there are.
template <typename W, int R = kExpandRows>
inline void expand(int rows, const W* b, int64_t num_ranks, const float* t, int64_t t_stride, PanelSums* sums,
                   int unit) {
  if constexpr (R > 1) {
    if (rows < R) return expand<W, R - 1>(rows, b, num_ranks, t, t_stride, sums, unit);
  }
  Floats even[R][kUnitVectors], odd[R][kUnitVectors] = {};
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kUnitVectors; ++v) even[r][v] = sums[r][unit * kUnitVectors + v];
  int64_t i = 0;
  for (; i + 2 <= num_ranks; i += 2) {
    for (int v = 0; v < kUnitVectors; ++v) {
      Floats first, second;
      load_pair(b + i * kUnit, v, first, second);
      for (int r = 0; r < R; ++r) {
        even[r][v] += broadcast(t[r * t_stride + i]) * first;
        odd[r][v] += broadcast(t[r * t_stride + i + 1]) * second;
      }
    }
  }
  if (i < num_ranks) {
    for (int v = 0; v < kUnitVectors; ++v) {
      const Floats last = load_first(b + i * kUnit, v);
      for (int r = 0; r < R; ++r) even[r][v] += broadcast(t[r * t_stride + i]) * last;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kUnitVectors; ++v) sums[r][unit * kUnitVectors + v] = even[r][v] + odd[r][v];
}

template <typename W>
void add_low_rank(const LinearTerms& terms, int64_t panel, const float* t, int64_t t_stride, int rows,
                  PanelSums* sums) {
  constexpr int kUnits = kPanel / kUnit;
  for (int u = 0; u < kUnits; ++u) {
    const Unit& unit = terms.units[panel * kUnits + u];
    const W* const b = static_cast<const W*>(terms.b) + unit.offset;
    fetch_unit(b, unit.num_ranks * kUnit * sizeof(W));
    for (int first = 0; first < rows; first += kExpandRows) {
      expand(std::min(rows - first, kExpandRows), b, unit.num_ranks, t + first * t_stride + unit.first_rank, t_stride,
             sums + first, u);
    }
  }
}

// All terms but the dense one; sums and t are those of the first row.
inline void add_terms(const LinearTerms& terms, int64_t panel, const float* t, int64_t t_stride, int rows,
                      PanelSums* sums) {
  constexpr int kVectors = kPanel / kLanes;
  if (terms.output_scale != nullptr) {
    const float* const scale = terms.output_scale + panel * kPanel;
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] *= load(scale + v * kLanes);
  }
  if (terms.b != nullptr) {
    if (terms.is_float32) {
      add_low_rank<float>(terms, panel, t, t_stride, rows, sums);
    } else {
      add_low_rank<BFloat16>(terms, panel, t, t_stride, rows, sums);
    }
  }
  if (terms.bias != nullptr) {
    const float* const bias = terms.bias + panel * kPanel;
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += load(bias + v * kLanes);
  }
}

}  // namespace rootgraft
