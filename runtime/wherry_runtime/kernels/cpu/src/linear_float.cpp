// Matrix products with float32 and bfloat16 weights; operands in linear.h. x is of the weights' type.
#include "kernels.h"
#include "linear.h"

namespace wherry::WHERRY_TARGET {

// With the sums, a tile's weights and a word of x, 29 of 32 registers or 15 of 16.
constexpr int MOST_ROWS = 6;

// sums [ROWS][64] += x [ROWS][words] · weights [words][64], for COLUMNS vectors of the panel.
template <class Type, int ROWS>
static void tile(const int32_t* x, int64_t stride, const int32_t* weights, int64_t words, float* sums,
                 Ahead ahead) {
  fvec total[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) total[r][v] = load<fvec>(sums + r * PANEL + v * WIDTH);
  for (int64_t k = 0; k < words; k++) {
    ivec w[COLUMNS];
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) w[v] = load<ivec>(weights + k * PANEL + v * WIDTH);
    ahead.fetch();
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      int32_t word = x[r * stride + k];
#pragma GCC unroll 4
      for (int v = 0; v < COLUMNS; v++) total[r][v] = Type::dot(total[r][v], w[v], word);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) store(sums + r * PANEL + v * WIDTH, total[r][v]);
}

template <class Type>
static void linear(const Call& call, Context& context) {
  constexpr int HALVES = VECTORS / COLUMNS;
  Linear op(call, context.step);
  auto* x = (const int32_t*)call.pointers[0];
  auto* weights = (const int32_t*)call.pointers[1];
  int64_t words = op.depth / Type::PER_WORD, stride = op.x_stride / Type::PER_WORD;
  const Rows spread(call);
  alignas(64) int32_t scratch[BLOCK * PANEL];
  op.for_each_item(context, [&](int64_t panel, int64_t first, int64_t rows, float* sums) {
    for (int64_t k = 0; k < words; k += BLOCK) {
      int64_t count = std::min<int64_t>(BLOCK, words - k);
      const int32_t* block =
          spread ? spread.block(panel, k, count, scratch) : weights + (panel * words + k) * PANEL;
      for_each_tile<MOST_ROWS>(rows, [&]<int ROWS>(int64_t row, int64_t index, int64_t tiles) {
        for (int h = 0; h < HALVES; h++) {
          int column = h * COLUMNS * WIDTH;
          tile<Type, ROWS>(x + (first + row) * stride + k, stride, block + column, count, sums + row * PANEL + column,
                           Ahead(block, count * PANEL * sizeof(int32_t), index * HALVES + h, tiles * HALVES, count));
        }
      });
    }
  });
}

void linear_f32(const Call& call, Context& context) { linear<OneFloat>(call, context); }
void linear_bf16(const Call& call, Context& context) { linear<TwoBFloat16>(call, context); }

}  // namespace wherry::WHERRY_TARGET
