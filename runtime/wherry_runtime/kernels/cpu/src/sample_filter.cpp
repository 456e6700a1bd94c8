// sample_filter: what top-k, top-p and min-p, in this order, leave of each row: a floor under its scores. After argmax.
//   pointers  0 logits float32 [S, stride]; 1 Params [S] (sample.h); 2 scratch of argmax; 3 work float32 [threads, Vp]
//   numbers   0 V, 1 stride, 2 Vp ≥ V
// A score is logit / temperature in float32. Ties with the k-th likeliest stay. Probabilities are summed in float64, so that
// a token at the very edge of the nucleus (1e-6 of top-p) may fall on the other side than in the reference.
#include <functional>

#include "kernels.h"
#include "sample.h"

namespace wherry::WHERRY_TARGET {

constexpr float REACHES[] = {2, 4, 8, 16, 32, 64, INFINITY};  // how far below the top to look for candidates

struct Filter {
  const float* row;
  int64_t width;
  float temperature, top;  // top: the highest score
  float* work;

  f32x16 scores(int64_t k) const { return load_columns(row, k, width) / temperature; }

  // Scores of at least `floor` → work; returns how many.
  int64_t collect(float floor) const {
    int64_t count = 0;
    for (int64_t k = 0; k < width; k += LANES) {
      f32x16 s = scores(k);
      i32x16 kept = s >= floor;
      if (!any(kept)) continue;
      for (int i = 0; i < LANES && k + i < width; i++)
        if (kept[i]) work[count++] = s[i];
    }
    return count;
  }

  float kth(int64_t k) const {
    int64_t count = 0;
    for (float reach : REACHES)
      if ((count = collect(top - reach)) >= k) break;
    std::nth_element(work, work + k - 1, work + count, std::greater<float>());
    return work[k - 1];
  }

  // Σ e^(score - top) over scores of at least `floor`.
  double mass(float floor) const {
    double total = 0;
    for (int64_t k = 0; k < width;) {
      f32x16 part{};
      for (int64_t end = std::min(k + 64 * LANES, width); k < end; k += LANES) {
        f32x16 s = scores(k);
        part = part + (s >= floor ? exp(s - top) : splat(0.0f));
      }
      total += sum(part);
    }
    return total;
  }

  // The lowest score of the fewest tokens that reach `share` of the mass above `floor`.
  float nucleus(float floor, double share) const {
    double wanted = mass(floor) * share;
    for (float reach : REACHES) {
      int64_t count = collect(std::max(floor, top - reach));
      std::sort(work, work + count, std::greater<float>());
      double reached = 0;
      for (int64_t i = 0; i < count; i++) {
        reached += std::exp((double)work[i] - (double)top);
        if (reached >= wanted) return work[i];
      }
      if (reach == INFINITY && count) return work[count - 1];
    }
    return floor;
  }
};

void sample_filter(const Call& call, Context& context) {
  Rows rows(call, 2);
  float* work = (float*)call.pointers[3] + context.thread * call.numbers[2];
  for (int64_t r, items = context.step.sampled; (r = context.take(items)) < items;) {
    const Params& params = ((const Params*)call.pointers[1])[r];
    RowState& state = rows.state(r);
    bool finite = state.top - state.top == 0;
    if (params.temperature <= 0 || !finite) continue;
    float temperature = (float)params.temperature, floor = -INFINITY;
    Filter filter{rows.row(r), rows.width, temperature, state.top / temperature, work};
    if (params.top_k > 0 && params.top_k < rows.width) floor = filter.kth(params.top_k);
    if (params.top_p < 1) floor = std::max(floor, filter.nucleus(floor, params.top_p));
    if (params.min_p > 0) floor = std::max(floor, filter.top + (float)std::log(params.min_p));
    state.floor = floor;
  }
}

}  // namespace wherry::WHERRY_TARGET
