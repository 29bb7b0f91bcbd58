// Attention over a paged KV cache; the package's docstring has the formula, native_kv.py the layout of a block.
//
// The rows of a sequence and KV head are its pairs of a token and a query head that shares the KV head. A tile is a run
// of rows, and goes over the positions that it sees in strips of 64:
//
//     keys of a strip, transposed    [D, 64]      scores = rows * keys         in registers, R rows at a time
//                                                 weights = exp(scores - maximum so far), masked
//     values of a strip              [64, Dv]     sums += weights * values     rescaled where the maximum grew
//
// The sums of every 256 positions are built by themselves and then added up in order. So a tile may be cut at these
// positions and its parts given to several threads (where there are few tiles and much context), and the result of a
// row has the same bits whatever batch it is in and however many threads there are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../cpu/runtime.h"
#include "../cpu/simd.h"
#include "kv_block.h"
#include "strip.h"
#include "tiles.h"

namespace rootgraft {
namespace {

constexpr int kMaxRows = kLanes == 16 ? 12 : (kLanes == 8 ? 3 : 1);  // rows whose sums fit the registers
constexpr int kMaxNarrowRows = kMaxRows < 4 ? kMaxRows : 4;  // rows up to which keys are widened on the way

// ------------------------------------------------------------------------------------ softmax

// Positions of a strip that a row sees: [begin, end), counted from the strip's first.
struct Range {
  int begin, end;
};

Range in_strip(int64_t begin, int64_t end, int64_t start) {
  return {static_cast<int>(std::clamp<int64_t>(begin - start, 0, kStrip)),
          static_cast<int>(std::clamp<int64_t>(end - start, 0, kStrip))};
}

inline Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

inline Floats tanh(Floats x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

inline float exp_one(float x) { return exp(broadcast(x))[0]; }

// The state of rows: the largest score so far, the sum of e^(score - largest), and that of e^(score - largest) * value.
struct Sums {
  float* maximum;  // [rows]
  float* weight;   // [rows]
  float* value;    // [rows, width]
  int64_t width;   // padded_value_dim

  void clear(int num_rows) {
    std::fill_n(maximum, num_rows, -kInfinity);
    std::fill_n(weight, num_rows, 0.0f);
    std::fill_n(value, num_rows * width, 0.0f);
  }
  void scale_row(int row, float factor) {
    weight[row] *= factor;
    for (int64_t i = 0; i < width; i += kLanes) store(value + row * width + i, load(value + row * width + i) * factor);
  }
};

// Turns the scores of one row of a strip into weights; positions in `needed` that are not `visible` get 0.
template <typename W>
inline void weigh(const PagedAttentionArgs& a, const Strip<W>& strip, Range needed, Range visible, float* scores,
                  Sums& sums, int row) {
  const int first = needed.begin / kLanes * kLanes;
  if (visible.begin >= visible.end) {
    for (int i = first; i < needed.end; i += kLanes) store(scores + i, Floats{});
    return;
  }
  Floats peaks = broadcast(-kInfinity);
  for (int i = first; i < needed.end; i += kLanes) {
    const Span<W>& span = strip.span[i / kSpan];
    Floats score = load(scores + i);
    if (span.key_scales != nullptr) score *= load(span.key_scales + i % kSpan);
    if (a.softcap != kInfinity) score = a.softcap * tanh(score / a.softcap);
    if (i < visible.begin || i + kLanes > visible.end) {
      const Ints position = lane_numbers() + i;
      score = (position >= visible.begin) & (position < visible.end) ? score : broadcast(-kInfinity);
    }
    peaks = max(score, peaks);
    store(scores + i, score);
  }
  const float peak = max(peaks), old = sums.maximum[row];
  if (peak > old) {
    sums.scale_row(row, exp_one(old - peak));
    sums.maximum[row] = peak;
  }
  const float maximum = sums.maximum[row];
  Floats total{};
  for (int i = first; i < needed.end; i += kLanes) {
    const Span<W>& span = strip.span[i / kSpan];
    const Floats weight = exp(load(scores + i) - maximum);
    total += weight;
    store(scores + i, span.value_scales != nullptr ? weight * load(span.value_scales + i % kSpan) : weight);
  }
  sums.weight[row] += sum(total);
}

// Adds the sums of one more part to those of the parts before it. A row that saw nothing of the part has weight 0.
void add_part(const Sums& part, int num_rows, Sums& total) {
  for (int row = 0; row < num_rows; ++row) {
    if (part.weight[row] == 0.0f) continue;
    const float maximum = std::max(total.maximum[row], part.maximum[row]);
    const float factor = exp_one(part.maximum[row] - maximum);
    total.scale_row(row, exp_one(total.maximum[row] - maximum));
    total.maximum[row] = maximum;
    total.weight[row] += part.weight[row] * factor;
    float* const value = total.value + row * total.width;
    for (int64_t i = 0; i < total.width; i += kLanes) {
      store(value + i, load(value + i) + load(part.value + row * total.width + i) * factor);
    }
  }
}

// ------------------------------------------------------------------------------------ one tile

// A thread's scratch memory.
struct Scratch {
  int64_t* begin;     // [rows] first position that each one sees
  int64_t* end;       // [rows] past the last
  float* queries;     // [rows, key_dim], scaled
  Sums part, total;
  float* scores;      // [kMaxRows, kStrip]
  float* keys;        // [key_dim, kStrip], widened
  float* values;      // [kStrip, padded_value_dim], widened
  float* key_scales;  // [kStrip]
  float* value_scales;

  Scratch(const PagedAttentionArgs& a, float* memory) {
    const auto take = [&](int64_t num_floats) {
      float* const start = memory;
      memory += (num_floats + 15) / 16 * 16;
      return start;
    };
    const int64_t rows = max_tile_rows(a), width = a.kv.padded_value_dim;
    begin = reinterpret_cast<int64_t*>(take(2 * rows));
    end = reinterpret_cast<int64_t*>(take(2 * rows));
    queries = take(rows * a.kv.key_dim);
    for (Sums* sums : {&part, &total}) *sums = {take(rows), take(rows), take(rows * width), width};
    scores = take(kMaxRows * kStrip);
    keys = take(a.kv.key_dim * kStrip);
    values = take(kStrip * width);
    key_scales = take(kStrip);
    value_scales = take(kStrip);
  }
};

class TileRun {
 public:
  TileRun(const PagedAttentionArgs& a, const Step& step, const Tile& tile, int64_t head, float* memory)
      : a_(a), tile_(tile), head_(head), scratch_(a, memory) {
    table_ = step.block_tables + (a.layer_group * step.num_sequences + tile.sequence) * step.block_table_stride;
    first_token_ = step.query_start[tile.sequence];
    first_position_ = step.seq_lens[tile.sequence] - (step.query_start[tile.sequence + 1] - first_token_);
  }

  template <typename W>
  void run() {
    for (int row = 0; row < tile_.num_rows; ++row) {
      const int64_t position = first_position_ + pair(row) / a_.num_shared();
      scratch_.begin[row] = a_.first_visible(position);
      scratch_.end[row] = position + 1;
      const float* const query = a_.query + token(row) * a_.query_stride + query_head(row) * a_.kv.key_dim;
      float* const scaled = scratch_.queries + row * a_.kv.key_dim;
      for (int64_t d = 0; d < a_.kv.key_dim; ++d) scaled[d] = query[d] * a_.scale;
    }
    scratch_.total.clear(tile_.num_rows);
    for (int64_t part = tile_.first_part; part < tile_.end_part; ++part) {
      scratch_.part.clear(tile_.num_rows);
      const int64_t begin = std::max(tile_.begin, part * kPart), end = std::min(tile_.end, (part + 1) * kPart);
      for (int64_t start = begin / kStrip * kStrip; start < end; start += kStrip) {
        run_strip<W>(start, std::max(begin, start), std::min(end, start + kStrip));
      }
      if (tile_.is_cut()) return hand_in();
      add_part(scratch_.part, tile_.num_rows, scratch_.total);
    }
    finish();
  }

 private:
  int64_t pair(int row) const { return tile_.first_row + row; }
  int64_t token(int row) const { return first_token_ + pair(row) / a_.num_shared(); }
  int64_t query_head(int row) const { return head_ * a_.num_shared() + pair(row) % a_.num_shared(); }

  // Positions [begin, end), all of the strip that starts at `start`.
  template <typename W>
  void run_strip(int64_t start, int64_t begin, int64_t end) {
    if (a_.kv.block_size % kSpan != 0) {
      multiply_all(start, widen_positions<W>(start, begin, end));
    } else if (sizeof(W) < sizeof(float) && tile_.num_rows > kMaxNarrowRows) {
      multiply_all(start, widen_strip(find_strip<W>(start, begin, end), in_strip(begin, end, start)));
    } else {
      multiply_all(start, find_strip<W>(start, begin, end));
    }
  }

  template <typename W>
  Span<W> find_span(int64_t position) const {
    const HeadBlock<W> block = head_block<W>(a_.kv, table_[position / a_.kv.block_size], head_);
    const int64_t offset = position % a_.kv.block_size;
    const W* const values = block.values + offset * a_.kv.padded_value_dim;
    if constexpr (kHasScales<W>) {
      return {block.keys + offset, values, block.key_scales + offset, block.value_scales + offset};
    }
    return {block.keys + offset, values, nullptr, nullptr};
  }

  // Spans outside [begin, end) may have no block: any other do, they are masked.
  template <typename W>
  Strip<W> find_strip(int64_t start, int64_t begin, int64_t end) const {
    Strip<W> strip;
    strip.key_stride = a_.kv.block_size;
    strip.value_stride = a_.kv.padded_value_dim;
    const int64_t last = std::min(tile_.end, tile_.end_part * kPart);
    for (int i = 0; i < kStrip / kSpan; ++i) {
      const int64_t position = std::clamp(start + i * kSpan, begin / kSpan * kSpan, (end - 1) / kSpan * kSpan);
      const int64_t next = position + kStrip;
      strip.span[i] = find_span<W>(position);
      strip.next[i] = next < last ? find_span<W>(next) : strip.span[i];
    }
    return strip;
  }

  // The strip that scratch memory holds, with the scales of its source.
  template <typename W>
  Strip<float> widened(const Strip<W>& source) const {
    Strip<float> strip;
    strip.key_stride = kStrip;
    strip.value_stride = a_.kv.padded_value_dim;
    for (int i = 0; i < kStrip / kSpan; ++i) {
      strip.span[i] = {scratch_.keys + i * kSpan, scratch_.values + i * kSpan * strip.value_stride,
                       source.span[i].key_scales, source.span[i].value_scales};
      strip.next[i] = strip.span[i];
    }
    return strip;
  }

  template <typename W>
  Strip<float> widen_strip(const Strip<W>& source, Range needed) const {
    for (int i = needed.begin / kSpan; i * kSpan < needed.end; ++i) {
      const Span<W>& span = source.span[i];
      const Span<W>& next = source.next[i];
      for (int64_t d = 0; d < a_.kv.key_dim; ++d) {
        __builtin_prefetch(next.keys + d * source.key_stride);
        for (int lane = 0; lane < kSpan; lane += kLanes) {
          store(scratch_.keys + d * kStrip + i * kSpan + lane, load(span.keys + d * source.key_stride + lane));
        }
      }
      const int64_t size = kSpan * a_.kv.padded_value_dim;
      for (int64_t j = 0; j < size; j += kLanes) {
        __builtin_prefetch(next.values + j);
        store(scratch_.values + i * size + j, load(span.values + j));
      }
    }
    return widened(source);
  }

  // For block sizes that are no multiple of a span: position by position.
  template <typename W>
  Strip<float> widen_positions(int64_t start, int64_t begin, int64_t end) const {
    const int64_t width = a_.kv.padded_value_dim;
    Strip<W> source{};
    for (int64_t position = begin; position < end; ++position) {
      const HeadBlock<W> block = head_block<W>(a_.kv, table_[position / a_.kv.block_size], head_);
      const int64_t offset = position % a_.kv.block_size, i = position - start;
      for (int64_t d = 0; d < a_.kv.key_dim; ++d) {
        scratch_.keys[d * kStrip + i] = widen(block.keys[d * a_.kv.block_size + offset]);
      }
      for (int64_t d = 0; d < width; ++d) scratch_.values[i * width + d] = widen(block.values[offset * width + d]);
      if constexpr (kHasScales<W>) {
        scratch_.key_scales[i] = block.key_scales[offset];
        scratch_.value_scales[i] = block.value_scales[offset];
        source.span[i / kSpan].key_scales = scratch_.key_scales + i / kSpan * kSpan;
        source.span[i / kSpan].value_scales = scratch_.value_scales + i / kSpan * kSpan;
      }
    }
    return widened(source);
  }

  template <typename W>
  void multiply_all(int64_t start, const Strip<W>& strip) {
    constexpr int kMost = sizeof(W) < sizeof(float) ? kMaxNarrowRows : kMaxRows;
    const int num_blocks = (tile_.num_rows + kMost - 1) / kMost;
    for (int block = 0; block < num_blocks; ++block) {
      const int first = tile_.num_rows * block / num_blocks;
      const int end = tile_.num_rows * (block + 1) / num_blocks;
      multiply_rows<W, kMost>(end - first, start, strip, first);
    }
  }

  template <typename W, int R>
  void multiply_rows(int num_rows, int64_t start, const Strip<W>& strip, int first) {
    if constexpr (R > 1) {
      if (num_rows < R) return multiply_rows<W, R - 1>(num_rows, start, strip, first);
    }
    multiply<R>(start, strip, first);
  }

  // Scores, weights and sums of R rows.
  template <int R, typename W>
  __attribute__((noinline)) void multiply(int64_t start, const Strip<W>& strip, int first) {
    const int64_t* const begin = scratch_.begin + first;
    const int64_t* const end = scratch_.end + first;
    const Range needed = in_strip(begin[0], end[R - 1], start);
    if (needed.begin >= needed.end) return;
    const float* const queries = scratch_.queries + first * a_.kv.key_dim;
    for (int i = needed.begin / kPanel * kPanel; i < needed.end; i += kPanel) {
      multiply_keys<R>(strip, i / kSpan, queries, a_.kv.key_dim, scratch_.scores + i);
    }
    for (int r = 0; r < R; ++r) {
      weigh(a_, strip, needed, in_strip(begin[r], end[r], start), scratch_.scores + r * kStrip, scratch_.part,
            first + r);
    }
    const int64_t width = a_.kv.padded_value_dim;
    float* const sums = scratch_.part.value + first * width;
    for (int64_t column = 0; column < width; column += kPanel) {
      multiply_values<R>(strip, column, scratch_.scores, needed.begin, needed.end, sums + column, width);
    }
  }

  // Puts a part of a cut tile into the workspace. Whoever is last adds up all parts.
  void hand_in() {
    const int64_t size = part_floats(a_, tile_.num_rows), num_parts = tile_.num_parts();
    float* const parts = a_.workspace + tile_.workspace + head_ * num_parts * size;
    const auto stored = [&](int64_t part) {
      float* const start = parts + part * size;
      return Sums{start, start + tile_.num_rows, start + 2 * tile_.num_rows, a_.kv.padded_value_dim};
    };
    const Sums mine = stored(tile_.first_part - tile_.begin / kPart);
    std::copy_n(scratch_.part.maximum, tile_.num_rows, mine.maximum);
    std::copy_n(scratch_.part.weight, tile_.num_rows, mine.weight);
    std::copy_n(scratch_.part.value, tile_.num_rows * mine.width, mine.value);
    std::atomic_ref<int32_t> counter(reinterpret_cast<int32_t*>(a_.workspace)[tile_.counter + head_]);
    if (counter.fetch_add(1, std::memory_order_acq_rel) + 1 < num_parts) return;
    counter.store(0, std::memory_order_relaxed);
    for (int64_t part = 0; part < num_parts; ++part) add_part(stored(part), tile_.num_rows, scratch_.total);
    finish();
  }

  void finish() {
    Sums& total = scratch_.total;
    for (int row = 0; row < tile_.num_rows; ++row) {
      const int64_t head = query_head(row);
      if (a_.sinks != nullptr) {
        const float maximum = std::max(total.maximum[row], a_.sinks[head]);
        total.scale_row(row, exp_one(total.maximum[row] - maximum));
        total.weight[row] += exp_one(a_.sinks[head] - maximum);
      }
      total.scale_row(row, 1.0f / total.weight[row]);
      std::copy_n(total.value + row * total.width, a_.kv.value_dim,
                  a_.out + token(row) * a_.out_stride + head * a_.kv.value_dim);
    }
  }

  const PagedAttentionArgs& a_;
  const Tile& tile_;
  const int64_t head_;  // of keys and values
  Scratch scratch_;
  const int32_t* table_;
  int64_t first_token_;     // of the sequence, in the batch
  int64_t first_position_;  // of that token
};

}  // namespace
}  // namespace rootgraft

using namespace rootgraft;

extern "C" void rootgraft_paged_attention(const void* args, const Step& step, Worker& worker) {
  const PagedAttentionArgs& a = *static_cast<const PagedAttentionArgs*>(args);
  static thread_local std::vector<Tile> tiles;
  make_tiles(a, step, tiles);
  const int64_t num_heads = a.kv.num_kv_heads;
  for (int64_t i; (i = worker.take(static_cast<int64_t>(tiles.size()) * num_heads)) >= 0;) {
    TileRun run(a, step, tiles[i / num_heads], i % num_heads, worker.scratch<float>());
    switch (a.kv.format) {
      case KVFormat::kFloat32: run.run<float>(); break;
      case KVFormat::kBFloat16: run.run<BFloat16>(); break;
      case KVFormat::kFloat16: run.run<Float16>(); break;
      case KVFormat::kInt8: run.run<int8_t>(); break;
      case KVFormat::kFloat8: run.run<Float8>(); break;
    }
  }
}
