// What a variant's terms make of the sums of a linear layer's tile: sums = e sums + t B^T + c.
#pragma once

#include "../cpu/simd.h"
#include "../cpu/variants.h"
#include "../linear/packed_weight.h"

namespace rootgraft {

constexpr int kUnitVectors = kUnit / kLanes;
// Units of a panel and rows that are computed together, whose sums fit the registers.
constexpr int kMaxUnits = kLanes == 16 ? 2 : 1;
constexpr int kExpandRows = kLanes == 16 ? 6 : (kLanes == 8 ? 2 : 1);

// Adds the products of U units that have as many ranks, for R rows; `sums` are those of the first row and unit.
// Even and odd ranks are summed apart, each one after the other: a row's bits do not depend on how many rows there are.
template <typename W, int U, int R>
inline void expand(const W* b, const Unit* units, const float* t, int64_t t_stride, Floats* sums) {
  constexpr int kVectors = kPanel / kLanes;
  const int64_t num_ranks = units[0].num_ranks;
  const W* of_unit[U];
  const float* of_row[U][R];
  Floats even[R][U][kUnitVectors], odd[R][U][kUnitVectors] = {};
  for (int u = 0; u < U; ++u) {
    of_unit[u] = b + units[u].offset;
    for (int r = 0; r < R; ++r) {
      of_row[u][r] = t + r * t_stride + units[u].first_rank;
      for (int v = 0; v < kUnitVectors; ++v) even[r][u][v] = sums[r * kVectors + u * kUnitVectors + v];
    }
  }
  int64_t i = 0;
  for (; i + 2 <= num_ranks; i += 2) {
    for (int u = 0; u < U; ++u) {
      for (int v = 0; v < kUnitVectors; ++v) {
        Floats first, second;
        load_pair(of_unit[u] + i * kUnit, v, first, second);
        for (int r = 0; r < R; ++r) {
          even[r][u][v] += broadcast(of_row[u][r][i]) * first;
          odd[r][u][v] += broadcast(of_row[u][r][i + 1]) * second;
        }
      }
    }
  }
  if (i < num_ranks) {
    for (int u = 0; u < U; ++u) {
      for (int v = 0; v < kUnitVectors; ++v) {
        const Floats last = load_first(of_unit[u] + i * kUnit, v);
        for (int r = 0; r < R; ++r) even[r][u][v] += broadcast(of_row[u][r][i]) * last;
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < kUnitVectors; ++v)
        sums[r * kVectors + u * kUnitVectors + v] = even[r][u][v] + odd[r][u][v];
}

template <typename W, int U, int R = kExpandRows>
inline void expand_rows(int rows, const W* b, const Unit* units, const float* t, int64_t t_stride, Floats* sums) {
  if constexpr (R > 1) {
    if (rows < R) return expand_rows<W, U, R - 1>(rows, b, units, t, t_stride, sums);
  }
  expand<W, U, R>(b, units, t, t_stride, sums);
}

template <typename W>
inline void add_low_rank(const LinearTerms& terms, int64_t panel, const float* t, int64_t t_stride, int rows,
                         PanelSums* sums) {
  constexpr int kUnits = kPanel / kUnit;
  const W* const b = static_cast<const W*>(terms.b);
  const Unit* const units = terms.units + panel * kUnits;
  const bool together = kMaxUnits == kUnits && units[0].num_ranks == units[kUnits - 1].num_ranks;
  for (int first = 0; first < rows; first += kExpandRows) {
    const int count = std::min(rows - first, kExpandRows);
    const float* const of_rows = t + first * t_stride;
    if (together) {
      expand_rows<W, kMaxUnits>(count, b, units, of_rows, t_stride, sums[first]);
    } else {
      for (int u = 0; u < kUnits; ++u) {
        expand_rows<W, 1>(count, b, units + u, of_rows, t_stride, sums[first] + u * kUnitVectors);
      }
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
