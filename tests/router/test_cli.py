"""`wherry`: lazily imported, plain about mistakes."""

import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from tests.router.harness import ROOT, TINY, Process


def wherry(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wherry_cli.main", *args]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=60)


def test_help_lists_everything_and_imports_nothing_heavy() -> None:
    code = """
import sys
from wherry_cli.main import app
try:
    app(["--help"], prog_name="wherry")
except SystemExit:
    pass
heavy = {"torch", "kubernetes", "kopf", "fastapi", "aiohttp", "uvicorn"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in ("serve", "chat", "plan", "local", "version"):
        assert name in result.stdout


def test_version() -> None:
    assert re.fullmatch(r"wherry \d+\.\d+\.\d+\n", wherry("version").stdout)


@pytest.mark.parametrize(
    "args, message",
    [
        (["serve", "/no/such/dir"], "there is no directory /no/such/dir"),
        (["serve", "sample://nope"], "nope"),
        (["serve", "hf://nobody"], "hf://"),
        (["chat", "--url", "http://127.0.0.1:9"], "is the server running?"),
        (["chat", "--url", "nonsense"], "is not a URL"),
    ],
)
def test_mistakes_are_told_without_traceback(args: list[str], message: str) -> None:
    result = wherry(*args, stdin="hello")
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_serve_on_a_taken_port(tiny_serve: Process) -> None:
    result = wherry("serve", str(TINY), "--port", str(urlsplit(tiny_serve.url).port))
    assert result.returncode == 1
    assert "choose another with --port" in result.stderr


def test_serve_says_where_and_how(tiny_serve: Process) -> None:
    log = tiny_serve.log()
    assert f"curl {tiny_serve.url}/v1/chat/completions" in log
    assert f"wherry chat --url {tiny_serve.url}" in log


def test_piped_chat(tiny_serve: Process) -> None:
    args = ["chat", "--url", tiny_serve.url, "--max-tokens", "8", "--temperature", "0"]
    result = wherry(*args, stdin="Tell me about boats.")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert wherry(*args, stdin="Tell me about boats.").stdout == result.stdout
    assert "no question" in wherry(*args, stdin="  \n").stderr
    wrong = wherry(*args, "--model", "other", stdin="hello")
    assert (wrong.returncode, "is not served here" in wrong.stderr) == (1, True)
