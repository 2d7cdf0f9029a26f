"""A download as people see it: a bar on a terminal, a line per step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from anser.cli.messages import tr
from anser.cli.output import STDERR, console

if TYPE_CHECKING:
    from anser.ports import Progress

__all__ = ["Steps", "shown_progress"]

_STEP_BYTES = 16 * 1024 * 1024  # where the whole length is unknown


class Steps:
    """Tells `tell(bytes, total)` at the start, at each tenth, and at the end of a download."""

    def __init__(self, tell: Callable[[int, int | None], None]) -> None:
        self._tell = tell
        self._last = -1

    def __repr__(self) -> str:
        return f"<Steps {self._last}>"

    def __call__(self, done: int, total: int | None) -> None:
        """So many bytes are here, of so many if known."""
        step = done * 10 // total if total else done // _STEP_BYTES
        if step != self._last:
            self._last = step
            self._tell(done, total)


@contextmanager
def shown_progress() -> Generator[Progress]:
    """A progress to hand on: it shows itself on standard error from its first call on."""
    if sys.stderr.isatty():
        with _bar() as progress:
            yield progress
    else:
        yield Steps(_print_step)


@contextmanager
def _bar() -> Generator[Progress]:
    from rich import progress as parts

    bar = parts.Progress(
        parts.TextColumn(tr("progress.title")),
        parts.BarColumn(),
        parts.DownloadColumn(),
        parts.TransferSpeedColumn(),
        parts.TimeRemainingColumn(),
        console=console(stderr=True),
    )
    tasks: list[parts.TaskID] = []

    def show(done: int, total: int | None) -> None:
        if not tasks:
            tasks.append(bar.add_task("", total=total))
            bar.start()
        bar.update(tasks[0], completed=done, total=total)
        if done == total:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


def _print_step(done: int, total: int | None) -> None:
    megabytes = f"{done / 1e6:,.0f}"
    if total:
        share, whole = done * 100 // total, f"{total / 1e6:,.0f}"
        text = tr("progress.share", done=megabytes, total=whole, share=share)
    else:
        text = tr("progress.bytes", done=megabytes)
    print(text, file=STDERR, flush=True)
