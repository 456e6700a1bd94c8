// What the matrix products on AMX share. Operands and panels are those of linear.h.
//
// A step multiplies up to 16 rows of x, 64 bytes of each, by the 64 outputs of a panel: four tiles of sums, one of x, and
// the weights' in turn. On paper a product takes 16 cycles and a load from L1 8: four products to five loads.
//
// All of this is tested by emulation (amx.h). It has never been timed.
#pragma once
#include "amx.h"
#include "linear.h"

namespace wherry::WHERRY_TARGET {

static_assert(WIDTH == 16, "a vector of a panel is a row of a tile");

constexpr int X_TILE = VECTORS, WEIGHTS_TILE = VECTORS + 1;  // and the one after it; 0 … 3: sums
constexpr int PANEL_BYTES = PANEL * 4;                       // of a word of each output
constexpr int AMX_PREFETCH = 2 * TILE_ROWS * PANEL_BYTES;    // bytes ahead: two steps of bytes or bfloat16

// The tiles' shapes for one call of a kernel, and the thread's tiles given back when it ends: the kernel saves 8 KiB more
// at each switch of threads that have them in use. To configure takes far less time than any product.
class TilesInUse {
 public:
  // `x_bytes`: how many bytes of each row a step takes.
  explicit TilesInUse(int x_bytes) : x_bytes_(x_bytes) {}
  ~TilesInUse() {
    if (rows_) tiles_release();
  }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;

  void set_rows(int rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileShapes shapes;
    auto set = [&](int tile, int tile_rows, int bytes) {
      shapes.rows[tile] = (uint8_t)tile_rows;
      shapes.row_bytes[tile] = (uint16_t)bytes;
    };
    for (int v = 0; v < VECTORS; v++) set(v, rows, TILE_BYTES);
    set(X_TILE, rows, x_bytes_);
    for (int i = 0; i < 2; i++) set(WEIGHTS_TILE + i, x_bytes_ / 4, TILE_BYTES);
    tiles_configure(shapes);
  }

 private:
  const int x_bytes_;
  int rows_ = 0;
};

// Calls each.template operator()<v>() for the vectors of a panel: the number of a tile is part of its instruction.
template <class Each>
inline void for_each_vector(Each each) {
  each.template operator()<0>();
  each.template operator()<1>();
  each.template operator()<2>();
  each.template operator()<3>();
  static_assert(VECTORS == 4);
}

// Calls tile(start, done) for tiles of min(rows, 16) rows from `start` on. All are of one shape: the last one begins where it
// ends at the last row, so its first `done` rows were in the tile before and are not to be counted again.
template <class EachTile>
inline void for_each_row_tile(int64_t rows, EachTile tile) {
  for (int64_t row = 0; row < rows; row += TILE_ROWS) {
    int64_t start = std::max<int64_t>(0, std::min(row, rows - TILE_ROWS));
    tile(start, row - start);
  }
}

// Sums' tiles += x [rows][bytes] · weights [bytes / 4][64] words, `step` bytes at a time. `ahead`: fetch what comes after.
template <class Dot>
inline void multiply(const void* x, int64_t x_stride, const uint8_t* weights, int64_t bytes, int step, bool ahead, Dot dot) {
  for (int64_t k = 0; k < bytes; k += step) {
    const uint8_t* w = weights + k / 4 * PANEL_BYTES;
    tile_load<X_TILE>((const uint8_t*)x + k, x_stride);
    if (ahead)
      for (int line = 0; line < step / 4 * PANEL_BYTES; line += 64) prefetch(w + line + AMX_PREFETCH);
    for_each_vector([&]<int V>() {
      tile_load<WEIGHTS_TILE + V % 2>(w + V * TILE_BYTES, PANEL_BYTES);
      dot.template operator()<V, X_TILE, WEIGHTS_TILE + V % 2>();
    });
  }
}

}  // namespace wherry::WHERRY_TARGET
