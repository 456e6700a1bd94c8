// Threads that run a program together.
#pragma once
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace wherry {

// The caller is thread 0. Between runs the others spin shortly, then sleep.
class Pool {
 public:
  // `cores`: one per thread, or empty to leave placement to the kernel. The caller is on its core during `run` only.
  Pool(int threads, const std::vector<int>& cores);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Runs `work(thread)` on every thread and returns when all are done.
  void run(const std::function<void(int)>& work);

  // Waits for all threads of the run; every one of them says which it is. Until then it calls idle() over and over.
  //
  // The dissemination barrier of Hensgen, Finkel and Manber, 1988 (https://doi.org/10.1007/BF01379320): in round r a thread
  // tells the one 2^r further and waits to be told, so that after log2 rounds each has heard of all. With two threads that
  // is one cache line each way at the same time.
  template <class Idle>
  void barrier(int thread, Idle idle) {
    uint32_t passed = ++places_[thread].passed;
    for (int round = 0, distance = 1; distance < threads_; round++, distance *= 2) {
      places_[(thread + distance) % threads_].told[round].store(passed, std::memory_order_release);
      auto& told = places_[thread].told[round];
      for (int i = 0; (int32_t)(told.load(std::memory_order_acquire) - passed) < 0; i++) {
        if (i < SPINS_IN_STEP)
          idle();
        else
          sched_yield();
      }
    }
  }

 private:
  // A thread that waits this long gives its core to whoever else may want it: a peer that was put off its own core.
  static constexpr int SPINS_IN_STEP = 20000;

  struct alignas(64) Place {
    std::atomic<uint32_t> told[14] = {};  // by the rounds of a barrier: how many barriers the teller has come to
    uint32_t passed = 0;
  };

  void loop(int thread, int core);

  const int threads_;
  const int first_core_;  // of the caller; -1: anywhere
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  alignas(64) std::atomic<uint64_t> runs_{0};
  std::vector<Place> places_;  // of each thread
  std::atomic<bool> closing_{false};
};

}  // namespace wherry
