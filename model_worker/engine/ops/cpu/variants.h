// What the kernels see of the variants that rows of a step use; mirrored in step_variants.py. What the terms mean is in
// ../lora/__init__.py.
//
//     plan ──► segments ──► one variant's tables ──► terms of linear i, weight of norm j, terms of the embedding
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace rootgraft {

constexpr int kUnit = 16;  // outputs that have the same ranks
constexpr int kPair = 2 * kUnit;  // numbers that are kept together: in a unit two ranks, in a row of A 32 inputs

// Vector v of the first and of the second half of a pair. Two numbers of bfloat16 lie side by side, for the cheapest
// widening that there is.
inline void load_pair(const float* pair, int v, Floats& first, Floats& second) {
  first = load(pair + v * kLanes);
  second = load(pair + kUnit + v * kLanes);
}

inline void load_pair(const BFloat16* pair, int v, Floats& first, Floats& second) {
  const Ints both = bits_of<Ints>(pair + 2 * v * kLanes);
  first = reinterpret_cast<Floats>(both << 16);
  second = reinterpret_cast<Floats>(both & static_cast<int32_t>(0xffff0000));
}

inline Floats load_first(const float* pair, int v) { return load(pair + v * kLanes); }
inline Floats load_first(const BFloat16* pair, int v) {
  return reinterpret_cast<Floats>(bits_of<Ints>(pair + 2 * v * kLanes) << 16);
}

struct Unit {
  int64_t offset;  // of its part of B, in numbers
  int64_t first_rank;
  int64_t num_ranks;
};

// Planes u ∘ (S ∘ v) of a matrix, whose layout ../sign_planes/packed_signs.py draws; mirrored there.
struct SignTerms {
  const uint32_t* blocks;      // [planes of all units][1 + num_words][kUnit]: u, as float32, then the signs
  const int64_t* starts;       // [units + 1] blocks [starts[i], starts[i + 1]) are those of unit i; null: no planes
  const int64_t* scales;       // of each block, which of column_scales is its v
  const float* column_scales;  // [num_scales][num_words * 32]
  int64_t num_scales;
  int64_t num_words;           // K padded / 32
};

// A matrix by the numbers that are not 0; mirrored in ../sparse_matrix/packed_sparse.py.
struct SparseTerms {
  const int64_t* starts;   // [units + 1] those of unit i are [starts[i], starts[i + 1]); null: there is no such matrix
  const int32_t* columns;  // [starts[units]][kUnit], ascending for each output
  const void* values;      // the same
};

// Of one linear layer; null pointers: it has no such term.
struct LinearTerms {
  const void* a;              // [rank, K padded to kPair]
  const void* b;              // of each unit [num_ranks][kUnit]; of bfloat16 an even number of ranks
  const Unit* units;          // [N padded / kUnit]
  const float* output_scale;  // [N padded]
  const float* input_scale;   // [K]; then there is no other term
  const void* dense;          // of each panel [K][32]
  const float* bias;          // [N padded]
  int64_t rank;
  int64_t a_stride;           // K padded
  int64_t is_float32;         // a, b, dense and the values of sparse are; otherwise they are bfloat16
  SignTerms signs;
  SparseTerms sparse;

  bool changes_sums() const {
    return b != nullptr || output_scale != nullptr || dense != nullptr || bias != nullptr || has_matrices();
  }
  // Sign planes or numbers of a sparse matrix.
  bool has_matrices() const { return signs.starts != nullptr || sparse.starts != nullptr; }
};

// Of the embedding.
struct EmbeddingTerms {
  const int64_t* token_ids;  // [num_replaced], ascending; from num_rows on: tokens that the base does not have
  const void* rows;          // [num_replaced, size]
  const void* a;             // [num_rows, rank]
  const void* b;             // [rank, size]
  int64_t num_rows;          // of the base
  int64_t num_replaced;
  int64_t rank;
  int64_t is_float32;        // rows, a and b are; otherwise they are bfloat16
  SignTerms signs;           // of [num_rows, size]
};

struct Variant {
  const LinearTerms* linears;       // by the layer's index
  const float* const* norms;        // by the norm's index: a weight, or null where it is the base's
  const EmbeddingTerms* embedding;  // or null
};

struct Segment {
  int64_t start;  // rows [start, end) of the step
  int64_t end;
  const Variant* variant;
};

struct VariantPlan {
  const Segment* segments;  // ascending, without overlap
  int64_t num_segments;
  float* t;                 // what Shrink leaves for the linear layer after it; rows t_stride apart
  int64_t t_stride;
  float* prepared;          // for each thread prepared_size numbers: what sign planes want of a tile's rows
  int64_t prepared_size;
  int64_t prepared_stride;  // from one row to the next
};

// Whether the layer's planes and sparse matrix are added to the weight before rows are multiplied with it, which many
// rows share, or to each row's product.
inline bool are_merged(const Segment& segment, const LinearTerms& terms) {
  constexpr int64_t kManyRows = 16;
  return segment.end - segment.start >= kManyRows && terms.has_matrices();
}

// Calls f(segment, row, count) for each run of rows [row, row + count) of [first, first + count) that use a variant.
// tokens: the step's row of each row, not descending; null: they are the step's rows themselves.
template <typename F>
inline void for_segments(const VariantPlan& plan, const int32_t* tokens, int64_t first, int64_t count, F&& f) {
  const int64_t end = first + count;
  const auto token_of = [&](int64_t row) { return tokens == nullptr ? row : tokens[row]; };
  const Segment* const last = plan.segments + plan.num_segments;
  const Segment* segment = std::partition_point(
      plan.segments, last, [&](const Segment& candidate) { return candidate.end <= token_of(first); });
  for (int64_t row = first; segment != last; ++segment) {
    while (row < end && token_of(row) < segment->start) ++row;
    int64_t stop = row;
    while (stop < end && token_of(stop) < segment->end) ++stop;
    if (stop > row) f(*segment, row, stop - row);
    if (stop == end) return;
    row = stop;
  }
}

}  // namespace rootgraft
