// What the matrix products share: panels, tiles of rows, and who computes which.
//
// y = x Wᵀ + b. W lies in panels of 64 outputs: for each step along K, the 64 outputs' words lie side by side, so that one
// word of x, broadcast, meets four vectors of weights. A word is 32 bits of K: one float32, two bfloat16, four int8.
// A sum runs along K in one chain per output, whatever the number of rows: a row's result never depends on its batch.
//
// Operands of all linear_* kernels:
//   pointers  0 x: see the kernel; 1 weights [panels][Kp words][64] words; 2 y float32; 3 bias float32 [panels * 64] or null;
//             4 weight scales, 5 x scales, 6 x sums: of the integer kernels; 7 rows, or null: see `Rows`
//   numbers   0 panels; 1 Kp; 2 stride of x in elements; 3 stride of y in floats; 4 group: weights per scale along K;
//             5 add: 1 adds to y, 0 overwrites it; 6 sampled: 1 if the rows are those that draw a token; 7 … of linear_k.cpp
// Goto and van de Geijn, 2008 (https://doi.org/10.1145/1356052.1356053) for the blocking.
#pragma once
#include <algorithm>

#include "abi.h"
#include "simd_native.h"
#include "transpose.h"

namespace wherry::WHERRY_TARGET {

constexpr int PANEL = 64;
constexpr int VECTORS = PANEL / WIDTH;
constexpr int BLOCK = 64;            // words along K per block: 16 KiB of weights stay in L1 while all rows use them
constexpr int CHUNK = 96;            // rows whose sums are kept at hand
constexpr int64_t LINE = 64, ALONE_AHEAD = 2048;  // bytes

// Vectors of a panel that a tile takes at once: all four of 32 registers' targets, two of those with 16.
constexpr int COLUMNS = WIDTH == 16 ? VECTORS : 2;

struct Linear {
  explicit Linear(const Call& call, const Step& step)
      : rows(call.numbers[6] ? step.sampled : step.rows),
        panels(call.numbers[0]),
        depth(call.numbers[1]),
        x_stride(call.numbers[2]),
        y_stride(call.numbers[3]),
        add(call.numbers[5]),
        y((float*)call.pointers[2]),
        bias((const float*)call.pointers[3]) {}

  int64_t rows, panels, depth, x_stride, y_stride;
  bool add;
  float* y;
  const float* bias;

  // Sums [rows][64] of a panel → y, with bias.
  void finish(const float* sums, int64_t panel, int64_t first_row, int64_t num_rows) const {
    fvec b[VECTORS] = {};
    if (bias)
      for (int v = 0; v < VECTORS; v++) b[v] = load<fvec>(bias + panel * PANEL + v * WIDTH);
    for (int64_t r = 0; r < num_rows; r++) {
      float* to = y + (first_row + r) * y_stride + panel * PANEL;
      for (int v = 0; v < VECTORS; v++) {
        fvec value = load<fvec>(sums + r * PANEL + v * WIDTH) + b[v];
        if (add) value = load<fvec>(to + v * WIDTH) + value;
        store(to + v * WIDTH, value);
      }
    }
  }

  // Calls compute(panel, first row, number of rows, sums) for each panel and chunk of rows, shared among the threads.
  template <class Compute>
  void for_each_item(Context& context, Compute compute) const {
    alignas(64) float sums[CHUNK * PANEL];
    int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    for (int64_t item, items = panels * chunks; (item = context.take(items)) < items;) {
      int64_t panel = item / chunks, chunk = item % chunks;
      int64_t first = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - first;
      std::memset(sums, 0, sizeof(float) * PANEL * count);
      compute(panel, first, count, sums);
      finish(sums, panel, first, count);
    }
  }
};

// Float weights that are still where they were read from, row by row: a block of a panel is turned when it is needed, at
// the same values in the same order. Somebody else packs them meanwhile; each call looks once whether that is done.
class Rows {
 public:
  // Pointer 7: [1 + panels * 64] int64: not zero until the weights are packed, then each row's address.
  explicit Rows(const Call& call) {
    auto* table = (const int64_t*)call.pointers[7];
    if (table && __atomic_load_n(table, __ATOMIC_ACQUIRE)) at_ = (const uint8_t* const*)(table + 1);
  }

  explicit operator bool() const { return at_; }

  const uint8_t* row(int64_t index) const { return at_[index]; }

  // Words k … k + count - 1 of a panel, [count][64] in `scratch`; count is a multiple of 16.
  const int32_t* block(int64_t panel, int64_t k, int64_t count, int32_t* scratch) const {
    for (int64_t c = 0; c < PANEL; c += 8) {
      const uint8_t* const* rows = at_ + panel * PANEL + c;
      for (int64_t w = 0; w < count; w += 16) {
        for (int i = 0; i < 8; i++) prefetch(rows[i] + 4 * (k + count + w));
        for (int64_t half = w; half < w + 16; half += 8) {
          __m256i columns[8];
          transpose(rows, 4 * (k + half), columns);
          for (int i = 0; i < 8; i++) _mm256_storeu_si256((__m256i*)(scratch + (half + i) * PANEL + c), columns[i]);
        }
      }
    }
    return scratch;
  }

 private:
  const uint8_t* const* at_ = nullptr;
};

// What one of several passes over a block of weights brings nearer while it computes: its share of the next block, so that
// memory is busy all the time. A pass that is alone goes through memory as fast as that can, and looks less far ahead.
class Ahead {
 public:
  // Pass `index` of `passes` over the `bytes` at `block`, each of `steps` calls to fetch().
  Ahead(const void* block, int64_t bytes, int64_t index, int64_t passes, int64_t steps)
      : at_((const char*)block + (passes == 1 ? ALONE_AHEAD : bytes + bytes * index / passes / LINE * LINE)),
        lines_((int)((bytes / LINE + passes * steps - 1) / (passes * steps))) {}

  void fetch() {
    for (int i = 0; i < lines_; i++, at_ += LINE) prefetch_l2(at_);
  }

 private:
  const char* at_;
  int lines_;
};

// Calls tile.template operator()<n>(first row, index, tiles) for tiles of n ≤ MOST rows each, as even as they can be.
template <int MOST, class Tile>
inline void for_each_tile(int64_t rows, Tile tile) {
  int64_t tiles = (rows + MOST - 1) / MOST;
  for (int64_t i = 0; i < tiles; i++) {
    int64_t first = rows * i / tiles;
    switch (rows * (i + 1) / tiles - first) {
      case 1: tile.template operator()<1>(first, i, tiles); break;
      case 2: tile.template operator()<2>(first, i, tiles); break;
      case 3: tile.template operator()<3>(first, i, tiles); break;
      case 4: if constexpr (MOST >= 4) tile.template operator()<4>(first, i, tiles); break;
      case 5: if constexpr (MOST >= 5) tile.template operator()<5>(first, i, tiles); break;
      case 6: if constexpr (MOST >= 6) tile.template operator()<6>(first, i, tiles); break;
    }
  }
}

}  // namespace wherry::WHERRY_TARGET
