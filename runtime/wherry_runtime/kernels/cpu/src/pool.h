// Threads that run a program together.
#pragma once
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

  // Waits for all threads of the run.
  void barrier();

 private:
  void loop(int thread, int core);

  const int threads_;
  const int first_core_;  // of the caller; -1: anywhere
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  alignas(64) std::atomic<uint64_t> runs_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<bool> closing_{false};
};

}  // namespace wherry
