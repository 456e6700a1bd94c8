"""One run of a container: its shim, and the state file by which a restarted node finds it again."""

import asyncio
import contextlib
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherry_local.files import read_json, write_json
from wherry_local.paths import ENV_MARK_CONTAINER
from wherry_local.processes import Identity, kill_marked

_SHIM = Path(__file__).with_name("shim.py")
_background: set[asyncio.Task[Any]] = set()


@dataclass(frozen=True)
class Exit:
    """How a run ended. `signal` is 0 unless a signal ended it, in which case `code` is 128 + signal."""

    code: int
    signal: int
    reason: str
    message: str
    started_at: str
    finished_at: str


class Run:
    """Run number `number` of the container whose files are in `directory`."""

    def __init__(self, directory: Path, number: int) -> None:
        self.directory = directory
        self.number = number
        self.log = directory / f"{number}.log"
        self.termination_log = directory / f"{number}.termination"
        self._state = directory / f"{number}.json"
        self.oom_killed = False

    @property
    def marker(self) -> str:
        """Value of the environment variable that all processes of this run carry."""
        return str(self.directory / str(self.number))

    def state(self) -> dict[str, Any]:
        """What the shim wrote; empty before it did."""
        return dict(read_json(self._state) or {})

    @classmethod
    def latest(cls, directory: Path) -> "Run | None":
        """The run with the highest number that left a state file."""
        numbers = [int(path.stem) for path in directory.glob("*.json") if path.stem.isdigit()]
        return cls(directory, max(numbers)) if numbers else None

    async def start(self, argv: list[str], env: dict[str, str], cwd: str) -> str:
        """Start the process; returns why it could not be started, or an empty text."""
        self.directory.mkdir(parents=True, exist_ok=True)
        env = env | {ENV_MARK_CONTAINER: self.marker}
        spec = {"argv": argv, "env": env, "cwd": cwd, "log": str(self.log), "state": str(self._state)}
        spec_file = self.directory / f"{self.number}.spec"
        write_json(spec_file, spec)
        with (self.directory / "shim.log").open("ab") as errors:
            shim = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(_SHIM),
                str(spec_file),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={key: value for key, value in env.items() if key.startswith("WHERRY_LOCAL_")},
                start_new_session=True,
            )
        reaper = asyncio.create_task(shim.wait())
        _background.add(reaper)
        reaper.add_done_callback(_background.discard)
        if shim.stdout is not None:
            await shim.stdout.read()  # the shim closes it when it has started the process, or could not
        state = self.state()
        spec_file.unlink(missing_ok=True)  # it holds the values of secrets
        if not state:
            return f"the shim ended with status {await reaper}; see {self.directory / 'shim.log'}"
        return str(state.get("start_error", ""))

    def _shim(self) -> Identity | None:
        return Identity.from_json(self.state().get("shim"))

    @property
    def session(self) -> int:
        """Session id of the container's processes; 0 before they run."""
        return int(self.state().get("pid", 0))

    def running(self) -> bool:
        """True while the shim watches over the process."""
        shim = self._shim()
        return shim is not None and shim.alive()

    async def wait(self) -> Exit:
        """Wait for the end of the run and of everything it started."""
        if (shim := self._shim()) is not None:
            await shim.wait()
        await asyncio.to_thread(kill_marked, ENV_MARK_CONTAINER, self.marker)
        return self.exit()

    def exit(self) -> Exit:
        """How the run ended, read from its state."""
        state = self.state()
        started, finished = str(state.get("started_at", "")), str(state.get("finished_at", ""))
        if error := state.get("start_error"):
            return Exit(128, 0, "StartError", str(error), finished, finished)
        if "exit_code" not in state:  # the node was lost with its shim: nobody saw the end
            return Exit(137, 9, "ContainerStatusUnknown", "The process was killed along with its node", started, "")
        code = int(state["exit_code"])
        reason = "OOMKilled" if self.oom_killed else "Completed" if code == 0 else "Error"
        return Exit(code, int(state["signal"]), reason, "", started, finished)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to the process group, SIGKILL after `grace_s` seconds; returns when all is gone."""
        shim = self._shim()
        if shim is not None and shim.send(signal.SIGTERM):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await shim.wait()
                    return
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL to the process group."""
        shim = self._shim()
        if shim is not None and shim.send(signal.SIGUSR1):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await shim.wait()
                    return
        await asyncio.to_thread(kill_marked, ENV_MARK_CONTAINER, self.marker)
