"""Building a binary from its Go module, for machines that reach a module proxy but no release."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wherry_local.assets.catalog import Asset

_OUTPUT_LINES = 15


class BuildError(Exception):
    """Go could not build it; the message holds the end of what Go said."""


def have_go() -> bool:
    """True when there is a Go to build with."""
    return shutil.which("go") is not None


def _go(arguments: Sequence[str], directory: Path, env: dict[str, str] | None = None) -> str:
    """Run Go in `directory`; returns its output. Raises BuildError."""
    settings = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -buildvcs=false", "GOWORK": "off"} | (env or {})
    done = subprocess.run(["go", *arguments], cwd=directory, env=settings, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        end = "\n".join(done.stderr.splitlines()[-_OUTPUT_LINES:])
        raise BuildError(f"go {' '.join(arguments[:2])} failed with status {done.returncode}:\n{end}")
    return done.stdout


def staging_replacements(go_mod: str, version: str) -> list[str]:
    """The `replace` lines that a module needs to build Kubernetes `version`.

    Kubernetes' go.mod points its own libraries at directories beside it (`k8s.io/api => ./staging/src/k8s.io/api`).
    They are published too, with 0 in place of the major version 1.
    """
    names = re.findall(r"^\s*(\S+) => \./staging/\S+$", go_mod, re.MULTILINE)
    return [f"\t{name} => {name} v0.{version.removeprefix('1.')}" for name in names]


def _write_module(asset: Asset, directory: Path) -> None:
    """A module in `directory` that requires the asset's, so that its commands resolve to its own dependencies."""
    answer = json.loads(_go(["mod", "download", "-json", f"{asset.module}@v{asset.version}"], directory))
    source = Path(answer["Dir"])
    go_mod = (source / "go.mod").read_text()
    language = re.search(r"^go (\S+)$", go_mod, re.MULTILINE)
    lines = ["module wherry.invalid/build", "", f"go {language[1] if language else '1.24'}", ""]
    lines += [f"require {asset.module} v{asset.version}", ""]
    if replacements := staging_replacements(go_mod, asset.version):
        lines += ["replace (", *replacements, ")", ""]
    (directory / "go.mod").write_text("\n".join(lines))
    shutil.copyfile(source / "go.sum", directory / "go.sum")


def _linker_flags(asset: Asset) -> str:
    flags = "-s -w"
    if asset.module == "k8s.io/kubernetes":
        version, minor = "k8s.io/component-base/version", asset.version.split(".")[1]
        flags += f" -X {version}.gitVersion=v{asset.version} -X {version}.gitMajor=1 -X {version}.gitMinor={minor}"
    return flags


def build(asset: Asset, directory: Path) -> Path:
    """Build the binary and put it at `directory/<name>`; returns its path. Raises BuildError, leaving nothing."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch_name:
        scratch = Path(scratch_name)
        flags = ["-trimpath", "-ldflags", _linker_flags(asset)]
        binary = scratch / "bin" / asset.name
        if asset.replaces:
            _write_module(asset, scratch)
            _go(["build", *flags, "-o", str(binary), asset.package], scratch)
        else:
            env = {"GOBIN": str(binary.parent), "GOFLAGS": "-buildvcs=false"}
            _go(["install", *flags, f"{asset.package}@v{asset.version}"], scratch, env)
        return binary.replace(directory / asset.name)
