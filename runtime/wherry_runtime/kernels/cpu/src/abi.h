// The shapes that the Python side (library.py) and every kernel share. Plain C layout; all integers are 64 bits wide
// unless said otherwise, so that NumPy arrays can be handed over as they are.
#pragma once
#include <atomic>
#include <cstdint>

namespace wherry {

// What differs between two replays of one program. T rows (tokens), S of which draw a token, of B sequences. The rows
// of a sequence are consecutive and in the order of their positions.
struct Step {
  int64_t rows;                 // T
  int64_t sampled;              // S
  int64_t sequences;            // B
  const int64_t* token_ids;     // [T]
  const int64_t* positions;     // [T]
  const int64_t* slots;         // [T] block * block_size + offset: where a row's key and value go
  const int64_t* sampled_rows;  // [S]
  const int64_t* first_rows;    // [B + 1] rows first_rows[i] … first_rows[i + 1] - 1 belong to sequence i
  const int64_t* table_starts;  // [B] where each sequence's block table begins in block_tables
  const int32_t* block_tables;  // concatenated; blocks of positions 0, block_size, 2 * block_size, …
};

struct Call;

// On a cache line of its own.
struct alignas(64) Counter {
  std::atomic<int64_t> taken;
};

// One thread's view of a call.
struct Context {
  const Step& step;
  int thread;
  int threads;
  Counter* counters;  // [threads]

  // The next of `items` work items that nobody has taken, or `items`. Each thread has a range of its own, which it works
  // through in order, so that what comes next is known; then it takes from the others' ranges one by one, so that a thread
  // that is held up (other work on its core) does not hold up the rest.
  int64_t take(int64_t items) {
    for (int i = 0; i < threads; i++) {
      int64_t owner = (thread + i) % threads, first = items * owner / threads, end = items * (owner + 1) / threads;
      if (counters[owner].taken.load(std::memory_order_relaxed) >= end - first) continue;
      int64_t item = first + counters[owner].taken.fetch_add(1, std::memory_order_relaxed);
      if (item < end) return item;
    }
    return items;
  }
};

using Kernel = void (*)(const Call&, Context&);

// One kernel with its operands. All threads run a call together; a barrier separates it from the next. `stream`, if not null,
// is what it reads from memory, the same in every step: as much for each work item, in their order.
struct Call {
  Kernel kernel;
  void* pointers[10];
  int64_t numbers[14];
  double scalars[4];
  const char* stream;
  int64_t stream_items, stream_item_bytes;
};

struct Entry {
  const char* name;
  Kernel kernel;
};

}  // namespace wherry
