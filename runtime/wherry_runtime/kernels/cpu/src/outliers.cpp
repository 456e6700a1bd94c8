// LLM.int8 (Dettmers et al., 2022, https://arxiv.org/abs/2208.07339): what is too large to share a scale with other
// activations is multiplied by itself.
//
// add_outliers: y += x' Wᵀ, where x' has the activations whose magnitude is at least a threshold, and zeros.
//   pointers  0 x float32, 1 weights of int8, 2 y, 4 weight scales: as linear_int.cpp has them, but for x
//   numbers   0 panels, 1 Kp, 2 stride of x, 3 stride of y, 4 group, 5 sampled: 1 if the rows are those that draw a token
//   scalars   0 threshold
// There are few of them: a row's outliers are looked for once for every so many panels. They are added in the order of K,
// so that a row's result never depends on its batch.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

constexpr int64_t PANEL = 64, WORD = 4, ZERO = 128;
constexpr int64_t PANELS_AT_ONCE = 8;

// y[0 … 63] += x · w of one input: byte `place` of the words of 64 outputs.
static void add_input(float* y, const uint8_t* words, int64_t place, const uint16_t* scales, float x) {
  for (int64_t n = 0; n < PANEL; n += LANES) {
    i32x16 word = load<i32x16>(words + n * WORD);
    f32x16 weight = to_float((word >> (int32_t)(8 * place) & 0xff) - (int32_t)ZERO);
    weight = weight * f16_to_float(load<u16x16>(scales + n));
    store(y + n, load<f32x16>(y + n) + weight * x);
  }
}

void add_outliers(const Call& call, Context& context) {
  const Step& step = context.step;
  int64_t panels = call.numbers[0], depth = call.numbers[1], groups = depth / call.numbers[4];
  int64_t rows = call.numbers[5] ? step.sampled : step.rows, pieces = (panels + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE;
  auto* weights = (const uint8_t*)call.pointers[1];
  auto* scales = (const uint16_t*)call.pointers[4];
  float limit = (float)call.scalars[0];
  for (int64_t item, items = rows * pieces; (item = context.take(items)) < items;) {
    int64_t row = item / pieces, first = item % pieces * PANELS_AT_ONCE, end = std::min(first + PANELS_AT_ONCE, panels);
    auto* x = (const float*)call.pointers[0] + row * call.numbers[2];
    float* y = (float*)call.pointers[2] + row * call.numbers[3];
    for (int64_t start = 0; start < depth; start += LANES) {
      if (max(abs(load<f32x16>(x + start))) < limit) continue;
      for (int64_t k = start; k < start + LANES; k++) {
        if (!(std::fabs(x[k]) >= limit)) continue;
        for (int64_t panel = first; panel < end; panel++)
          add_input(y + panel * PANEL, weights + panel * PANEL * depth + k / WORD * WORD * PANEL, k % WORD,
                    scales + (panel * groups + k / call.numbers[4]) * PANEL, x[k]);
      }
    }
  }
}

}  // namespace wherry::WHERRY_TARGET
