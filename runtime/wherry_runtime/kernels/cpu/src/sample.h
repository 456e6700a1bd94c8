// What the kernels that choose tokens share: a row of logits in pieces, and where their findings meet.
#pragma once
#include <algorithm>
#include <atomic>

#include "abi.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

constexpr int64_t PIECE = 4096;  // columns per work item

// A row's best, or a piece's.
struct Best {
  float value;
  int32_t bad;  // 1: NaN or +infinity was seen
  int64_t id;

  // The higher wins; of equals the lower id.
  void meet(const Best& other) {
    bad |= other.bad;
    if (other.value > value || (other.value == value && other.id < id)) {
      value = other.value;
      id = other.id;
    }
  }
};

// In front of a row's pieces in `scratch`.
struct RowState {
  int64_t done;  // pieces, while a kernel runs; 0 between
  float top;     // the highest logit
  float floor;   // lowest score that is not filtered out
};
static_assert(sizeof(Best) == 16 && sizeof(RowState) == 16);

// A request's settings, as kernels/cpu/sampling.py writes them.
struct Params {
  double temperature;  // 0: the likeliest
  int64_t top_k;       // 0: off
  double top_p, min_p;
  uint64_t seed;
  int64_t position;
};
static_assert(sizeof(Params) == 48);

struct Rows {
  Rows(const Call& call, int scratch)
      : logits((const float*)call.pointers[0]),
        scratch((Best*)call.pointers[scratch]),
        width(call.numbers[0]),
        stride(call.numbers[1]),
        pieces((width + PIECE - 1) / PIECE) {}

  const float* row(int64_t r) const { return logits + r * stride; }
  RowState& state(int64_t r) const { return *(RowState*)(scratch + r * (pieces + 1)); }
  Best* bests(int64_t r) const { return scratch + r * (pieces + 1) + 1; }

  // Notes a piece's best; true for the row's last piece, `all` is then the best of all.
  bool arrive(int64_t r, int64_t piece, const Best& best, Best* all) const {
    bests(r)[piece] = best;
    std::atomic_ref<int64_t> done(state(r).done);
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < pieces) return false;
    done.store(0, std::memory_order_relaxed);
    *all = bests(r)[0];
    for (int64_t p = 1; p < pieces; p++) all->meet(bests(r)[p]);
    return true;
  }

  const float* logits;
  Best* scratch;
  int64_t width, stride, pieces;
};

// Sixteen logits from column k on; -infinity beyond the row.
inline f32x16 load_columns(const float* row, int64_t k, int64_t width) {
  if (k + LANES <= width) return load<f32x16>(row + k);
  f32x16 value = splat(-INFINITY);
  std::memcpy(&value, row + k, sizeof(float) * (width - k));
  return value;
}

inline i32x16 lane_numbers() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline bool any(i32x16 mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < LANES; i++) all |= mask[i];
  return all != 0;
#endif
}

// The best of sixteen running bests.
inline Best best_lane(f32x16 values, i32x16 ids, int32_t bad) {
  Best best{values[0], bad, ids[0]};
  for (int i = 1; i < LANES; i++) best.meet(Best{values[i], 0, ids[i]});
  return best;
}

}  // namespace wherry::WHERRY_TARGET
