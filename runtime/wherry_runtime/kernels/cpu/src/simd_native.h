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

}  // namespace wherry::WHERRY_TARGET
