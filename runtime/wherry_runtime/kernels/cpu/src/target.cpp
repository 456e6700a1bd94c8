#include "target.h"

#include <cstdlib>
#include <cstring>

namespace wherry {

namespace avx2 {
extern const Entry entries[];
}
namespace avx512 {
extern const Entry entries[];
}
namespace avx512bf16 {
extern const Entry entries[];
}

static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
static bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Best first.
static const Target targets[] = {
    {"avx512bf16", avx512bf16::entries, has_avx512bf16},
    {"avx512", avx512::entries, has_avx512},
    {"avx2", avx2::entries, has_avx2},
};
static const Entry no_entries[] = {{nullptr, nullptr}};
static const Target none = {"none", no_entries, nullptr};

static const Target& choose() {
  const char* wanted = std::getenv("WHERRY_CPU_TARGET");
  for (const Target& target : targets)
    if (target.supported() && (!wanted || !*wanted || !std::strcmp(wanted, target.name))) return target;
  return none;
}

const Target& chosen_target() {
  static const Target& target = choose();
  return target;
}

}  // namespace wherry
