// Vectors as wide as the target's registers, for loops that must keep their sums in registers: where there is no
// AVX-512, the compiler holds the sixteen lanes of simd.h in memory.
#pragma once
#include "simd.h"

namespace wherry::WHERRY_TARGET {

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif
typedef float fvec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));

// A word is 32 bits of the summed dimension: one float32 …
struct OneFloat {
  static constexpr int PER_WORD = 1;
  static fvec dot(fvec sum, ivec a, int32_t word) { return sum + (fvec)a * (fvec)(ivec{} + word); }
};

// … or two bfloat16, the lower index in the lower half.
struct TwoBFloat16 {
  static constexpr int PER_WORD = 2;
  static fvec dot(fvec sum, ivec a, int32_t word) {
    ivec b = ivec{} + word;
#ifdef __AVX512BF16__
    return (fvec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum = sum + (fvec)(a << 16) * (fvec)(b << 16);
    return sum + (fvec)(a & (int32_t)0xffff0000) * (fvec)(b & (int32_t)0xffff0000);
#endif
  }
};

inline fvec half_to_float(const uint16_t* from) {
#ifdef __AVX512F__
  return (fvec)_mm512_cvtph_ps(load<__m256i>(from));
#else
  return (fvec)_mm256_cvtph_ps(load<__m128i>(from));
#endif
}

// acc + Σ of four products of unsigned `w` with signed `a`, per lane, exact.
inline ivec dot_u8s8(ivec acc, ivec w, ivec a) {
#ifdef __AVX512VNNI__
  return (ivec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
#else
  // Through 16 bits: the 8-bit multiply-add saturates.
  __m256i even = _mm256_madd_epi16((__m256i)(w & 0x00ff00ff), _mm256_srai_epi16(_mm256_slli_epi16((__m256i)a, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), _mm256_srai_epi16((__m256i)a, 8));
  return acc + (ivec)even + (ivec)odd;
#endif
}

}  // namespace wherry::WHERRY_TARGET
