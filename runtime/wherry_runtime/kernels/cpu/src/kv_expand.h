// Caches of one byte a value, as bfloat16: every code of both types is a bfloat16 exactly.
#pragma once
#include <array>

#include "kv.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

constexpr uint16_t bf16_of(int whole, int exponent) {  // whole · 2^exponent, whole < 256
  if (!whole) return 0;
  int top = 31 - __builtin_clz(whole);
  return (uint16_t)((top + exponent + 127) << 7 | (whole << (7 - top) & 0x7f));
}

constexpr uint16_t of_fp8(int code) {  // without the sign
  int exponent = code >> 3, mantissa = code & 7;
  if (code == 0x7f) return 0x7fc0;  // NaN
  return exponent ? bf16_of(8 + mantissa, exponent - 10) : bf16_of(mantissa, -9);
}

constexpr uint16_t of_int8(int code) { return bf16_of(code, 0); }

// What codes 0 … 127 stand for; the code's highest bit is the sign.
struct Codes {
  template <class Of>
  constexpr explicit Codes(Of of) {
    for (int i = 0; i < 128; i++) {
      words[i] = of(i);
      low[i] = (uint8_t)words[i];
      high[i] = (uint8_t)(words[i] >> 8);
    }
  }

  alignas(64) uint16_t words[128] = {};
  alignas(64) uint8_t low[128] = {}, high[128] = {};
};

alignas(64) constexpr Codes FP8_CODES(of_fp8);
alignas(64) constexpr Codes INT8_CODES(of_int8);

#ifdef __AVX512BW__

// 32 codes, by their lower six bits in each half of the table.
inline void expand_32(const uint8_t* from, uint16_t* to, const Codes& codes) {
  __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
  const uint16_t* words = codes.words;
  __m512i low = _mm512_permutex2var_epi16(_mm512_load_si512(words), x, _mm512_load_si512(words + 32));
  __m512i high = _mm512_permutex2var_epi16(_mm512_load_si512(words + 64), x, _mm512_load_si512(words + 96));
  __m512i size = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(x, _mm512_set1_epi16(0x40)), high);
  __m512i sign = _mm512_and_si512(_mm512_slli_epi16(x, 8), _mm512_set1_epi16((int16_t)0x8000));
  _mm512_storeu_si512(to, _mm512_or_si512(size, sign));
}

// 64 at a time by bytes, where the processor can (VBMI). `ahead`: what will be wanted next, brought nearer.
__attribute__((target("avx512vbmi"))) static void expand_by_bytes(const uint8_t* from, const uint8_t* ahead, int64_t count,
                                                                  uint16_t* to, const Codes& codes) {
  // Interleaving works within quarters: the codes of each quarter's first and second half come together.
  alignas(64) static constexpr uint64_t ORDER[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  __m512i order = _mm512_load_si512(ORDER), sign = _mm512_set1_epi8((char)0x80);
  __m512i low[2] = {_mm512_load_si512(codes.low), _mm512_load_si512(codes.low + 64)};
  __m512i high[2] = {_mm512_load_si512(codes.high), _mm512_load_si512(codes.high + 64)};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    prefetch(ahead + i);
    __m512i x = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + i));
    __m512i lows = _mm512_permutex2var_epi8(low[0], x, low[1]);
    __m512i highs = _mm512_permutex2var_epi8(high[0], x, high[1]);
    highs = _mm512_ternarylogic_epi64(highs, x, sign, 0xf8);  // highs | (x & sign)
    _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(lows, highs));
    _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(lows, highs));
  }
  if (i < count) expand_32(from + i, to + i, codes);
}

#endif

// `count` codes, a multiple of 32.
inline void expand(const uint8_t* from, const uint8_t* ahead, int64_t count, uint16_t* to, const Codes& codes) {
#ifdef __AVX512BW__
  static const bool by_bytes = __builtin_cpu_supports("avx512vbmi");
  if (by_bytes) return expand_by_bytes(from, ahead, count, to, codes);
  for (int64_t i = 0; i < count; i += 32) {
    prefetch(ahead + i);
    expand_32(from + i, to + i, codes);
  }
#else
  (void)ahead;
  for (int64_t i = 0; i < count; i++) to[i] = (uint16_t)(codes.words[from[i] & 0x7f] | (from[i] & 0x80) << 8);
#endif
}

}  // namespace wherry::WHERRY_TARGET
