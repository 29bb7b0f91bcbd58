// How the work of a step is cut into tiles, which threads take one by one. Part of cpu.cpp.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../cpu/runtime.h"
#include "kv_block.h"

namespace rootgraft {

constexpr int kPart = 256;         // keys whose sums are built by themselves
constexpr int kMaxTileRows = 96;
constexpr int kFewTiles = 32;      // fewer are cut at the parts
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Mirrored by `_PagedAttentionArgs` in operation.py.
struct PagedAttentionArgs {
  const float* query;       // [T, num_heads, key_dim], rows query_stride apart
  int64_t query_stride;
  float* out;               // [T, num_heads, value_dim], rows out_stride apart
  int64_t out_stride;
  KVBlocks kv;
  int64_t num_heads;
  float scale;
  float softcap;            // infinity: none
  int64_t sliding_window;   // the largest integer: none
  int64_t chunk_size;       // the largest integer: none
  const float* sinks;       // [num_heads], or null
  float* workspace;         // kFewTiles counters, which are zero between two runs, then the parts of cut tiles
  int64_t workspace_floats;
  int64_t layer_group;  // whose block tables are read

  int64_t num_shared() const { return num_heads / kv.num_kv_heads; }  // query heads of a KV head
  int64_t first_visible(int64_t position) const {
    return std::max<int64_t>({0, position - sliding_window + 1, position - position % chunk_size});
  }
};

struct Tile {
  int64_t sequence;
  int64_t first_row;   // of the sequence's (token, query head) pairs
  int num_rows;
  int64_t begin, end;  // positions that any of the rows sees
  int64_t first_part, end_part;
  int64_t workspace;   // where the parts of a cut tile's first head go, in floats
  int64_t counter;     // of the parts of its first head that are done

  int64_t num_parts() const { return (end + kPart - 1) / kPart - begin / kPart; }
  bool is_cut() const { return end_part - first_part < num_parts(); }
  int64_t cost() const { return num_rows * (std::min(end, end_part * kPart) - std::max(begin, first_part * kPart)); }
};

// Floats of one part of one tile and head: maximum and sum of each row, then their sums of values.
static int64_t part_floats(const PagedAttentionArgs& a, int num_rows) { return num_rows * (2 + a.kv.padded_value_dim); }

// Bounded by the scratch memory too: queries, sums of a part and of all parts.
static int64_t max_tile_rows(const PagedAttentionArgs& a) {
  const int64_t row_bytes = sizeof(float) * (a.kv.key_dim + 2 * a.kv.padded_value_dim);
  return std::min<int64_t>(kMaxTileRows, 96 * 1024 / row_bytes);
}

// All tiles of one head; the other heads have the same. The longest come first, so that threads finish together.
static void make_tiles(const PagedAttentionArgs& a, const Step& step, std::vector<Tile>& tiles) {
  tiles.clear();
  const int64_t most_rows = max_tile_rows(a);
  for (int64_t s = 0; s < step.num_sequences; ++s) {
    const int64_t num_tokens = step.query_start[s + 1] - step.query_start[s];
    const int64_t num_rows = num_tokens * a.num_shared();
    const int64_t num_tiles = (num_rows + most_rows - 1) / most_rows;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t first = num_rows * i / num_tiles, end = num_rows * (i + 1) / num_tiles;
      const int64_t before = step.seq_lens[s] - num_tokens;
      Tile tile{};
      tile.sequence = s;
      tile.first_row = first;
      tile.num_rows = static_cast<int>(end - first);
      tile.begin = a.first_visible(before + first / a.num_shared());
      tile.end = before + (end - 1) / a.num_shared() + 1;
      tile.first_part = tile.begin / kPart;
      tile.end_part = tile.first_part + tile.num_parts();
      tiles.push_back(tile);
    }
  }
  const int64_t num_heads = a.kv.num_kv_heads;
  const int64_t num_uncut = static_cast<int64_t>(tiles.size());
  if (num_uncut * num_heads < kFewTiles) {
    int64_t used = kFewTiles;
    for (int64_t i = 0; i < num_uncut; ++i) {
      tiles[i].workspace = used;
      tiles[i].counter = i * num_heads;
      used += num_heads * tiles[i].num_parts() * part_floats(a, tiles[i].num_rows);
    }
    for (int64_t i = 0; i < num_uncut && used <= a.workspace_floats; ++i) {
      for (int64_t part = tiles[i].first_part + 1; part < tiles[i].first_part + tiles[i].num_parts(); ++part) {
        Tile tile = tiles[i];
        tile.first_part = part;
        tile.end_part = part + 1;
        tiles.push_back(tile);
      }
      tiles[i].end_part = tiles[i].first_part + 1;
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& x, const Tile& y) { return x.cost() > y.cost(); });
}

}  // namespace rootgraft
