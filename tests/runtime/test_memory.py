"""An engine that really runs out of memory: a child process with a limit on its address space (RLIMIT_AS)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.runtime.random_models import CASES

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, gc, json, resource, sys
from pathlib import Path
import torch
from tests.runtime.engines import ask_all, running
from wherry_runtime.engine.runner import ModelRunner

PROMPTS = [[(7 * i + j) % 300 for j in range(10 + 23 * i)] for i in range(12)]
PER_TOKEN = 1 << 19  # bytes; a backend with hungry activations

real = ModelRunner.run
failed = []

def hungry(self, prepared, live):
    count = sum(len(s.tokens) for s in prepared.sequences)
    try:
        scratch = torch.zeros(count, PER_TOKEN, dtype=torch.uint8)
    except RuntimeError as error:
        failed.append(str(error))
        raise
    result = real(self, prepared, live)
    del scratch
    return result

ModelRunner.run = hungry

def own_size():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

async def answers(directory, room):
    async with running(Path(directory), max_batched_tokens=512, max_running=16) as engine:
        async def all_of_them():
            return [a.ids for a in await ask_all(engine, PROMPTS, max_tokens=12, seed=5, ignore_eos=True)]
        if room is None:
            return await all_of_them()
        await ask_all(engine, [[1, 2]], max_tokens=2)  # threads and their stacks are there
        resource.setrlimit(resource.RLIMIT_AS, (own_size() + room, resource.RLIM_INFINITY))
        try:
            return await all_of_them()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

expected = asyncio.run(answers(sys.argv[1], None))
assert not failed
got = asyncio.run(answers(sys.argv[1], int(sys.argv[2])))
print(json.dumps({"same": got == expected, "lengths": [len(a) for a in got], "failed": failed}))
"""


@pytest.mark.parametrize("room_mib", [32, 96])
def test_steps_that_run_out_of_memory_lose_nothing(room_mib: int, tmp_path: Path) -> None:
    """The first step wants 256 MiB. With room for 32 or 96 all requests end with the tokens they have otherwise."""
    CASES[0].build(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(room_mib << 20)],
        cwd=CHECKOUT,
        env=os.environ | {"MALLOC_ARENA_MAX": "2", "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    result = json.loads(child.stdout.splitlines()[-1])
    assert result["same"]
    assert result["lengths"] == [12] * 12
    assert 1 <= len(result["failed"]) <= 40
    assert all("can't allocate memory" in message for message in result["failed"])
