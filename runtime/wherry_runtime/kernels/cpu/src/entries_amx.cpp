// The table of the target with AMX: its own matrix products first, and for the rest what it builds on. The first of a
// name counts.
#include "kernels.h"

namespace wherry::avx512bf16 {
#define WHERRY_DECLARE(name) void name(const Call& call, Context& context);
WHERRY_KERNELS(WHERRY_DECLARE)
#undef WHERRY_DECLARE
}  // namespace wherry::avx512bf16

namespace wherry::WHERRY_TARGET {

extern const Entry entries[];
#define WHERRY_ENTRY(name) {#name, avx512bf16::name},
const Entry entries[] = {
    {"linear_bf16", linear_bf16},
    {"linear_int8", linear_int8},
    {"linear_int4", linear_int4},
    WHERRY_KERNELS(WHERRY_ENTRY){nullptr, nullptr},
};
#undef WHERRY_ENTRY

}  // namespace wherry::WHERRY_TARGET
