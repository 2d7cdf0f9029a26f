"""The mock engine and the load: compiled, started, and what they and the kernel counted.

Theory of operation. `Tools.make` compiles `engine.c` and `load.c` with the machine's C compiler
into a folder of the caller's. A `Window` is what one run of the load saw between its words "begin"
and "end"; CPU times are read when these are heard, each a few milliseconds late.

Invariants: a run with a single wrong answer is no result (`WireError`), nor is one whose CPU times
cannot be true: more than a core for who has one core.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from anser.core.errors import AnserError
from bench.wire.kernel import cpu_s, memory_mb, pinned

__all__ = ["Ask", "Gateway", "Tools", "Window", "WireError", "start", "wait_until"]

_FOLDER = Path(__file__).parent
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-function")
_STOP_S = 10.0
_COUNTED = "seconds requests chunks p50_us p99_us delay_p50_us delay_p99_us".split()
_CORE_MAX = 1.05  # of a core, by a reading that comes a little late


class WireError(AnserError):
    """Nothing can be measured so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What the load asks; see load.c."""

    connections: int = 64
    seconds: int = 2
    warm_ms: int = 500
    rate: int = 0
    stream: bool = False
    chunks: int = 8
    every_us: int = 0
    idle: int = 0
    prompt: int = 750

    @property
    def words(self) -> list[str]:
        """As load.c takes it."""
        return [f"{one.name}={int(getattr(self, one.name))}" for one in fields(self)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What was counted between the beginning and the end of one run of the load."""

    seconds: float
    requests: int
    chunks: int
    p50_us: float
    p99_us: float
    delay_p50_us: float  # of chunks, from engine to client
    delay_p99_us: float
    cpu_s: float  # of the gateway and all below it; 0 without one
    load_cpu_s: float  # of load and engine
    memory_mb: float  # of the gateway, when all its connections are open

    @property
    def request_us(self) -> float:
        """CPU microseconds of the gateway per request."""
        return self.cpu_s / self.requests * 1e6 if self.requests else float("nan")

    @property
    def chunk_us(self) -> float:
        """CPU microseconds of the gateway per chunk."""
        return self.cpu_s / self.chunks * 1e6 if self.chunks else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """What is measured, running."""

    pid: int | None  # None: there is no gateway, the engine itself is asked
    port: int
    key: str = ""
    ready_s: float = 0.0  # from the start of its process until it accepts


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The compiled programs, and the cores: the gateway's, and that of load and engine."""

    engine: Path
    load: Path
    gateway_core: int | None
    load_core: int | None

    @classmethod
    def make(cls, folder: Path) -> Tools:
        """Compile them into `folder`. Raises WireError with the way out where that cannot be."""
        if not Path("/proc/self/stat").is_file():
            raise WireError("bench wire reads CPU times from Linux's /proc: run it on Linux.")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise WireError("bench wire needs a C compiler: install gcc (Debian: apt install gcc).")
        made = {name: folder / name for name in ("engine", "load")}
        for name, path in made.items():
            command = [compiler, *_FLAGS, "-o", str(path), str(_FOLDER / f"{name}.c")]
            told = subprocess.run(command, capture_output=True, text=True, check=False)
            if told.returncode:
                raise WireError(f"{name}.c does not compile: {told.stderr[-2_000:]}")
        cores = sorted(os.sched_getaffinity(0))
        gateway, load = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
        return cls(**made, gateway_core=gateway, load_core=load)

    @contextmanager
    def engines(self, count: int) -> Generator[tuple[int, list[int]]]:
        """A mock engine with so many addresses: its process and their ports on loopback."""
        with start([str(self.engine), str(count)], self.load_core) as process:
            assert process.stdout is not None
            ports = [int(word) for word in process.stdout.readline().split()]
            if len(ports) != count:
                raise WireError("the mock engine does not start")
            yield process.pid, ports

    def window(self, ask: Ask, gateway: Gateway, engine: int) -> Window:
        """Run the load once. Raises WireError for a wrong answer."""
        words = [f"port={gateway.port}", f"key={gateway.key}", *ask.words]
        log = self.load.with_suffix(".log")
        with start([str(self.load), *words], self.load_core, log=log) as process:

            def readings() -> tuple[float, float]:
                here = cpu_s(gateway.pid) if gateway.pid else 0.0
                return here, cpu_s(engine) + cpu_s(process.pid)

            try:
                _hear(process, "begin")
                before = readings()
                held = memory_mb(gateway.pid) if gateway.pid else 0.0
                _hear(process, "end")
                after = readings()
                counted: dict[str, Any] = json.loads(_hear(process, "{"))
            except EOFError:
                raise WireError(f"the load has ended: {log.read_text().strip()}") from None
        if counted["errors"]:
            raise WireError(f"{counted['errors']} wrong answers, the first: {counted['error']}")
        window = Window(
            **{name: counted[name] for name in _COUNTED},
            cpu_s=after[0] - before[0],
            load_cpu_s=after[1] - before[1],
            memory_mb=held,
        )
        if window.cpu_s > window.seconds * _CORE_MAX + 0.05:
            raise WireError(f"{window.cpu_s} CPU seconds in {window.seconds} on one core")
        return window


def _hear(process: subprocess.Popen[str], beginning: str) -> str:
    """The next line that begins so. Raises EOFError if none comes."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return line
    raise EOFError


@contextmanager
def start(
    command: list[str],
    core: int | None,
    *,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    heard: bool = True,
) -> Generator[subprocess.Popen[str]]:
    """A process on that core; stopped at the end, with all that it has started.

    Its errors go to the log, and its output too, unless it is `heard`.
    """
    with pinned(core), (log or Path(os.devnull)).open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE if heard else errors,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Stop the process, and what it has started in its session."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    if process.stdout is not None:
        process.stdout.close()


def wait_until(condition: Callable[[], bool], within_s: float) -> float:
    """Seconds until it is true, looked at every 5 ms. Raises WireError if it takes longer."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > within_s:
            raise WireError(f"not ready within {within_s:g} s")
        time.sleep(0.005)
    return time.monotonic() - begun
