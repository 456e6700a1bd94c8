"""What a person sees while something takes its time."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

# Progress goes to stderr, so that `$(wherry local assets)` and `eval "$(wherry local env)"` get answers alone.
console = Console(stderr=True, highlight=False)
_REMIND_S = 10.0


@contextlib.contextmanager
def step(text: str) -> Iterator[Callable[[str], None]]:
    """One line per step with the time it took; a spinner meanwhile, or a line every 10 s where there is no terminal."""
    began, detail, ended = time.monotonic(), [""], threading.Event()

    def describe() -> str:
        return f"{text} {detail[0]} [dim]{time.monotonic() - began:.0f} s[/]"

    def keep_telling(tell: Callable[[str], Any], every_s: float) -> None:
        while not ended.wait(every_s):
            tell(describe())

    def report(news: str) -> None:
        detail[0] = f"[dim]{news}[/]"

    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            status = stack.enter_context(console.status(describe()))
            teller = threading.Thread(target=keep_telling, args=(status.update, 0.5), daemon=True)
        else:
            teller = threading.Thread(target=keep_telling, args=(console.print, _REMIND_S), daemon=True)
        teller.start()
        try:
            yield report
        except BaseException:
            console.print(f"[red]✗[/] {text} [dim]{time.monotonic() - began:.1f} s[/]")
            raise
        finally:
            ended.set()
            teller.join()
    took = time.monotonic() - began
    failed = "failed" in detail[0]
    mark = "[yellow]–[/]" if failed else "[green]✓[/]"
    if took > 0.05 or failed:
        console.print(f"{mark} {text} [dim]{took:.1f} s[/]" + (f" {detail[0]}" if failed else ""), soft_wrap=True)
