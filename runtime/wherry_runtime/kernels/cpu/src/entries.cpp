// The table of one target's kernels, by name.
#include "kernels.h"

namespace wherry::WHERRY_TARGET {

extern const Entry entries[];
#define WHERRY_ENTRY(name) {#name, name},
const Entry entries[] = {WHERRY_KERNELS(WHERRY_ENTRY){nullptr, nullptr}};
#undef WHERRY_ENTRY

}  // namespace wherry::WHERRY_TARGET
