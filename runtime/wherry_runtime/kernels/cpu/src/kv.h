// How keys and values lie in memory, and the four types they are kept in.
//
// A layer's cache is [blocks][kv heads][block_size / 16][group]: a block is one range of bytes, and so is a head of it.
// A group holds 16 consecutive keys of one head, and their values, as attention reads them:
//   float32   keys [D][16] float32, values [16][Dp] float32
//   bfloat16  keys [D / 2][16][2] bfloat16, values [8][Dp][2] bfloat16: pairs of dimensions, and pairs of keys, in one word
//   fp8       the same with E4M3 (Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433), saturating at 448
//   int8      scales of the 16 keys float32, scales of the 16 values float32, then as fp8: value = q · scale,
//             scale = max |x| / 127 of one token's head; a code is the sign in the highest bit and |q| below
// Dp is D rounded up to 16. Zero bytes are zero keys and values in every type.
#pragma once
#include <cstdint>

namespace wherry::WHERRY_TARGET {

constexpr int GROUP = 16;  // keys
constexpr int MAX_HEAD_DIM = 256;
constexpr double LOG2_E = 1.4426950408889634;  // queries hold it, so scores are logarithms of two

enum class Format : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FP8 = 2, INT8 = 3 };

struct KVLayout {
  KVLayout(uint8_t* base, int64_t kv_heads, int64_t head_dim, int64_t block_size, Format format)
      : base(base), format(format), padded((head_dim + 15) / 16 * 16), groups(block_size / GROUP), kv_heads(kv_heads) {
    int64_t size = format == Format::FLOAT32 ? 4 : format == Format::BFLOAT16 ? 2 : 1;
    keys = format == Format::INT8 ? 2 * GROUP * sizeof(float) : 0;
    values = keys + GROUP * head_dim * size;
    bytes = values + GROUP * padded * size;
  }

  // Group `index` of a head of `block`.
  uint8_t* group(int64_t block, int64_t head, int64_t index) const {
    return base + ((block * kv_heads + head) * groups + index) * bytes;
  }

  uint8_t* base;
  Format format;
  int64_t padded, groups, kv_heads;
  int64_t keys, values, bytes;  // offsets within a group, and its size
};

}  // namespace wherry::WHERRY_TARGET
