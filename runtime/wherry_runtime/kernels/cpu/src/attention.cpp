// Paged attention for any mixture of decodes and chunks of prompts.
//
// attention: softmax(q · kᵀ) v over the keys that a row sees: its own sequence's, up to itself, `window` of them at most.
//   pointers  0 query as rope_and_cache wrote it; 1 cache (kv.h); 2 plan of attention_plan; 3 partials float32
//             [most_partials * (Dp + 16)]; 4 out float32 [T, out_stride], head h in columns h * D …; 5 slopes [H] or null:
//             scores lose this much for each token of distance (ALiBi: Press et al., 2022, https://arxiv.org/abs/2108.12409)
//   numbers   0 H, 1 KV, 2 D, 3 block_size, 4 Format, 5 q_stride, 6 out_stride, 7 window (0: none), 8 most_items of the plan
//   scalars   0 c: scores become c · tanh(score / c); 0: they do not
// A float32 cache is read in float32 throughout; for the others queries and softmax weights are rounded to bfloat16.
#include <algorithm>

#include "attention_plan.h"
#include "attention_tile.h"
#include "kernels.h"
#include "kv_expand.h"

namespace wherry::WHERRY_TARGET {

struct Attention {
  explicit Attention(const Call& call, const Step& step)
      : step(step),
        kv_heads(call.numbers[1]),
        group(call.numbers[0] / call.numbers[1]),
        dim(call.numbers[2]),
        q_stride(call.numbers[5]),
        out_stride(call.numbers[6]),
        window(call.numbers[7]),
        softcap((float)(call.scalars[0] * LOG2_E)),
        slopes((const float*)call.pointers[5]),
        query((const int32_t*)call.pointers[0]),
        partials((float*)call.pointers[3]),
        out((float*)call.pointers[4]),
        cache((uint8_t*)call.pointers[1], kv_heads, dim, call.numbers[3], (Format)call.numbers[4]) {}

  const Step& step;
  int64_t kv_heads, group, dim, q_stride, out_stride, window;
  float softcap;  // of scores as they are here
  const float* slopes;
  const int32_t* query;
  float *partials, *out;
  KVLayout cache;
};

// Softmax so far, of each row of a tile: weights are 2^(score - top).
struct State {
  float top[MOST_ROWS];
  alignas(64) float total[MOST_ROWS][WIDTH];
  alignas(64) float sums[MOST_ROWS * MAX_HEAD_DIM];  // [rows][padded]

  void clear(int64_t rows, int64_t padded) {
    std::fill_n(top, rows, LOWEST);
    std::memset(total, 0, sizeof(float) * WIDTH * rows);
    std::memset(sums, 0, sizeof(float) * padded * rows);
  }
};

// (top, total, sums) += (other_top, other_total, other_sums). One function for all, so that all round alike.
__attribute__((noinline)) static void merge(float* top, float* total, float* sums, float other_top, float other_total,
                                            const float* other_sums, int64_t padded) {
  float higher = *top > other_top ? *top : other_top;
  fvec mine = power_of_two(spread(*top - higher)), others = power_of_two(spread(other_top - higher));
  for (int64_t k = 0; k < padded; k += WIDTH)
    store(sums + k, load<fvec>(sums + k) * mine + load<fvec>(other_sums + k) * others);
  *total = *total * mine[0] + other_total * others[0];
  *top = higher;
}

template <class Type>
class Tile {
 public:
  Tile(const Attention& op, const Item& item, int64_t head, const Plan& plan) : op_(op), item_(item), head_(head), plan_(plan) {
    rows_ = item.tokens * op.group;
    words_ = op.dim / Type::PER_WORD;
    first_position_ = op.step.positions[item.row];
    for (int64_t r = 0; r < rows_; r++) {
      auto* from = op.query + (item.row + r / op.group) * op.q_stride + (head * op.group + r % op.group) * words_;
      int32_t* to = query_ + r / TILE_ROWS * TILE_ROWS * words_ + r % TILE_ROWS;
      for (int64_t k = 0; k < words_; k++) to[k * TILE_ROWS] = from[k];
    }
  }

  void run() {
    int64_t padded = op_.cache.padded;
    bool whole = item_.counter < 0;
    if (whole) all_.clear(rows_, padded);
    for (int64_t chunk = item_.first_chunk; chunk < item_.end_chunk; chunk++) {
      attend(chunk);
      for (int64_t r = 0; r < rows_; r++) {
        float total = total_of(load<fvec>(chunk_.total[r]));
        if (whole)
          merge(all_.top + r, all_.total[r], all_.sums + r * padded, chunk_.top[r], total, chunk_.sums + r * padded, padded);
        else
          keep(chunk, r, total);
      }
    }
    if (!whole && !last_piece()) return;
    for (int64_t r = 0; r < rows_; r++) {
      if (!whole) gather(r);
      write(r);
    }
  }

 private:
  int64_t position(int64_t row) const { return first_position_ + row / op_.group; }
  int64_t low(int64_t row) const { return lowest_key(position(row), op_.window); }

  // chunk_ = the softmax of one chunk of keys.
  void attend(int64_t chunk) {
    chunk_.clear(rows_, op_.cache.padded);
    int64_t begin = std::max(chunk * CHUNK, low(0) / SPAN * SPAN);
    int64_t end = std::min((chunk + 1) * CHUNK, position(rows_ - 1) + 1);
    for (int64_t base = begin; base < end; base += SPAN) {
      find_keys(base);
      for (int64_t row = 0; row < rows_; row += TILE_ROWS) {
        int64_t count = std::min<int64_t>(TILE_ROWS, rows_ - row);
        if (base > position(row + count - 1) || base + SPAN <= low(row)) continue;
        if (count == 1) attend_rows<1>(base, row);
        if constexpr (TILE_ROWS >= 2)
          if (count == 2) attend_rows<2>(base, row);
        if constexpr (TILE_ROWS >= 4) {
          if (count == 3) attend_rows<3>(base, row);
          if (count == 4) attend_rows<4>(base, row);
        }
      }
    }
  }

  // Group `index` of the sequence; beyond what the tile sees, the nearest that it does see.
  const uint8_t* group(int64_t index) const {
    index = std::clamp(index, low(0) / GROUP, position(rows_ - 1) / GROUP);
    const int32_t* table = op_.step.block_tables + item_.table;
    return op_.cache.group(table[index / op_.cache.groups], head_, index % op_.cache.groups);
  }

  // Where the keys and values of base … base + 63 are, as words, and the next 64.
  void find_keys(int64_t base) {
    const KVLayout& cache = op_.cache;
    for (int g = 0; g < SPAN_GROUPS; g++) {
      const uint8_t *now = group(base / GROUP + g), *next = group((base + SPAN) / GROUP + g);
      if (cache.format == Format::FLOAT32 || cache.format == Format::BFLOAT16) {
        keys_[g] = (const int32_t*)(now + cache.keys);
        values_[g] = (const int32_t*)(now + cache.values);
        next_keys_[g] = (const int32_t*)(next + cache.keys);
        next_values_[g] = (const int32_t*)(next + cache.values);
        continue;
      }
      keys_[g] = next_keys_[g] = expanded_[g];
      values_[g] = next_values_[g] = expanded_[g] + op_.dim * (GROUP / 2);
      if (cache.format == Format::INT8) {
        std::memcpy(key_scales_ + g * GROUP, now, GROUP * sizeof(float));
        std::memcpy(value_scales_ + g * GROUP, now + GROUP * sizeof(float), GROUP * sizeof(float));
      }
      const Codes& codes = cache.format == Format::FP8 ? FP8_CODES : INT8_CODES;
      expand(now + cache.keys, next + cache.keys, cache.bytes - cache.keys, (uint16_t*)expanded_[g], codes);
    }
  }

  template <int ROWS>
  void attend_rows(int64_t base, int64_t row) {
    alignas(64) float scores[ROWS][SPAN];
    alignas(64) int32_t weights[ROWS][SPAN];
    int64_t padded = op_.cache.padded;
    float* sums[ROWS];
    // Each few rows bring a share of what is wanted next nearer, so that memory is never idle: here some groups, elsewhere
    // others. A group that is not fetched is one that is at hand.
    const int32_t *keys_ahead[SPAN_GROUPS], *values_ahead[SPAN_GROUPS];
    int64_t shares = std::min<int64_t>(SPAN_GROUPS, (rows_ + TILE_ROWS - 1) / TILE_ROWS);
    for (int g = 0; g < SPAN_GROUPS; g++) {
      bool fetch = g * shares / SPAN_GROUPS == row / TILE_ROWS;
      keys_ahead[g] = fetch ? next_keys_[g] : keys_[g];
      values_ahead[g] = fetch ? next_values_[g] : values_[g];
    }
    multiply_keys<Type, ROWS>(query_ + row * words_, keys_, keys_ahead, words_, scores);
    for (int r = 0; r < ROWS; r++) {
      sums[r] = chunk_.sums + (row + r) * padded;
      soften(base, row + r, scores[r], weights[r]);
    }
    int groups = (int)std::min<int64_t>(SPAN_GROUPS, (position(row + ROWS - 1) - base) / GROUP + 1);
    int64_t column = 0;
    for (; column + MOST_COLUMNS * WIDTH <= padded; column += MOST_COLUMNS * WIDTH)
      multiply_values<Type, ROWS, MOST_COLUMNS>(weights, values_, values_ahead, groups, padded, column, sums);
    switch ((padded - column) / WIDTH) {
      case 1: multiply_values<Type, ROWS, 1>(weights, values_, values_ahead, groups, padded, column, sums); break;
      case 2: multiply_values<Type, ROWS, 2>(weights, values_, values_ahead, groups, padded, column, sums); break;
      case 3: multiply_values<Type, ROWS, 3>(weights, values_, values_ahead, groups, padded, column, sums); break;
    }
  }

  // Scores of one row → weights, and the row's state made ready for them.
  void soften(int64_t base, int64_t row, const float* scores, int32_t* weights) {
    fvec s[SPAN_VECTORS];
    for (int v = 0; v < SPAN_VECTORS; v++) s[v] = load<fvec>(scores + v * WIDTH);
    bool int8 = op_.cache.format == Format::INT8;
    if (int8)
      for (int v = 0; v < SPAN_VECTORS; v++) s[v] = s[v] * load<fvec>(key_scales_ + v * WIDTH);
    if (op_.softcap != 0) cap(s, op_.softcap);
    if (op_.slopes) lose(s, (float)LOG2_E * op_.slopes[head_ * op_.group + row % op_.group], (float)(position(row) - base));
    int64_t from = low(row) - base, to = position(row) - base;
    if (from > 0 || to < SPAN - 1) hide(s, (int32_t)std::max<int64_t>(from, 0), (int32_t)std::min<int64_t>(to, SPAN));
    fvec best = s[0];
    for (int v = 1; v < SPAN_VECTORS; v++) best = best > s[v] ? best : s[v];
    float top = max(best);
    if (top > chunk_.top[row]) raise(row, top);
    top = chunk_.top[row];
    for (int v = 0; v < SPAN_VECTORS; v++) s[v] = power_of_two(s[v] - top);
    fvec total = load<fvec>(chunk_.total[row]);
    pack_weights(Type(), s, weights, &total);
    store(chunk_.total[row], total);
    if (int8) {
      fvec unused{};
      for (int v = 0; v < SPAN_VECTORS; v++) s[v] = s[v] * load<fvec>(value_scales_ + v * WIDTH);
      pack_weights(Type(), s, weights, &unused);
    }
  }

  static void cap(fvec* s, float limit) {
    for (int v = 0; v < SPAN_VECTORS; v++) {
      fvec size = s[v] < 0.0f ? -s[v] : s[v], small = power_of_two(size * ((float)(-2 * LOG2_E) / limit));
      fvec capped = (1.0f - small) / (1.0f + small) * limit;
      s[v] = s[v] < 0.0f ? -capped : capped;
    }
  }

  // `distance` is that to the first of the keys.
  static void lose(fvec* s, float slope, float distance) {
    fvec far;
    for (int i = 0; i < WIDTH; i++) far[i] = distance - (float)i;
    for (int v = 0; v < SPAN_VECTORS; v++, far = far - (float)WIDTH) s[v] = s[v] - far * slope;
  }

  // Scores of keys before `from` and after `to` become -infinity.
  static void hide(fvec* s, int32_t from, int32_t to) {
    ivec lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
    for (int v = 0; v < SPAN_VECTORS; v++, lane += WIDTH)
      s[v] = (lane >= from) & (lane <= to) ? s[v] : spread(-INFINITY);
  }

  void raise(int64_t row, float top) {
    fvec factor = power_of_two(spread(chunk_.top[row] - top));
    float* sums = chunk_.sums + row * op_.cache.padded;
    for (int64_t k = 0; k < op_.cache.padded; k += WIDTH) store(sums + k, load<fvec>(sums + k) * factor);
    store(chunk_.total[row], load<fvec>(chunk_.total[row]) * factor);
    chunk_.top[row] = top;
  }

  // A row of a chunk in `partials`: sums, top, total.
  float* partial(int64_t chunk, int64_t row) const {
    int64_t chunks = item_.tile_end - item_.tile_first;
    int64_t index = item_.partial + (head_ * chunks + chunk - item_.tile_first) * rows_ + row;
    return op_.partials + index * (op_.cache.padded + 16);
  }

  void keep(int64_t chunk, int64_t row, float total) {
    int64_t padded = op_.cache.padded;
    float* to = partial(chunk, row);
    std::memcpy(to, chunk_.sums + row * padded, sizeof(float) * padded);
    to[padded] = chunk_.top[row];
    to[padded + 1] = total;
  }

  // Whether all other pieces of the tile are done; the counter is then ready for the next layer.
  bool last_piece() {
    std::atomic_ref<int64_t> done(plan_.counters[item_.counter + head_]);
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < item_.pieces) return false;
    done.store(0, std::memory_order_relaxed);
    return true;
  }

  void gather(int64_t row) {
    int64_t padded = op_.cache.padded;
    float* sums = all_.sums + row * padded;
    std::memset(sums, 0, sizeof(float) * padded);
    all_.top[row] = LOWEST;
    all_.total[row][0] = 0;
    for (int64_t chunk = item_.tile_first; chunk < item_.tile_end; chunk++) {
      const float* from = partial(chunk, row);
      merge(all_.top + row, all_.total[row], sums, from[padded], from[padded + 1], from, padded);
    }
  }

  void write(int64_t row) const {
    float* to = op_.out + (item_.row + row / op_.group) * op_.out_stride + (head_ * op_.group + row % op_.group) * op_.dim;
    const float* sums = all_.sums + row * op_.cache.padded;
    float inverse = 1.0f / all_.total[row][0];
    for (int64_t k = 0; k < op_.dim; k++) to[k] = sums[k] * inverse;
  }

  const Attention& op_;
  const Item& item_;
  int64_t head_, rows_, words_, first_position_;
  const Plan& plan_;
  const int32_t *keys_[SPAN_GROUPS], *values_[SPAN_GROUPS], *next_keys_[SPAN_GROUPS], *next_values_[SPAN_GROUPS];
  alignas(64) int32_t query_[MOST_ROWS * MAX_HEAD_DIM];  // [rows / TILE_ROWS][words][TILE_ROWS]
  alignas(64) float key_scales_[SPAN], value_scales_[SPAN];
  alignas(64) int32_t expanded_[SPAN_GROUPS][GROUP * MAX_HEAD_DIM];  // two bfloat16 a word: keys, then values
  State chunk_, all_;
};

void attention(const Call& call, Context& context) {
  Attention op(call, context.step);
  Plan plan(call.pointers[2], call.numbers[8]);
  for (int64_t i, items = *plan.count * op.kv_heads; (i = context.take(items)) < items;) {
    const Item& item = plan.items[i / op.kv_heads];
    if (op.cache.format == Format::FLOAT32)
      Tile<OneFloat>(op, item, i % op.kv_heads, plan).run();
    else
      Tile<TwoBFloat16>(op, item, i % op.kv_heads, plan).run();
  }
}

}  // namespace wherry::WHERRY_TARGET
