"""The figures of the wire: which loads are run in which order, and what is made of the counts.

Theory of operation. All gateways of an experiment run side by side, idle but for the one that is
asked; each round asks each of them once, in an order that moves on by one from round to round, so
that what else happens on the machine meets all alike. A figure is the median of its rounds, a
ratio one of medians. "none" is the engine without a gateway: what the harness itself can do.

A peer that gives a wrong answer is left out from then on, with a word; Anser is not: then there is
no result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.rows import Options, Row, at_least, at_most, figure
from bench.wire.gateways import PEERS, anser, peer, program
from bench.wire.kernel import memory_mb
from bench.wire.programs import Ask, Gateway, Tools, Window, WireError

__all__ = ["Bench", "alternate", "chunks", "requests", "start", "streams", "waits"]

_NODES = 2
_STREAMS_NODES = 12  # a platform opens 1,024 connections to one node
_FILES_SPARE = 500
_ENDLESS = 100_000  # chunks: the stream is cut when the load ends
_Windows = Mapping[str, Sequence[Window]]


def alternate(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Each name once a round; each round begins with the next."""
    for number in range(rounds):
        shift = number % len(names) if names else 0
        yield from (*names[shift:], *names[:shift])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all experiments share."""

    options: Options
    tools: Tools
    files: int  # that a process may have open
    lost: set[str] = field(default_factory=set[str])  # peers that answered wrongly, or not at all

    @property
    def rounds(self) -> int:
        """Of each kind."""
        return len(self.options.all_seeds)

    def peers(self, *names: str) -> dict[str, str]:
        """Those that are to be measured and are here, with their programs."""
        found: dict[str, str] = {}
        for name in names if not self.options.anser_only else ():
            path = program(name, self.options.programs.get(name))
            if path is None and name not in self.lost:
                self.lost.add(name)
                self.options.tell(f"wire: {name} is not installed: what compares to it is left out")
            elif path is not None and name not in self.lost:
                found[name] = path
        return found

    def run(self, gateways: Mapping[str, Gateway], engine: int, ask: Ask) -> _Windows:
        """The load against each in turn, for all rounds."""
        windows: dict[str, list[Window]] = {name: [] for name in gateways}
        for name in alternate(list(gateways), self.rounds):
            if name in self.lost:
                continue
            try:
                windows[name].append(self.tools.window(ask, gateways[name], engine))
            except WireError as error:
                if name not in PEERS:
                    raise
                self.lose(name, error)
                windows.pop(name)
        return windows

    def lose(self, name: str, error: WireError) -> None:
        """Leave a peer out from now on."""
        self.lost.add(name)
        self.options.tell(f"wire: {name} is left out: {error.message}")


def _open(bench: Bench, stack: ExitStack, name: str, engines: list[int]) -> Gateway | None:
    """One gateway, in a folder of its own; None if it is a peer that is lost."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="wire-")))
    if name == "anser":
        return stack.enter_context(anser(bench.tools, folder, engines))
    try:
        path = bench.peers(name).get(name)
        if path is None:
            return None
        return stack.enter_context(peer(bench.tools, name, path, folder, engines))
    except WireError as error:
        bench.lose(name, error)
        return None


def _opened(
    bench: Bench, stack: ExitStack, names: Sequence[str], nodes: int
) -> tuple[int, dict[str, Gateway]]:
    """The engine's process, with so many addresses; Anser and those of the peers that start."""
    engine, ports = stack.enter_context(bench.tools.engines(nodes))
    gateways = {"none": Gateway(pid=None, port=ports[0])}
    for name in (*bench.peers(*names), "anser"):
        gateway = _open(bench, stack, name, ports)
        if gateway is not None:
            gateways[name] = gateway
    return engine, gateways


def _compared(bench: Bench, names: Sequence[str], ask: Ask) -> _Windows:
    """Start them, ask them, stop them."""
    with ExitStack() as stack:
        engine, gateways = _opened(bench, stack, names, _NODES)
        return bench.run(gateways, engine, ask)


def _mid(windows: Sequence[Window], get: Callable[[Window], float]) -> float:
    return median(get(window) for window in windows)


# The experiments


def requests(bench: Bench) -> list[Row]:
    """CPU time of whole answers, small prompts and large."""
    quick = bench.options.quick
    ask = Ask(seconds=1 if quick else 2, connections=8 if quick else 64)
    rows: list[Row] = []
    with ExitStack() as stack:
        engine, gateways = _opened(bench, stack, list(PEERS), _NODES)
        bench.options.tell("wire requests")
        small = bench.run(gateways, engine, ask)
        large_ask = Ask(seconds=ask.seconds, connections=ask.connections, prompt=16_384)
        large = bench.run({"anser": gateways["anser"]}, engine, large_ask)["anser"]
    rows += _busy("requests", small)
    each = {name: _mid(found, lambda w: w.request_us) for name, found in small.items()}
    rows += [figure(f"request CPU, {n}", each[n], "us") for n in each if n != "none"]
    targets = {"nginx": 0.5, "vllm-router": 2.5, "litellm": 100.0}
    for name, target in targets.items():
        if name in each:
            ratio = each[name] / each["anser"]
            rows.append(at_least(f"requests per CPU-second / {name}", ratio, "1", target))
    ratio = each["anser"] / _mid(large, lambda w: w.request_us)
    return [*rows, at_least("16 KB prompts / small prompts, rate", ratio, "1", 0.8)]


def _busy(what: str, windows: _Windows) -> list[Row]:
    """How fast it went, and which core was the narrow place: the gateway's, or that of the load."""
    rows: list[Row] = []
    for name, found in windows.items():
        rate = _mid(found, lambda w: (w.requests if what == "requests" else w.chunks) / w.seconds)
        rows.append(figure(f"{what}, {name}", rate, "1/s"))
        if name != "none":
            busy = _mid(found, lambda w: w.cpu_s / w.seconds)
            rows.append(figure(f"{what}, {name}, its core busy", busy, "1"))
        busy = _mid(found, lambda w: w.load_cpu_s / w.seconds)
        rows.append(figure(f"{what}, {name}, load's core busy", busy, "1"))
    return rows


def chunks(bench: Bench) -> list[Row]:
    """CPU time of a chunk, in streams that are busy."""
    bench.options.tell("wire chunks")
    quick = bench.options.quick
    ask = Ask(
        seconds=1 if quick else 2,
        connections=8 if quick else 64,
        stream=True,
        chunks=50 if quick else 200,
        every_us=10_000,
    )
    windows = _compared(bench, ("nginx", "haproxy", "vllm-router", "sglang-router"), ask)
    each = {name: _mid(found, lambda w: w.chunk_us) for name, found in windows.items()}
    rows = _busy("chunks", windows)
    rows += [figure(f"chunk CPU, {n}", each[n], "us") for n in each if n != "none"]
    if "nginx" in each:
        ratio = each["anser"] / each["nginx"]
        rows.append(at_most("chunk CPU / nginx", ratio, "1", 1.3))
    return rows


def waits(bench: Bench) -> list[Row]:
    """How much longer an answer takes, at 100 requests a second."""
    bench.options.tell("wire waits")
    ask = Ask(seconds=1 if bench.options.quick else 5, rate=100, connections=16)
    windows = _compared(bench, ("nginx",), ask)
    rows: list[Row] = []
    for name, found in windows.items():
        rows.append(figure(f"p50 at 100/s, {name}", _mid(found, lambda w: w.p50_us / 1e3), "ms"))
        rows.append(figure(f"p99 at 100/s, {name}", _mid(found, lambda w: w.p99_us / 1e3), "ms"))
    p50 = {name: _mid(found, lambda w: w.p50_us / 1e3) for name, found in windows.items()}
    rows.append(at_most("added p50 at 100/s", p50["anser"] - p50["none"], "ms", 0.5))
    if "nginx" in windows:
        p99 = {name: _mid(found, lambda w: w.p99_us) for name, found in windows.items()}
        rows.append(at_most("p99 at 100/s / nginx", p99["anser"] / p99["nginx"], "1", 3))
    return rows


def start(bench: Bench) -> list[Row]:
    """How soon one accepts, what it holds when idle, and what open streams add."""
    bench.options.tell("wire start")
    count = 50 if bench.options.quick else 1_000
    grown: dict[str, list[tuple[float, float, float]]] = {}
    for name in alternate([*bench.peers("nginx", "haproxy"), "anser"], bench.rounds):
        with ExitStack() as stack:
            engine, ports = stack.enter_context(bench.tools.engines(_NODES))
            gateway = _open(bench, stack, name, ports)
            if gateway is not None:
                grown.setdefault(name, []).append(_grow(bench, gateway, engine, count))
    rows: list[Row] = []
    for name, found in grown.items():
        ready_s, idle, added = (median(column) for column in zip(*found, strict=True))
        if name == "anser":
            rows.append(at_most("ready to accept", ready_s, "s", 1.5))
            rows.append(at_most("memory, idle", idle, "MB", 80))
            rows.append(at_most(f"memory that {count:,} streams add", added, "MB", 30))
        else:
            rows.append(figure(f"ready to accept, {name}", ready_s, "s"))
            rows.append(figure(f"memory, idle, {name}", idle, "MB"))
            rows.append(figure(f"memory that {count:,} streams add, {name}", added, "MB"))
    return rows


def _grow(bench: Bench, gateway: Gateway, engine: int, count: int) -> tuple[float, float, float]:
    """Seconds until it accepted, megabytes when idle, megabytes that so many streams add."""
    assert gateway.pid is not None
    time.sleep(1)  # what it does at its start is done
    idle = memory_mb(gateway.pid)
    ask = Ask(connections=count, seconds=1, stream=True, chunks=_ENDLESS, every_us=5_000_000)
    window = bench.tools.window(ask, gateway, engine)
    return gateway.ready_s, idle, window.memory_mb - idle


def streams(bench: Bench) -> list[Row]:
    """How long chunks are under way when 10,000 streams are open and a quarter of them busy."""
    count = min(10_000, (bench.files - _FILES_SPARE) // 2)
    if bench.options.quick or count < 1_000:
        bench.options.tell("wire streams is left out: it needs time, and 20,500 open files")
        return []
    bench.options.tell(f"wire streams: {count:,}")
    ask = Ask(
        connections=count,
        idle=count * 3 // 4,
        seconds=5,
        warm_ms=2_000,
        stream=True,
        chunks=_ENDLESS,
        every_us=100_000,
    )
    found: dict[str, float] = {}
    for name in [*bench.peers("nginx"), "anser"]:
        with ExitStack() as stack:
            engine, ports = stack.enter_context(bench.tools.engines(_STREAMS_NODES))
            gateway = _open(bench, stack, name, ports)
            if gateway is not None:
                found[name] = _delay(bench, name, gateway, engine, ask)
    what = f"p99 chunk delay, {count:,} streams"
    rows = [figure(f"{what}, {name}", delay, "ms") for name, delay in found.items()]
    if count < 10_000:
        bench.options.tell("wire streams: 10,000 need 20,500 open files; no target is held to less")
    elif "nginx" in found:
        rows.append(at_most(f"{what} / nginx", found["anser"] / found["nginx"], "1", 3))
    return rows


def _delay(bench: Bench, name: str, gateway: Gateway, engine: int, ask: Ask) -> float:
    """Milliseconds; not a number if streams broke: this is a load that may be too much."""
    try:
        return bench.tools.window(ask, gateway, engine).delay_p99_us / 1e3
    except WireError as error:
        bench.options.tell(f"wire streams: {name} cannot: {error.message}")
        return float("nan")
