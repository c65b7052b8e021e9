// Loops over threads, on a machine that may be busy with other things.
//
// A kernel runs as a Team: the thread that called is the leader and walks through it, and helpers
// take grains of whatever loop is open. The leader never waits for a helper that holds no grain,
// neither between loops nor at the end, so a helper that lost its core to another process costs its
// share of speed and little more. (An OpenMP region ends when every thread has reached its end,
// and its threads spin for milliseconds before they sleep, on cores that others need.)
//
// Which thread runs which grain is left to chance: a body must give the same bits whatever the
// grains and whoever runs them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace sortserve {

// What a leader and its helpers share. It belongs to the leading thread, and outlives it for as
// long as a helper looks at it.
class Crew {
 public:
  using Run = void (*)(const void* data, int64_t grain);

  // The calling thread's own, with as many helpers as could be started; at least one, or null.
  static Crew* of_this_thread(int64_t num_helpers);

  // run(data, i) for each grain i < num_grains, by the leader and its first helpers.
  void run_loop(Run run, const void* data, uint32_t num_grains, int64_t num_helpers);

  // The life of a helper.
  void help(int64_t index);

  // Helpers end, each as soon as it looks.
  void dismiss();

 private:
  static constexpr uint32_t kClosed = ~0u;

  void publish(Run run, const void* data, uint32_t num_grains);
  bool has_grain() const;
  bool take_grain();
  void wake_helpers();
  bool wait_for_grain(int64_t index);
  void wait_for_end(uint32_t num_grains);

  // The number of the loop and, in its low half, the next free grain. It is closed while the loop
  // changes, so whoever takes a grain has read the loop that the grain is of.
  alignas(64) std::atomic<uint64_t> ticket_{kClosed};
  std::atomic<Run> run_{nullptr};
  std::atomic<const void*> data_{nullptr};
  std::atomic<uint32_t> num_grains_{0};
  std::atomic<int64_t> num_wanted_{0};  // helpers with a lower index take part
  alignas(64) std::atomic<uint32_t> num_done_{0};
  std::atomic<bool> is_leader_asleep_{false};
  alignas(64) std::atomic<uint32_t> num_calls_{0};  // changes when sleepers are to wake
  std::atomic<int64_t> num_asleep_{0};
  std::atomic<bool> is_dismissed_{false};
};

class Team {
 public:
  int64_t num_threads() const { return num_helpers_ + 1; }

  // body(i) for i in [0, count), a grain of neighbouring indices at a time. Leader only.
  template <typename Body>
  void parallel_for(int64_t count, int64_t grain, const Body& body) {
    parallel_for_grains(count, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i);
    });
  }

  // body(first, last) for grains [first, last) of [0, count). Leader only.
  template <typename Body>
  void parallel_for_grains(int64_t count, int64_t grain, const Body& body) {
    grain = std::max(grain, (count + kMaxGrains - 1) / kMaxGrains);
    const int64_t num_grains = (count + grain - 1) / grain;
    if (num_helpers_ == 0 || num_grains <= 1) {
      if (count > 0) body(0, count);
      return;
    }
    const auto run_grain = [&](int64_t index) {
      body(index * grain, std::min(count, (index + 1) * grain));
    };
    using RunGrain = decltype(run_grain);
    crew_->run_loop([](const void* data, int64_t i) { (*static_cast<const RunGrain*>(data))(i); },
                    &run_grain, static_cast<uint32_t>(num_grains), num_helpers_);
  }

  // fn(team), with num_threads threads; with one where no other can be started.
  template <typename Fn>
  static void run(int64_t num_threads, const Fn& fn) {
    Crew* crew = num_threads > 1 ? Crew::of_this_thread(num_threads - 1) : nullptr;
    Team team(crew, crew == nullptr ? 0 : num_threads - 1);
    fn(team);
  }

 private:
  static constexpr int64_t kMaxGrains = 1 << 20;

  Team(Crew* crew, int64_t num_helpers) : crew_(crew), num_helpers_(num_helpers) {}

  Crew* const crew_;
  const int64_t num_helpers_;
};

}  // namespace sortserve
