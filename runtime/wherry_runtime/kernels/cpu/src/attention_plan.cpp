// attention_plan: shares a step's attention out, once per step and per distinct window, before the first layer.
//   pointers  0 plan int64 [8 + 12 * most_items]
//   numbers   0 H, 1 KV, 2 most_partials, 3 window (0: none), 4 most_items: at least 2 * T + 16 * threads
#include <algorithm>

#include "attention_plan.h"
#include "kernels.h"

namespace wherry::WHERRY_TARGET {

constexpr int64_t ITEMS_PER_THREAD = 4;  // so that no thread waits long for another's last

// The tiles of all sequences, whole; returns how many.
static int64_t add_tiles(const Call& call, const Step& step, Item* items) {
  int64_t group = call.numbers[0] / call.numbers[1], window = call.numbers[3];
  int64_t most_tokens = std::max<int64_t>(1, MOST_ROWS / group), count = 0;
  for (int64_t s = 0; s < step.sequences; s++) {
    int64_t end = step.first_rows[s + 1];
    for (int64_t row = step.first_rows[s]; row < end; row += most_tokens) {
      int64_t tokens = std::min(most_tokens, end - row);
      int64_t low = lowest_key(step.positions[row], window), last = step.positions[row + tokens - 1];
      int64_t first = low / CHUNK, stop = last / CHUNK + 1;
      int64_t cost = (last - low + 1) * (8 + tokens * group);  // reading a key costs about as much as eight rows
      items[count++] = Item{row, tokens, step.table_starts[s], first, stop, first, stop, 1, -1, 0, cost};
    }
  }
  return count;
}

// Splits tiles that would keep others waiting; returns the new number of items.
static int64_t split_tiles(const Call& call, int64_t threads, const Plan& plan, int64_t tiles) {
  int64_t kv_heads = call.numbers[1], group = call.numbers[0] / kv_heads, most_items = call.numbers[4];
  int64_t count = tiles, counters = 0, partials = 0, total = 0;
  for (int64_t i = 0; i < tiles; i++) total += plan.items[i].cost * kv_heads;
  int64_t share = std::max<int64_t>(1, total / (threads * ITEMS_PER_THREAD));
  for (int64_t i = 0; i < tiles; i++) {
    Item tile = plan.items[i];
    int64_t chunks = tile.end_chunk - tile.first_chunk;
    int64_t pieces = std::min(chunks, (tile.cost + share - 1) / share);
    int64_t rows = tile.tokens * group * chunks * kv_heads;
    if (threads == 1 || pieces < 2 || partials + rows > call.numbers[2]) continue;
    if (count + pieces > most_items || counters + kv_heads > most_items) continue;
    for (int64_t p = 0; p < pieces; p++) {
      Item item = tile;
      item.first_chunk = tile.tile_first + chunks * p / pieces;
      item.end_chunk = tile.tile_first + chunks * (p + 1) / pieces;
      item.pieces = pieces;
      item.counter = counters;
      item.partial = partials;
      item.cost = tile.cost / pieces;
      plan.items[p ? count++ : i] = item;
    }
    for (int64_t h = 0; h < kv_heads; h++) plan.counters[counters++] = 0;
    partials += rows;
  }
  return count;
}

void attention_plan(const Call& call, Context& context) {
  if (context.thread != 0) return;
  Plan plan(call.pointers[0], call.numbers[4]);
  int64_t tiles = add_tiles(call, context.step, plan.items);
  *plan.count = split_tiles(call, context.threads, plan, tiles);
  // The dearest first: the small ones fill the gaps at the end.
  std::stable_sort(plan.items, plan.items + *plan.count, [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

}  // namespace wherry::WHERRY_TARGET
