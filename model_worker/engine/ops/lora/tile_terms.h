// The terms of the variants that the rows of a linear layer's tiles use.
#pragma once

#include "../cpu/variants.h"
#include "../linear/packed_weight.h"

namespace rootgraft {

// Looked up once for a block of rows, then fetched and applied panel by panel.
class TileTerms {
 public:
  static constexpr int kMaxRows = 120;

  // Rows of the block that use one variant which has terms for this layer.
  struct Run {
    const LinearTerms* terms;
    int64_t row;    // the first one, among those of the operation
    int num_rows;
    const float* t;         // of the first row; others t_stride apart
    float* prepared;        // the same for sign planes, prepared_stride apart; null: not wanted
    bool is_merged;         // sign planes and a sparse matrix are added to the weight; see are_merged
  };

  TileTerms() = default;

  // Those of rows [first_row, end_row); every run is wholly among them or not at all.
  TileTerms(const TileTerms& all, int64_t first_row, int64_t end_row)
      : t_stride_(all.t_stride_), prepared_stride_(all.prepared_stride_) {
    for (const Run& run : all)
      if (run.row >= first_row && run.row < end_row) runs_[num_runs_++] = run;
  }

  // Rows [first_row, first_row + num_rows) of an operation, at most kMaxRows; tokens as in `for_segments`. What sign
  // planes want of them is still to be put where the runs say, memory of this thread's own.
  void look_up(const VariantPlan& plan, int thread, const int32_t* tokens, int64_t index, int64_t first_row,
               int64_t num_rows) {
    num_runs_ = 0;
    float* prepared = plan.prepared + thread * plan.prepared_size;
    t_stride_ = plan.t_stride;
    prepared_stride_ = plan.prepared_stride;
    has_merged_ = false;
    for_segments(plan, tokens, first_row, num_rows, [&](const Segment& segment, int64_t row, int64_t count) {
      const LinearTerms& terms = segment.variant->linears[index];
      if (!terms.changes_sums()) return;
      const bool is_merged = are_merged(segment, terms);
      has_merged_ |= is_merged;
      const bool is_prepared = terms.signs.starts != nullptr && !is_merged;
      runs_[num_runs_++] = {&terms,
                            row,
                            static_cast<int>(count),
                            plan.t + row * plan.t_stride,
                            is_prepared ? prepared : nullptr,
                            is_merged};
      if (is_prepared) prepared += count * plan.prepared_stride;
    });
  }

  const Run* begin() const { return runs_; }
  const Run* end() const { return runs_ + num_runs_; }
  int64_t t_stride() const { return t_stride_; }
  int64_t prepared_stride() const { return prepared_stride_; }
  bool has_merged() const { return has_merged_; }

  // From now on `fetch_line` is about this panel.
  void begin_panel(int64_t panel) {
    panel_ = panel;
    num_fetched_units_ = 0;
    next_unit();
  }

  // Asks for one more line of B, if one is left. For loops that are busy computing while the memory is not.
  void fetch_line() {
    if (line_ == end_line_) return;
    constexpr int kForRead = 0, kSecondLevel = 2;
    __builtin_prefetch(line_, kForRead, kSecondLevel);
    line_ += kLine;
    if (line_ == end_line_) next_unit();
  }

  void fetch_rest() {
    while (line_ != end_line_) fetch_line();
  }

 private:
  static constexpr int kLine = 64;

  void next_unit() {
    constexpr int kUnits = kPanel / kUnit;
    line_ = end_line_ = nullptr;
    while (line_ == end_line_ && num_fetched_units_ < num_runs_ * kUnits) {
      const LinearTerms& terms = *runs_[num_fetched_units_ / kUnits].terms;
      const int in_panel = num_fetched_units_++ % kUnits;
      if (terms.b == nullptr) continue;
      const Unit& unit = terms.units[panel_ * kUnits + in_panel];
      const int64_t number_bytes = terms.is_float32 ? sizeof(float) : sizeof(BFloat16);
      line_ = static_cast<const char*>(terms.b) + unit.offset * number_bytes;
      end_line_ = line_ + unit.num_ranks * kUnit * number_bytes / kLine * kLine;
    }
  }

  int num_runs_ = 0;
  int64_t t_stride_ = 0, prepared_stride_ = 0;
  bool has_merged_ = false;
  int64_t panel_ = 0;
  int num_fetched_units_ = 0;
  const char* line_ = nullptr;
  const char* end_line_ = nullptr;
  Run runs_[kMaxRows];
};

}  // namespace rootgraft
