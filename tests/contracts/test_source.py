"""What no source file of ours may hold, looked for on the syntax tree: ways to run what somebody sends, and guards that
`python -O` leaves out."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "operator").rglob("*.py"), *(ROOT / "runtime").rglob("*.py")])
# All of these run, while they read, whatever the writer liked; `multiprocessing` sends everything as pickles.
MODULES = frozenset(
    {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
    | {"multiprocessing", "xmlrpc"}
)
# PyTorch's collectives of Python objects pickle them.
NAMES = frozenset(
    {"recv_pyobj", "send_pyobj", "trust_remote_code", "allow_pickle", "broadcast_object_list", "all_gather_object"}
    | {"gather_object", "scatter_object_list", "send_object_list", "recv_object_list"}
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
SAFE_LOADERS = frozenset({"SafeLoader", "CSafeLoader", "_LOADER"})


def complaints(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and reason of all that is wrong."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, n.name) for n in names if n.name.split(".")[0] in MODULES)
                yield from ((node.lineno, n.name) for n in names if n.name == "torch.multiprocessing")
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES or module == "torch.multiprocessing":
                    yield node.lineno, module
                yield from ((node.lineno, n.name) for n in names if n.name in NAMES)
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in NAMES:
                yield node.lineno, name
            case ast.Assert():
                yield node.lineno, "assert"
            case ast.Call():
                yield from _call(node)


def _call(node: ast.Call) -> Iterator[tuple[int, str]]:
    name = ast.unparse(node.func)
    told = {word.arg: ast.unparse(word.value) for word in node.keywords}
    yield from ((node.lineno, word) for word in told if word in NAMES)
    if name in BUILTINS or name in ("os.system", "os.popen"):
        yield node.lineno, name
    if name == "torch.save" or (name == "torch.load" and told.get("weights_only") != "True"):
        yield node.lineno, name
    if told.get("shell", "False") != "False":
        yield node.lineno, "shell"
    if name == "yaml.load":
        loaders = [told.get("Loader", ""), *(ast.unparse(argument) for argument in node.args[1:])]
        if not any(one.rpartition(".")[2] in SAFE_LOADERS for one in loaders):
            yield node.lineno, name


def test_no_source_file_runs_what_somebody_sends() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {reason}"
        for path in FILES
        for line, reason in complaints(ast.parse(path.read_text(), str(path)))
    ]
    assert found == []


def test_the_files_are_there() -> None:
    names = {path.name for path in FILES}
    assert {"app.py", "upstream.py", "safetensors.py", "handlers.py"} & names >= {
        "app.py",
        "upstream.py",
        "handlers.py",
    }
    assert len(FILES) > 200


@pytest.mark.parametrize(
    "source, found",
    [
        ("import pickle", "pickle"),
        ("import os, marshal as m", "marshal"),
        ("from dill import loads", "dill"),
        ("from torch.multiprocessing import spawn", "torch.multiprocessing"),
        ("from multiprocessing.connection import Client", "multiprocessing.connection"),
        ("socket.recv_pyobj()", "recv_pyobj"),
        ("dist.broadcast_object_list(x)", "broadcast_object_list"),
        ("from torch.distributed import all_gather_object", "all_gather_object"),
        ("load(path, trust_remote_code=True)", "trust_remote_code"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=flag)", "torch.load"),
        ("torch.load(path, weights_only=True)", None),
        ("yaml.load(text, yaml.Loader)", "yaml.load"),
        ("yaml.load(text, Loader=yaml.SafeLoader)", None),
        ("def f(x):\n    assert x", "assert"),
        ("eval(text)", "eval"),
        ("model.eval()", None),
        ("re.compile(text)", None),
        ("exec(compile(text, '', 'exec'))", "exec"),
        ("subprocess.run(line, shell=True)", "shell"),
        ("os.system(line)", "os.system"),
    ],
)
def test_each_of_them_would_be_found(source: str, found: str | None) -> None:
    assert [reason for _, reason in complaints(ast.parse(source))][:1] == ([] if found is None else [found])
