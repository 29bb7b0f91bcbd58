// What every CPU kernel sees of the step under way and of the threads that compute it.
//
// A step is a list of commands. All threads of a team run the same command together, then meet at a barrier:
//
//     thread 0   | command 0, tiles 0 1 2 5 | barrier | command 1, tiles 0 1 | barrier | ...
//     thread 1   | command 0, tiles 3 4     |         | command 1, tiles 2 3 |
//
// The tiles of a command are cut into as many ranges as there are threads. A thread works through its own range, whose
// weights lie one after the other in memory, and then helps with those of the others, so that a thread which lost its
// core for a while holds up one tile, not a half.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace rootgraft {

struct VariantPlan;  // variants.h

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
  const VariantPlan* variants;   // of the rows; null where no operation looks at variants
};

constexpr size_t kScratchBytes = 256 * 1024;

// How many tiles of a thread's range have been taken; in a cache line of its own.
struct alignas(64) TileCounter {
  std::atomic<int64_t> num_taken{0};
};

// One thread of a team, as a kernel sees it during one command.
class Worker {
 public:
  // counters: one of each thread, all zero before the first take.
  Worker(TileCounter* counters, int num_threads, int thread, std::byte* scratch) noexcept
      : counters_(counters), num_threads_(num_threads), thread_(thread), scratch_(scratch) {}

  // A tile in [0, num_tiles) that no other thread has, or -1. All calls of a command pass the same number.
  int64_t take(int64_t num_tiles) {
    for (; num_ranges_done_ < num_threads_; ++num_ranges_done_) {
      const int range = (thread_ + num_ranges_done_) % num_threads_;
      const int64_t first = num_tiles * range / num_threads_, end = num_tiles * (range + 1) / num_threads_;
      const int64_t tile = first + counters_[range].num_taken.fetch_add(1, std::memory_order_relaxed);
      if (tile < end) return tile;
    }
    return -1;
  }

  // Which one this is, in [0, number of threads).
  int thread() const { return thread_; }

  // kScratchBytes of memory of this thread's own, aligned to 64 bytes; its content does not outlive the command.
  template <typename T>
  T* scratch() {
    return reinterpret_cast<T*>(scratch_);
  }

 private:
  TileCounter* counters_;
  int num_threads_;
  int thread_;
  int num_ranges_done_ = 0;
  std::byte* scratch_;
};

using Kernel = void (*)(const void* args, const Step& step, Worker& worker);

// Mirrored by `_Command` in program.py.
struct Command {
  Kernel kernel;
  const void* args;
};

}  // namespace rootgraft
