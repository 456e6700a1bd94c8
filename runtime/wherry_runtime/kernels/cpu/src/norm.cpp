// Root mean square normalization: Zhang and Sennrich, 2019 (https://arxiv.org/abs/1910.07467).
//
// rms_norm: y = x / sqrt(mean(x²) + eps) · w, row by row.
//   pointers  0 x [.., x_stride], 1 weight [width], 2 out [.., out_stride]
//   numbers   0 width, 1 x_stride, 2 out_stride, 3 gather: 0: row r of T from row r (x may be out);
//             1: row s of S from row step.sampled_rows[s]
//   scalars   0 eps
#include "kernels.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

// Four chains of sums, in an order that depends on the width alone.
static float sum_of_squares(const float* x, int64_t width) {
  f32x16 total[4] = {};
  for (int64_t k = 0, v = 0; k < width; k += LANES, v = (v + 1) % 4) {
    f32x16 value = load<f32x16>(x + k);
    total[v] = total[v] + value * value;
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

void rms_norm(const Call& call, Context& context) {
  const Step& step = context.step;
  int64_t width = call.numbers[0];
  bool gather = call.numbers[3];
  auto* weight = (const float*)call.pointers[1];
  int64_t rows = gather ? step.sampled : step.rows;
  for (int64_t row, items = rows; (row = context.take(items)) < items;) {
    auto* x = (const float*)call.pointers[0] + (gather ? step.sampled_rows[row] : row) * call.numbers[1];
    float* out = (float*)call.pointers[2] + row * call.numbers[2];
    float scale = 1.0f / std::sqrt(sum_of_squares(x, width) / (float)width + (float)call.scalars[0]);
    for (int64_t k = 0; k < width; k += LANES)
      store(out + k, load<f32x16>(x + k) * scale * load_first(weight + k, (int)(width - k)));
  }
}

}  // namespace wherry::WHERRY_TARGET
