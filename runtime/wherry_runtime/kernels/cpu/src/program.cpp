// Programs: flat lists of kernel calls, recorded once and replayed for every step. The C interface of the library.
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

// `seconds`: null, or where to write how long each call took, the barrier after it included.
static void replay(Program& program, const Step& step, double* seconds) {
  using Clock = std::chrono::steady_clock;
  size_t count = program.calls.size();
  int threads = program.pool->threads();
  if (!program.counters) program.counters.reset(new Counter[count * threads]);
  for (size_t i = 0; i < count * threads; i++) program.counters[i].taken.store(0, std::memory_order_relaxed);
  program.pool->run([&](int thread) {
    for (size_t i = 0; i < count; i++) {
      auto start = seconds ? Clock::now() : Clock::time_point();
      Context context{step, thread, threads, &program.counters[i * threads]};
      program.calls[i].kernel(program.calls[i], context);
      program.pool->barrier();
      if (seconds && thread == 0) seconds[i] = std::chrono::duration<double>(Clock::now() - start).count();
    }
  });
}

}  // namespace wherry

using namespace wherry;

#define WHERRY_EXPORT __attribute__((visibility("default")))

extern "C" {

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

WHERRY_EXPORT void wherry_program_run(void* program, const Step* step) { replay(*(Program*)program, *step, nullptr); }

WHERRY_EXPORT void wherry_program_profile(void* program, const Step* step, double* seconds) {
  replay(*(Program*)program, *step, seconds);
}

}  // extern "C"
