// Matrix products with int8 and int4 weights on AMX; operands and arithmetic are those of linear_int.cpp, bit for bit.
//
// The sums of a group are exact, and what is done with them is done in the same order: so few rows, which wait for
// memory and not for arithmetic, go to the kernels on vectors, and no row can tell.
#include "kernels.h"
#include "linear_amx.h"

namespace wherry::avx512bf16 {
void linear_int8(const Call& call, Context& context);
void linear_int4(const Call& call, Context& context);
}  // namespace wherry::avx512bf16

namespace wherry::WHERRY_TARGET {

constexpr int64_t LEAST_ROWS = 5;
constexpr int INT8_ZERO = 128, INT4_ZERO = 8;
constexpr int INT4_BYTES = PANEL_BYTES / 2;

struct Operands {
  const int8_t* x;
  int64_t x_stride, group, groups;  // groups: along the whole of K
  const float* x_scales;
  const int32_t* x_sums;
  int zero, step;  // of the weights' bytes; bytes of a row that a tile takes, so that a group is whole tiles
};

// sums [rows][64] += a group's dots [rows][64] by the scales of both, for rows `begin` … `end` - 1 of a chunk that starts
// at `first`.
static void add_scaled(const Operands& in, int64_t first, int64_t begin, int64_t end, int64_t group, const int32_t* dots,
                       const uint16_t* scales, float* sums) {
  fvec scale[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) scale[v] = half_to_float(scales + v * WIDTH);
  for (int64_t r = begin; r < end; r++) {
    int64_t at = (first + r) * in.groups + group;
    ivec start = ivec{} - in.zero * in.x_sums[at];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      ivec dot = start + load<ivec>(dots + (r - begin) * PANEL + v * WIDTH);
      fvec both = scale[v] * in.x_scales[at];
      float* sum = sums + r * PANEL + v * WIDTH;
      store(sum, load<fvec>(sum) + __builtin_convertvector(dot, fvec) * both);
    }
  }
}

// A byte for each nibble.
static void unpack(const uint8_t* weights, int64_t words, uint8_t* to) {
  for (int64_t k = 0; k < words; k++)
    for (int half = 0; half < 2; half++) {
      prefetch(weights + k * INT4_BYTES + half * 64 + ALONE_AHEAD);
      u8x64 pair = load<u8x64>(weights + k * INT4_BYTES + half * 64);
      store(to + k * PANEL_BYTES + half * 64, pair & 15);
      store(to + k * PANEL_BYTES + (half + 2) * 64, pair >> 4);
    }
}

// sums [rows][64] += the products of `count` groups from `group` on.
static void block(const Operands& in, int64_t first, int64_t rows, int64_t group, int64_t count, const uint8_t* weights,
                  const uint16_t* scales, bool ahead, float* sums) {
  alignas(64) int32_t dots[TILE_ROWS * PANEL];
  int64_t height = std::min<int64_t>(rows, TILE_ROWS);
  for_each_row_tile(rows, [&](int64_t start, int64_t done) {
    const int8_t* x = in.x + (first + start) * in.x_stride + group * in.group;
    for (int64_t g = 0; g < count; g++) {
      for_each_vector([]<int V>() { tile_zero<V>(); });
      multiply(x + g * in.group, in.x_stride, weights + g * in.group / 4 * PANEL_BYTES, in.group, in.step, ahead && !start,
               []<int C, int A, int B>() { tile_dot_s8u8<C, A, B>(); });
      for_each_vector([&]<int V>() { tile_store<V>(dots + V * WIDTH, PANEL * 4); });
      add_scaled(in, first, start + done, start + height, group + g, dots + done * PANEL, scales + g * PANEL, sums);
    }
  });
}

template <int BYTES>  // a word of each output
static void linear(const Call& call, Context& context) {
  constexpr bool PACKED = BYTES == INT4_BYTES;
  Linear op(call, context.step);
  int64_t group = call.numbers[4], groups = op.depth / group;
  Operands in{(const int8_t*)call.pointers[0],  op.x_stride,
              group,                            groups,
              (const float*)call.pointers[5],   (const int32_t*)call.pointers[6],
              PACKED ? INT4_ZERO : INT8_ZERO,   group % TILE_BYTES ? TILE_BYTES / 2 : TILE_BYTES};
  auto* weights = (const uint8_t*)call.pointers[1];
  auto* scales = (const uint16_t*)call.pointers[4];
  int64_t words = group / 4, per_block = std::max<int64_t>(1, BLOCK / words);
  alignas(64) uint8_t unpacked[PACKED ? BLOCK * PANEL_BYTES : 1];
  TilesInUse tiles(in.step);
  op.for_each_item(context, [&](int64_t panel, int64_t first, int64_t rows, float* sums) {
    tiles.set_rows((int)std::min<int64_t>(rows, TILE_ROWS));
    for (int64_t g = 0; g < groups; g += per_block) {
      int64_t count = std::min(per_block, groups - g);
      const uint8_t* w = weights + (panel * op.depth / 4 + g * words) * BYTES;
      if constexpr (PACKED) {
        unpack(w, count * words, unpacked);
        w = unpacked;
      }
      block(in, first, rows, g, count, w, scales + (panel * groups + g) * PANEL, !PACKED, sums);
    }
  });
}

static bool few(const Call& call, const Context& context) {
  return (call.numbers[6] ? context.step.sampled : context.step.rows) < LEAST_ROWS;
}

void linear_int8(const Call& call, Context& context) {
  few(call, context) ? avx512bf16::linear_int8(call, context) : linear<PANEL_BYTES>(call, context);
}

void linear_int4(const Call& call, Context& context) {
  few(call, context) ? avx512bf16::linear_int4(call, context) : linear<INT4_BYTES>(call, context);
}

}  // namespace wherry::WHERRY_TARGET
