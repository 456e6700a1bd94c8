// Eight rows of eight words as eight columns: what turns rows of a matrix into panels (pack.cpp, linear.h).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace wherry {

// Words `rows[i] + offset` … of eight rows, with no alignment asked for; offset in bytes.
__attribute__((target("avx2"), always_inline)) inline void transpose(const uint8_t* const* rows, int64_t offset,
                                                                     __m256i* columns) {
  __m256i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256((const __m256i*)(rows[i] + offset));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    columns[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    columns[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
}

}  // namespace wherry
