// Matrix products with bfloat16 weights on AMX; operands in linear.h.
//
// TDPBF16PS adds in another order than VDPBF16PS. So that a row never depends on its batch, this kernel takes all numbers
// of rows, one included: that one waits for memory either way.
#include "kernels.h"
#include "linear_amx.h"

namespace wherry::WHERRY_TARGET {

constexpr int PAIR = 4;  // bytes of a word: two bfloat16

// sums [rows][64] += x · weights over `words` words. The sum of an output runs through the tiles of K in ascending order,
// whatever the blocks: between them it lies in `sums`, in float32 as in the tile.
static void block(const uint8_t* x, int64_t x_stride, int64_t rows, const uint8_t* weights, int64_t words, float* sums) {
  alignas(64) float scratch[TILE_ROWS * PANEL];
  for_each_row_tile(rows, [&](int64_t start, int64_t done) {
    float* from = sums + start * PANEL;
    float* to = done ? scratch : from;
    for_each_vector([&]<int V>() { tile_load<V>(from + V * WIDTH, PANEL * 4); });
    multiply(x + start * x_stride, x_stride, weights, words * PAIR, TILE_BYTES, !start,
             []<int C, int A, int B>() { tile_dot_bf16<C, A, B>(); });
    for_each_vector([&]<int V>() { tile_store<V>(to + V * WIDTH, PANEL * 4); });
    if (!done) return;
    for (int64_t r = done; r < TILE_ROWS; r++) std::memcpy(from + r * PANEL, scratch + r * PANEL, PANEL * 4);
  });
}

void linear_bf16(const Call& call, Context& context) {
  Linear op(call, context.step);
  auto* x = (const uint8_t*)call.pointers[0];
  auto* weights = (const uint8_t*)call.pointers[1];
  int64_t words = op.depth / 2, stride = op.x_stride * 2;
  const Rows spread(call);
  alignas(64) int32_t scratch[BLOCK * PANEL];
  TilesInUse tiles(TILE_BYTES);
  op.for_each_item(context, [&](int64_t panel, int64_t first, int64_t rows, float* sums) {
    tiles.set_rows((int)std::min<int64_t>(rows, TILE_ROWS));
    for (int64_t k = 0; k < words; k += BLOCK) {
      int64_t count = std::min<int64_t>(BLOCK, words - k);
      auto* from = spread ? (const uint8_t*)spread.block(panel, k, count, scratch)
                          : weights + (panel * words + k) * PANEL_BYTES;
      block(x + first * stride + k * PAIR, stride, rows, from, count, sums);
    }
  });
}

}  // namespace wherry::WHERRY_TARGET
