// What is computed for the rows of variants beside the linear layers themselves; the formulas are in __init__.py.

#include <algorithm>

#include "../cpu/runtime.h"
#include "../cpu/simd.h"
#include "../cpu/variants.h"
#include "../sign_planes/sign_planes.h"
#include "shrink_tiles.h"

namespace rootgraft {
namespace {

constexpr int kMaxRanks = 8;                     // of a block of dot products whose sums
constexpr int kMaxRows = kLanes == 16 ? 2 : 1;  // fit the registers

// Mirrored by `_ShrinkArgs` in __init__.py.
struct ShrinkArgs {
  float* x;              // [T, K], rows x_stride apart
  int64_t x_stride;
  int64_t num_inputs;    // K
  int64_t index;         // of the linear layer's terms; of experts, that of the first one's
  const int64_t* starts; // [num_experts + 1] rows [starts[e], starts[e + 1]) are those of expert e; null: no experts
  const int32_t* tokens; // [T * num_chosen] the step's row of each row; null: no experts
  int64_t num_experts;
};

inline void fetch(const void* numbers, int num_bytes) {
  constexpr int kForRead = 0, kSecondLevel = 2;
  for (int i = 0; i < num_bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(numbers) + i, kForRead, kSecondLevel);
  }
}

// sums += the products of some pairs of R rows and Q ranks; `next` [Q ranks] is what will be read after them.
template <typename W, int Q, int R>
inline void dot_pairs(const W* a, int64_t a_stride, const W* next, const float* x, int64_t x_stride,
                      int64_t num_inputs, Floats (&sums)[Q][R]) {
  for (int64_t k = 0; k < num_inputs; k += kPair) {
#pragma GCC unroll 4
    for (int v = 0; v < kUnit / kLanes; ++v) {
      Floats first[R], second[R];
      for (int r = 0; r < R; ++r) load_pair(x + r * x_stride + k, v, first[r], second[r]);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        Floats w_first, w_second;
        load_pair(a + q * a_stride + k, v, w_first, w_second);
        if (v == 0) fetch(next + q * a_stride + k, kPair * sizeof(W));
        for (int r = 0; r < R; ++r) sums[q][r] += w_first * first[r];
        for (int r = 0; r < R; ++r) sums[q][r] += w_second * second[r];
      }
    }
  }
}

// t[r, q] = x[r] . a[q] for R rows and Q ranks. Each has sums of its own, so that its bits depend on nothing else.
template <typename W, int Q, int R>
inline void dot(const W* a, int64_t a_stride, const W* next, const float* x, int64_t x_stride, int64_t num_inputs,
                float* t, int64_t t_stride) {
  Floats sums[Q][R] = {};
  const int64_t num_whole = num_inputs / kPair * kPair, num_left = num_inputs - num_whole;
  dot_pairs<W, Q, R>(a, a_stride, next, x, x_stride, num_whole, sums);
  if (num_left > 0) {
    float last[R * kPair] = {};
    for (int r = 0; r < R; ++r) std::copy_n(x + r * x_stride + num_whole, num_left, last + r * kPair);
    dot_pairs<W, Q, R>(a + num_whole, a_stride, next + num_whole, last, kPair, kPair, sums);
  }
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < R; ++r) t[r * t_stride + q] = sum(sums[q][r]);
}

template <typename W, int Q = kMaxRanks, int R = kMaxRows>
void dot_block(int ranks, int rows, const W* a, int64_t a_stride, const W* next, const float* x, int64_t x_stride,
               int64_t num_inputs, float* t, int64_t t_stride) {
  if constexpr (R > 1) {
    if (rows < R) return dot_block<W, Q, R - 1>(ranks, rows, a, a_stride, next, x, x_stride, num_inputs, t, t_stride);
  }
  if constexpr (Q > 1) {
    if (ranks < Q) return dot_block<W, Q - 1, R>(ranks, rows, a, a_stride, next, x, x_stride, num_inputs, t, t_stride);
  }
  dot<W, Q, R>(a, a_stride, next, x, x_stride, num_inputs, t, t_stride);
}

// x and t are those of the tile's first row; `after` is what will be read after the tile.
template <typename W>
void shrink_tile(const ShrinkTile& tile, const W* after, const float* x, int64_t x_stride, int64_t num_inputs, float* t,
                 int64_t t_stride) {
  const int64_t a_stride = tile.terms->a_stride;
  for (int q = 0; q < tile.num_ranks; q += kMaxRanks) {
    const W* const a = static_cast<const W*>(tile.a()) + q * a_stride;
    const W* const next = q + kMaxRanks < tile.num_ranks ? a + kMaxRanks * a_stride : after;
    for (int r = 0; r < tile.num_rows; r += kMaxRows) {
      dot_block<W>(std::min(tile.num_ranks - q, kMaxRanks), std::min(tile.num_rows - r, kMaxRows), a, a_stride, next,
                   x + r * x_stride, x_stride, num_inputs, t + r * t_stride + tile.first_rank + q, t_stride);
    }
  }
}

void scale_inputs(const float* scale, float* x, int64_t x_stride, int64_t num_inputs, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int64_t k = 0; k < num_inputs; ++k) x[r * x_stride + k] *= scale[k];
}

// next: the tile that comes after this one, or this one.
void shrink(const ShrinkArgs& a, const VariantPlan& plan, const ShrinkTile& tile, const ShrinkTile& next) {
  const LinearTerms& terms = *tile.terms;
  float* const x = a.x + tile.row * a.x_stride;
  if (terms.input_scale != nullptr) return scale_inputs(terms.input_scale, x, a.x_stride, a.num_inputs, tile.num_rows);
  float* const t = plan.t + tile.row * plan.t_stride;
  if (terms.is_float32) {
    shrink_tile(tile, static_cast<const float*>(next.a()), x, a.x_stride, a.num_inputs, t, plan.t_stride);
  } else {
    shrink_tile(tile, static_cast<const BFloat16*>(next.a()), x, a.x_stride, a.num_inputs, t, plan.t_stride);
  }
}

// Mirrored by `_AddEmbeddingArgs` in __init__.py.
struct AddEmbeddingArgs {
  float* out;  // [T, size], rows out_stride apart
  int64_t out_stride;
  int64_t size;
  float multiplier;
};

template <typename W>
void embedding_row(const AddEmbeddingArgs& a, const EmbeddingTerms& terms, int64_t token, float* out) {
  const int64_t* const end = terms.token_ids + terms.num_replaced;
  const int64_t* const found = std::lower_bound(terms.token_ids, end, token);
  if (found != end && *found == token) {
    const W* const row = static_cast<const W*>(terms.rows) + (found - terms.token_ids) * a.size;
    for (int64_t k = 0; k < a.size; ++k) out[k] = widen(row[k]) * a.multiplier;
  } else if (terms.signs.starts != nullptr) {
    add_signs_of_output(terms.signs, token, a.size, a.multiplier, out);
  }
  if (token >= terms.num_rows) return;
  for (int64_t i = 0; i < terms.rank; ++i) {
    const float factor = widen(static_cast<const W*>(terms.a)[token * terms.rank + i]) * a.multiplier;
    const W* const b = static_cast<const W*>(terms.b) + i * a.size;
    int64_t k = 0;
    for (; k + kLanes <= a.size; k += kLanes) store(out + k, load(out + k) + load(b + k) * factor);
    for (; k < a.size; ++k) out[k] += widen(b[k]) * factor;
  }
}

}  // namespace
}  // namespace rootgraft

using namespace rootgraft;

extern "C" void rootgraft_shrink(const void* args, const Step& step, Worker& worker) {
  const ShrinkArgs& a = *static_cast<const ShrinkArgs*>(args);
  ShrinkTiles tiles(*step.variants, a.index);
  for (int64_t number; (number = worker.take(tiles.count())) >= 0;) {
    const ShrinkTile tile = tiles[number];
    shrink(a, *step.variants, tile, number + 1 < tiles.count() ? tiles[number + 1] : tile);
  }
}

// A tile is one expert.
extern "C" void rootgraft_expert_shrink(const void* args, const Step& step, Worker& worker) {
  const ShrinkArgs& a = *static_cast<const ShrinkArgs*>(args);
  for (int64_t expert; (expert = worker.take(a.num_experts)) >= 0;) {
    const int64_t start = a.starts[expert], num_rows = a.starts[expert + 1] - start;
    if (num_rows == 0) continue;
    for_segments(*step.variants, a.tokens, start, num_rows, [&](const Segment& segment, int64_t row, int64_t count) {
      const LinearTerms& terms = segment.variant->linears[a.index + expert];
      const int64_t num_tiles = ShrinkTile::num_rank_tiles(terms);
      for (int64_t i = 0; i < num_tiles; ++i) {
        shrink(a, *step.variants, ShrinkTile::of(terms, row, count, i),
               ShrinkTile::of(terms, row, count, std::min(i + 1, num_tiles - 1)));
      }
    });
  }
}

extern "C" void rootgraft_add_embedding(const void* args, const Step& step, Worker& worker) {
  const AddEmbeddingArgs& a = *static_cast<const AddEmbeddingArgs*>(args);
  for (int64_t first; (first = worker.take(step.num_rows)) >= 0;) {
    for_segments(*step.variants, nullptr, first, 1, [&](const Segment& segment, int64_t row, int64_t) {
      const EmbeddingTerms* const terms = segment.variant->embedding;
      if (terms == nullptr) return;
      if (terms->is_float32) {
        embedding_row<float>(a, *terms, step.input_ids[row], a.out + row * a.out_stride);
      } else {
        embedding_row<BFloat16>(a, *terms, step.input_ids[row], a.out + row * a.out_stride);
      }
    });
  }
}
