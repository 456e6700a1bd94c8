#include "target.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

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
#ifdef WHERRY_AMX
namespace amx {
extern const Entry entries[];
}
#endif

static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
static bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

#ifdef WHERRY_AMX
// Whether the processor has the instructions and Linux lets this process use them: their registers are large, so they are
// given on request, once for all threads (https://docs.kernel.org/arch/x86/xstate.html). It is refused where the kernel is
// older than 5.16, in some sandboxes, and where a thread's alternative signal stack is too small for them.
static bool has_amx() {
#ifdef WHERRY_EMULATE_AMX
  return has_avx512bf16();
#else
  constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25, BF16 = 1u << 22, WANTED = TILE | INT8 | BF16;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & WANTED) == WANTED &&
         !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#endif
}
#endif

// Best first.
static const Target targets[] = {
#ifdef WHERRY_AMX
    {"amx", amx::entries, has_amx},
#endif
    {"avx512bf16", avx512bf16::entries, has_avx512bf16},
    {"avx512", avx512::entries, has_avx512},
    {"avx2", avx2::entries, has_avx2},
};
static const Entry no_entries[] = {{nullptr, nullptr}};
static const Target none = {"none", no_entries, nullptr};

static const Target& choose() {
  const char* wanted = std::getenv("WHERRY_CPU_TARGET");
  for (const Target& target : targets)
    if ((!wanted || !*wanted || !std::strcmp(wanted, target.name)) && target.supported()) return target;
  return none;
}

const Target& chosen_target() {
  static const Target& target = choose();
  return target;
}

}  // namespace wherry
