// sample_draw: draws a token for each row of a temperature above 0, by the Gumbel-max trick over what sample_filter left.
//   pointers  0 logits float32 [S, stride]; 1 Params [S]; 2 scratch of argmax; 3 tokens int64 [S]: argmax's, overwritten
//   numbers   0 V, 1 stride
// Noise is a function of (seed, position, token id) alone: Philox4x64-10 (Salmon et al., 2011,
// https://doi.org/10.1145/2063384.2063405) keyed by (seed, position), in the order of engine/rng.py. Logarithms are good to
// about 2 units in the last place, so the token is the reference's unless the two best lie within 1e-5 of each other.
#include "kernels.h"
#include "sample.h"

namespace wherry::WHERRY_TARGET {

constexpr float MOST_NOISE = 22.9f;  // of what 32 random bits can give
constexpr int64_t GROUPS = 16;  // of sixteen columns, at a time

// Eight words: block `index` of the stream.
static void philox(uint64_t key0, uint64_t key1, uint64_t index, uint32_t* out) {
  uint64_t x[4] = {index + 1, 0, 0, 0};  // NumPy counts before it draws
  for (int round = 0; round < 10; round++) {
    __uint128_t a = (__uint128_t)0xD2E7470EE14C6C93u * x[0], b = (__uint128_t)0xCA5A826395121157u * x[2];
    uint64_t y0 = (uint64_t)(b >> 64) ^ x[1] ^ key0, y2 = (uint64_t)(a >> 64) ^ x[3] ^ key1;
    x[1] = (uint64_t)b;
    x[3] = (uint64_t)a;
    x[0] = y0;
    x[2] = y2;
    key0 += 0x9E3779B97F4A7C15u;
    key1 += 0xBB67AE8584CAA73Bu;
  }
  std::memcpy(out, x, sizeof(x));
}

// Natural logarithm of positive normal numbers, to about 2 units in the last place.
static f32x16 log(f32x16 x) {
  i32x16 bits = (i32x16)x;
  i32x16 exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [√½, √2)
  f32x16 f = (f32x16)(bits - (exponent << 23)) - 1.0f;
  f32x16 whole = to_float(exponent);
  f32x16 p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  f32x16 square = f * f;
  f32x16 small = p * f * square + whole * -2.12194440e-4f - 0.5f * square;
  return f + small + whole * 0.693359375f;
}

// Uniform words → standard Gumbel noise −log(−log(1 − v)), as engine/rng.py has it.
static f32x16 gumbel(i32x16 words) {
  f32x16 high = to_float((words >> 16) & 0xffff), low = to_float(words & 0xffff);
  f32x16 v = (high * 65536.0f + low + 0.5f) * 0x1p-32f;
  v = v < 1 - 0x1p-24f ? v : splat(1 - 0x1p-24f);
  f32x16 u = 1.0f - v;
  f32x16 rest = (1.0f - u) - v;  // what rounding took from u
  return -log(-(log(u) + rest / u));
}

// Words of columns k … k + 15 in `out`.
static void words_at(const Params& params, int64_t k, uint32_t* out) {
  philox(params.seed, (uint64_t)params.position, (uint64_t)k / 8, out);
  philox(params.seed, (uint64_t)params.position, (uint64_t)k / 8 + 1, out + 8);
}

static float noise_at(const Params& params, int64_t column) {
  alignas(64) uint32_t words[LANES];
  words_at(params, column / LANES * LANES, words);
  return gumbel(load<i32x16>(words))[column % LANES];
}

// Where noise may lift a score to `best`: more than d only comes of words under 2³² e^-d. A little room for rounding; where
// a score is infinite the comparison is of NaN, and says yes.
static i32x16 may_win(f32x16 scores, float best, i32x16 words) {
  f32x16 room = (abs(scores) + std::fabs(best)) * 1e-6f + 1e-4f;
  return ~(to_float((words >> 1) & 0x7fffffff) * 0x1p-31f >= exp(scores - best + room) + 0x1p-32f);
}

// The best score + noise in columns begin … end - 1. What cannot beat `sure`, a sum known to occur, or what was found
// since, gets no words, and what its words cannot lift so far no logarithms.
static Best draw(const Rows& rows, int64_t row, const Params& params, float sure, int64_t begin, int64_t end) {
  float temperature = (float)params.temperature, floor = rows.state(row).floor;
  f32x16 values = splat(-INFINITY), scores[GROUPS];
  i32x16 ids = lane_numbers() + (int32_t)begin;
  alignas(64) uint32_t words[GROUPS * LANES];
  int64_t columns[GROUPS];
  for (int64_t first = begin; first < end; first += GROUPS * LANES) {
    int64_t count = 0;
    for (int64_t k = first; k < std::min(first + GROUPS * LANES, end); k += LANES) {
      f32x16 s = load_columns(rows.row(row), k, end) / temperature;
      if (!any(s >= std::max(floor, sure - MOST_NOISE))) continue;
      scores[count] = s >= floor ? s : splat(-INFINITY);
      columns[count++] = k;
    }
    // All words first: logarithms in between would wait for each of them.
    for (int64_t i = 0; i < count; i++) words_at(params, columns[i], words + i * LANES);
    for (int64_t i = 0; i < count; i++) {
      i32x16 drawn = load<i32x16>(words + i * LANES);
      if (!any(may_win(scores[i], sure, drawn))) continue;
      f32x16 sums = scores[i] + gumbel(drawn);
      i32x16 higher = sums > values;
      values = higher ? sums : values;
      ids = higher ? lane_numbers() + (int32_t)columns[i] : ids;
      sure = std::max(sure, max(sums));
    }
  }
  return best_lane(values, ids, 0);
}

void sample_draw(const Call& call, Context& context) {
  Rows rows(call, 2);
  auto* tokens = (int64_t*)call.pointers[3];
  for (int64_t item, items = context.step.sampled * rows.pieces; (item = context.take(items)) < items;) {
    int64_t row = item / rows.pieces, piece = item % rows.pieces;
    const Params& params = ((const Params*)call.pointers[1])[row];
    const RowState& state = rows.state(row);
    if (params.temperature <= 0 || !(state.top - state.top == 0)) continue;
    // tokens[row] is argmax's until the row's last piece is done, and that one comes after all reads.
    int64_t likeliest = std::atomic_ref<int64_t>(tokens[row]).load(std::memory_order_relaxed);
    float sure = state.top / (float)params.temperature + noise_at(params, likeliest);
    Best best = draw(rows, row, params, sure, piece * PIECE, std::min((piece + 1) * PIECE, rows.width)), all;
    if (rows.arrive(row, piece, best, &all)) std::atomic_ref<int64_t>(tokens[row]).store(all.id, std::memory_order_relaxed);
  }
}

}  // namespace wherry::WHERRY_TARGET
