// Activations into the type that a matrix product reads.
//
//   to_bf16        pointers 0 x float32, 1 bfloat16 out; numbers 0 Kp, 1 stride of x, 2 stride out, 3 sampled
//   quantize_int8  pointers 0 x float32, 1 int8 out, 2 scales float32 [rows][Kp / group], 3 sums int32 [rows][Kp / group];
//                  numbers as above, 4 group; scalars 0 the least magnitude that counts as zero here, as add_outliers
//                  multiplies it; 0: none does
// `sampled` is 1 if the rows are those that draw a token.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

constexpr int64_t PIECE = 1024;  // elements of a row per work item, so that a single row is shared out too

template <class Convert>
static void for_each_piece(const Call& call, Context& context, Convert convert) {
  int64_t rows = call.numbers[3] ? context.step.sampled : context.step.rows, depth = call.numbers[0];
  int64_t pieces = (depth + PIECE - 1) / PIECE;
  for (int64_t item, items = rows * pieces; (item = context.take(items)) < items;) {
    int64_t begin = item % pieces * PIECE;
    convert(item / pieces, begin, std::min(begin + PIECE, depth));
  }
}

void to_bf16(const Call& call, Context& context) {
  auto* x = (const float*)call.pointers[0];
  auto* out = (uint16_t*)call.pointers[1];
  for_each_piece(call, context, [&](int64_t row, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k += LANES)
      store(out + row * call.numbers[2] + k, float_to_bf16(load<f32x16>(x + row * call.numbers[1] + k)));
  });
}

// Lanes without outliers: their magnitude is below `limit`. What is no number stays.
template <bool APART>
static f32x16 ordinary(f32x16 x, float limit) {
  if constexpr (APART) return abs(x) >= limit ? splat(0.0f) : x;
  return x;
}

// One group: q = round(x / scale) with scale = max |x| / 127; its sum. What is not finite makes the scale NaN, and so all
// that comes of the row.
template <bool APART>
static void quantize_group(const float* x, int64_t size, float limit, int8_t* q, float* scale, int32_t* total) {
  f32x16 top{}, zero{};
  for (int64_t k = 0; k < size; k += LANES) {
    f32x16 value = ordinary<APART>(load<f32x16>(x + k), limit);
    top = max(top, abs(value));
    zero += value * 0.0f;
  }
  float largest = max(top);
  *scale = largest / 127 + sum(zero);
  float inverse = largest > 0 ? 127 / largest : 0;
  i32x16 sums{};
  for (int64_t k = 0; k < size; k += LANES) {
    i32x16 value = round_to_int(ordinary<APART>(load<f32x16>(x + k), limit) * inverse);
    value = value << 24 >> 24;  // as it is stored; what is no number would overflow the sum
    sums += value;
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtepi32_epi8((__m512i)value));
#else
    for (int i = 0; i < LANES; i++) q[k + i] = (int8_t)value[i];
#endif
  }
  int32_t all = 0;
  for (int i = 0; i < LANES; i++) all += sums[i];
  *total = all;
}

void quantize_int8(const Call& call, Context& context) {
  auto* x = (const float*)call.pointers[0];
  auto* out = (int8_t*)call.pointers[1];
  auto* scales = (float*)call.pointers[2];
  auto* sums = (int32_t*)call.pointers[3];
  int64_t group = call.numbers[4], groups = call.numbers[0] / group;
  float limit = (float)call.scalars[0];
  auto quantize = limit > 0 ? quantize_group<true> : quantize_group<false>;
  for_each_piece(call, context, [&](int64_t row, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k += group)
      quantize(x + row * call.numbers[1] + k, group, limit, out + row * call.numbers[2] + k, scales + row * groups + k / group,
               sums + row * groups + k / group);
  });
}

}  // namespace wherry::WHERRY_TARGET
