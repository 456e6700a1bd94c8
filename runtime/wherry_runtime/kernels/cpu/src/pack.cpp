// Rows of a float matrix into the panels that the linear kernels read, rounded and scaled on the way. The PyTorch code
// in wherry_runtime/quantization says the same in a few lines, and gives equal bits: so nothing here may be contracted
// into fused multiply-adds, and sums go in the order given there.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "transpose.h"

// The best of two builds is taken when the library is loaded. AVX2 without FMA, which keeps products and sums apart.
#if defined(__GLIBC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif
#define INLINE inline __attribute__((always_inline))

namespace wherry {
namespace {

constexpr int LANES = 16;
constexpr int64_t PANEL = 64;
constexpr int64_t HALF = PANEL / 2;
constexpr int64_t AHEAD = 256;  // bytes of a row that are fetched before they are moved
constexpr int64_t SKEW = 16;  // words between rows of scratch, so that columns of it do not share a cache set

enum Kind { FLOAT32, BFLOAT16, INT8, INT4 };

struct Job {
  Kind kind;
  int64_t group, depth, padded;  // K and Kp
  uint8_t* data;
  uint16_t* scales;
  int64_t first_row, num_rows;
  const uint8_t* source;
  int64_t source_dtype, source_stride;
};

INLINE uint32_t bits(float x) {
  uint32_t value;
  std::memcpy(&value, &x, 4);
  return value;
}

INLINE float from_bits(uint32_t x) {
  float value;
  std::memcpy(&value, &x, 4);
  return value;
}

// To the nearest integer, ties to even, for |x| < 2²².
INLINE float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; }

INLINE float absolute(float x) { return x < 0 ? -x : x; }

// The nearest float16, as a float; infinity beyond the largest.
INLINE float to_half_precision(float x) {
  float size = absolute(x), sign = x < 0 ? -1.0f : 1.0f;
  float small = (size + 0.5f) - 0.5f;  // steps of 2⁻²⁴, as float16's subnormals
  uint32_t b = bits(size);
  float normal = from_bits((b + 0xfff + ((b >> 13) & 1)) & 0xffffe000u);
  float value = size < 0x1p-14f ? small : normal;
  value = value >= 65536.0f ? from_bits(0x7f800000u) : value;
  return value == 0 ? 0 : sign * value;  // no negative zero
}

// The bits of a float16 whose value is `x` exactly.
INLINE uint16_t half_bits(float x) {
  uint32_t b = bits(x), sign = (b >> 16) & 0x8000;
  float size = absolute(x);
  if (size >= 65536.0f) return (uint16_t)(sign | 0x7c00);
  if (size < 0x1p-14f) return (uint16_t)(sign | (uint32_t)(size * 0x1p24f));
  return (uint16_t)(sign | (((b & 0x7fffffff) - 0x38000000u) >> 13));
}

INLINE float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000u | rest << 13);
  return from_bits(sign | bits(from_bits(rest << 13) * 0x1p112f));
}

INLINE uint16_t to_bfloat16(float x) {
  uint32_t b = bits(x);
  return x == x ? (uint16_t)((b + 0x7fff + ((b >> 16) & 1)) >> 16) : (uint16_t)0x7fc0;
}

// One row as float32, zeros after its end.
FAST void read_row(const Job& job, int64_t row, float* to) {
  int64_t size = job.source_dtype == 0 ? 4 : 2;
  const uint8_t* from = job.source + (row - job.first_row) * job.source_stride * size;
  if (job.source_dtype == 0) {
    std::memcpy(to, from, 4 * job.depth);
  } else {
    for (int64_t k = 0; k < job.depth; k++) {
      uint16_t half;
      std::memcpy(&half, from + 2 * k, 2);
      to[k] = job.source_dtype == 1 ? from_bits((uint32_t)half << 16) : from_half(half);
    }
  }
  for (int64_t k = job.depth; k < job.padded; k++) to[k] = 0;
}

// x · inverse to the nearest integer of low … high.
INLINE float code(float x, float inverse, float low, float high) {
  float value = x * inverse;
  value = value < low ? low : value;
  value = value > high ? high : value;
  return rounded(value);
}

FAST float quantize_int8(const float* x, int64_t group, int8_t* q) {
  float tops[LANES] = {}, top = 0;
  for (int64_t k = 0; k < group; k += LANES)
    for (int i = 0; i < LANES; i++) tops[i] = absolute(x[k + i]) > tops[i] ? absolute(x[k + i]) : tops[i];
  for (int i = 0; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
  float scale = to_half_precision(top / 127), inverse = scale == 0 ? 0 : 1 / scale;
  for (int64_t k = 0; k < group; k++) q[k] = (int8_t)(int32_t)code(x[k], inverse, -127, 127);
  return scale;
}

// Σ (x − q · scale)², sixteen partial sums added pairwise.
INLINE float int4_error(const float* x, int64_t group, float scale, float inverse) {
  float sums[LANES] = {};
  for (int64_t k = 0; k < group; k += LANES)
    for (int i = 0; i < LANES; i++) {
      float off = x[k + i] - code(x[k + i], inverse, -8, 7) * scale;
      sums[i] += off * off;
    }
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) sums[i] += sums[i + width];
  return sums[0];
}

// The largest magnitude goes to -d for each d of a grid (so its sign is the scale's, turned round): the scale with the
// least squared error wins, the first of equals.
constexpr int NUM_TRIED = 8;
constexpr float GRID[NUM_TRIED] = {-8.0f, -7.0f, -7.5f, -7.75f, -8.25f, -8.5f, -8.75f, -9.25f};

FAST float quantize_int4(const float* x, int64_t group, int8_t* q) {
  float lows[LANES] = {}, highs[LANES] = {}, low = 0, high = 0;
  for (int64_t k = 0; k < group; k += LANES)
    for (int i = 0; i < LANES; i++) {
      lows[i] = x[k + i] < lows[i] ? x[k + i] : lows[i];
      highs[i] = x[k + i] > highs[i] ? x[k + i] : highs[i];
    }
  for (int i = 0; i < LANES; i++) low = lows[i] < low ? lows[i] : low, high = highs[i] > high ? highs[i] : high;
  float top = high > -low ? high : low, scales[NUM_TRIED], inverses[NUM_TRIED], least = 0;
  for (int i = 0; i < NUM_TRIED; i++) {
    scales[i] = to_half_precision(top / GRID[i]);
    inverses[i] = scales[i] == 0 ? 0 : 1 / scales[i];
  }
  int best = 0;
  for (int i = 0; i < NUM_TRIED; i++) {
    float error = int4_error(x, group, scales[i], inverses[i]);
    if (i == 0 || error < least) best = i, least = error;
  }
  for (int64_t k = 0; k < group; k++) q[k] = (int8_t)(int32_t)code(x[k], inverses[best], -8, 7);
  return scales[best];
}

// One row into scratch, in the words that a panel is made of; its scales go to their place.
FAST void convert_row(const Job& job, int64_t row, const float* x, uint32_t* words) {
  if (job.kind == FLOAT32) {
    std::memcpy(words, x, 4 * job.padded);
    return;
  }
  if (job.kind == BFLOAT16) {
    auto* halves = (uint16_t*)words;
    for (int64_t k = 0; k < job.padded; k++) halves[k] = to_bfloat16(x[k]);
    return;
  }
  int64_t groups = job.padded / job.group;
  uint16_t* scales = job.scales + row / PANEL * groups * PANEL + row % PANEL;
  auto* codes = (int8_t*)words;
  for (int64_t g = 0; g < groups; g++) {
    const float* from = x + g * job.group;
    int8_t* to = codes + g * job.group;
    float scale = job.kind == INT8 ? quantize_int8(from, job.group, to) : quantize_int4(from, job.group, to);
    scales[g * PANEL] = half_bits(scale);
  }
  // q + 128 in eight bits, q + 8 in four: the sign bit the other way round.
  uint32_t sign = job.kind == INT8 ? 0x80808080u : 0x08080808u, kept = job.kind == INT8 ? ~0u : 0x0f0f0f0fu;
  for (int64_t w = 0; w < job.padded / 4; w++) words[w] = (words[w] ^ sign) & kept;
}

// Columns `begin` … `end` - 1 of a panel from scratch [64][stride], which is read a cache line at a time.
FAST void place_words(const uint32_t* scratch, int64_t stride, int64_t words, int64_t begin, int64_t end,
                      uint32_t* panel) {
  for (int64_t first = 0; first < words; first += LANES)
    for (int64_t w = first; w < first + LANES && w < words; w++)
      for (int64_t c = begin; c < end; c++) panel[w * PANEL + c] = scratch[c * stride + w];
}

FAST void place_nibbles(const uint32_t* scratch, int64_t stride, int64_t words, int64_t begin, int64_t end,
                        uint32_t* panel) {
  if (begin == 0 && end == PANEL) {
    for (int64_t first = 0; first < words; first += LANES)
      for (int64_t w = first; w < first + LANES && w < words; w++)
        for (int64_t c = 0; c < HALF; c++)
          panel[w * HALF + c] = scratch[c * stride + w] | scratch[(c + HALF) * stride + w] << 4;
    return;
  }
  for (int64_t c = begin; c < end; c++) {
    int shift = c < HALF ? 0 : 4;
    uint32_t kept = 0xf0f0f0f0u >> shift;
    for (int64_t w = 0; w < words; w++) {
      uint32_t& word = panel[w * HALF + c % HALF];
      word = (word & kept) | scratch[c * stride + w] << shift;
    }
  }
}

// A whole panel whose source has the panel's own type: only moved, at the pace of memory. Rows go side by side, so no
// prefetcher of the processor sees where they continue; and what is written is not read again soon.
__attribute__((target("avx2"))) void move_panel(const Job& job, int64_t panel) {
  int64_t size = job.kind == FLOAT32 ? 4 : 2, stride = job.source_stride * size;
  int64_t words = job.depth * size / 4, padded = job.padded * size / 4;
  const uint8_t* rows[PANEL];
  for (int64_t c = 0; c < PANEL; c++) rows[c] = job.source + (panel * PANEL + c - job.first_row) * stride;
  auto* to = (uint32_t*)job.data + panel * padded * PANEL;
  for (int64_t w = 0; w < words; w += LANES)
    for (int64_t c = 0; c < PANEL; c += LANES) {
      for (int i = 0; i < LANES; i++) _mm_prefetch((const char*)(rows[c + i] + 4 * w + AHEAD), _MM_HINT_T0);
      for (int64_t half = w; half < w + LANES; half += 8) {
        __m256i left[8], right[8];
        transpose(rows + c, 4 * half, left);
        transpose(rows + c + 8, 4 * half, right);
        uint32_t* line = to + half * PANEL + c;
        for (int i = 0; i < 8; i++) {
          _mm256_stream_si256((__m256i*)(line + i * PANEL), left[i]);
          _mm256_stream_si256((__m256i*)(line + i * PANEL + 8), right[i]);
        }
      }
    }
  _mm_sfence();
  std::memset(to + words * PANEL, 0, 4 * (padded - words) * PANEL);
}

// Whether `move_panel` can do it: it moves lines of 64 bytes, of 64 rows.
bool only_moved(const Job& job, int64_t panel) {
  bool same = (job.kind == FLOAT32 && job.source_dtype == 0) || (job.kind == BFLOAT16 && job.source_dtype == 1);
  return same && job.depth % (job.kind == FLOAT32 ? 16 : 32) == 0 && job.first_row <= panel * PANEL &&
         (panel + 1) * PANEL <= job.first_row + job.num_rows && __builtin_cpu_supports("avx2");
}

void pack_panel(const Job& job, int64_t panel, std::vector<float>& row, std::vector<uint32_t>& scratch) {
  if (only_moved(job, panel)) return move_panel(job, panel);
  int64_t per_word = job.kind == FLOAT32 ? 1 : job.kind == BFLOAT16 ? 2 : 4;
  int64_t words = job.padded / per_word, stride = words + SKEW, bytes = job.kind == INT4 ? HALF * 4 : PANEL * 4;
  int64_t begin = std::max(job.first_row - panel * PANEL, (int64_t)0);
  int64_t end = std::min(job.first_row + job.num_rows - panel * PANEL, PANEL);
  row.resize(job.padded);
  scratch.resize(PANEL * stride);
  for (int64_t c = begin; c < end; c++) {
    read_row(job, panel * PANEL + c, row.data());
    convert_row(job, panel * PANEL + c, row.data(), scratch.data() + c * stride);
  }
  auto* to = (uint32_t*)(job.data + panel * words * bytes);
  if (job.kind == INT4)
    place_nibbles(scratch.data(), stride, words, begin, end, to);
  else
    place_words(scratch.data(), stride, words, begin, end, to);
}

}  // namespace
}  // namespace wherry

using namespace wherry;

// Packs rows `first_row` … `first_row + num_rows - 1` of a matrix whose panels begin at `data` and `scales`.
//
// kind: 0 float32, 1 bfloat16, 2 int8, 3 int4, the last two with a scale for each `group` of the `depth` inputs, which
// are padded with zeros to `padded`, a multiple of 128. Source: rows `source_stride` elements apart, of float32 (dtype
// 0), bfloat16 (1) or float16 (2), with no alignment asked for. Padding beyond the last row is left as it is.
extern "C" __attribute__((visibility("default"))) void wherry_pack(
    int64_t kind, int64_t group, void* data, uint16_t* scales, int64_t depth, int64_t padded, int64_t first_row,
    int64_t num_rows, const void* source, int64_t source_dtype, int64_t source_stride, int64_t threads) {
  Job job{(Kind)kind, group,     depth,    padded,                 (uint8_t*)data, scales,
          first_row,  num_rows,  (const uint8_t*)source, source_dtype,           source_stride};
  int64_t last = (first_row + num_rows + PANEL - 1) / PANEL;
  std::atomic<int64_t> next{first_row / PANEL};
  auto work = [&] {
    std::vector<float> row;
    std::vector<uint32_t> scratch;
    for (int64_t panel; (panel = next.fetch_add(1)) < last;) pack_panel(job, panel, row, scratch);
  };
  // A thread is worth its start from a few hundred thousand weights on.
  int64_t useful = std::min({threads, last - first_row / PANEL, num_rows * depth / 250000 + 1});
  std::vector<std::thread> others;
  for (int64_t t = 1; t < useful; t++) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
}
