// Sixteen lanes of everything, on whatever vectors the target has.
//
// Arithmetic uses the compiler's vector types: it splits a 64-byte vector into two of AVX2 where there is no AVX-512.
// Only what has no operator (dot products of packed types, conversions, gathers of one value) is written per target.
// Each file that includes this is compiled once per target, in a namespace of its own (WHERRY_TARGET).
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace wherry::WHERRY_TARGET {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

constexpr int LANES = 16;

template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

inline f32x16 splat(float x) { return f32x16{} + x; }
inline i32x16 splat(int32_t x) { return i32x16{} + x; }
inline f32x16 to_float(i32x16 x) { return __builtin_convertvector(x, f32x16); }

// Lanes 0 … count - 1 of `from`, zeros after; reads nothing beyond.
inline f32x16 load_first(const float* from, int count) {
  f32x16 value{};
  std::memcpy(&value, from, sizeof(float) * (count < LANES ? count : LANES));
  return value;
}

inline f32x16 bf16_to_float(u16x16 x) {
  return (f32x16)(__builtin_convertvector(x, i32x16) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
inline u16x16 float_to_bf16(f32x16 x) {
#ifdef __AVX512BF16__
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
  i32x16 bits = (i32x16)x;
  i32x16 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  rounded = x == x ? rounded : bits | 0x400000;
  return __builtin_convertvector((rounded >> 16) & 0xffff, u16x16);
#endif
}

inline f32x16 f16_to_float(u16x16 x) {
#ifdef __AVX512F__
  return (f32x16)_mm512_cvtph_ps((__m256i)x);
#else
  f32x16 result;
  __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)x));
  __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)x, 1));
  std::memcpy(&result, &low, 32);
  std::memcpy((char*)&result + 32, &high, 32);
  return result;
#endif
}

inline float sum(f32x16 x) {
  float total[8];
  for (int i = 0; i < 8; i++) total[i] = x[i] + x[i + 8];
  for (int width = 4; width; width /= 2)
    for (int i = 0; i < width; i++) total[i] += total[i + width];
  return total[0];
}

inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

typedef float f32x8 __attribute__((vector_size(32)));

// Halves, quarters, …: a short tree, where a loop over lanes is a long chain.
inline float max(f32x8 x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

inline float max(f32x16 x) {
  f32x8 halves[2];
  std::memcpy(halves, &x, sizeof(x));
  return max((f32x8)_mm256_max_ps((__m256)halves[0], (__m256)halves[1]));
}

inline f32x16 abs(f32x16 x) { return (f32x16)((i32x16)x & 0x7fffffff); }

// To the nearest integer, ties to even.
inline i32x16 round_to_int(f32x16 x) {
#ifdef __AVX512F__
  return (i32x16)_mm512_cvtps_epi32((__m512)x);
#else
  i32x16 result;
  __m256 halves[2];
  std::memcpy(halves, &x, 64);
  __m256i low = _mm256_cvtps_epi32(halves[0]), high = _mm256_cvtps_epi32(halves[1]);
  std::memcpy(&result, &low, 32);
  std::memcpy((char*)&result + 32, &high, 32);
  return result;
#endif
}

// e^x to about 2 units in the last place; 0 below -87.
inline f32x16 exp(f32x16 x) {
  f32x16 clamped = x < -87.0f ? splat(-87.0f) : x > 88.0f ? splat(88.0f) : x;
  i32x16 n = round_to_int(clamped * 1.44269504088896341f);
  f32x16 whole = to_float(n);
  // ln 2 in two parts: the first has few bits, so whole * first is exact.
  f32x16 r = clamped - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  f32x16 scale = (f32x16)((n + 127) << 23);
  return x < -87.0f ? splat(0.0f) : p * scale;
}

inline void prefetch(const void* address) { _mm_prefetch((const char*)address, _MM_HINT_T0); }
// Not into the first level: it waits for memory in the far longer queue of the second.
inline void prefetch_l2(const void* address) { _mm_prefetch((const char*)address, _MM_HINT_T1); }

}  // namespace wherry::WHERRY_TARGET
