// argmax: the likeliest token of each row that draws one, ties to the lowest id, and whether the row is usable.
//   pointers  0 logits float32 [S, stride]; 1 scratch, 16 * (1 + ceil(V / 4096)) bytes a row, zeros at first; 2 tokens out
//             int64 [S]; 3 finite out uint8 [S]: 0 if a logit is NaN or +infinity, or all are -infinity
//   numbers   0 V, 1 stride
#include "kernels.h"
#include "sample.h"

namespace wherry::WHERRY_TARGET {

static Best scan(const float* row, int64_t begin, int64_t end) {
  f32x16 values = splat(-INFINITY), bad{};
  i32x16 ids = lane_numbers() + (int32_t)begin, now = ids;
  for (int64_t k = begin; k < end; k += LANES, now += LANES) {
    f32x16 x = load_columns(row, k, end);
    i32x16 higher = x > values;
    values = higher ? x : values;
    ids = higher ? now : ids;
    bad = bad + x * 0.0f;  // NaN from NaN and from both infinities …
  }
  i32x16 suspect = bad != bad;
  int32_t found = 0;
  if (any(suspect))  // … of which the negative one is fine
    for (int64_t k = begin; k < end; k++) found |= !(row[k] < INFINITY);
  return best_lane(values, ids, found);
}

void argmax(const Call& call, Context& context) {
  Rows rows(call, 1);
  for (int64_t item, items = context.step.sampled * rows.pieces; (item = context.take(items)) < items;) {
    int64_t row = item / rows.pieces, piece = item % rows.pieces;
    Best best = scan(rows.row(row), piece * PIECE, std::min((piece + 1) * PIECE, rows.width)), all;
    if (!rows.arrive(row, piece, best, &all)) continue;
    rows.state(row).top = all.value;
    rows.state(row).floor = -INFINITY;
    ((int64_t*)call.pointers[2])[row] = all.id;
    ((uint8_t*)call.pointers[3])[row] = !all.bad && all.value > -INFINITY;
  }
}

}  // namespace wherry::WHERRY_TARGET
