// What a sparse matrix adds to the sums of a linear layer's tile; the formulas are in __init__.py.
#pragma once

#include "../cpu/simd.h"
#include "../cpu/variants.h"
#include "../linear/packed_weight.h"

namespace rootgraft {

// x[columns[i]] for each lane.
inline Floats gather(const float* x, const int32_t* columns) {
#if defined(__AVX512F__)
  return _mm512_i32gather_ps(_mm512_loadu_si512(columns), x, sizeof(float));
#elif defined(__AVX2__)
  return _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)), sizeof(float));
#else
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = x[columns[i]];
  return result;
#endif
}

// sums[r] += x[r] times the rows of a panel, for some rows.
template <typename W>
inline void add_sparse(const SparseTerms& terms, int64_t panel, const float* x, int64_t x_stride, int rows,
                       PanelSums* sums) {
  constexpr int kUnits = kPanel / kUnit, kUnitVectors = kUnit / kLanes;
  for (int unit = 0; unit < kUnits; ++unit) {
    const int64_t start = terms.starts[panel * kUnits + unit], end = terms.starts[panel * kUnits + unit + 1];
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kUnitVectors; ++v) {
        Floats& sum = sums[r][unit * kUnitVectors + v];
        for (int64_t i = start * kUnit + v * kLanes; i < end * kUnit; i += kUnit) {
          sum += gather(x + r * x_stride, terms.columns + i) * load(static_cast<const W*>(terms.values) + i);
        }
      }
    }
  }
}

// How many numbers of each output of a panel have been added.
using SparsePlaces = int64_t[kPanel];

// wide[k][n] += the numbers of a panel for inputs [first_input, first_input + num_inputs); `places` are those of the
// inputs before, and move on.
template <typename W>
inline void add_sparse_to_panel(const SparseTerms& terms, int64_t panel, int64_t first_input, int64_t num_inputs,
                                SparsePlaces& places, float* wide) {
  for (int64_t n = 0; n < kPanel; ++n) {
    const int64_t unit = (panel * kPanel + n) / kUnit, start = terms.starts[unit], end = terms.starts[unit + 1];
    for (int64_t& place = places[n]; start + place < end; ++place) {
      const int64_t i = (start + place) * kUnit + n % kUnit;
      if (terms.columns[i] >= first_input + num_inputs) break;
      wide[(terms.columns[i] - first_input) * kPanel + n] += widen(static_cast<const W*>(terms.values)[i]);
    }
  }
}

}  // namespace rootgraft
