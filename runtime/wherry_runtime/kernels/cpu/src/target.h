// Which build of the kernels runs on this processor.
#pragma once
#include "abi.h"

namespace wherry {

struct Target {
  const char* name;
  const Entry* entries;  // ends with a null name
  bool (*supported)();
};

const Target& chosen_target();

}  // namespace wherry
