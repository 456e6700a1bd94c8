// How fast this machine reads memory: the limit that decoding runs into.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "pool.h"

namespace wherry {

constexpr int PASSES = 7;

// The sum of all words, so that no read can be left out.
static int64_t read_all(const char* from, const char* to) {
  __m128i totals[8] = {};
  for (; from + 128 <= to; from += 128) {
    _mm_prefetch(from + 4096, _MM_HINT_T0);
    _mm_prefetch(from + 4096 + 64, _MM_HINT_T0);
    for (int i = 0; i < 8; i++) totals[i] = _mm_add_epi64(totals[i], _mm_load_si128((const __m128i*)from + i));
  }
  __m128i total = totals[0];
  for (int i = 1; i < 8; i++) total = _mm_add_epi64(total, totals[i]);
  return _mm_extract_epi64(total, 0) + _mm_extract_epi64(total, 1);
}

}  // namespace wherry

// Bytes per second of `bytes` in huge pages read by all threads at once, the median of some passes; 0 without memory.
extern "C" __attribute__((visibility("default"))) double wherry_read_bandwidth(void* handle, int64_t bytes) {
  using namespace wherry;
  using Clock = std::chrono::steady_clock;
  auto& pool = *(Pool*)handle;
  constexpr int64_t HUGE_PAGE = 2 << 20;
  bytes = std::max(bytes, HUGE_PAGE * pool.threads()) / HUGE_PAGE * HUGE_PAGE;
  void* mapped = mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return 0;
  char* start = (char*)(((uintptr_t)mapped + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
  madvise(start, bytes, MADV_HUGEPAGE);
  std::vector<int64_t> sums(pool.threads() * 8);
  int64_t share = bytes / pool.threads() / 128 * 128;
  pool.run([&](int thread) { std::memset(start + thread * share, thread + 1, share); });
  std::vector<double> seconds;
  for (int pass = 0; pass < PASSES; pass++) {
    auto begin = Clock::now();
    pool.run([&](int thread) { sums[thread * 8] += read_all(start + thread * share, start + (thread + 1) * share); });
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
  }
  munmap(mapped, bytes + HUGE_PAGE);
  std::sort(seconds.begin(), seconds.end());
  volatile int64_t kept = sums[0];
  (void)kept;
  return share * pool.threads() / seconds[PASSES / 2];
}
