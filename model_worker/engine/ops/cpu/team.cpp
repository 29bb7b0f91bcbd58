// A team of threads that runs lists of commands.
//
// Waiting spins for a short while, because most commands take microseconds, and then sleeps in the kernel, because a
// thread that spins on while the one it waits for has lost its core wastes that core's whole time slice.

#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "runtime.h"

namespace rootgraft {
namespace {

constexpr int kSpins = 600;  // of one pause instruction each: some ten microseconds

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `value` is not `old` any more.
void wait_while_equal(std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Keeps the calling thread on processor `index` of those that the process may use, if these are `num_threads`. Left to
// itself, the system now and then puts two threads of a team on one processor: every barrier then costs a time slice.
// Where there are more processors, other programs may want the rest, and the system knows better where.
void keep_on_processor(int index, int num_threads) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) != num_threads) return;
  for (int cpu = 0, num_before = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || num_before++ != index) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);  // where it is refused, all works without
    return;
  }
#else
  (void)index;
  (void)num_threads;
#endif
}

struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};

class Team {
 public:
  explicit Team(int num_threads) : num_threads_(num_threads) {
    for (auto& counters : counters_) counters = std::make_unique<TileCounter[]>(num_threads);
    for (int i = 0; i < num_threads; ++i) {
      scratch_.emplace_back(static_cast<std::byte*>(std::aligned_alloc(64, kScratchBytes)));
      if (!scratch_.back()) throw std::bad_alloc();
    }
    try {
      for (int i = 1; i < num_threads; ++i) {
        threads_.emplace_back([this, i] {
          keep_on_processor(i, num_threads_);
          serve(i);
        });
      }
    } catch (...) {
      stop();
      throw;
    }
  }

  ~Team() { stop(); }

  void run(const Command* commands, int64_t num_commands, const Step* step, int64_t* end_ns) {
    commands_ = commands;
    num_commands_ = num_commands;
    step_ = step;
    end_ns_ = end_ns;
    announce();
    compute(0);
  }

 private:
  void stop() {
    commands_ = nullptr;
    announce();
    for (std::thread& thread : threads_) thread.join();
  }

  void announce() {
    job_.fetch_add(1);
    job_.notify_all();
  }

  void serve(int index) {
    for (uint32_t seen = 0;; ++seen) {
      wait_while_equal(job_, seen);
      if (commands_ == nullptr) return;
      compute(index);
    }
  }

  void compute(int index) {
    // The members may change as soon as the last barrier is passed.
    const Command* const commands = commands_;
    const int64_t num_commands = num_commands_;
    const Step& step = *step_;
    for (int64_t i = 0; i < num_commands; ++i) {
      const uint32_t generation = generation_.load(std::memory_order_relaxed);
      // Nobody looks at the other set before the barrier, and nobody has since the one before.
      counters_[(generation + 1) % 2][index].num_taken.store(0, std::memory_order_relaxed);
      Worker worker(counters_[generation % 2].get(), num_threads_, index, scratch_[index].get());
      commands[i].kernel(commands[i].args, step, worker);
      barrier(i, generation);
    }
  }

  // The last thread to come notes the time and lets the others go.
  void barrier(int64_t command, uint32_t generation) {
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      if (end_ns_ != nullptr) {
        end_ns_[command] = std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
      }
      num_arrived_.store(0, std::memory_order_relaxed);
      // In sequence with notify_all's own look at who waits, which could otherwise come before this is visible.
      generation_.store(generation + 1);
      if (num_threads_ > 1) generation_.notify_all();
    } else {
      wait_while_equal(generation_, generation);
    }
  }

  const int num_threads_;
  std::vector<std::unique_ptr<std::byte, FreeDeleter>> scratch_;
  std::vector<std::thread> threads_;
  std::unique_ptr<TileCounter[]> counters_[2];  // [num_threads]; the commands use one set and the other by turns

  const Command* commands_ = nullptr;
  int64_t num_commands_ = 0;
  const Step* step_ = nullptr;
  int64_t* end_ns_ = nullptr;

  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
};

}  // namespace
}  // namespace rootgraft

// A null pointer where threads or memory are lacking.
extern "C" void* rootgraft_team_create(int64_t num_threads) {
  try {
    return new rootgraft::Team(static_cast<int>(num_threads));
  } catch (...) {
    return nullptr;
  }
}

extern "C" void rootgraft_team_destroy(void* team) { delete static_cast<rootgraft::Team*>(team); }

// Runs all commands, each after the one before it is complete, and returns when the last one is.
// end_ns [num_commands], or null: when each command ended, by the steady clock.
extern "C" void rootgraft_team_run(void* team, const rootgraft::Command* commands, int64_t num_commands,
                                   const rootgraft::Step* step, int64_t* end_ns) {
  if (num_commands > 0) static_cast<rootgraft::Team*>(team)->run(commands, num_commands, step, end_ns);
}
