// Loops over the threads of the OpenMP runtime that torch has loaded, so that there is one pool.
//
// A kernel enters that pool once, as a Team, and then runs any number of loops: the thread that
// called is the leader and walks through the kernel; the others help with whatever loop is open.
// The leader never waits for a helper that holds no work, so a helper which lost its core to
// another process costs its share of speed and no more. (One OpenMP region per loop would wait for
// every thread at every loop: measured, a step then takes ten times as long on a busy machine.)
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace sortserve {

// GOMP_parallel of that runtime (libgomp, or LLVM's libomp under its compatible name); it runs
// fn(data) once on each of num_threads threads, the caller among them. Null: no helpers.
using ParallelFn = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);
extern ParallelFn run_on_threads;

class Team {
 public:
  explicit Team(int64_t num_threads) : num_threads_(num_threads) {}

  int64_t num_threads() const { return num_threads_; }

  // body(i) for i in [0, count), a grain of neighbouring indices at a time. Leader only.
  template <typename Body>
  void parallel_for(int64_t count, int64_t grain, const Body& body) {
    grain = std::max(grain, (count + kMaxGrains - 1) / kMaxGrains);
    const int64_t num_grains = (count + grain - 1) / grain;
    if (num_threads_ <= 1 || num_grains <= 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    const auto run_grain = [&](int64_t index) {
      const int64_t last = std::min(count, (index + 1) * grain);
      for (int64_t i = index * grain; i < last; ++i) body(i);
    };
    using RunGrain = decltype(run_grain);
    publish([](const void* data, int64_t i) { (*static_cast<const RunGrain*>(data))(i); },
            &run_grain, num_grains);
    while (take_grain()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != num_grains;) relax(spins);
  }

  // fn(team), with num_threads threads.
  template <typename Fn>
  static void run(int64_t num_threads, const Fn& fn) {
    if (run_on_threads == nullptr || num_threads <= 1) {
      Team alone(1);
      return fn(alone);
    }
    struct Region {
      const Fn& fn;
      Team team;
      std::thread::id leader;
    } region{fn, Team(num_threads), std::this_thread::get_id()};
    run_on_threads(
        [](void* data) {
          Region& region = *static_cast<Region*>(data);
          if (std::this_thread::get_id() != region.leader) return region.team.help();
          region.fn(region.team);
          region.team.finished_.store(true, std::memory_order_release);
        },
        &region, static_cast<unsigned>(num_threads), 0);
  }

 private:
  using Run = void (*)(const void*, int64_t);
  static constexpr uint32_t kClosed = ~0u;
  static constexpr int64_t kMaxGrains = 1 << 20;

  static void relax(int& spins) {
    if (++spins > 256) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // ticket_ is the number of the loop and, in its low half, the next free grain. It is closed
  // while the loop changes, so whoever takes a grain has read the loop that the grain is of.
  void publish(Run run, const void* data, int64_t num_grains) {
    const uint64_t loop = ((ticket_.load(std::memory_order_relaxed) >> 32) + 1) << 32;
    ticket_.store(loop | kClosed, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    run_.store(run, std::memory_order_relaxed);
    data_.store(data, std::memory_order_relaxed);
    num_grains_.store(num_grains, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(loop, std::memory_order_release);
  }

  // False: no free grain.
  bool take_grain() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    const Run run = run_.load(std::memory_order_relaxed);
    const void* data = data_.load(std::memory_order_relaxed);
    const int64_t index = static_cast<uint32_t>(ticket);
    if (index >= num_grains_.load(std::memory_order_relaxed)) return false;
    if (!ticket_.compare_exchange_strong(ticket, ticket + 1, std::memory_order_acq_rel)) return true;
    run(data, index);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void help() {
    for (int spins = 0; !finished_.load(std::memory_order_acquire);) {
      if (take_grain())
        spins = 0;
      else
        relax(spins);
    }
  }

  const int64_t num_threads_;
  std::atomic<uint64_t> ticket_{kClosed};
  std::atomic<Run> run_{nullptr};
  std::atomic<const void*> data_{nullptr};
  std::atomic<int64_t> num_grains_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> finished_{false};
};

}  // namespace sortserve
