// Tiles: the eight registers of AMX, each up to 16 rows of 64 bytes, and the two products that the kernels need.
//
// A product C += A · B takes rows of 32-bit words: A [m][k] words, B [k][n] words, C [m][n]; a word of A and B is four
// bytes or two bfloat16, and their products are summed. So B's rows are just a panel's (linear.h): a word of each output.
//
// The instructions are written out. GCC 12's intrinsics do not tell the compiler that a load reads memory, which lets it
// drop or move the stores that filled it, and they take no template parameter as a tile's number.
//
// With WHERRY_EMULATE_AMX the same functions compute in plain C++ what Intel's Software Developer's Manual (volume 2,
// TDPBSUD and TDPBF16PS) says of the instructions, and end the process where the processor would have raised a fault. It
// is how the kernels are tested on machines without AMX, and what AddressSanitizer can see into.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef WHERRY_EMULATE_AMX
#include <cmath>
#include <cstdio>
#include <cstdlib>
#endif

namespace wherry::WHERRY_TARGET {

constexpr int NUM_TILES = 8;
constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 64;  // of a row

// What LDTILECFG reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

#ifndef WHERRY_EMULATE_AMX

// Zeroes all tiles as well.
inline void tiles_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void tiles_release() { asm volatile("tilerelease"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// `stride`: bytes from a row to the next.
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// C += A · B: signed bytes of A by unsigned ones of B, summed exactly in 32 bits.
template <int C, int A, int B>
inline void tile_dot_s8u8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// C += A · B in float32, of bfloat16: rounded as said at the emulation below.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct Tile {
  int rows, bytes;
  alignas(64) uint8_t data[TILE_ROWS][TILE_BYTES];
};

struct TileRegisters {
  bool configured;
  Tile tile[NUM_TILES];
};
inline thread_local TileRegisters registers{};

inline void fault_unless(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX emulation: the processor would fault here: %s\n", what);
  std::abort();
}

inline Tile& configured_tile(int number) {
  Tile& tile = registers.tile[number];
  fault_unless(registers.configured && tile.rows && tile.bytes, "a tile that is not configured");
  return tile;
}

inline void tiles_configure(const TileShapes& shapes) {
  bool reserved = false;
  for (uint8_t byte : shapes.reserved) reserved |= byte != 0;
  fault_unless(shapes.palette == 1 && !reserved, "no such palette");
  registers.configured = true;
  for (int i = 0; i < 16; i++) {
    int rows = shapes.rows[i], bytes = shapes.row_bytes[i];
    bool fits = i < NUM_TILES ? rows <= TILE_ROWS && bytes <= TILE_BYTES && !rows == !bytes : !rows && !bytes;
    fault_unless(fits, "no such shape of a tile");
    if (i >= NUM_TILES) continue;
    registers.tile[i].rows = rows;
    registers.tile[i].bytes = bytes;
    std::memset(registers.tile[i].data, 0, sizeof(registers.tile[i].data));
  }
}

inline void tiles_release() { registers = TileRegisters{}; }

template <int T>
inline void tile_zero() {
  Tile& tile = configured_tile(T);
  std::memset(tile.data, 0, sizeof(tile.data));
}

template <int T>
inline void tile_load(const void* from, int64_t stride) {
  Tile& tile = configured_tile(T);
  std::memset(tile.data, 0, sizeof(tile.data));
  for (int r = 0; r < tile.rows; r++) std::memcpy(tile.data[r], (const uint8_t*)from + r * stride, tile.bytes);
}

template <int T>
inline void tile_store(void* to, int64_t stride) {
  Tile& tile = configured_tile(T);
  for (int r = 0; r < tile.rows; r++) std::memcpy((uint8_t*)to + r * stride, tile.data[r], tile.bytes);
}

// The three tiles of a product, whose shapes must fit.
template <int C, int A, int B>
struct Product {
  static_assert(C != A && A != B && B != C, "the processor faults");
  Tile &c = configured_tile(C), &a = configured_tile(A), &b = configured_tile(B);

  Product() {
    fault_unless(c.bytes % 4 == 0 && a.bytes % 4 == 0 && b.bytes % 4 == 0, "rows of whole words");
    fault_unless(c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows, "tiles that do not fit");
  }
};

template <int C, int A, int B>
inline void tile_dot_s8u8() {
  Product<C, A, B> tile;
  for (int m = 0; m < tile.c.rows; m++) {
    uint32_t sums[TILE_BYTES / 4];  // unsigned: wraps around, as the processor does
    std::memcpy(sums, tile.c.data[m], TILE_BYTES);
    for (int k = 0; k < tile.a.bytes / 4; k++)
      for (int n = 0; n < tile.c.bytes / 4; n++)
        for (int i = 0; i < 4; i++)
          sums[n] += (uint32_t)((int8_t)tile.a.data[m][4 * k + i] * tile.b.data[k][4 * n + i]);
    std::memcpy(tile.c.data[m], sums, TILE_BYTES);
  }
}

// Subnormal numbers are taken for zero, going in and coming out.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float bf16_at(const uint8_t* from) {
  uint32_t bits = (uint32_t)(from[0] | from[1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flushed(value);
}

// Even and odd elements of A's row each in a chain of fused multiply-adds of its own, in ascending order and from zero;
// then the two are added, and that to C. Every step is rounded to nearest, ties to even.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  Product<C, A, B> tile;
  int words = tile.a.bytes / 4, columns = tile.c.bytes / 4;
  float w[2][TILE_ROWS][TILE_BYTES / 4];  // even, odd
  for (int k = 0; k < words; k++)
    for (int n = 0; n < columns; n++)
      for (int odd = 0; odd < 2; odd++) w[odd][k][n] = bf16_at(&tile.b.data[k][4 * n + 2 * odd]);
  for (int m = 0; m < tile.c.rows; m++) {
    float chains[2][TILE_BYTES / 4] = {}, sums[TILE_BYTES / 4];
    std::memcpy(sums, tile.c.data[m], TILE_BYTES);
    for (int k = 0; k < words; k++)
      for (int odd = 0; odd < 2; odd++) {
        float x = bf16_at(&tile.a.data[m][4 * k + 2 * odd]);
        for (int n = 0; n < columns; n++) chains[odd][n] = flushed(std::fma(x, w[odd][k][n], chains[odd][n]));
      }
    for (int n = 0; n < columns; n++) sums[n] = flushed(flushed(sums[n]) + flushed(chains[0][n] + chains[1][n]));
    std::memcpy(tile.c.data[m], sums, TILE_BYTES);
  }
}

#endif

}  // namespace wherry::WHERRY_TARGET
