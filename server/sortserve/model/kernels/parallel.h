// Loops over the threads of the OpenMP runtime that torch has loaded, so that there is one pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace sortserve {

// GOMP_parallel of that runtime (libgomp, or LLVM's libomp under its compatible name); it runs
// fn(data) once on each of num_threads threads. Null: run on the calling thread.
using ParallelFn = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);
extern ParallelFn run_on_threads;

// body(i) for i in [0, count). Threads take the next grain of indices as they come free, so that
// a thread which lost its core for a while does not hold up the others.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int64_t num_threads, const Body& body) {
  const int64_t num_grains = (count + grain - 1) / grain;
  num_threads = std::min(num_threads, num_grains);
  if (run_on_threads == nullptr || num_threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Work {
    const Body& body;
    int64_t count, grain;
    std::atomic<int64_t> next{0};
  } work{body, count, grain};
  run_on_threads(
      [](void* data) {
        Work& work = *static_cast<Work*>(data);
        for (;;) {
          const int64_t first = work.next.fetch_add(work.grain, std::memory_order_relaxed);
          if (first >= work.count) return;
          const int64_t last = std::min(first + work.grain, work.count);
          for (int64_t i = first; i < last; ++i) work.body(i);
        }
      },
      &work, static_cast<unsigned>(num_threads), 0);
}

}  // namespace sortserve
