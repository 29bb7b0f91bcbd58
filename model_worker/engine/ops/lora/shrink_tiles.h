// How the work of a Shrink is cut into tiles.
#pragma once

#include <algorithm>

#include "../cpu/variants.h"

namespace rootgraft {

// Some rows of one variant times some ranks.
struct ShrinkTile {
  static constexpr int kRanks = 16;
  static constexpr int kRows = 48;

  const LinearTerms* terms;
  int64_t row;
  int num_rows;
  int first_rank;
  int num_ranks;

  // What a tile reads of A: num_ranks rows, one after the other.
  const void* a() const {
    const int64_t number_bytes = terms->is_float32 ? sizeof(float) : sizeof(BFloat16);
    return static_cast<const char*>(terms->a) + first_rank * terms->a_stride * number_bytes;
  }

  // Tiles of as many ranks; where the inputs are scaled instead, one.
  static int64_t num_rank_tiles(const LinearTerms& terms) {
    return terms.input_scale != nullptr ? 1 : (terms.rank + kRanks - 1) / kRanks;
  }

  // The tile of some rows and the rank tile of this number.
  static ShrinkTile of(const LinearTerms& terms, int64_t row, int64_t num_rows, int64_t rank_tile) {
    const int64_t first = rank_tile * kRanks, num_ranks = std::min<int64_t>(terms.rank - first, kRanks);
    return {&terms, row, static_cast<int>(num_rows), static_cast<int>(first), static_cast<int>(num_ranks)};
  }
};

// All tiles of a step's rows, in the order of the rows.
class ShrinkTiles {
 public:
  // index: of the linear layer's terms.
  ShrinkTiles(const VariantPlan& plan, int64_t index) : plan_(plan), index_(index) {
    for (int64_t s = 0; s < plan.num_segments; ++s) count_ += num_tiles_of(plan.segments[s]);
  }

  int64_t count() const { return count_; }

  // Fast where the numbers ascend.
  ShrinkTile operator[](int64_t tile) {
    if (tile < first_tile_) segment_ = first_tile_ = 0;
    for (int64_t count; tile >= first_tile_ + (count = num_tiles_of(plan_.segments[segment_])); ++segment_) {
      first_tile_ += count;
    }
    const Segment& segment = plan_.segments[segment_];
    const LinearTerms& terms = segment.variant->linears[index_];
    const int64_t rank_tiles = ShrinkTile::num_rank_tiles(terms), place = tile - first_tile_;
    const int64_t row = segment.start + place / rank_tiles * ShrinkTile::kRows;
    return ShrinkTile::of(terms, row, std::min<int64_t>(segment.end - row, ShrinkTile::kRows), place % rank_tiles);
  }

 private:
  int64_t num_tiles_of(const Segment& segment) const {
    return (segment.end - segment.start + ShrinkTile::kRows - 1) / ShrinkTile::kRows *
           ShrinkTile::num_rank_tiles(segment.variant->linears[index_]);
  }

  const VariantPlan& plan_;
  int64_t index_;
  int64_t count_ = 0;
  int64_t segment_ = 0;
  int64_t first_tile_ = 0;  // tiles of earlier segments
};

}  // namespace rootgraft
