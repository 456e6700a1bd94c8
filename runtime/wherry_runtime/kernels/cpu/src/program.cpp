// Programs: flat lists of kernel calls, recorded once and replayed for every step. The C interface of the library.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "pool.h"
#include "target.h"

namespace wherry {

struct Program {
  Pool* pool;
  std::vector<Call> calls;
  std::unique_ptr<Counter[]> counters;  // [calls][threads]
};

// What a thread will read next from memory, brought nearer while it waits for the others: small calls, in which most threads
// have nothing to do and nobody reads weights, take up to a tenth of a step.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Call& call, int thread, int threads) {
    at_ = call.stream + call.stream_items * thread / threads * call.stream_item_bytes;
    const char* end = call.stream + call.stream_items * (thread + 1) / threads * call.stream_item_bytes;
    end_ = std::min(end, at_ + MOST);
  }

  void operator()() {
    if (at_ >= end_) return _mm_pause();
    _mm_prefetch(at_, _MM_HINT_T1);
    at_ += LINE;
  }

 private:
  static constexpr int64_t MOST = 256 << 10, LINE = 64;  // bytes; there is room in the second cache for more than this
  const char* at_ = nullptr;
  const char* end_ = nullptr;
};

// A call of one of the programs that run one after the other.
struct Item {
  const Call& call;
  const Step& step;
  Counter* counters;  // [threads]
};

// A program, and what it is replayed with.
struct Part {
  Program* program;
  const Step* step;
};

static std::vector<Item> items_of(const Part* parts, int64_t count) {
  std::vector<Item> items;
  for (int64_t p = 0; p < count; p++) {
    Program& program = *parts[p].program;
    size_t threads = program.pool->threads(), counters = program.calls.size() * threads;
    if (!program.counters) program.counters.reset(new Counter[counters]);
    for (size_t i = 0; i < counters; i++) program.counters[i].taken.store(0, std::memory_order_relaxed);
    for (size_t i = 0; i < program.calls.size(); i++)
      items.push_back({program.calls[i], *parts[p].step, &program.counters[i * threads]});
  }
  return items;
}

// `seconds`: null, or where to write how long each call took, the barrier after it included.
static void replay(Pool& pool, const std::vector<Item>& items, double* seconds) {
  using Clock = std::chrono::steady_clock;
  int threads = pool.threads();
  pool.run([&](int thread) {
    Ahead ahead;
    size_t next = 0;  // the call that `ahead` is for
    for (size_t i = 0; i < items.size(); i++) {
      auto start = seconds ? Clock::now() : Clock::time_point();
      Context context{items[i].step, thread, threads, items[i].counters};
      items[i].call.kernel(items[i].call, context);
      if (next <= i) {
        for (next = i + 1; next < items.size() && !items[next].call.stream;) next++;
        ahead = next < items.size() ? Ahead(items[next].call, thread, threads) : Ahead();
      }
      pool.barrier(thread, [&] { ahead(); });
      if (seconds && thread == 0) seconds[i] = std::chrono::duration<double>(Clock::now() - start).count();
    }
  });
}

}  // namespace wherry

using namespace wherry;

#define WHERRY_EXPORT __attribute__((visibility("default")))

extern "C" {

// Counts up when a kernel takes other operands than before: the Python side asks for what it was written for.
WHERRY_EXPORT int64_t wherry_interface() { return 4; }

// The name of the instruction set in use: the best that the processor has, or the one that was asked for.
WHERRY_EXPORT const char* wherry_target() { return chosen_target().name; }

WHERRY_EXPORT void* wherry_pool_new(int64_t threads, const int64_t* cores, int64_t num_cores) {
  return new Pool((int)threads, std::vector<int>(cores, cores + num_cores));
}

WHERRY_EXPORT void wherry_pool_free(void* pool) { delete (Pool*)pool; }

// The kernel of this name, or null.
WHERRY_EXPORT void* wherry_kernel(const char* name) {
  for (const Entry* entry = chosen_target().entries; entry->name; entry++)
    if (std::string(entry->name) == name) return (void*)entry->kernel;
  return nullptr;
}

WHERRY_EXPORT void* wherry_program_new(void* pool) { return new Program{(Pool*)pool, {}, nullptr}; }

WHERRY_EXPORT void wherry_program_free(void* program) { delete (Program*)program; }

WHERRY_EXPORT void wherry_program_add(void* program, const Call* call) {
  auto* p = (Program*)program;
  p->calls.push_back(*call);
  p->counters.reset();
}

WHERRY_EXPORT int64_t wherry_program_size(void* program) { return (int64_t)((Program*)program)->calls.size(); }

// Runs programs of the same pool one after the other.
WHERRY_EXPORT void wherry_replay(const Part* parts, int64_t count) {
  replay(*parts[0].program->pool, items_of(parts, count), nullptr);
}

WHERRY_EXPORT void wherry_program_profile(void* program, const Step* step, double* seconds) {
  Part part{(Program*)program, step};
  replay(*part.program->pool, items_of(&part, 1), seconds);
}

}  // extern "C"
