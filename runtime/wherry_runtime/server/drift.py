"""Measures, beside a worker that serves, what its model lost by being rounded as it was loaded."""

import asyncio
import contextlib
import logging
import os
import sys

import msgspec

from wherry_runtime.server.surface import Rounded

log = logging.getLogger("wherry.worker")

LIMIT_S = 600.0
NICE = 10  # a tenth of what who answers gets when both want the same core
# No secrets for what only reads weights.
ENVIRONMENT = (
    "PATH",
    "PYTHONPATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "WHERRY_CPU_LIBRARY",
    "WHERRY_CPU_TARGET",
)


class Drift(msgspec.Struct, omit_defaults=True):
    """What `GET /health` tells as `quality`.

    Attributes:
        method: how weights are rounded.
        divergence: mean Kullback-Leibler divergence from the model as it was, in nats per token.
        change: of perplexity, relative.
        tokens: that were looked at.
        error: why nothing was measured.
    """

    method: str
    divergence: float | None = None
    change: float | None = None
    tokens: int = 0
    error: str = ""


async def measured(model: Rounded, memory: int) -> Drift:
    """What `quality.drift` finds, in a process of its own that ends with this call, within LIMIT_S.

    Args:
        memory: bytes that it may take.
    """
    command = [sys.executable, "-m", "wherry_runtime.quality.drift", str(model.directory), model.method]
    process = await asyncio.create_subprocess_exec(
        *(*command, "--group", str(model.group), "--memory", str(memory)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k in ENVIRONMENT} | {"OMP_NUM_THREADS": "1"},
    )
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
        async with asyncio.timeout(LIMIT_S):
            out, _ = await process.communicate()
        found = msgspec.json.decode(out, type=_Found)
    except TimeoutError:
        return Drift(model.method, error=f"measuring it took longer than {LIMIT_S:.0f} s")
    except msgspec.MsgspecError:
        return Drift(model.method, error=f"measuring it failed, with exit status {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Drift(model.method, found.divergence, found.change, found.tokens, found.error)


class _Found(msgspec.Struct):
    divergence: float | None = None
    change: float | None = None
    tokens: int = 0
    error: str = ""
