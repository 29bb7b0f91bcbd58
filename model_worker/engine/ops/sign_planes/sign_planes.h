// What sign planes add to the sums of a linear layer's tile; the formulas are in __init__.py.
//
// With 16 lanes a register holds the 16 sums ±x0 ±x1 ±x2 ±x3 of four inputs, and four bits of a word choose one for each
// of 16 outputs: a shift, a permutation and an addition for 64 weights. Those tables are what `prepare` makes.
// With fewer lanes it leaves v ∘ x, whose signs are turned one input at a time.
#pragma once

#include <algorithm>

#include "../cpu/simd.h"
#include "../cpu/variants.h"
#include "../linear/packed_weight.h"

namespace rootgraft {

constexpr int kWordInputs = 32;
constexpr int kTable = 16;                                         // sums of four inputs
constexpr int kPreparedFloats = kLanes == 16 ? kTable / 4 : 1;     // for each input
constexpr int kMaxSignRows = kLanes == 16 ? 4 : (kLanes == 8 ? 2 : 1);  // rows that share a shifted word

// Of one row and one column scale.
inline int64_t prepared_size(const SignTerms& terms) { return terms.num_words * kWordInputs * kPreparedFloats; }

// out = what add_signs wants of a row x and a column scale.
inline void prepare(const SignTerms& terms, int64_t scale, const float* x, int64_t num_inputs, float* out) {
  const float* const v = terms.column_scales + scale * terms.num_words * kWordInputs;
  for (int64_t first = 0; first < terms.num_words * kWordInputs; first += kWordInputs) {
    alignas(64) float scaled[kWordInputs] = {};
    const int64_t count = std::min<int64_t>(num_inputs - first, kWordInputs);
    if (count == kWordInputs) {
      for (int i = 0; i < kWordInputs; i += kLanes) store(scaled + i, load(x + first + i) * load(v + first + i));
    } else {
      for (int64_t i = 0; i < count; ++i) scaled[i] = x[first + i] * v[first + i];
    }
#if defined(__AVX512F__)
    // Entry e of a table has +x[i] where bit i of e is 1, else -x[i].
    const Floats sign0 = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    const Floats sign1 = {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1};
    const Floats sign2 = {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1};
    const Floats sign3 = {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (int i = 0; i < kWordInputs; i += 4) {
      const Floats sums = sign0 * scaled[i] + sign1 * scaled[i + 1] + sign2 * scaled[i + 2] + sign3 * scaled[i + 3];
      store(out + (first + i) * kPreparedFloats, sums);
    }
#else
    for (int i = 0; i < kWordInputs; i += kLanes) store(out + first + i, load(scaled + i));
#endif
  }
}

// The same for some rows and all column scales of a layer; in `out`, rows are `stride` apart.
inline void prepare_rows(const SignTerms& terms, int rows, const float* x, int64_t x_stride, int64_t num_inputs,
                         float* out, int64_t stride) {
  for (int r = 0; r < rows; ++r) {
    for (int64_t scale = 0; scale < terms.num_scales; ++scale) {
      prepare(terms, scale, x + r * x_stride, num_inputs, out + r * stride + scale * prepared_size(terms));
    }
  }
}

// The numbers ±value of 16 outputs, bit `bit` of whose words says the sign.
inline Floats with_sign(Floats value, Ints words, int bit) {
  const Ints is_positive = words << (31 - bit);
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(value) ^ (~is_positive & INT32_MIN));
}

__attribute__((always_inline)) inline void fetch_words(const uint32_t* words, int64_t num_words_ahead) {
  constexpr int kForRead = 0, kSecondLevel = 2;
  __builtin_prefetch(words + num_words_ahead, kForRead, kSecondLevel);
}

// Asks for the planes of a panel. add_signs asks for those of the next one; this is for the first one of a thread.
inline void fetch_panel(const SignTerms& terms, int64_t panel) {
  constexpr int kUnits = kPanel / kUnit;
  const int64_t block_size = (1 + terms.num_words) * kUnit;
  const uint32_t* const end = terms.blocks + terms.starts[(panel + 1) * kUnits] * block_size;
  for (const uint32_t* line = terms.blocks + terms.starts[panel * kUnits] * block_size; line < end; line += kUnit) {
    fetch_words(line, 0);
  }
}

// sums[r] += u * the sums of one plane of a unit, for R rows. Each row's additions have one order for every R.
template <int R>
inline void add_plane(const SignTerms& terms, const uint32_t* block, const float* prepared, int64_t stride,
                      int64_t fetch_distance, PanelSums* sums, int unit) {
  const uint32_t* const words = block + kUnit;
  fetch_words(block, fetch_distance);
#if defined(__AVX512F__)
  constexpr int kChains = 4;  // an addition takes four cycles
  __m512 chains[R][kChains] = {};
  for (int64_t w = 0; w < terms.num_words; ++w) {
    const uint32_t* const source = words + w * kUnit;
    const float* const tables = prepared + w * kWordInputs * kPreparedFloats;
    const __m512i word = _mm512_loadu_si512(source);
    fetch_words(source, fetch_distance);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i entries = _mm512_srli_epi32(word, 4 * i);  // of each, four bits count
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512 table = _mm512_load_ps(tables + r * stride + i * kTable);
        chains[r][i % kChains] = _mm512_add_ps(chains[r][i % kChains], _mm512_permutexvar_ps(entries, table));
      }
    }
  }
  const __m512 u = _mm512_loadu_ps(block);
  for (int r = 0; r < R; ++r) {
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(chains[r][0], chains[r][1]), _mm512_add_ps(chains[r][2], chains[r][3]));
    sums[r][unit] += reinterpret_cast<Floats>(_mm512_mul_ps(u, sum));
  }
#else
  constexpr int kUnitVectors = kUnit / kLanes;
  Floats totals[R][kUnitVectors] = {};
  for (int64_t w = 0; w < terms.num_words; ++w) {
    fetch_words(words + w * kUnit, fetch_distance);
    Ints word[kUnitVectors];
    for (int v = 0; v < kUnitVectors; ++v) word[v] = bits_of<Ints>(words + w * kUnit + v * kLanes);
    for (int i = 0; i < kWordInputs; ++i) {
      for (int r = 0; r < R; ++r) {
        const Floats x = broadcast(prepared[r * stride + w * kWordInputs + i]);
        for (int v = 0; v < kUnitVectors; ++v) totals[r][v] += with_sign(x, word[v], i);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kUnitVectors; ++v)
      sums[r][unit * kUnitVectors + v] += bits_of<Floats>(block + v * kLanes) * totals[r][v];
#endif
}

template <int R = kMaxSignRows>
inline void add_plane_rows(int rows, const SignTerms& terms, const uint32_t* block, const float* prepared,
                           int64_t stride, int64_t fetch_distance, PanelSums* sums, int unit) {
  if constexpr (R > 1) {
    if (rows < R) return add_plane_rows<R - 1>(rows, terms, block, prepared, stride, fetch_distance, sums, unit);
  }
  add_plane<R>(terms, block, prepared, stride, fetch_distance, sums, unit);
}

// sums[r] += all planes of a panel, for some rows; `prepared` and `sums` are those of the first one.
inline void add_signs(const SignTerms& terms, int64_t panel, const float* prepared, int64_t stride, int rows,
                      PanelSums* sums) {
  constexpr int kUnits = kPanel / kUnit;
  const int64_t block_size = (1 + terms.num_words) * kUnit;
  const int64_t* const starts = terms.starts + panel * kUnits;
  const int64_t fetch_distance = (starts[kUnits] - starts[0]) * block_size;  // where the next panel is
  for (int unit = 0; unit < kUnits; ++unit) {
    for (int64_t i = starts[unit]; i < starts[unit + 1]; ++i) {
      const float* const of_scale = prepared + terms.scales[i] * prepared_size(terms);
      for (int first = 0; first < rows; first += kMaxSignRows) {
        add_plane_rows(std::min(rows - first, kMaxSignRows), terms, terms.blocks + i * block_size,
                       of_scale + first * stride, stride, fetch_distance, sums + first, unit);
      }
    }
  }
}

// wide[k][n] += the planes' numbers of a panel for inputs [first_input, first_input + num_inputs); first_input is a
// multiple of 32, and `wide` has room for whole words.
inline void add_signs_to_panel(const SignTerms& terms, int64_t panel, int64_t first_input, int64_t num_inputs,
                               float* wide) {
  constexpr int kUnits = kPanel / kUnit, kUnitVectors = kUnit / kLanes;
  const int64_t block_size = (1 + terms.num_words) * kUnit;
  for (int unit = 0; unit < kUnits; ++unit) {
    for (int64_t i = terms.starts[panel * kUnits + unit]; i < terms.starts[panel * kUnits + unit + 1]; ++i) {
      const uint32_t* const block = terms.blocks + i * block_size;
      const float* const scale = terms.column_scales + terms.scales[i] * terms.num_words * kWordInputs + first_input;
      for (int64_t k = 0; k < num_inputs; k += kWordInputs) {
        const uint32_t* const words = block + kUnit + (first_input + k) / kWordInputs * kUnit;
        for (int v = 0; v < kUnitVectors; ++v) {
          const Floats u = bits_of<Floats>(block + v * kLanes);
          const Ints word = bits_of<Ints>(words + v * kLanes);
          float* const out = wide + k * kPanel + unit * kUnit + v * kLanes;
#pragma GCC unroll 32
          for (int j = 0; j < kWordInputs; ++j) {
            store(out + j * kPanel, load(out + j * kPanel) + broadcast(scale[k + j]) * with_sign(u, word, j));
          }
        }
      }
    }
  }
}

// out[k] += multiplier * the planes' numbers of one output.
inline void add_signs_of_output(const SignTerms& terms, int64_t output, int64_t num_inputs, float multiplier,
                                float* out) {
  const int64_t unit = output / kUnit, lane = output % kUnit, block_size = (1 + terms.num_words) * kUnit;
  for (int64_t i = terms.starts[unit]; i < terms.starts[unit + 1]; ++i) {
    const uint32_t* const block = terms.blocks + i * block_size + lane;
    const float* const scale = terms.column_scales + terms.scales[i] * terms.num_words * kWordInputs;
    const float u = bits_of<float>(block) * multiplier;
    for (int64_t k = 0; k < num_inputs; ++k) {
      const uint32_t is_positive = block[kUnit + k / kWordInputs * kUnit] >> k % kWordInputs & 1;
      out[k] += is_positive ? u * scale[k] : -(u * scale[k]);
    }
  }
}

}  // namespace rootgraft
