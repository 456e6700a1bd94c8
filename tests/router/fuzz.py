"""Requests that nobody would send, made from the router's own description, while others are to get whole answers.

    python -m tests.router.fuzz [--seconds 3600] [--seed N]

Schemathesis makes them: valid and invalid bodies, headers, methods and paths, in sequences. No answer may be a 5xx or
break what the description says, nothing without the key may pass, and the streams beside them are not to notice.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

from tests.router.harness import Process, router, stream, text_of, worker

KEY = "the-key-of-the-fuzzed-router"
# Schemathesis would have every body accepted that fits the schema. Which values go together the schema does not say.
NOT_PROMISED = "positive_data_acceptance"


def fuzz(url: str, *options: str) -> str:
    """Why it failed, in Schemathesis' words; empty: it did not."""
    command = [Path(sys.executable).with_name("st"), "run", url + "/openapi.json", "--no-color"]
    checks = ["--checks", "all", "--exclude-checks", NOT_PROMISED, "-H", f"Authorization: Bearer {KEY}"]
    with tempfile.TemporaryDirectory() as directory:  # it writes files of its own
        done = subprocess.run(
            [*map(str, command), *checks, *options], cwd=directory, capture_output=True, text=True, check=False
        )
    return "" if done.returncode == 0 else done.stdout[-20_000:] + done.stderr[-2_000:]


class Clients(threading.Thread):
    """One stream after the other, all of the same answer, until `stop`."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.answers: list[str] = []
        self._url = url
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            chunks = stream(self._url, "Tell me of boats", key=KEY, max_tokens=20, temperature=0)
            self.answers.append(text_of(chunks) if chunks[-1] == {} else "cut")

    def stop(self) -> list[str]:
        """Every answer so far."""
        self._stopped.set()
        self.join(60)
        return self.answers


def complaints(processes: list[Process]) -> list[str]:
    """What went wrong inside."""
    return [str(line) for p in processes for line in p.lines() if line["level"] in ("error", "critical")]


def play(seconds: float, seed: int) -> str:
    """Why it failed; empty: it did not."""
    with ExitStack() as stack:
        workers = [stack.enter_context(worker()) for _ in range(2)]
        front = stack.enter_context(router(*(w.url for w in workers), env={"WHERRY_API_KEY": KEY}))
        clients = Clients(front.url)
        clients.start()
        failure = fuzz(front.url, "--max-time", str(int(seconds)), "--seed", str(seed), "--workers", "2")
        answers = clients.stop()
        print(f"{len(answers)} streams beside it, {len(set(answers))} different answers")
        if failure or len(set(answers)) != 1 or "cut" in answers:
            return failure or f"answers beside it: {set(answers)}"
        return "\n".join(complaints([front, *workers]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    failure = play(args.seconds, args.seed)
    print(failure or "nothing was lost")
    return bool(failure)


if __name__ == "__main__":
    sys.exit(main())
