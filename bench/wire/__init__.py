"""What Anser costs on the wire, beside other gateways: `anser bench wire`.

Theory of operation. A mock engine and a load, both small programs in C (`engine.c`, `load.c`), are
compiled here; the load asks the engine through each gateway in turn and checks every answer. The
gateway has one core to itself, load and engine share another. What is compared is CPU time, which
the kernel tells: on a shared machine it moves far less than what a clock shows. See
docs/reference/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.rows import Options, Row
from bench.wire import figures
from bench.wire.figures import Bench
from bench.wire.kernel import descriptors, ending, pinned
from bench.wire.profile import profile
from bench.wire.programs import Tools

__all__ = ["EXPERIMENTS", "measure"]

EXPERIMENTS: Mapping[str, Callable[[Bench], list[Row]]] = {
    "start": figures.start,
    "requests": figures.requests,
    "chunks": figures.chunks,
    "waits": figures.waits,
    "streams": figures.streams,
    "profile": profile,
}


def measure(options: Options, experiment: str | None = None) -> list[Row]:
    """All experiments, or one. Raises WireError where nothing can be measured."""
    with ending(), TemporaryDirectory(prefix="wire-") as folder:
        tools = Tools.make(Path(folder))
        if tools.gateway_core is None:
            options.tell("wire: this machine has one core; gateway, load and engine share it")
        with descriptors() as files, pinned(tools.load_core):
            bench = Bench(options=options, tools=tools, files=files)
            rows: list[Row] = []
            for name in [experiment] if experiment else EXPERIMENTS:
                rows += EXPERIMENTS[name](bench)
    return rows
