"""Every generated file again: `make generate`. Whatever drifts is named by the tests, with a diff."""

import importlib.util
import subprocess
import sys

# Each is a module that writes its files when it is run.
GENERATORS = ["wherry_operator.api.generate", "hack.generate_values", "hack.reference"]
GOLDEN = ["tests/contracts"]


def main() -> None:
    for module in GENERATORS:
        if importlib.util.find_spec(module) is not None:
            subprocess.run([sys.executable, "-m", module], check=True)
    subprocess.run([sys.executable, "-m", "pytest", "-q", "--regenerate", *GOLDEN], check=True)


if __name__ == "__main__":
    main()
