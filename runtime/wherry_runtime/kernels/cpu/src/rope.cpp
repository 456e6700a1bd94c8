// Queries and keys get their positions, keys and values go to the cache.
//
// rope_and_cache: optional RMS norm per head (Qwen3), rotary embedding in the half-split layout (Su et al., 2021,
// https://arxiv.org/abs/2104.09864), then the query, scaled, to `query`; key and value to the row's slot.
//   pointers  0 qkv [T, qkv_stride]: H query heads, KV key heads, KV value heads of D columns each; 1 query norm [D] or null;
//             2 key norm [D] or null; 3 cos [positions, D / 2]; 4 sin [positions, D / 2]; 5 cache; 6 query out
//   numbers   0 H, 1 KV, 2 D (even, at most 256), 3 block_size, 4 Format, 5 qkv_stride, 6 q_stride
//   scalars   0 eps of the norms, 1 scale of the query (D^-½), 2 what queries, keys and values are cut off at, or 0
// A row of `query` is 4 * q_stride bytes: float32 for a float32 cache, bfloat16 in the first half for the others.
#include "kernels.h"
#include "kv.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

struct Rope {
  explicit Rope(const Call& call)
      : heads(call.numbers[0]),
        kv_heads(call.numbers[1]),
        dim(call.numbers[2]),
        eps((float)call.scalars[0]),
        scale((float)(call.scalars[1] * LOG2_E)),
        limit((float)call.scalars[2]),
        cache((uint8_t*)call.pointers[5], kv_heads, dim, call.numbers[3], (Format)call.numbers[4]) {}

  int64_t heads, kv_heads, dim;
  float eps, scale, limit;
  KVLayout cache;

  // One head.
  void load_head(const float* from, float* x) const {
    std::memcpy(x, from, dim * sizeof(float));
    if (limit == 0) return;
    for (int64_t k = 0; k < dim; k++) x[k] = x[k] > limit ? limit : x[k] < -limit ? -limit : x[k];
  }

  // x [D], and zeros up to the next 16 → its rotation in place.
  void rotate(float* x, const float* norm, const float* cos, const float* sin) const {
    if (norm) normalize(x, norm);
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
      float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  }

  void normalize(float* x, const float* norm) const {
    f32x16 total{};
    for (int64_t k = 0; k < dim; k += LANES) {
      f32x16 value = load<f32x16>(x + k);
      total = total + value * value;
    }
    float factor = 1.0f / std::sqrt(sum(total) / (float)dim + eps);
    for (int64_t k = 0; k < dim; k++) x[k] = x[k] * factor * norm[k];
  }
};

// E4M3 of each lane: to nearest, ties to even; beyond 448 it saturates; NaN stays NaN.
static void to_fp8(f32x16 x, uint8_t* out) {
  i32x16 sign = ((i32x16)x >> 24) & 0x80;
  f32x16 size = abs(x);
  f32x16 bounded = size > 448.0f ? splat(448.0f) : size;
  i32x16 bits = (i32x16)bounded;
  i32x16 normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 the steps are 2^-9: what adding 2^14 rounds to.
  i32x16 small = (i32x16)(bounded + 16384.0f) - (i32x16)splat(16384.0f);
  i32x16 code = bounded < 0.015625f ? small : normal;
  code = x == x ? code : splat((int32_t)0x7f);
  code |= sign;
  for (int i = 0; i < LANES; i++) out[i] = (uint8_t)code[i];
}

// Sign and magnitude of each lane rounded, ties to even.
static void to_int8(f32x16 x, uint8_t* out) {
  i32x16 size = round_to_int(abs(x)), code = size > 127 ? splat((int32_t)127) : size;  // NaN gives the lowest integer: 0
  code = (code < 0 ? splat((int32_t)0) : code) | (((i32x16)x >> 24) & 0x80);
  for (int i = 0; i < LANES; i++) out[i] = (uint8_t)code[i];
}

// max |x| / 127, or NaN if x is not finite: then so is everything that looks at this token.
static float int8_scale(const float* x, int64_t dim) {
  f32x16 top{}, bad{};
  for (int64_t k = 0; k < dim; k += LANES) {
    f32x16 value = load<f32x16>(x + k);
    top = max(top, abs(value));
    bad = bad + (value - value);
  }
  return max(top) / 127.0f + sum(bad);
}

// x [D] → elements of the cache's type [D], zeros beyond; returns the scale (int8).
static float encode(const float* x, int64_t dim, Format format, void* out) {
  float scale = format == Format::INT8 ? int8_scale(x, dim) : 1.0f;
  float inverse = format == Format::INT8 ? (scale > 0 ? 1.0f / scale : 0.0f) : 1.0f;
  for (int64_t k = 0; k < dim; k += LANES) {
    f32x16 value = load<f32x16>(x + k);
    if (format == Format::FLOAT32) store((float*)out + k, value);
    if (format == Format::BFLOAT16) store((uint16_t*)out + k, float_to_bf16(value));
    if (format == Format::FP8) to_fp8(value, (uint8_t*)out + k);
    if (format == Format::INT8) to_int8(value * inverse, (uint8_t*)out + k);
  }
  return scale;
}

// Element by element: neighbours in a group may be another thread's.
template <class Element, int PER_WORD>
static void scatter_key(const void* from, int64_t dim, uint8_t* keys, int64_t place) {
  auto* x = (const Element*)from;
  auto* to = (Element*)keys + place * PER_WORD;
  for (int64_t d = 0; d < dim; d++) to[d / PER_WORD * GROUP * PER_WORD + d % PER_WORD] = x[d];
}

template <class Element, int PER_WORD>
static void scatter_value(const void* from, int64_t dim, int64_t padded, uint8_t* values, int64_t place) {
  auto* x = (const Element*)from;
  auto* to = (Element*)values + place / PER_WORD * padded * PER_WORD + place % PER_WORD;
  for (int64_t d = 0; d < dim; d++) to[d * PER_WORD] = x[d];
}

static void write(const Rope& op, const float* key, const float* value, int64_t head, int64_t slot, int64_t block_size) {
  const KVLayout& cache = op.cache;
  alignas(64) uint8_t k[4 * MAX_HEAD_DIM], v[4 * MAX_HEAD_DIM];
  float key_scale = encode(key, op.dim, cache.format, k), value_scale = encode(value, op.dim, cache.format, v);
  int64_t offset = slot % block_size, place = offset % GROUP;
  uint8_t* group = cache.group(slot / block_size, head, offset / GROUP);
  switch (cache.format) {
    case Format::FLOAT32:
      scatter_key<uint32_t, 1>(k, op.dim, group + cache.keys, place);
      scatter_value<uint32_t, 1>(v, op.dim, cache.padded, group + cache.values, place);
      break;
    case Format::BFLOAT16:
      scatter_key<uint16_t, 2>(k, op.dim, group + cache.keys, place);
      scatter_value<uint16_t, 2>(v, op.dim, cache.padded, group + cache.values, place);
      break;
    default:
      scatter_key<uint8_t, 2>(k, op.dim, group + cache.keys, place);
      scatter_value<uint8_t, 2>(v, op.dim, cache.padded, group + cache.values, place);
  }
  if (cache.format == Format::INT8) {
    ((float*)group)[place] = key_scale;
    ((float*)group)[GROUP + place] = value_scale;
  }
}

static void store_query(const Rope& op, const float* x, void* row, int64_t head) {
  for (int64_t k = 0; k < op.dim; k += LANES) {
    f32x16 value = load<f32x16>(x + k) * op.scale;
    size_t count = op.dim - k < LANES ? op.dim - k : LANES;
    if (op.cache.format == Format::FLOAT32) {
      std::memcpy((float*)row + head * op.dim + k, &value, count * sizeof(float));
    } else {
      u16x16 rounded = float_to_bf16(value);
      std::memcpy((uint16_t*)row + head * op.dim + k, &rounded, count * sizeof(uint16_t));
    }
  }
}

void rope_and_cache(const Call& call, Context& context) {
  Rope op(call);
  int64_t group = op.heads / op.kv_heads, dim = op.dim;
  auto* query_norm = (const float*)call.pointers[1];
  auto* key_norm = (const float*)call.pointers[2];
  for (int64_t item, items = context.step.rows * op.kv_heads; (item = context.take(items)) < items;) {
    int64_t row = item / op.kv_heads, head = item % op.kv_heads, position = context.step.positions[row];
    auto* qkv = (const float*)call.pointers[0] + row * call.numbers[5];
    auto* cos = (const float*)call.pointers[3] + position * (dim / 2);
    auto* sin = (const float*)call.pointers[4] + position * (dim / 2);
    float* query = (float*)call.pointers[6] + row * call.numbers[6];
    alignas(64) float x[MAX_HEAD_DIM] = {}, value[MAX_HEAD_DIM] = {};
    for (int64_t h = head * group; h < (head + 1) * group; h++) {
      op.load_head(qkv + h * dim, x);
      op.rotate(x, query_norm, cos, sin);
      store_query(op, x, query, h);
    }
    op.load_head(qkv + (op.heads + head) * dim, x);
    op.rotate(x, key_norm, cos, sin);
    op.load_head(qkv + (op.heads + op.kv_heads + head) * dim, value);
    write(op, x, value, head, context.step.slots[row], call.numbers[3]);
  }
}

}  // namespace wherry::WHERRY_TARGET
