// Where the ranks of a group meet, in memory that their processes share.
//
// all_reduce: out = Σ over ranks of their summands, or out += it; in the ranks' order, so that all get the same bits.
//   pointers  0 arrivals [ranks], a cache line each, shared; 1 summands [ranks][.., x_stride], shared, `slot` floats apart;
//             2 out [T, out_stride]; 3 turns [threads], a cache line each, this process's own
//   numbers   0 width, 1 x_stride, 2 out_stride, 3 ranks, 4 this rank, 5 slot, 6 whether to add
// meet: nothing but the waiting.
//   pointers  0 arrivals, 3 turns;   numbers  3 ranks, 4 this rank
//
// One meeting makes a rank's summand visible to the others, not free: it may be written again after the next meeting but
// one, by which all have read it. With one rank there is nobody to wait for, and arrivals and turns may be null.
#include <sched.h>

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

constexpr int SPINS = 4000;  // then others may have the core: there may be more ranks than cores
constexpr int64_t PIECE = 512;  // columns per work item

static void meet_all(const Call& call, Context& context) {
  int64_t ranks = call.numbers[3];
  if (ranks == 1) return;
  auto* arrivals = (Counter*)call.pointers[0];
  int64_t turn = ++((Counter*)call.pointers[3])[context.thread].taken;
  // The barrier before this call has ordered the other threads' writes before this one.
  if (context.thread == 0) arrivals[call.numbers[4]].taken.store(turn, std::memory_order_release);
  for (int64_t rank = 0; rank < ranks; rank++)
    for (int i = 0; arrivals[rank].taken.load(std::memory_order_acquire) < turn; i++)
      i < SPINS ? _mm_pause() : (void)sched_yield();
}

void meet(const Call& call, Context& context) { meet_all(call, context); }

void all_reduce(const Call& call, Context& context) {
  meet_all(call, context);
  int64_t width = call.numbers[0], x_stride = call.numbers[1], ranks = call.numbers[3], slot = call.numbers[5];
  bool add = call.numbers[6];
  int64_t pieces = (width + PIECE - 1) / PIECE;
  for (int64_t item, items = context.step.rows * pieces; (item = context.take(items)) < items;) {
    int64_t row = item / pieces, begin = item % pieces * PIECE, end = std::min(begin + PIECE, width);
    auto* x = (const float*)call.pointers[1] + row * x_stride;
    float* out = (float*)call.pointers[2] + row * call.numbers[2];
    for (int64_t k = begin; k < end; k += LANES) {
      f32x16 total = load<f32x16>(x + k);
      for (int64_t rank = 1; rank < ranks; rank++) total = total + load<f32x16>(x + rank * slot + k);
      store(out + k, add ? load<f32x16>(out + k) + total : total);
    }
  }
}

}  // namespace wherry::WHERRY_TARGET
