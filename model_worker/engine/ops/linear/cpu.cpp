// Linear layers over packed weights (packed_weight.py draws the layouts), for any number of rows.
//
// A tile is a panel of 32 outputs times a block of rows. Sums stay in registers: R rows times kVectors vectors. With
// few rows the weights stream once from memory and are widened on the way; with many, the first rows leave the widened
// weights of a part of the panel in scratch memory for the others.

#include <algorithm>

#include "../cpu/runtime.h"
#include "../cpu/simd.h"
#include "../cpu/variants.h"
#include "../lora/expand.h"
#include "../lora/tile_terms.h"
#include "../sign_planes/sign_planes.h"
#include "../sparse_matrix/sparse_matrix.h"
#include "integer_products.h"
#include "packed_weight.h"
#include "widening.h"

namespace rootgraft {
namespace {

constexpr int kTileRows = 120;              // rows of a tile: what a widened weight is reused for
constexpr int kChunk = 768;                 // K that is widened at a time; a multiple of kGroup

enum Activation : int64_t { kNone = 0, kSilu = 1, kGeluTanh = 2 };

// Mirrored by `LinearArgs` in __init__.py.
struct LinearArgs {
  const float* x;         // [T, K], rows x_stride apart
  int64_t x_stride;
  const void* weight;     // packed
  int64_t format;
  const float* bias;      // [N], in the order of the packed outputs, or null
  float* out;             // [T, N], or [T, N / 2] where gated; rows out_stride apart
  int64_t out_stride;
  int64_t num_inputs;     // K
  int64_t num_outputs;    // N
  int64_t activation;     // other than kNone: outputs are gated
  int64_t accumulate;     // add to `out`
  float alpha;            // scales the product and its bias
  const int8_t* quantized_x;   // [T, padded K], or null: K is padded to a multiple of kGroup with zeros
  const float* x_scales;       // [T, K groups]
  const int32_t* x_sums;       // [T, K groups] sums of quantized_x
  int64_t terms;               // index of its terms in a variant's table; -1: rows have none
};

static_assert(kTileRows <= TileTerms::kMaxRows);

// -------------------------------------------------------------------------------- one tile

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

inline Floats activate(Floats x, int64_t activation) {
  if (activation == kSilu) return x * sigmoid(x);
  // 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
  return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
}

inline void store_partly(float* destination, Floats value, int64_t count) {
  for (int64_t i = 0; i < std::min<int64_t>(count, kLanes); ++i) destination[i] = value[i];
}

void finish(const LinearArgs& a, int64_t panel, int64_t row, const Sums& sums) {
  const int64_t first = panel * kPanel;
  const bool gated = a.activation != kNone;
  Floats y[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    y[v] = sums[v];
    if (a.bias != nullptr) {
      alignas(64) float bias[kLanes] = {};
      const int64_t count = std::min<int64_t>(kLanes, a.num_outputs - first - v * kLanes);
      for (int64_t i = 0; i < count; ++i) bias[i] = a.bias[first + v * kLanes + i];
      y[v] += load(bias);
    }
    y[v] *= a.alpha;
  }
  // A gated panel holds 16 gates, then their 16 values.
  const int num_vectors = gated ? kVectors / 2 : kVectors;
  const int64_t out_first = gated ? first / 2 : first;
  const int64_t out_end = gated ? a.num_outputs / 2 : a.num_outputs;
  float* out = a.out + row * a.out_stride + out_first;
  for (int v = 0; v < num_vectors; ++v) {
    const int64_t count = out_end - out_first - v * kLanes;
    if (count <= 0) break;
    Floats value = gated ? activate(y[v], a.activation) * y[v + num_vectors] : y[v];
    if (count >= kLanes) {
      if (a.accumulate) value += load(out + v * kLanes);
      store(out + v * kLanes, value);
    } else {
      if (a.accumulate)
        for (int64_t i = 0; i < count; ++i) value[i] += out[v * kLanes + i];
      store_partly(out + v * kLanes, value, count);
    }
  }
}

// Whether the base's weight is multiplied with quantized rows.
inline bool multiplies_integers([[maybe_unused]] const LinearArgs& a) {
#if ROOTGRAFT_VNNI
  return a.quantized_x != nullptr;
#else
  return false;
#endif
}

// The terms that x itself is multiplied with.
template <typename W>
void add_products(const LinearArgs& a, TileTerms& variants, const LinearTerms& terms, int64_t panel, int64_t row,
                  int rows, Sums* sums) {
  const float* const x = a.x + row * a.x_stride;
  if (terms.sparse.starts != nullptr) add_sparse<W>(terms.sparse, panel, x, a.x_stride, rows, sums);
  if (terms.dense == nullptr) return;
  const W* const weights = static_cast<const W*>(terms.dense) + panel * a.num_inputs * kPanel;
  for_blocks(rows, kMaxRows, [&](int first, int count) {
    const float* const block = x + first * a.x_stride;
    multiply_rows(count, weights, block, a.x_stride, a.num_inputs, sums + first, FetchFromMemory{variants});
  });
}

// What is left to be done for rows of a weight with merged terms; see merged_tile.
LinearTerms without_merged(LinearTerms terms) {
  terms.output_scale = nullptr;
  terms.signs.starts = nullptr;
  terms.sparse.starts = nullptr;
  return terms;
}

void add_variant(const LinearArgs& a, TileTerms& variants, const TileTerms::Run& run, const LinearTerms& terms,
                 int64_t panel, Sums* sums) {
  add_terms(terms, panel, run.t, variants.t_stride(), run.num_rows, sums);
  if (terms.signs.starts != nullptr) {
    add_signs(terms.signs, panel, run.prepared, variants.prepared_stride(), run.num_rows, sums);
  }
  if (terms.is_float32) {
    add_products<float>(a, variants, terms, panel, run.row, run.num_rows, sums);
  } else {
    add_products<BFloat16>(a, variants, terms, panel, run.row, run.num_rows, sums);
  }
}

// Rows from the sums of their products with the base's weight, or with that and its merged terms.
void finish_rows(const LinearArgs& a, TileTerms& variants, int64_t panel, int64_t first_row, int rows, Sums* sums) {
  for (const TileTerms::Run& run : variants) {
    Sums* const of_run = sums + (run.row - first_row);
    if (run.is_merged) {
      add_variant(a, variants, run, without_merged(*run.terms), panel, of_run);
    } else {
      add_variant(a, variants, run, *run.terms, panel, of_run);
    }
  }
  for (int r = 0; r < rows; ++r) finish(a, panel, first_row + r, sums[r]);
}

template <typename W>
void dense_tile(const LinearArgs& a, TileTerms& variants, int64_t panel, int64_t first_row, int rows, float* scratch) {
  const W* const weights = static_cast<const W*>(a.weight) + panel * a.num_inputs * kPanel;
  const float* const x = a.x + first_row * a.x_stride;
  if (rows <= kMaxRows) {
    Sums sums[kMaxRows] = {};
    multiply_rows(rows, weights, x, a.x_stride, a.num_inputs, sums, FetchFromMemory{variants});
    variants.fetch_rest();
    finish_rows(a, variants, panel, first_row, rows, sums);
    return;
  }
  Sums* const sums = reinterpret_cast<Sums*>(scratch + kChunk * kPanel);
  std::fill_n(&sums[0][0], rows * kVectors, Floats{});
  for (int64_t k = 0; k < a.num_inputs; k += kChunk) {
    const int64_t length = std::min<int64_t>(kChunk, a.num_inputs - k);
    const W* const chunk = weights + k * kPanel;
    for_blocks(rows, kMaxRows, [&](int first, int count) {
      const float* const block = x + first * a.x_stride + k;
      if (first == 0) {
        float* const wide = sizeof(W) == sizeof(float) ? nullptr : scratch;
        multiply_rows(count, chunk, block, a.x_stride, length, sums, FetchFromMemory{variants}, wide);
      } else if constexpr (sizeof(W) == sizeof(float)) {
        multiply_rows(count, chunk, block, a.x_stride, length, sums + first, FetchFromCache{variants});
      } else {
        multiply_rows<float>(count, scratch, block, a.x_stride, length, sums + first, FetchFromCache{variants});
      }
    });
  }
  variants.fetch_rest();
  finish_rows(a, variants, panel, first_row, rows, sums);
}

// Quantized weights, float activations: for machines without integer dot products.
template <typename Group>
void widened_tile(const LinearArgs& a, TileTerms& variants, int64_t panel, int64_t first_row, int rows,
                  float* scratch) {
  const int64_t num_groups = (a.num_inputs + kGroup - 1) / kGroup;
  const Group* const groups = static_cast<const Group*>(a.weight) + panel * num_groups;
  const float* const x = a.x + first_row * a.x_stride;
  Sums* const sums = reinterpret_cast<Sums*>(scratch + kChunk * kPanel);
  std::fill_n(&sums[0][0], rows * kVectors, Floats{});
  for (int64_t k = 0; k < a.num_inputs; k += kChunk) {
    const int64_t length = std::min<int64_t>(kChunk, a.num_inputs - k);
    for (int64_t i = 0; i < length; i += kGroup) widen_group(groups[(k + i) / kGroup], scratch + i * kPanel);
    for_blocks(rows, kMaxRows, [&](int first, int count) {
      const float* const block = x + first * a.x_stride + k;
      multiply_rows<float>(count, scratch, block, a.x_stride, length, sums + first, FetchFromCache{variants});
    });
  }
  variants.fetch_rest();
  finish_rows(a, variants, panel, first_row, rows, sums);
}

#if ROOTGRAFT_VNNI
template <typename Group>
void integer_tile(const LinearArgs& a, TileTerms& variants, int64_t panel, int64_t first_row, int rows,
                  float* scratch) {
  const int64_t num_groups = (a.num_inputs + kGroup - 1) / kGroup;
  const Group* const groups = static_cast<const Group*>(a.weight) + panel * num_groups;
  Sums* const sums = reinterpret_cast<Sums*>(scratch);
  for_blocks(rows, kMaxIntegerRows, [&](int first, int count) {
    const int64_t row = first_row + first;
    const auto multiply = [&](auto fetch) {
      multiply_integer_rows(count, groups, num_groups, a.quantized_x + row * num_groups * kGroup,
                            a.x_scales + row * num_groups, a.x_sums + row * num_groups, sums + first, fetch);
    };
    first == 0 ? multiply(FetchFromMemory{variants}) : multiply(FetchFromCache{variants});
  });
  variants.fetch_rest();
  finish_rows(a, variants, panel, first_row, rows, sums);
}
#endif

template <typename Group>
void quantized_tile(const LinearArgs& a, TileTerms& variants, int64_t panel, int64_t first_row, int rows,
                    float* scratch) {
#if ROOTGRAFT_VNNI
  if (multiplies_integers(a)) return integer_tile<Group>(a, variants, panel, first_row, rows, scratch);
#endif
  widened_tile<Group>(a, variants, panel, first_row, rows, scratch);
}

// -------------------------------------------------------------------------------- rows of a long segment

void scale_outputs(const Sums& scale, int64_t num_inputs, float* panel) {
  for (float* const end = panel + num_inputs * kPanel; panel < end; panel += kPanel)
    for (int v = 0; v < kVectors; ++v) store(panel + v * kLanes, load(panel + v * kLanes) * scale[v]);
}

#if ROOTGRAFT_VNNI
// sums += scale ∘ the products of quantized rows.
template <typename Group>
void add_integer_products(const LinearArgs& a, TileTerms& variants, int64_t panel, int64_t first_row, int rows,
                          const Sums& scale, Sums* sums) {
  const int64_t num_groups = (a.num_inputs + kGroup - 1) / kGroup;
  const Group* const groups = static_cast<const Group*>(a.weight) + panel * num_groups;
  for_blocks(rows, kMaxIntegerRows, [&](int first, int count) {
    const int64_t row = first_row + first;
    Sums products[kMaxIntegerRows];
    multiply_integer_rows(count, groups, num_groups, a.quantized_x + row * num_groups * kGroup,
                          a.x_scales + row * num_groups, a.x_sums + row * num_groups, products, FetchFromCache{variants});
    for (int r = 0; r < count; ++r)
      for (int v = 0; v < kVectors; ++v) sums[first + r][v] += scale[v] * products[r][v];
  });
}
#endif

constexpr int64_t kMerged = 128;  // inputs that are merged at a time: their numbers stay in the first level of cache

// out = inputs [first_input, first_input + num_inputs) of the panel with which merged_tile multiplies its rows.
void merge_panel(const LinearArgs& a, const LinearTerms& terms, int64_t panel, int64_t first_input, int64_t num_inputs,
                 const Sums& output_scale, SparsePlaces& places, float* out) {
  if (multiplies_integers(a)) {
    std::fill_n(out, num_inputs * kPanel, 0.0f);
  } else {
    widen_panel(static_cast<WeightFormat>(a.format), a.weight, a.num_inputs, panel, first_input, num_inputs, out);
    if (terms.output_scale != nullptr) scale_outputs(output_scale, num_inputs, out);
  }
  if (terms.signs.starts != nullptr) add_signs_to_panel(terms.signs, panel, first_input, num_inputs, out);
  if (terms.sparse.starts == nullptr) return;
  if (terms.is_float32) {
    add_sparse_to_panel<float>(terms.sparse, panel, first_input, num_inputs, places, out);
  } else {
    add_sparse_to_panel<BFloat16>(terms.sparse, panel, first_input, num_inputs, places, out);
  }
}

// All rows are multiplied with e ∘ W + D, D the sign planes and the sparse matrix, which is made once. Where W is
// multiplied by integers, rows are multiplied with D alone, and that is added to e ∘ their products with W.
void merged_tile(const LinearArgs& a, const LinearTerms& terms, TileTerms& variants, int64_t panel, int64_t first_row,
                 int rows, float* scratch) {
  Sums output_scale;
  for (int v = 0; v < kVectors; ++v) {
    const float* const e = terms.output_scale;
    output_scale[v] = e == nullptr ? broadcast(1.0f) : load(e + panel * kPanel + v * kLanes);
  }
  Sums* const sums = reinterpret_cast<Sums*>(scratch + kChunk * kPanel);
  std::fill_n(&sums[0][0], rows * kVectors, Floats{});
  SparsePlaces places = {};
  for (int64_t k = 0; k < a.num_inputs; k += kChunk) {
    const int64_t length = std::min<int64_t>(kChunk, a.num_inputs - k);
    for (int64_t i = 0; i < length; i += kMerged) {
      merge_panel(a, terms, panel, k + i, std::min(length - i, kMerged), output_scale, places, scratch + i * kPanel);
    }
    for_blocks(rows, kMaxRows, [&](int first, int count) {
      const float* const x = a.x + (first_row + first) * a.x_stride + k;
      multiply_rows<float>(count, scratch, x, a.x_stride, length, sums + first, FetchFromCache{variants});
    });
  }
#if ROOTGRAFT_VNNI
  if (multiplies_integers(a)) {
    if (a.format == kInt8) {
      add_integer_products<Int8Group>(a, variants, panel, first_row, rows, output_scale, sums);
    } else {
      add_integer_products<Int4Group>(a, variants, panel, first_row, rows, output_scale, sums);
    }
  }
#endif
  finish_rows(a, variants, panel, first_row, rows, sums);
}

}  // namespace
}  // namespace rootgraft

using namespace rootgraft;

namespace {

// A panel times a block of rows, none of them of a merged run; variants: those of the rows.
void plain_tile(const LinearArgs& a, TileTerms& variants, int64_t panel, int64_t first_row, int rows, float* scratch) {
  switch (a.format) {
    case kFloat32: dense_tile<float>(a, variants, panel, first_row, rows, scratch); break;
    case kBFloat16: dense_tile<BFloat16>(a, variants, panel, first_row, rows, scratch); break;
    case kFloat16: dense_tile<Float16>(a, variants, panel, first_row, rows, scratch); break;
    case kInt8: quantized_tile<Int8Group>(a, variants, panel, first_row, rows, scratch); break;
    case kInt4: quantized_tile<Int4Group>(a, variants, panel, first_row, rows, scratch); break;
  }
}

// The same for any rows.
void compute_tile(const LinearArgs& a, TileTerms& variants, int64_t panel, int64_t first_row, int rows,
                  float* scratch) {
  variants.begin_panel(panel);
  if (!variants.has_merged()) return plain_tile(a, variants, panel, first_row, rows, scratch);
  int64_t row = first_row;
  const auto compute_until = [&](int64_t end, const TileTerms::Run* merged) {
    if (end == row) return;
    TileTerms piece(variants, row, end);
    piece.begin_panel(panel);
    if (merged != nullptr) {
      merged_tile(a, *merged->terms, piece, panel, row, static_cast<int>(end - row), scratch);
    } else {
      plain_tile(a, piece, panel, row, static_cast<int>(end - row), scratch);
    }
    row = end;
  };
  for (const TileTerms::Run& run : variants) {
    if (!run.is_merged) continue;
    compute_until(run.row, nullptr);
    compute_until(run.row + run.num_rows, &run);
  }
  compute_until(first_row + rows, nullptr);
}

// The variants of a block of rows, which are prepared for their sign planes; `panel` is the first one to be computed.
void look_up(const LinearArgs& a, const VariantPlan& plan, const int32_t* tokens, int64_t terms, int64_t panel,
             int64_t first_row, int rows, const Worker& worker, TileTerms& variants) {
  variants.look_up(plan, worker.thread(), tokens, terms, first_row, rows);
  for (const TileTerms::Run& run : variants) {
    if (run.prepared == nullptr) continue;
    const SignTerms& signs = run.terms->signs;
    fetch_panel(signs, panel);
    prepare_rows(signs, run.num_rows, a.x + run.row * a.x_stride, a.x_stride, a.num_inputs, run.prepared,
                 plan.prepared_stride);
  }
}

// Mirrored by `_ExpertLinearArgs` in experts/__init__.py.
struct ExpertLinearArgs {
  LinearArgs linear;      // of the first expert
  const int64_t* starts;  // [num_experts + 1] rows [starts[e], starts[e + 1]) are those of expert e
  int64_t num_experts;
  int64_t expert_bytes;   // from one expert's weight to the next
  const int32_t* tokens;  // the step's row of each row
};

}  // namespace

extern "C" void rootgraft_linear(const void* args, const Step& step, Worker& worker) {
  const LinearArgs& a = *static_cast<const LinearArgs*>(args);
  const int64_t num_panels = (a.num_outputs + kPanel - 1) / kPanel;
  const int64_t num_blocks = (step.num_rows + kTileRows - 1) / kTileRows;
  TileTerms variants;
  int64_t block_of_variants = -1;
  for (int64_t tile; (tile = worker.take(num_panels * num_blocks)) >= 0;) {
    const int64_t panel = tile % num_panels, block = tile / num_panels;
    const int64_t first = step.num_rows * block / num_blocks;
    const int rows = static_cast<int>(step.num_rows * (block + 1) / num_blocks - first);
    if (step.variants != nullptr && a.terms >= 0 && block != block_of_variants) {
      look_up(a, *step.variants, nullptr, a.terms, panel, first, rows, worker, variants);
      block_of_variants = block;
    }
    compute_tile(a, variants, panel, first, rows, worker.scratch<float>());
  }
}

extern "C" void rootgraft_expert_linear(const void* args, const Step& step, Worker& worker) {
  const ExpertLinearArgs& a = *static_cast<const ExpertLinearArgs*>(args);
  const int64_t num_panels = (a.linear.num_outputs + kPanel - 1) / kPanel;
  int64_t num_tiles = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    num_tiles += (a.starts[e + 1] - a.starts[e] + kTileRows - 1) / kTileRows * num_panels;
  }
  TileTerms variants;
  int64_t first_of_variants = -1;
  int64_t expert = 0, first_tile = 0;  // tiles of earlier experts come first
  for (int64_t tile; (tile = worker.take(num_tiles)) >= 0;) {
    if (tile < first_tile) expert = first_tile = 0;
    int64_t num_rows, num_blocks;
    for (;; ++expert, first_tile += num_blocks * num_panels) {
      num_rows = a.starts[expert + 1] - a.starts[expert];
      num_blocks = (num_rows + kTileRows - 1) / kTileRows;
      if (tile < first_tile + num_blocks * num_panels) break;
    }
    LinearArgs linear(a.linear);
    linear.weight = static_cast<const std::byte*>(a.linear.weight) + expert * a.expert_bytes;
    const int64_t panel = (tile - first_tile) % num_panels, block = (tile - first_tile) / num_panels;
    const int64_t first = a.starts[expert] + num_rows * block / num_blocks;
    const int rows = static_cast<int>(a.starts[expert] + num_rows * (block + 1) / num_blocks - first);
    if (step.variants != nullptr && linear.terms >= 0 && first != first_of_variants) {
      look_up(linear, *step.variants, a.tokens, linear.terms + expert, panel, first, rows, worker, variants);
      first_of_variants = first;
    }
    compute_tile(linear, variants, panel, first, rows, worker.scratch<float>());
  }
}
