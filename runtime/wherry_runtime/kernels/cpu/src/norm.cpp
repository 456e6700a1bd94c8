// Normalization of rows.
//
// rms_norm: y = x / sqrt(mean(x²) + eps) · w (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).
// layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) · w + b (Ba et al., 2016, https://arxiv.org/abs/1607.06450).
//   pointers  0 x [.., x_stride], 1 weight [width], 2 out [.., out_stride], 3 bias [width] (layer_norm)
//   numbers   0 width, 1 x_stride, 2 out_stride, 3 gather: 0: row r of T from row r (x may be out);
//             1: row s of S from row step.sampled_rows[s]
//   scalars   0 eps
#include "kernels.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

static f32x16 lanes(const float* x, int64_t width, int64_t k) {
  return k + LANES <= width ? load<f32x16>(x + k) : load_first(x + k, (int)(width - k));
}

// Of what `part` makes of columns k … k + 15, zeros beyond the width: four chains, in an order that depends on the width alone.
template <class Part>
static float sum_of(int64_t width, Part part) {
  f32x16 total[4] = {};
  for (int64_t k = 0, v = 0; k < width; k += LANES, v = (v + 1) % 4) total[v] = total[v] + part(k);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

static float sum_of_squares(const float* x, int64_t width) {
  return sum_of(width, [=](int64_t k) {
    f32x16 value = lanes(x, width, k);
    return value * value;
  });
}

// Calls make(x, out) for all rows.
template <class Make>
static void for_each_row(const Call& call, Context& context, Make make) {
  const Step& step = context.step;
  bool gather = call.numbers[3];
  for (int64_t row, items = gather ? step.sampled : step.rows; (row = context.take(items)) < items;)
    make((const float*)call.pointers[0] + (gather ? step.sampled_rows[row] : row) * call.numbers[1],
         (float*)call.pointers[2] + row * call.numbers[2]);
}

// out[k] = make(k) for columns k … k + 15.
template <class Make>
static void fill(float* out, int64_t width, Make make) {
  for (int64_t k = 0; k < width; k += LANES) {
    f32x16 value = make(k);
    if (k + LANES <= width)
      store(out + k, value);
    else
      std::memcpy(out + k, &value, sizeof(float) * (width - k));
  }
}

void rms_norm(const Call& call, Context& context) {
  int64_t width = call.numbers[0];
  auto* weight = (const float*)call.pointers[1];
  for_each_row(call, context, [&](const float* x, float* out) {
    float scale = 1.0f / std::sqrt(sum_of_squares(x, width) / (float)width + (float)call.scalars[0]);
    fill(out, width, [=](int64_t k) { return lanes(x, width, k) * scale * lanes(weight, width, k); });
  });
}

void layer_norm(const Call& call, Context& context) {
  int64_t width = call.numbers[0];
  auto *weight = (const float*)call.pointers[1], *bias = (const float*)call.pointers[3];
  for_each_row(call, context, [&](const float* x, float* out) {
    float mean = sum_of(width, [=](int64_t k) { return lanes(x, width, k); }) / (float)width;
    float squares = sum_of(width, [=](int64_t k) {
      f32x16 off = lanes(x, width, k) - mean;
      off = width - k < LANES ? load_first((const float*)&off, (int)(width - k)) : off;
      return off * off;
    });
    float scale = 1.0f / std::sqrt(squares / (float)width + (float)call.scalars[0]);
    fill(out, width, [=](int64_t k) {
      return (lanes(x, width, k) - mean) * scale * lanes(weight, width, k) + lanes(bias, width, k);
    });
  });
}

}  // namespace wherry::WHERRY_TARGET
