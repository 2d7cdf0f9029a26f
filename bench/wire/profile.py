"""Where the microseconds of one request go: a sampling profile of Anser under load, by module.

Theory of operation. py-spy looks at the running platform 250 times a second while the load asks;
what runs at that moment is counted for the module whose Python line it is, with what C code that
line has called, kernel included. The parts are scaled to the CPU time of a request in the same
window. Threads that only wait are not counted.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.rows import Row, figure
from bench.wire.figures import Bench
from bench.wire.gateways import anser
from bench.wire.programs import Ask, WireError, start

__all__ = ["by_module", "profile"]

_FRAME = re.compile(r"\((.+?)(?::\d+)?\)$")
_SECONDS = 8
_LEAST = 0.01  # of all; what has less is summed up
_NODES = 2


def by_module(stacks: str) -> Counter[str]:
    """Samples of each module, from lines of frames (outermost first) and a count."""
    samples: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        found = _FRAME.search(stack.rpartition(";")[2])
        samples[_module(Path(found[1])) if found else "not Python"] += int(count)
    return samples


def _module(path: Path) -> str:
    """`anser.wire.server`; of other packages the name alone."""
    parts = path.with_suffix("").parts
    for place in ("site-packages", "asyncio"):
        if place in parts[:-1]:
            return "asyncio" if place == "asyncio" else parts[parts.index(place) + 1]
    return ".".join(parts[parts.index("anser") :]) if "anser" in parts else path.stem


def profile(bench: Bench) -> list[Row]:
    """CPU time of one request, by module."""
    spy = shutil.which("py-spy")
    if spy is None or bench.options.quick:
        bench.options.tell("wire profile is left out: it needs time, and py-spy on PATH")
        return []
    bench.options.tell("wire profile")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="wire-")))
        engine, ports = stack.enter_context(bench.tools.engines(_NODES))
        gateway = stack.enter_context(anser(bench.tools, folder, ports))
        found = folder / "stacks"
        words = ["--full-filenames", "--nonblocking", "-r", "250", "-d", str(_SECONDS)]
        command = [spy, "record", "-p", str(gateway.pid), "-f", "raw", "-o", str(found), *words]
        log = folder / "spy.log"
        with start(command, bench.tools.load_core, log=log, heard=False) as process:
            window = bench.tools.window(Ask(seconds=_SECONDS), gateway, engine)
            if process.wait(_SECONDS * 4):
                raise WireError(f"py-spy fails: {log.read_text()[-500:]}")
        samples = by_module(found.read_text())
    rows = [figure("profile, whole request", window.request_us, "us")]
    scale = window.request_us / samples.total()
    shown = [(name, n) for name, n in samples.most_common() if n >= _LEAST * samples.total()]
    rows += [figure(f"profile, {name}", n * scale, "us") for name, n in shown]
    rest = samples.total() - sum(n for _, n in shown)
    return [*rows, figure("profile, all others", rest * scale, "us")]
