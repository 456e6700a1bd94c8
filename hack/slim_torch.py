#!/usr/bin/env python3
"""Makes a CPU installation out of PyPI's CUDA wheel of torch, for where PyTorch's CPU index cannot be reached.

    slim_torch.py SITE_PACKAGES

torch's extension module is linked against CUDA's libraries, so they must be there to import it, but without
a GPU not one of their functions is called. Each is replaced by a stub: a library with the same name, symbols and symbol
versions whose functions trap. Headers, static archives and libraries that nothing is linked against go. 5.2 GB become
1.2 GB. Needs binutils (nm, readelf, as, ld).
"""

import collections
import pathlib
import shutil
import subprocess
import sys
import tempfile

# Small, and called on a machine without a GPU too: they are what says that there is none.
KEPT = ("libcudart.so", "libcupti.so")
# Torch's own that only a GPU can use; the second one is loaded on demand by CUDA's linear algebra.
TORCH_STUBS = ("libtorch_nvshmem.so",)
TORCH_UNUSED = ("lib/libtorch_cuda_linalg.so", "include", "share", "test")


def output(*command: str | pathlib.Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def dynamic(library: pathlib.Path, tag: str) -> list[str]:
    """The values of a library's dynamic section with this tag: NEEDED, SONAME."""
    lines = output("readelf", "-d", library).splitlines()
    return [line.split("[")[1].rstrip("]") for line in lines if f"({tag})" in line]


def symbols(library: pathlib.Path) -> list[tuple[str, str, int, bool]]:
    """(name, version or "", size, is a function) of all that the library defines."""
    found = []
    for line in output("nm", "-D", "--defined-only", "-S", library).splitlines():
        *numbers, kind, name = line.split()
        if kind == "A":
            continue
        name, _, version = name.replace("@@", "@").partition("@")
        found.append((name, version, int(numbers[1], 16) if len(numbers) == 2 else 8, kind in "TtWi"))
    return found


def stub(library: pathlib.Path) -> None:
    """Replaces a library by its stub."""
    functions, data, versions = [], [], collections.defaultdict(list)
    for name, version, size, is_function in symbols(library):
        versions[version].append(name)
        if is_function:
            functions.append(f'.globl "{name}"\n.type "{name}",@function\n"{name}":')
        else:
            data.append(f'.globl "{name}"\n.type "{name}",@object\n.size "{name}",{size}\n"{name}": .zero {size}')
    text = [
        "\t.text",
        *functions,
        "\tud2",
        "\t.bss",
        "\t.balign 64",
        *data,
        '\t.section .note.GNU-stack,"",@progbits',
        "",
    ]
    script = [f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in versions.items() if version]
    soname = dynamic(library, "SONAME")[0]
    library.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        source, object_file, map_file = (pathlib.Path(scratch, f"stub.{end}") for end in ("s", "o", "map"))
        source.write_text("\n".join(text))
        map_file.write_text("".join(script))
        output("as", "-o", object_file, source)
        versioned = ["--version-script", map_file] if script else []
        output("ld", "-shared", "-soname", soname, *versioned, "-o", library, object_file)


def slim(site: pathlib.Path) -> None:
    """Leaves of torch and CUDA in `site` what a CPU needs."""
    torch = site / "torch"
    for name in TORCH_UNUSED:
        path = torch / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in TORCH_STUBS:
        if (library := torch / "lib" / name).exists():
            stub(library)
    needed = {n for library in [*torch.glob("lib/*.so*"), *torch.glob("_C*.so")] for n in dynamic(library, "NEEDED")}
    for path in sorted((site / "nvidia").rglob("*")):
        if not path.is_file():
            continue
        if path.name.startswith(KEPT):
            continue
        if path.name in needed:
            stub(path)
        else:
            path.unlink()


def main() -> None:
    site = pathlib.Path(sys.argv[1])
    before = int(output("du", "-sm", site).split()[0])
    slim(site)
    print(f"slim_torch: {site}: {before} MB became {output('du', '-sm', site).split()[0]} MB")


if __name__ == "__main__":
    main()
