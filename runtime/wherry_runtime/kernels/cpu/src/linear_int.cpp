// Matrix products with int8 and int4 weights and int8 activations, a scale for each group along K; operands in linear.h.
//
//   pointers  0 x int8 [rows][stride]; 4 weight scales float16 [panels][Kp / group][64]; 5 x scales float32 and
//             6 x sums int32, both [rows][Kp / group]
// A weight is stored unsigned, as q + zero (128 or 8). The dot product instruction wants one unsigned operand, and
// Σ q x = Σ (q + zero) x − zero Σ x, where Σ x comes with x. All of it is exact in 32 bits.
#include "kernels.h"
#include "linear.h"

namespace wherry::WHERRY_TARGET {

constexpr int MOST_ROWS = 3;  // integer and float sums, weights and a word of x: 29 of 32 registers, or 15 of 16
constexpr int PER_WORD = 4;

// The vectors of a panel that pass h of a tile takes: one half of them from the lower outputs, the other from the upper.
constexpr int vector_at(int h, int column) {
  constexpr int PAIRS = COLUMNS / 2;
  return column < PAIRS ? h * PAIRS + column : VECTORS / 2 + h * PAIRS + column - PAIRS;
}

// A word of int8 weights: [64][4] bytes.
struct Int8 {
  static constexpr int BYTES = 256;  // a step of one word, 64 outputs
  static constexpr int zero(int) { return 128; }

  static void words(const uint8_t* weights, int h, ivec (&w)[COLUMNS]) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) w[c] = load<ivec>(weights + vector_at(h, c) * 4 * WIDTH);
  }

  static void finish(ivec (&)[COLUMNS]) {}
};

// Two nibbles a byte, [32][4] bytes: outputs 0 … 31 in the low ones, 32 … 63 in the high ones. A product with the byte as it
// is counts the low nibble once and the high one 16 times, a product with the high nibble alone that one 16 times: one
// operation for two vectors of weights, and the sums are taken apart once a group.
struct Int4 {
  static constexpr int BYTES = 128;
  static constexpr int zero(int column) { return column < COLUMNS / 2 ? 8 + 16 * 8 : 16 * 8; }

  static void words(const uint8_t* weights, int h, ivec (&w)[COLUMNS]) {
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS / 2; c++) {
      w[c] = load<ivec>(weights + vector_at(h, c) * 4 * WIDTH);
      w[c + COLUMNS / 2] = w[c] & (int32_t)0xf0f0f0f0;
    }
  }

  static void finish(ivec (&dot)[COLUMNS]) {
#pragma GCC unroll 2
    for (int c = 0; c < COLUMNS / 2; c++) {
      dot[c] -= dot[c + COLUMNS / 2];
      dot[c + COLUMNS / 2] >>= 4;
    }
  }
};

struct Operands {
  const int8_t* x;
  int64_t x_stride, group, groups;  // groups: along the whole of K
  const float* x_scales;
  const int32_t* x_sums;
};

// sums [ROWS][64] += the products of `count` groups from `group` on, for the vectors of pass h.
template <class Type, int ROWS>
static void tile(const Operands& in, int64_t row, int64_t group, int64_t count, const uint8_t* weights,
                 const uint16_t* scales, int h, float* sums, Ahead ahead) {
  fvec total[ROWS][COLUMNS];
  const int32_t* x[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    x[r] = (const int32_t*)(in.x + (row + r) * in.x_stride + group * in.group);
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) total[r][v] = load<fvec>(sums + r * PANEL + vector_at(h, v) * WIDTH);
  }
  int64_t words = in.group / PER_WORD;
  for (int64_t g = 0; g < count; g++) {
    ivec dot[ROWS][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      int32_t sum = in.x_sums[(row + r) * in.groups + group + g];
#pragma GCC unroll 4
      for (int v = 0; v < COLUMNS; v++) dot[r][v] = ivec{} - Type::zero(v) * sum;
    }
    for (int64_t k = g * words; k < (g + 1) * words; k++) {
      ivec w[COLUMNS];
      Type::words(weights + k * Type::BYTES, h, w);
      ahead.fetch();
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        ivec word = ivec{} + x[r][k];
#pragma GCC unroll 4
        for (int v = 0; v < COLUMNS; v++) dot[r][v] = dot_u8s8(dot[r][v], w[v], word);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) Type::finish(dot[r]);
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) {
      fvec scale = half_to_float(scales + g * PANEL + vector_at(h, v) * WIDTH);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        fvec both = scale * in.x_scales[(row + r) * in.groups + group + g];
        total[r][v] = total[r][v] + __builtin_convertvector(dot[r][v], fvec) * both;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) store(sums + r * PANEL + vector_at(h, v) * WIDTH, total[r][v]);
}

template <class Type>
static void block(const Operands& in, int64_t first, int64_t rows, int64_t group, int64_t count, const uint8_t* weights,
                  const uint16_t* scales, float* sums) {
  constexpr int HALVES = VECTORS / COLUMNS;
  int64_t steps = count * in.group / PER_WORD, bytes = steps * Type::BYTES;
  for_each_tile<MOST_ROWS>(rows, [&]<int ROWS>(int64_t row, int64_t index, int64_t tiles) {
    for (int h = 0; h < HALVES; h++)
      tile<Type, ROWS>(in, first + row, group, count, weights, scales, h, sums + row * PANEL,
                       Ahead(weights, bytes, index * HALVES + h, tiles * HALVES, steps));
  });
}

template <class Type>
static void linear(const Call& call, Context& context) {
  Linear op(call, context.step);
  int64_t group = call.numbers[4], groups = op.depth / group;
  Operands in{(const int8_t*)call.pointers[0], op.x_stride,
              group,                           groups,
              (const float*)call.pointers[5],  (const int32_t*)call.pointers[6]};
  auto* weights = (const uint8_t*)call.pointers[1];
  auto* scales = (const uint16_t*)call.pointers[4];
  int64_t per_block = std::max<int64_t>(1, BLOCK * PER_WORD / group);
  op.for_each_item(context, [&](int64_t panel, int64_t first, int64_t rows, float* sums) {
    for (int64_t g = 0; g < groups; g += per_block) {
      int64_t count = std::min(per_block, groups - g), words = group / PER_WORD;
      const uint8_t* w = weights + (panel * op.depth / PER_WORD + g * words) * Type::BYTES;
      const uint16_t* s = scales + (panel * groups + g) * PANEL;
      block<Type>(in, first, rows, g, count, w, s, sums);
    }
  });
}

void linear_int8(const Call& call, Context& context) { linear<Int8>(call, context); }
void linear_int4(const Call& call, Context& context) { linear<Int4>(call, context); }

}  // namespace wherry::WHERRY_TARGET
