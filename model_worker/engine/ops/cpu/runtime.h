// What every CPU kernel sees of the step under way and of the threads that compute it.
//
// A step is a list of commands. All threads of a team run the same command together, then meet at a barrier:
//
//     thread 0   | command 0, tiles 0 2 5 | barrier | command 1, tiles 0 1 | barrier | ...
//     thread 1   | command 0, tiles 1 3 4 |         | command 1, tiles 2   |
//
// Tiles are handed out by a counter, so that a thread which lost its core for a while holds up one tile, not a half.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace rootgraft {

// The batch of one step; mirrored by `Step` in program.py.
struct Step {
  int64_t num_rows;              // T: rows of all activations
  int64_t num_sequences;         // S
  const int64_t* input_ids;      // [T]
  const int64_t* positions;      // [T]
  const int64_t* slot_mapping;   // [G, T] for each layer group: block * block_size + offset
  const int32_t* block_tables;   // [G, S, block_table_stride]
  int64_t block_table_stride;
  const int64_t* query_start;    // [S + 1]
  const int64_t* seq_lens;       // [S]
};

constexpr size_t kScratchBytes = 256 * 1024;

// One thread of a team, as a kernel sees it.
class Worker {
 public:
  Worker(std::atomic<int64_t>& next_tile, std::byte* scratch) noexcept : next_tile_(next_tile), scratch_(scratch) {}

  // The next tile in [0, num_tiles) that no other thread has, or -1.
  int64_t take(int64_t num_tiles) {
    const int64_t tile = next_tile_.fetch_add(1, std::memory_order_relaxed);
    return tile < num_tiles ? tile : -1;
  }

  // kScratchBytes of memory of this thread's own, aligned to 64 bytes; its content does not outlive the command.
  template <typename T>
  T* scratch() {
    return reinterpret_cast<T*>(scratch_);
  }

 private:
  std::atomic<int64_t>& next_tile_;
  std::byte* scratch_;
};

using Kernel = void (*)(const void* args, const Step& step, Worker& worker);

// Mirrored by `_Command` in program.py.
struct Command {
  Kernel kernel;
  const void* args;
};

}  // namespace rootgraft
