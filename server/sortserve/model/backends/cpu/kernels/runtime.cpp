// The threads that help: how they take work, wait for it, and sleep.

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <chrono>
#include <climits>
#include <memory>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "parallel.h"

namespace sortserve {
namespace {

// Measured on two cores (benchmarks/busy.py). A helper that waits for work sleeps soon, since others
// need the core. The leader spins for longer than a grain takes: to be woken costs more than that.
constexpr int64_t kHelperSpinNs = 50'000, kLeaderSpinNs = 200'000, kLeaderSleepNs = 500'000;
constexpr int64_t kTurnNs = 1'000'000;  // Linux gives a thread about 3 ms at a time

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or for so long; what done() said last.
template <typename Done>
bool spin(int64_t for_ns, const Done& done) {
  for (const int64_t until = now_ns() + for_ns; now_ns() < until;)
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  return done();
}

// Sleeps while the word has the value that was seen, at most for so long (0: until woken); it may
// return early.
void sleep_while(std::atomic<uint32_t>& word, uint32_t seen, int64_t at_most_ns) {
#if defined(__linux__)
  const timespec limit = {at_most_ns / 1'000'000'000, at_most_ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, at_most_ns > 0 ? &limit : nullptr, nullptr, 0);
#else
  if (word.load() == seen) std::this_thread::sleep_for(std::chrono::microseconds(100));
#endif
}

void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// ---- who is there

struct Leader {
  std::shared_ptr<Crew> crew = std::make_shared<Crew>();
  int64_t num_helpers = 0;
  ~Leader() { crew->dismiss(); }
};

// Signals are for the threads of the program, which know what to do with them.
bool start_helper(const std::shared_ptr<Crew>& crew, int64_t index) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  bool is_started = true;
  try {
    std::thread([crew, index] {
#if defined(__linux__)
      pthread_setname_np(pthread_self(), "sortserve-cpu");
#endif
      crew->help(index);
    }).detach();
  } catch (const std::system_error&) {
    is_started = false;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return is_started;
}

}  // namespace

Crew* Crew::of_this_thread(int64_t num_helpers) {
  thread_local Leader leader;
  while (leader.num_helpers < num_helpers && start_helper(leader.crew, leader.num_helpers))
    ++leader.num_helpers;
  return leader.num_helpers > 0 ? leader.crew.get() : nullptr;
}

void Crew::dismiss() {
  is_dismissed_.store(true);
  wake_helpers();
}

// ---- the leader

void Crew::run_loop(Run run, const void* data, uint32_t num_grains, int64_t num_helpers) {
  num_wanted_.store(num_helpers, std::memory_order_relaxed);
  publish(run, data, num_grains);
  if (num_asleep_.load() > 0) wake_helpers();
  while (has_grain()) take_grain();
  wait_for_end(num_grains);
}

void Crew::publish(Run run, const void* data, uint32_t num_grains) {
  const uint64_t loop = ((ticket_.load(std::memory_order_relaxed) >> 32) + 1) << 32;
  ticket_.store(loop | kClosed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  run_.store(run, std::memory_order_relaxed);
  data_.store(data, std::memory_order_relaxed);
  num_grains_.store(num_grains, std::memory_order_relaxed);
  num_done_.store(0, std::memory_order_relaxed);
  ticket_.store(loop);
}

void Crew::wake_helpers() {
  num_calls_.fetch_add(1);
  wake(num_calls_);
}

// Grains that helpers hold. One that was put off its core may go on on this one if we sleep; short
// sleeps give the kernel several occasions to move it.
void Crew::wait_for_end(uint32_t num_grains) {
  const auto is_over = [&] { return num_done_.load(std::memory_order_acquire) == num_grains; };
  if (is_over() || spin(kLeaderSpinNs, is_over)) return;
  is_leader_asleep_.store(true);
  for (uint32_t num_done; (num_done = num_done_.load()) != num_grains;)
    sleep_while(num_done_, num_done, kLeaderSleepNs);
  is_leader_asleep_.store(false, std::memory_order_relaxed);
}

// ---- everybody

bool Crew::has_grain() const {
  const uint64_t ticket = ticket_.load();
  return static_cast<uint32_t>(ticket) < num_grains_.load(std::memory_order_relaxed);
}

// False: there was none, or another thread was faster.
bool Crew::take_grain() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  const Run run = run_.load(std::memory_order_relaxed);
  const void* data = data_.load(std::memory_order_relaxed);
  const uint32_t num_grains = num_grains_.load(std::memory_order_relaxed);
  const uint32_t index = static_cast<uint32_t>(ticket);
  if (index >= num_grains) return false;
  std::atomic_thread_fence(std::memory_order_acquire);
  if (!ticket_.compare_exchange_strong(ticket, ticket + 1)) return false;
  run(data, index);
  const uint32_t num_done = num_done_.fetch_add(1) + 1;
  if (num_done == num_grains && is_leader_asleep_.load()) wake(num_done_);
  return true;
}

// ---- helpers

// A thread that has used up its turn is put off its core in the middle of a grain, and the leader
// waits. So a helper offers its core while it holds none, before its turn is over.
void Crew::help(int64_t index) {
  int64_t turn_began = now_ns();
  while (!is_dismissed_.load(std::memory_order_relaxed)) {
    bool was_off_core = false;
    if (index >= num_wanted_.load(std::memory_order_relaxed) || !has_grain())
      was_off_core = wait_for_grain(index);
    else if (take_grain() && now_ns() - turn_began > kTurnNs)
      was_off_core = sched_yield() == 0;
    if (was_off_core) turn_began = now_ns();
  }
}

// True: it has slept.
bool Crew::wait_for_grain(int64_t index) {
  const auto has_work = [&] {
    return is_dismissed_.load() ||
           (has_grain() && index < num_wanted_.load(std::memory_order_relaxed));
  };
  if (spin(kHelperSpinNs, has_work)) return false;
  const uint32_t num_calls = num_calls_.load();
  num_asleep_.fetch_add(1);
  if (!has_work()) sleep_while(num_calls_, num_calls, 0);
  num_asleep_.fetch_sub(1);
  return true;
}

}  // namespace sortserve
