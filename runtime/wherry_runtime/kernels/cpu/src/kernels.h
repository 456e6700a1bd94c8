// Every kernel's declaration: its operands are described where it is defined. One line per kernel, in this one list.
#pragma once
#include "abi.h"

#define WHERRY_KERNELS(X) \
  X(linear_f32)           \
  X(linear_bf16)          \
  X(linear_int8)          \
  X(linear_int4)          \
  X(linear_k4)            \
  X(linear_k5)            \
  X(linear_k6)            \
  X(to_bf16)              \
  X(quantize_int8)        \
  X(add_outliers)         \
  X(embed)                \
  X(all_reduce)           \
  X(meet)                 \
  X(rms_norm)             \
  X(layer_norm)           \
  X(activation)           \
  X(add_positions)        \
  X(add_scaled)           \
  X(scale)                \
  X(rope_and_cache)       \
  X(attention_plan)       \
  X(attention)            \
  X(argmax)               \
  X(sample_filter)        \
  X(sample_draw)

namespace wherry::WHERRY_TARGET {
#define WHERRY_DECLARE(name) void name(const Call& call, Context& context);
WHERRY_KERNELS(WHERRY_DECLARE)
#undef WHERRY_DECLARE
}  // namespace wherry::WHERRY_TARGET
