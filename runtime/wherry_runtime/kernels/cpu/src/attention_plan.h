// How a step's attention is shared out: made once per step and window, read by every layer.
//
// Keys are taken in chunks of a fixed number, at fixed places. Each chunk's softmax stands for itself, and chunks are
// merged in ascending order (as in Flash-Decoding, Dao et al., 2023), by one thread or after many: who does what never
// changes a bit of the result.
#pragma once
#include <atomic>
#include <cstdint>

#include "abi.h"

namespace wherry::WHERRY_TARGET {

constexpr int64_t CHUNK = 256;     // keys
constexpr int64_t MOST_ROWS = 128;  // of a tile: query heads × tokens; every key read from memory serves all of them

// A tile (consecutive tokens of one sequence, for any one key head) and some chunks of its keys.
struct Item {
  int64_t row, tokens;              // rows of the step
  int64_t table;                    // where the sequence's block table begins
  int64_t first_chunk, end_chunk;   // of this item
  int64_t tile_first, tile_end;     // chunks of the whole tile
  int64_t pieces;                   // items that the tile is split into
  int64_t counter;                  // the first of the tile's counters (one per key head) of pieces done; -1 if not split
  int64_t partial;                  // the tile's first row in `partials`
  int64_t cost;
};

struct Plan {
  explicit Plan(void* memory, int64_t most_items)
      : count((int64_t*)memory), items((Item*)(count + 8)), counters((int64_t*)(items + most_items)) {}

  int64_t* count;
  Item* items;
  int64_t* counters;  // [most_items]
};

inline int64_t lowest_key(int64_t position, int64_t window) {
  return window && position >= window ? position - window + 1 : 0;
}

}  // namespace wherry::WHERRY_TARGET
