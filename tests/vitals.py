"""What the operating system tells about a process: where it tells at all, as Linux does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["cpu_s", "limit_of", "memory_bytes", "needs_proc", "open_files"]

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells this about a process"
)


def memory_bytes(pid: int) -> int:
    """Resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1_024


def cpu_s(pid: int) -> float:
    """Seconds of processor time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_files(pid: int) -> int:
    """How many files and sockets it has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def limit_of(pid: int, name: str) -> str:
    """The soft limit of this name, such as "Max open files"."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return line.removeprefix(name).split()[0]
