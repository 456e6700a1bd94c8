// Matrix products with weights of 4, 5 or 6 bits whose scales have two levels, as GGUF's K-quants, and int8 activations, a
// scale for each group along K; operands in linear.h. How the weights lie: wherry_runtime/quantization/super_blocks.py.
//
//   pointers  0 x int8 [rows][stride]; 4 weight scales [panels][super-blocks]: d float16 [64], d_min float16 [64], and for
//             each group s int8 [64], m int8 [64], d_min and m only if there are minima; 5 x scales float32 and 6 x sums
//             int32, both [rows][Kp / group]
//   numbers   7 weights of a super-block; 8 zero; 9 minima: 1 if there are some
// A weight is (d s) (q − zero) − (d_min m), q as it is stored. Group by group, y += (d s x_scale) (Σ q x − zero Σ x) and
// y −= (d_min m) (x_scale Σ x): the sums are exact in 32 bits.
#include "kernels.h"
#include "linear.h"

namespace wherry::WHERRY_TARGET {

constexpr int MOST_ROWS = 3;
constexpr int PER_WORD = 4;
constexpr int PAIRS = COLUMNS / 2;
constexpr int LOW_BYTES = 2 * PANEL;       // the low four bits of a word of each output
constexpr int QUARTER = PANEL / 4;         // outputs
constexpr int HIGH_BYTES = PER_WORD * QUARTER;

// The vectors of a panel that pass h of a tile takes: one half of them from the lower outputs, the other from the upper.
constexpr int vector_at(int h, int column) {
  return column < PAIRS ? h * PAIRS + column : VECTORS / 2 + h * PAIRS + column - PAIRS;
}

inline fvec signed_bytes(const int8_t* from) {
#ifdef __AVX512F__
  return (fvec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#else
  return (fvec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#endif
}

// Two words of the weights of some vectors, a byte each.
template <int BITS>
struct Codes {
  static constexpr int MORE = BITS - 4;
  static constexpr int BYTES = 2 * LOW_BYTES + MORE * HIGH_BYTES;  // of two words

  // Word `i` of the two at `pair`.
  static void words(const uint8_t* pair, int i, int h, ivec (&w)[COLUMNS]) {
    const uint8_t* low = pair + i * (LOW_BYTES + (MORE == 2 ? HIGH_BYTES : 0));
#pragma GCC unroll 2
    for (int c = 0; c < PAIRS; c++) {
      ivec both = load<ivec>(low + vector_at(h, c) * 4 * WIDTH);
      w[c] = both & 0x0f0f0f0f;
      w[c + PAIRS] = (both >> 4) & 0x0f0f0f0f;
    }
    if constexpr (MORE > 0) {
      const uint8_t* high = MORE == 2 ? low + LOW_BYTES : pair + 2 * LOW_BYTES;
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) {
        int output = vector_at(h, c) * WIDTH, shift = output / QUARTER * MORE + (MORE == 1 ? 4 * i : 0);
        ivec bits = load<ivec>(high + output % QUARTER * PER_WORD);
        w[c] |= ((bits >> shift) & (MORE == 2 ? 0x03030303 : 0x01010101)) << 4;
      }
    }
  }
};

struct Operands {
  const int8_t* x;
  int64_t x_stride, group, groups;  // groups: along the whole of K
  const float* x_scales;
  const int32_t* x_sums;
  int64_t per_block;  // groups of a super-block
  int zero;
};

// Where the scales of a group are.
template <bool MINIMA>
struct GroupScales {
  static constexpr int LEVELS = MINIMA ? 2 : 1, HALF = 2 * PANEL;

  static int64_t bytes(int64_t per_block) { return LEVELS * (HALF + per_block * PANEL); }

  GroupScales(const uint8_t* scales, int64_t group, int64_t per_block)
      : d((const uint16_t*)(scales + group / per_block * bytes(per_block))),
        s((const int8_t*)d + LEVELS * (HALF + group % per_block * PANEL)) {}

  fvec scale(int v) const { return half_to_float(d + v * WIDTH) * signed_bytes(s + v * WIDTH); }
  fvec minimum(int v) const { return half_to_float(d + PANEL + v * WIDTH) * signed_bytes(s + PANEL + v * WIDTH); }

  const uint16_t* d;
  const int8_t* s;
};

// sums [ROWS][64] += the products of `count` groups from `group` on, for the vectors of pass h.
template <int BITS, bool MINIMA, int ROWS>
static void tile(const Operands& in, int64_t row, int64_t group, int64_t count, const uint8_t* weights,
                 const uint8_t* scales, int h, float* sums, Ahead ahead) {
  fvec total[ROWS][COLUMNS];
  const int32_t* x[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    x[r] = (const int32_t*)(in.x + (row + r) * in.x_stride + group * in.group);
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) total[r][v] = load<fvec>(sums + r * PANEL + vector_at(h, v) * WIDTH);
  }
  int64_t pairs = in.group / PER_WORD / 2;
  for (int64_t g = 0; g < count; g++) {
    ivec dot[ROWS][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      int32_t start = -in.zero * in.x_sums[(row + r) * in.groups + group + g];
#pragma GCC unroll 4
      for (int v = 0; v < COLUMNS; v++) dot[r][v] = ivec{} + start;
    }
    for (int64_t k = g * pairs; k < (g + 1) * pairs; k++) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        ivec w[COLUMNS];
        Codes<BITS>::words(weights + k * Codes<BITS>::BYTES, i, h, w);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          ivec word = ivec{} + x[r][2 * k + i];
#pragma GCC unroll 4
          for (int v = 0; v < COLUMNS; v++) dot[r][v] = dot_u8s8(dot[r][v], w[v], word);
        }
      }
      ahead.fetch();
    }
    GroupScales<MINIMA> own(scales, group + g, in.per_block);
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) {
      fvec scale = own.scale(vector_at(h, v)), minimum{};
      if constexpr (MINIMA) minimum = own.minimum(vector_at(h, v));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        int64_t at = (row + r) * in.groups + group + g;
        total[r][v] = total[r][v] + __builtin_convertvector(dot[r][v], fvec) * (scale * in.x_scales[at]);
        if constexpr (MINIMA) total[r][v] = total[r][v] - minimum * (in.x_scales[at] * (float)in.x_sums[at]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < COLUMNS; v++) store(sums + r * PANEL + vector_at(h, v) * WIDTH, total[r][v]);
}

template <int BITS, bool MINIMA>
static void linear(const Call& call, Context& context) {
  constexpr int HALVES = VECTORS / COLUMNS;
  Linear op(call, context.step);
  int64_t group = call.numbers[4], groups = op.depth / group, block = call.numbers[7];
  Operands in{(const int8_t*)call.pointers[0], op.x_stride,
              group,                           groups,
              (const float*)call.pointers[5],  (const int32_t*)call.pointers[6],
              block / group,                   (int)call.numbers[8]};
  int64_t panel_scales = (op.depth + block - 1) / block * GroupScales<MINIMA>::bytes(in.per_block);
  int64_t at_once = std::max<int64_t>(1, BLOCK * PER_WORD / group);
  op.for_each_item(context, [&](int64_t panel, int64_t first, int64_t rows, float* sums) {
    auto* scales = (const uint8_t*)call.pointers[4] + panel * panel_scales;
    for (int64_t g = 0; g < groups; g += at_once) {
      int64_t count = std::min(at_once, groups - g), pairs = group / PER_WORD / 2, steps = count * pairs;
      int64_t bytes = steps * Codes<BITS>::BYTES;
      auto* w = (const uint8_t*)call.pointers[1] + (panel * groups + g) * pairs * Codes<BITS>::BYTES;
      for_each_tile<MOST_ROWS>(rows, [&]<int ROWS>(int64_t row, int64_t index, int64_t tiles) {
        for (int h = 0; h < HALVES; h++)
          tile<BITS, MINIMA, ROWS>(in, first + row, g, count, w, scales, h, sums + row * PANEL,
                                   Ahead(w, bytes, index * HALVES + h, tiles * HALVES, steps));
      });
    }
  });
}

template <int BITS>
static void linear(const Call& call, Context& context) {
  call.numbers[9] ? linear<BITS, true>(call, context) : linear<BITS, false>(call, context);
}

void linear_k4(const Call& call, Context& context) { linear<4>(call, context); }
void linear_k5(const Call& call, Context& context) { linear<5>(call, context); }
void linear_k6(const Call& call, Context& context) { linear<6>(call, context); }

}  // namespace wherry::WHERRY_TARGET
