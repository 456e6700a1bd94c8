// What happens to activations one element at a time.
//
// embed: rows of the table; zeros for ids that it does not have.
//   pointers  0 table [V, H] row-major, 1 out [T, out_stride], 7 rows, or null: see linear.h
//   numbers   0 H, 1 out_stride, 2 type of the table: 0 float32, 1 bfloat16, 3 V, 4 the first row's id, 5 Kp: the table
//             is that of a matrix product, in panels; 0: it is not
// silu_mul: silu(gate) · up, with silu(x) = x / (1 + e^-x).
//   pointers  0 x [T, x_stride]: gate in columns 0 … I - 1, up in I … 2I - 1; 1 out [T, out_stride]
//   numbers   0 I, 1 x_stride, 2 out_stride
#include <algorithm>

#include "kernels.h"
#include "linear.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

constexpr int64_t PIECE = 512;  // columns per work item, so that a single row is shared out too

// Calls work(row, first column, end column) for all rows and pieces of `width` columns.
template <class Work>
static void for_each_piece(Context& context, int64_t width, Work work) {
  int64_t pieces = (width + PIECE - 1) / PIECE;
  for (int64_t item, items = context.step.rows * pieces; (item = context.take(items)) < items;) {
    int64_t begin = item % pieces * PIECE;
    work(item / pieces, begin, std::min(begin + PIECE, width));
  }
}

// Columns begin … end - 1 of row `id` of panels. A cache line for each word: with one row per token that does not matter.
static void from_panel(const Call& call, int64_t id, int64_t begin, int64_t end, float* out) {
  int64_t words = call.numbers[2] ? call.numbers[5] / 2 : call.numbers[5];
  auto* panel = (const uint32_t*)call.pointers[0] + id / PANEL * words * PANEL + id % PANEL;
  for (int64_t k = begin; k < end; k++) {
    uint32_t bits = call.numbers[2] == 0 ? panel[k * PANEL]
                    : k % 2              ? panel[k / 2 * PANEL] & 0xffff0000u
                                         : panel[k / 2 * PANEL] << 16;
    std::memcpy(out + k, &bits, sizeof(bits));
  }
}

void embed(const Call& call, Context& context) {
  int64_t width = call.numbers[0], size = call.numbers[2] == 0 ? 4 : 2;
  const Rows spread(call);
  for_each_piece(context, width, [&](int64_t row, int64_t begin, int64_t end) {
    int64_t id = context.step.token_ids[row] - call.numbers[4];
    float* out = (float*)call.pointers[1] + row * call.numbers[1];
    if (id < 0 || id >= call.numbers[3]) {  // another rank has it
      std::memset(out + begin, 0, sizeof(float) * (end - begin));
      return;
    }
    if (call.numbers[5] && !spread) return from_panel(call, id, begin, end, out);
    auto* table = spread ? spread.row(id) : (const uint8_t*)call.pointers[0] + id * width * size;
    if (call.numbers[2] == 0) {
      std::memcpy(out + begin, table + 4 * begin, sizeof(float) * (end - begin));
      return;
    }
    int64_t k = begin;
    for (; k + LANES <= end; k += LANES) store(out + k, bf16_to_float(load<u16x16>(table + 2 * k)));
    for (; k < end; k++) {
      uint16_t half;
      std::memcpy(&half, table + 2 * k, sizeof(half));
      uint32_t bits = (uint32_t)half << 16;
      std::memcpy(out + k, &bits, sizeof(bits));
    }
  });
}

static f32x16 gated(f32x16 gate, f32x16 up) { return gate / (1.0f + exp(-gate)) * up; }

void silu_mul(const Call& call, Context& context) {
  int64_t width = call.numbers[0];
  for_each_piece(context, width, [&](int64_t row, int64_t begin, int64_t end) {
    auto* gate = (const float*)call.pointers[0] + row * call.numbers[1];
    auto* up = gate + width;
    float* out = (float*)call.pointers[1] + row * call.numbers[2];
    int64_t k = begin;
    for (; k + LANES <= end; k += LANES) store(out + k, gated(load<f32x16>(gate + k), load<f32x16>(up + k)));
    if (k < end) {
      f32x16 last = gated(load_first(gate + k, (int)(end - k)), load_first(up + k, (int)(end - k)));
      std::memcpy(out + k, &last, sizeof(float) * (end - k));
    }
  });
}

}  // namespace wherry::WHERRY_TARGET
