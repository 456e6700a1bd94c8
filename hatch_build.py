"""Puts the native kernels into the wheel, where they can be compiled."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path(__file__).resolve().parent / "runtime" / "wherry_runtime" / "kernels" / "cpu"
sys.path.insert(0, str(KERNELS))
import build as native  # noqa: E402 - kernels/cpu/build.py, by its path: wherry itself is not installed yet


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Environment:

    `WHERRY_PREBUILT_KERNELS`  a library to take instead of compiling one
    `WHERRY_REQUIRE_KERNELS`   set: no library is an error; else the wheel is made without, and runs on PyTorch alone
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if prebuilt := os.environ.get("WHERRY_PREBUILT_KERNELS"):
            shutil.copyfile(prebuilt, native.LIBRARY)
        else:
            try:
                native.build()
            except native.BuildError as e:
                if os.environ.get("WHERRY_REQUIRE_KERNELS"):
                    raise
                self.app.display_warning(f"without native kernels: {e}")
                return
        build_data["artifacts"].append(str(native.LIBRARY.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"  # nothing of Python's own interface is used
