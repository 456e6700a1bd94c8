// Groups of one-byte caches as bfloat16: every E4M3 and every int8 value is a bfloat16 exactly.
#pragma once
#include <array>

#include "kv.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

constexpr uint16_t fp8_as_bf16(int code) {
  int exponent = code >> 3 & 15, mantissa = code & 7, sign = (code & 0x80) << 8;
  if (exponent == 15 && mantissa == 7) return (uint16_t)(sign | 0x7fc0);  // NaN
  if (exponent) return (uint16_t)(sign | (exponent + 120) << 7 | mantissa << 4);
  if (!mantissa) return (uint16_t)sign;
  int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;  // mantissa · 2^-9
  return (uint16_t)(sign | (top + 118) << 7 | (mantissa - (1 << top)) << (7 - top));
}

constexpr std::array<uint16_t, 256> fp8_table() {
  std::array<uint16_t, 256> table{};
  for (int i = 0; i < 256; i++) table[i] = fp8_as_bf16(i);
  return table;
}

alignas(64) constexpr std::array<uint16_t, 256> FP8_AS_BF16 = fp8_table();

// `count` codes, a multiple of 32, in the order they lie in.
inline void expand_fp8(const uint8_t* from, int64_t count, uint16_t* to) {
#ifdef __AVX512BW__
  __m512i subnormal = _mm512_loadu_si512(FP8_AS_BF16.data());  // codes 0 … 31, of which 0 … 7 are looked up
  for (int64_t i = 0; i < count; i += 32) {
    __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + i)));
    __m512i size = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
    __mmask32 small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
    __mmask32 nan = _mm512_cmpeq_epu16_mask(size, _mm512_set1_epi16(0x7f));
    bits = _mm512_mask_permutexvar_epi16(bits, small, size, subnormal);
    bits = _mm512_mask_mov_epi16(bits, nan, _mm512_set1_epi16(0x7fc0));
    __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(x, size), 8);
    _mm512_storeu_si512(to + i, _mm512_or_si512(bits, sign));
  }
#else
  for (int64_t i = 0; i < count; i++) to[i] = FP8_AS_BF16[from[i]];
#endif
}

inline void expand_int8(const uint8_t* from, int64_t count, uint16_t* to) {
#ifdef __AVX512F__
  for (int64_t i = 0; i < count; i += 16) {
    __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + i)));
    __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(q)), 16);
    _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtepi32_epi16(bits));
  }
#else
  for (int64_t i = 0; i < count; i++) {
    float value = (float)(int8_t)from[i];
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    to[i] = (uint16_t)(bits >> 16);
  }
#endif
}

}  // namespace wherry::WHERRY_TARGET
