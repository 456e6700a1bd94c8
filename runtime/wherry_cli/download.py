"""A model's download as a person sees it: a bar on a terminal, a line now and then elsewhere."""

import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from wherry_runtime.loading.locate import local_uri
from wherry_runtime.sources.progress import Download

REFRESH_S = 0.2
LINE_S = 10.0
_console = Console(stderr=True, highlight=False)


def download(uri: str, cache: Path) -> str:
    """`uri` as one of something that is here: downloaded into `cache` if it is not. Ctrl-C ends it and keeps what came.

    Raises:
        ModelError: why it cannot be had.
    """
    progress, stop = Download(), threading.Event()
    found: list[str | BaseException] = []

    def run() -> None:
        try:
            found.append(local_uri(uri, cache, progress, stop))
        except BaseException as error:  # told by the thread that waits
            found.append(error)

    worker = threading.Thread(target=run, name="wherry-pull")
    worker.start()
    try:
        (_bar if _console.is_terminal else _lines)(progress, worker)
    finally:
        stop.set()
        worker.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _bar(progress: Download, worker: threading.Thread) -> None:
    columns = (TextColumn("Downloading"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=_console, transient=True) as bar:
        task = bar.add_task("download", total=None, text="", visible=False)
        while worker.is_alive():
            at = progress.snapshot()
            bar.update(task, completed=at.done, total=at.total or None, text=str(at), visible=progress.active)
            worker.join(REFRESH_S)


def _lines(progress: Download, worker: threading.Thread) -> None:
    told = time.monotonic()
    while worker.is_alive():
        if progress.active and time.monotonic() - told >= LINE_S:
            told = time.monotonic()
            _console.print(f"Downloading: {progress.snapshot()}", soft_wrap=True)
        worker.join(REFRESH_S)
