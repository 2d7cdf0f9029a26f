"""What the kernel says of processes: CPU time and memory of one and all below it. Linux only.

Theory of operation. CPU time is user and system time from `/proc/PID/stat`, threads that have
ended included, and of children that have ended and were waited for; its grain is a clock tick (10
ms), so a reading over a second of work is good to a percent. What the network stack does for a
loopback connection is done, and counted, in the process that sends. Memory is the proportional set
size: pages that several processes share are divided among them, so that sums are true.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Stat", "cpu_s", "descriptors", "ending", "family", "memory_mb", "parse_stat", "pinned"]

_PROC = Path("/proc")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """A line of `/proc/PID/stat`, as far as it is wanted."""

    pid: int
    parent: int
    ticks: int  # user and system time, with that of children that were waited for


def parse_stat(line: str) -> Stat:
    """The line, read (proc(5)). A program's name stands in brackets and may hold anything."""
    name_end = line.rindex(")")
    rest = line[name_end + 2 :].split()
    return Stat(
        pid=int(line[: line.index(" ")]),
        parent=int(rest[1]),
        ticks=sum(map(int, rest[11:15])),  # utime, stime, cutime, cstime
    )


def family(pid: int) -> list[Stat]:
    """The process and all below it, as they are now; empty if it is gone."""
    found: dict[int, Stat] = {}
    below: dict[int, list[int]] = defaultdict(list)
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it ended while it was read
                stat = parse_stat((folder / "stat").read_text("utf-8", "replace"))
                found[stat.pid] = stat
                below[stat.parent].append(stat.pid)
    every = [pid] if pid in found else []
    for one in every:
        every += below[one]
    return [found[one] for one in every]


def cpu_s(pid: int) -> float:
    """CPU seconds that the process and all below it have taken."""
    return sum(one.ticks for one in family(pid)) * _TICK_S


def memory_mb(pid: int) -> float:
    """Megabytes (1e6) that the process and all below it hold."""
    return sum(_pss_kib(one.pid) for one in family(pid)) * 1024 / 1e6


def _pss_kib(pid: int) -> int:
    with suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


@contextmanager
def pinned(core: int | None) -> Generator[None]:
    """What is started inside runs on this core only; on any, if it is None."""
    before = os.sched_getaffinity(0)
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def descriptors() -> Generator[int]:
    """As many open files as this process, and what it starts, may have; yields how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def ending() -> Generator[None]:
    """SIGTERM ends the harness as Ctrl-C does: what it has started is stopped."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
