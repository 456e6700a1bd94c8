#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

namespace wherry {

// Steps follow one another closely; a sleeping thread takes tens of microseconds to come back.
constexpr int SPINS_BETWEEN_STEPS = 4000;

static void pin(int core) {
  if (core < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // a refusal costs speed only
}

// Keeps the calling thread on a core for as long as this lives. Left where it likes, it may share the core of a thread that
// it waits for.
class Pinned {
 public:
  explicit Pinned(int core) : pinned_(core >= 0 && !pthread_getaffinity_np(pthread_self(), sizeof(before_), &before_)) {
    if (pinned_) pin(core);
  }
  ~Pinned() {
    if (pinned_) pthread_setaffinity_np(pthread_self(), sizeof(before_), &before_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
  cpu_set_t before_;
  const bool pinned_;
};

Pool::Pool(int threads, const std::vector<int>& cores)
    : threads_(threads), first_core_(cores.empty() || threads == 1 ? -1 : cores[0]), places_(threads) {
  for (int t = 1; t < threads; t++) {
    int core = t < (int)cores.size() ? cores[t] : -1;
    workers_.emplace_back([this, t, core] { loop(t, core); });
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    runs_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::loop(int thread, int core) {
  pin(core);
  uint64_t seen = 0;
  for (;;) {
    for (int i = 0; i < SPINS_BETWEEN_STEPS && runs_.load(std::memory_order_acquire) == seen; i++) _mm_pause();
    if (runs_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return runs_.load(std::memory_order_acquire) != seen; });
    }
    seen++;
    if (closing_) return;
    (*work_)(thread);
    barrier(thread, [] { _mm_pause(); });
  }
}

void Pool::run(const std::function<void(int)>& work) {
  Pinned pinned(first_core_);
  if (threads_ > 1) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      runs_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }
  work(0);
  barrier(0, [] { _mm_pause(); });  // nobody may look at `work` any more
}

}  // namespace wherry
