"""Runs one container's process and outlives the node: `python -I -S shim.py SPEC` (standard library only).

It starts the process in a session of its own, copies its output line by line into a log in the CRI format, and writes
the process's fate into a state file, so that a node that was restarted learns exit codes it was not there for.
SIGTERM is passed on to the process group; SIGUSR1 kills the group. When the process ends, so does all of its group:
the group's number cannot have been reused then, since the ended process has not been reaped yet.
"""

import datetime
import json
import os
import selectors
import signal
import sys
import time
from typing import Any

_LINE = 16 * 1024  # longest piece of a line in one log entry, as container runtimes have it
_LOG_LIMIT = 16 * 1024 * 1024


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


class Log:
    """A log file in the CRI format; when it is full it becomes `<path>.1` and a new one begins."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the process
        self.pending = {"stdout": b"", "stderr": b""}

    def write(self, stream: str, data: bytes) -> None:
        """Append whole lines; keep what has no end yet."""
        *lines, rest = (self.pending[stream] + data).split(b"\n")
        entries = []
        for line in lines:
            while len(line) > _LINE:
                entries.append((b"P", line[:_LINE]))
                line = line[_LINE:]
            entries.append((b"F", line))
        while len(rest) > _LINE:
            entries.append((b"P", rest[:_LINE]))
            rest = rest[_LINE:]
        self.pending[stream] = rest
        self._append(stream, entries)

    def _append(self, stream: str, entries: list[tuple[bytes, bytes]]) -> None:
        head = f"{_now()} {stream} ".encode()
        self.file.write(b"".join(head + tag + b" " + line + b"\n" for tag, line in entries))
        if self.file.tell() > _LOG_LIMIT:
            os.replace(self.path, self.path + ".1")
            self.file.close()
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Write lines that never ended."""
        for stream, rest in self.pending.items():
            if rest:
                self._append(stream, [(b"F", rest)])
        self.file.close()


def _write_state(path: str, state: dict[str, object]) -> None:
    with open(path + ".new", "w") as file:
        json.dump(state, file)
    os.replace(path + ".new", path)


def _start_ticks(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def _exec(spec: dict[str, Any], out: int, err: int, failure: int) -> None:
    """In the child: become the container's process, or write why not into `failure`."""
    argv: list[str] = spec["argv"]
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.chdir(spec["cwd"])
        os.execvpe(argv[0], argv, spec["env"])  # noqa: S606 - no shell is the point
    except FileNotFoundError as error:
        if error.filename == spec["cwd"]:
            os.write(failure, f"the working directory {spec['cwd']!r} does not exist".encode())
        else:
            os.write(failure, f'exec: "{argv[0]}": executable file not found in $PATH'.encode())
    except OSError as error:
        os.write(failure, f'exec: "{argv[0]}": {error.strerror}'.encode())
    finally:
        os._exit(127)


def _copy_output(pipes: dict[int, str], log: Log, wakeup: int, pid: int) -> None:
    """Copy output until the process ends, then what is still in the pipes."""
    selector = selectors.DefaultSelector()
    selector.register(wakeup, selectors.EVENT_READ)
    for pipe in pipes:
        os.set_blocking(pipe, False)
        selector.register(pipe, selectors.EVENT_READ)
    ended = False
    while True:
        ready = selector.select(0 if ended else None)
        for key, _ in ready:
            descriptor = key.fd
            if descriptor == wakeup:
                os.read(wakeup, 4096)
                continue
            try:
                data = os.read(descriptor, 65536)
            except BlockingIOError:
                continue
            if data:
                log.write(pipes[descriptor], data)
            else:
                selector.unregister(descriptor)
        if ended and not [key for key, _ in ready if key.fd != wakeup]:
            return
        if not ended and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            ended = True
            _kill_group(pid)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    time.sleep(0.01)  # lets those just killed close their ends of the pipes


def main() -> None:
    """Run the process that the file in argv[1] describes."""
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    pid = 0

    def forward(number: int) -> None:
        if pid:
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                return

    signal.signal(signal.SIGTERM, lambda *_: forward(signal.SIGTERM))
    signal.signal(signal.SIGUSR1, lambda *_: forward(signal.SIGKILL))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    fail_read, fail_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _exec(spec, out_write, err_write, fail_write)
    for descriptor in (out_write, err_write, fail_write):
        os.close(descriptor)
    failure = os.read(fail_read, 4096).decode()
    if failure:
        os.waitpid(pid, 0)
        _write_state(spec["state"], {"start_error": failure, "finished_at": _now()})
        return
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()[:8]
    state: dict[str, object] = {"pid": pid, "started": f"{boot}/{_start_ticks(pid)}", "started_at": _now()}
    state["shim"] = {"pid": os.getpid(), "started": f"{boot}/{_start_ticks(os.getpid())}"}
    _write_state(spec["state"], state)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tells the node that the process has started
    log = Log(spec["log"])
    _copy_output({out_read: "stdout", err_read: "stderr"}, log, wake_read, pid)
    log.close()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    state |= {"exit_code": code if code >= 0 else 128 - code, "signal": max(0, -code), "finished_at": _now()}
    _write_state(spec["state"], state)


if __name__ == "__main__":
    main()
