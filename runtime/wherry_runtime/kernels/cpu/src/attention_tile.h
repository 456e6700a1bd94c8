// The inner loops of attention: a few rows of queries against 64 keys.
//
// Each sum runs in one chain in a fixed order, however many rows go together: a row's result is the same alone, in a
// tile, and in any batch. Online softmax: Milakov and Gimelshein, 2018 (https://arxiv.org/abs/1805.02867); tiles as in
// FlashAttention (Dao et al., 2022, https://arxiv.org/abs/2205.14135). Logarithms and powers are of two.
#pragma once
#include "kv.h"
#include "simd_native.h"

namespace wherry::WHERRY_TARGET {

constexpr int SPAN = 64;              // keys at once
constexpr int SPAN_GROUPS = SPAN / GROUP;
constexpr int SPAN_VECTORS = SPAN / WIDTH;
constexpr int MOST_COLUMNS = 4;       // vectors of sums per row
#ifdef __AVX512F__
constexpr int TILE_ROWS = 4;          // 4 × 4 sums, 4 vectors of keys and a word of the query
#else
constexpr int TILE_ROWS = 2;
#endif
constexpr float LOWEST = -1e30f;      // below every score, yet finite: its difference to itself is 0

inline fvec spread(float x) { return fvec{} + x; }

inline float total_of(fvec x) {
  float sums[WIDTH];
  store(sums, x);
  for (int width = WIDTH / 2; width; width /= 2)
    for (int i = 0; i < width; i++) sums[i] += sums[i + width];
  return sums[0];
}

// 2^x for x ≤ 0 to about 2 units in the last place; 0 below -126.
inline fvec power_of_two(fvec x) {
#ifdef __AVX512F__
  fvec whole = (fvec)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  fvec whole = (fvec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  fvec f = x - whole;
  fvec p = spread(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
#ifdef __AVX512F__
  __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // NaN is kept
  return (fvec)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)whole);
#else
  ivec scale = ((ivec)_mm256_cvtps_epi32((__m256)whole) + 127) << 23;
  return x < -126.0f ? spread(0.0f) : p * (fvec)scale;
#endif
}

// scores [ROWS][64] = q · keys; q [words][TILE_ROWS], keys in four groups [words][16], `ahead` those wanted next.
template <class Type, int ROWS>
inline void multiply_keys(const int32_t* q, const int32_t* const* keys, const int32_t* const* ahead, int64_t words,
                          float (*scores)[SPAN]) {
  for (int first = 0; first < SPAN_VECTORS; first += MOST_COLUMNS) {
    const int32_t *from[MOST_COLUMNS], *next[MOST_COLUMNS];
#pragma GCC unroll 4
    for (int v = 0; v < MOST_COLUMNS; v++) {
      int lane = (first + v) * WIDTH;
      from[v] = keys[lane / GROUP] + lane % GROUP;
      next[v] = ahead[lane / GROUP] + lane % GROUP;
    }
    fvec sums[ROWS][MOST_COLUMNS] = {};
    for (int64_t k = 0; k < words; k++) {
      ivec key[MOST_COLUMNS];
#pragma GCC unroll 4
      for (int v = 0; v < MOST_COLUMNS; v++) {
        key[v] = load<ivec>(from[v] + k * GROUP);
        prefetch(next[v] + k * GROUP);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < MOST_COLUMNS; v++) sums[r][v] = Type::dot(sums[r][v], key[v], q[k * TILE_ROWS + r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int v = 0; v < MOST_COLUMNS; v++) store(scores[r] + (first + v) * WIDTH, sums[r][v]);
  }
}

// sums [ROWS][COLUMNS vectors] += weights · values, over `groups` groups of values [16 / PER_WORD][padded] words.
template <class Type, int ROWS, int COLUMNS>
inline void multiply_values(const int32_t (*weights)[SPAN], const int32_t* const* values, const int32_t* const* ahead,
                            int groups, int64_t padded, int64_t column, float* const* to) {
  constexpr int WORDS = GROUP / Type::PER_WORD;
  fvec sums[ROWS][COLUMNS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) sums[r][v] = load<fvec>(to[r] + column + v * WIDTH);
  for (int g = 0; g < groups; g++) {
    const int32_t *from = values[g] + column, *next = ahead[g] + column;
    for (int k = 0; k < WORDS; k++, from += padded, next += padded) {
      ivec value[COLUMNS];
#pragma GCC unroll 4
      for (int v = 0; v < COLUMNS; v++) {
        value[v] = load<ivec>(from + v * WIDTH);
        prefetch(next + v * WIDTH);
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < COLUMNS; v++) sums[r][v] = Type::dot(sums[r][v], value[v], weights[r][g * WORDS + k]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) store(to[r] + column + v * WIDTH, sums[r][v]);
}

// Weights as the words that multiply values; their sum as rounded, so that what is divided by is what was multiplied.
inline void pack_weights(OneFloat, const fvec* weights, int32_t* words, fvec* total) {
  for (int v = 0; v < SPAN_VECTORS; v++) {
    store(words + v * WIDTH, weights[v]);
    *total = *total + weights[v];
  }
}

inline void pack_weights(TwoBFloat16, const fvec* weights, int32_t* words, fvec* total) {
#ifdef __AVX512BF16__
  for (int v = 0; v < SPAN_VECTORS; v += 2) {
    ivec pairs = (ivec)_mm512_cvtne2ps_pbh((__m512)weights[v + 1], (__m512)weights[v]);
    store(words + v / 2 * WIDTH, pairs);
    *total = TwoBFloat16::dot(*total, pairs, 0x3f803f80);
  }
#else
  typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));
  for (int v = 0; v < SPAN_VECTORS; v++) {
    ivec bits = (ivec)weights[v];
    ivec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
    rounded = weights[v] == weights[v] ? rounded : bits;
    *total = *total + (fvec)rounded;
    store((char*)words + v * WIDTH * 2, __builtin_convertvector((rounded >> 16) & 0xffff, hvec));
  }
#endif
}

}  // namespace wherry::WHERRY_TARGET
