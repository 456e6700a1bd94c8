// What happens to activations one element at a time.
//
// embed: rows of the table; zeros for ids that it does not have.
//   pointers  0 table [V, H] row-major, 1 out [T, out_stride], 7 rows, or null: see linear.h
//   numbers   0 H, 1 out_stride, 2 type of the table: 0 float32, 1 bfloat16, 3 V, 4 the first row's id, 5 Kp: the table
//             is that of a matrix product, in panels; 0: it is not
// add_positions: adds rows of a table, those of the rows' positions.
//   pointers  0 table [positions, H] row-major, 1 x [T, x_stride]
//   numbers   0 H, 1 x_stride, 2 type of the table: 0 float32, 1 bfloat16
// activation: act(x), or act(gate) · up.
//   pointers  0 x [T, x_stride], where it is gated gate in columns 0 … I - 1, up in I … 2I - 1; 1 out [T, out_stride]
//   numbers   0 I, 1 x_stride, 2 out_stride, 3 Function, 4 whether it is gated
// add_scaled: x += f · y.
//   pointers  0 x [T, x_stride], 1 y [T, y_stride]
//   numbers   0 width, 1 x_stride, 2 y_stride
//   scalars   0 f
// scale: x becomes f · x, and then, where c is not 0, c · tanh(x / c).
//   pointers  0 x [.., x_stride]
//   numbers   0 width, 1 x_stride, 2 rows: 0: T, 1: S
//   scalars   0 f, 1 c
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "linear.h"
#include "simd.h"

namespace wherry::WHERRY_TARGET {

constexpr int64_t PIECE = 512;  // columns per work item, so that a single row is shared out too

// Calls work(row, first column, end column) for all rows and pieces of `width` columns.
template <class Work>
static void for_each_piece(Context& context, int64_t rows, int64_t width, Work work) {
  int64_t pieces = (width + PIECE - 1) / PIECE;
  for (int64_t item, items = rows * pieces; (item = context.take(items)) < items;) {
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
  for_each_piece(context, context.step.rows, width, [&](int64_t row, int64_t begin, int64_t end) {
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

// Calls work(column, lanes in use) for columns begin … end - 1, sixteen at a time; all sixteen are known to the compiler.
template <class Work>
static void for_each_vector(int64_t begin, int64_t end, Work work) {
  int64_t k = begin;
  for (; k + LANES <= end; k += LANES) work(k, std::integral_constant<int, LANES>());
  if (k < end) work(k, (int)(end - k));
}

static void store_first(float* to, f32x16 value, int count) { std::memcpy(to, &value, sizeof(float) * count); }

void add_positions(const Call& call, Context& context) {
  int64_t width = call.numbers[0], size = call.numbers[2] == 0 ? 4 : 2;
  for_each_piece(context, context.step.rows, width, [&](int64_t row, int64_t begin, int64_t end) {
    auto* from = (const uint8_t*)call.pointers[0] + context.step.positions[row] * width * size;
    float* x = (float*)call.pointers[1] + row * call.numbers[1];
    for_each_vector(begin, end, [&](int64_t k, auto count) {
      f32x16 added;
      if (size == 4) {
        added = load_first((const float*)from + k, count);
      } else {
        u16x16 halves{};
        std::memcpy(&halves, from + 2 * k, 2 * count);
        added = bf16_to_float(halves);
      }
      store_first(x + k, load_first(x + k, count) + added, count);
    });
  });
}

enum class Function { SILU, GELU, GELU_TANH, RELU, RELU2 };  // recorder.py has the same

// 1 - erf(x) for x ≥ 0, of its own size to about 1e-6: a Chebyshev fit (Press et al., Numerical Recipes, 6.2.2).
static f32x16 erfc(f32x16 x) {
  f32x16 t = 1.0f / (1.0f + x * 0.5f);
  f32x16 p = splat(0.17087277f);
  for (float next : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                     1.00002368f, -1.26551223f})
    p = p * t + next;
  return t * exp(p - x * x);
}

// NaN stays NaN.
template <Function F>
static f32x16 apply(f32x16 x) {
  if constexpr (F == Function::SILU) return x / (1.0f + exp(-x));
  if constexpr (F == Function::GELU) {  // x Φ(x)
    f32x16 tail = erfc(abs(x) * 0.70710678f) * 0.5f;
    return x * (x < 0.0f ? tail : 1.0f - tail);
  }
  // ½ x (1 + tanh u) = x / (1 + e^-2u)
  if constexpr (F == Function::GELU_TANH) return x / (1.0f + exp(x * (x * x * 0.044715f + 1.0f) * -1.59576912f));
  f32x16 positive = x < 0.0f ? splat(0.0f) : x;
  return F == Function::RELU2 ? positive * positive : positive;
}

template <Function F>
static void activate(const Call& call, Context& context) {
  int64_t width = call.numbers[0];
  bool gated = call.numbers[4];
  for_each_piece(context, context.step.rows, width, [&](int64_t row, int64_t begin, int64_t end) {
    auto* x = (const float*)call.pointers[0] + row * call.numbers[1];
    float* out = (float*)call.pointers[1] + row * call.numbers[2];
    for_each_vector(begin, end, [&](int64_t k, auto count) {
      f32x16 y = apply<F>(load_first(x + k, count));
      store_first(out + k, gated ? y * load_first(x + width + k, count) : y, count);
    });
  });
}

void activation(const Call& call, Context& context) {
  switch ((Function)call.numbers[3]) {
    case Function::SILU: return activate<Function::SILU>(call, context);
    case Function::GELU: return activate<Function::GELU>(call, context);
    case Function::GELU_TANH: return activate<Function::GELU_TANH>(call, context);
    case Function::RELU: return activate<Function::RELU>(call, context);
    case Function::RELU2: return activate<Function::RELU2>(call, context);
  }
}

void add_scaled(const Call& call, Context& context) {
  float factor = (float)call.scalars[0];
  for_each_piece(context, context.step.rows, call.numbers[0], [&](int64_t row, int64_t begin, int64_t end) {
    float* x = (float*)call.pointers[0] + row * call.numbers[1];
    auto* y = (const float*)call.pointers[1] + row * call.numbers[2];
    for_each_vector(begin, end, [&](int64_t k, auto count) {
      store_first(x + k, load_first(x + k, count) + load_first(y + k, count) * factor, count);
    });
  });
}

static f32x16 tanh(f32x16 x) {
  f32x16 small = exp(abs(x) * -2.0f), size = (1.0f - small) / (1.0f + small);
  return x < 0.0f ? -size : size;
}

void scale(const Call& call, Context& context) {
  float factor = (float)call.scalars[0], cap = (float)call.scalars[1];
  int64_t rows = call.numbers[2] ? context.step.sampled : context.step.rows;
  for_each_piece(context, rows, call.numbers[0], [&](int64_t row, int64_t begin, int64_t end) {
    float* x = (float*)call.pointers[0] + row * call.numbers[1];
    for_each_vector(begin, end, [&](int64_t k, auto count) {
      f32x16 y = load_first(x + k, count) * factor;
      store_first(x + k, cap != 0 ? tanh(y / cap) * cap : y, count);
    });
  });
}

}  // namespace wherry::WHERRY_TARGET
