"""E5 on real engines: one floods, five chat, through the HTTP API of a real platform.

Theory of operation. Each run opens a platform in this process, with a data folder of its own that
is thrown away, two llama.cpp engines as its nodes, and a listening socket. Members are added, each
gets a key, and their clients ask over that socket; all that is measured is what clients saw. First
the chats run alone, then beside the flood, then beside it once more with first come, first served.

*Unlike nodes.* Both run the same model. `fast` reads with all cores, 128 prompt tokens a step, and
has eight slots; `slow` reads with one, 32 a step, and has four. How fast each is alone is measured
before the runs. Under load they share the machine's cores, as two machines would not.

*First come, first served* is the scheduler with one account for all and no rule but the order
(`FirstCome`). It is handed to `open_platform` here; no setting of a platform can choose it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from anser.adapters.blobs import DiskBlobs
from anser.adapters.engine_llamacpp import LlamaCppEngine
from anser.adapters.mirrors import mirrors_for
from anser.api.context import Services
from anser.config import Config, EngineSettings, GatewaySettings, load
from anser.core.events import Decision, Event, Submitted
from anser.core.fleet import Node
from anser.core.hub import Model
from anser.core.rules import STRICT
from anser.core.scheduler import Scheduler
from anser.platform import open_platform
from anser.ports import Call, Route
from anser.services.hub import Hub
from anser.wire.doors import Door, listen, serving_loop, url_of
from anser.wire.server import GuardSettings
from bench.clients import Answer, Client
from bench.curves import Curves, distribution
from bench.rows import Options, Row, at_least, at_most, figure
from bench.trace import percentile

__all__ = ["FirstCome", "Run", "flood", "runs"]

_PROJECT = "bench/real"
_LIGHT = 5
_THINK_S = 8.0
_AT_ONCE = 60
_PROMPT, _OUTPUT = 100, 120  # tokens of a request of the flood, about
_UNSERVED_S = 10.0  # who has waited so long at the end counts as served then
_NODES = {
    "fast": EngineSettings(slots=8, context_tokens=1_024, batch_tokens=128, threads=0),
    "slow": EngineSettings(slots=4, context_tokens=1_024, batch_tokens=32, threads=1),
}


class FirstCome(Scheduler):
    """First come, first served: all requests are one member's, and the oldest goes first.

    For measurements: members, nodes and their speeds are not looked at.
    """

    def __init__(self, queued_max: int, retries_max: int) -> None:
        super().__init__(queued_max, retries_max, replace(STRICT, patience_s=0.0, passed_max=0))

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Take one event, as if everybody were the same member."""
        if isinstance(event, Submitted):
            event = Submitted(request=replace(event.request, member="all"))
        return super().handle(event, now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What clients saw between the end of the warming up and the end, in seconds of the run."""

    answers: list[Answer]
    since: float
    until: float

    @property
    def waits(self) -> list[float]:
        """Seconds to first token of those who chat, of first tokens that came in this time.

        Who still waits at its end has waited until then, if that is long enough to tell anything.
        """
        found: list[float] = []
        for answer in self.answers:
            first_at = self.until if answer.first_at is None else answer.first_at
            wait_s = first_at - answer.at
            if first_at < self.since or answer.error or not answer.member.startswith("light"):
                continue
            if answer.first_at is not None or wait_s >= _UNSERVED_S:
                found.append(wait_s)
        return found

    @property
    def tokens_s(self) -> float:
        """Fresh prompt and output tokens a second, of all: what the engines computed."""
        total = sum(answer.tokens_in(self.since, self.until) for answer in self.answers)
        return total / (self.until - self.since)

    @property
    def cached(self) -> float:
        """Which part of the prompt tokens of those who chat the engines had in their caches."""
        read = [each for each in self.answers if each.member.startswith("light")]
        total = sum(answer.prompt_tokens for answer in read)
        return sum(answer.cached_tokens for answer in read) / total if total else 0.0

    @property
    def errors(self) -> int:
        """Requests that were not answered whole, though nobody left."""
        return sum(bool(answer.error) for answer in self.answers)


def flood(options: Options) -> list[Row]:
    """E5 on real engines."""
    with asyncio.Runner(loop_factory=serving_loop) as runner:
        speeds, found = runner.run(runs(options))
    rows = [figure(f"E5 real {name} node", value, "tokens/s") for name, value in speeds.items()]
    for name, run in found.items():
        rows.append(figure(f"E5 real {name}, light p50", percentile(run.waits, 0.5), "s"))
        rows.append(figure(f"E5 real {name}, light p99", percentile(run.waits, 0.99), "s"))
        rows.append(figure(f"E5 real {name}, light requests", len(run.waits), "1"))
        rows.append(figure(f"E5 real {name}, light cached", run.cached, "1"))
        rows.append(figure(f"E5 real {name}, tokens", run.tokens_s, "tokens/s"))
    options.draw(
        Curves(
            name="E5 real, time to first token of those who chat",
            x="seconds",
            y="part of their requests",
            lines={name: distribution(run.waits) for name, run in found.items()},
            log_x=True,
        )
    )
    alone, shared, first = (percentile(run.waits, 0.99) for run in found.values())
    usual = [percentile(run.waits, 0.5) for run in found.values()]
    tokens = found["flood"].tokens_s / found["flood FCFS"].tokens_s
    return [
        *rows,
        figure("E5 real light p50 / alone", usual[1] / usual[0], "1"),
        figure("E5 real FCFS light p99 / alone", first / alone, "1"),
        at_most("E5 real light p99 / alone", shared / alone, "1", 6),
        at_least("E5 real tokens / FCFS", tokens, "1", 0.97),
        at_most("E5 real errors", sum(run.errors for run in found.values()), "1", 0),
    ]


async def runs(options: Options) -> tuple[dict[str, float], dict[str, Run]]:
    """The speeds of the nodes, and the three runs."""
    model, path = await _model(options)
    options.tell("E5 real: how fast each node is alone")
    speeds: dict[str, float] = {}
    for name, settings in _NODES.items():
        async with _engine(model, path, settings) as engine:
            speeds.update(await _speeds(name, engine))
    kinds: dict[str, tuple[bool, Callable[[int, int], Scheduler]]] = {
        "alone": (False, Scheduler),
        "flood": (True, Scheduler),
        "flood FCFS": (True, FirstCome),
    }
    found: dict[str, Run] = {}
    for name, (flooded, make) in kinds.items():
        options.tell(f"E5 real {name}")
        found[name] = await _run(options, model, path, make, flooded=flooded)
    return speeds, found


async def _model(options: Options) -> tuple[Model, Path]:
    """The model of this platform's settings, from its data folder; fetched if it is not there."""
    config = load(file=None, environ=os.environ, overrides={}).config
    blobs = DiskBlobs(config.data_dir / "blobs")
    hub = Hub(mirrors_for(config.engine.mirrors), blobs)
    model = hub.resolve(config.engine.model)
    if hub.find(model) is None:
        options.tell(f"E5 real: fetching {model.id}")
    return model, await hub.ensure(model, lambda _done, _total: None)


@asynccontextmanager
async def _engine(
    model: Model, path: Path, settings: EngineSettings
) -> AsyncGenerator[LlamaCppEngine]:
    engine = LlamaCppEngine(model.id, settings)
    try:
        await engine.start(path)
        yield engine
    finally:
        await engine.aclose()


async def _speeds(name: str, engine: LlamaCppEngine) -> dict[str, float]:
    """What a node reads and writes in a second when it has one request, and nobody else has any."""
    text = "Write a long story about " + " ".join(str(number) for number in range(150))
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 64}
    begun, times, prompt = monotonic(), list[float](), 0
    call = Call(lease=f"speed of {name}", route=Route.CHAT, body=body)
    async with engine.generate(call) as answer:
        async for data in answer:
            chunk = json.loads(data)
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                times.append(monotonic())
            if chunk.get("usage"):
                prompt = chunk["usage"]["prompt_tokens"]
    reads, writes = prompt / (times[0] - begun), (len(times) - 1) / (times[-1] - times[0])
    return {f"{name} reads, alone,": reads, f"{name} writes, alone,": writes}


@asynccontextmanager
async def _platform(
    model: Model, path: Path, scheduler: Callable[[int, int], Scheduler]
) -> AsyncGenerator[tuple[Services, str]]:
    """A platform with two nodes, and the address where it listens."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anser-bench-")))
        config = Config(data_dir=folder, gateway=GatewaySettings(queue_timeout_s=3_600.0))
        opened = open_platform(config, engine=False, scheduler=scheduler)
        platform = await stack.enter_async_context(opened)
        services = platform.services
        for name, settings in _NODES.items():
            engine = await stack.enter_async_context(_engine(model, path, settings))
            node = Node(id=name, url="builtin:", model=model.id, slots=settings.slots)
            services.fleet.attach(node, engine)
        sock = stack.enter_context(listen("127.0.0.1", 0))
        door = Door(platform.public_app, sock, GuardSettings())
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        serving = tasks.create_task(door.serve())
        try:
            async with asyncio.timeout(30):
                fleet = services.fleet
                while not all(one.ready for one in fleet.statuses()):  # noqa: ASYNC110 - no news
                    await asyncio.sleep(0.05)
            yield services, url_of(sock)
        finally:
            door.close(quickly=True)
            await serving


async def _run(
    options: Options,
    model: Model,
    path: Path,
    scheduler: Callable[[int, int], Scheduler],
    *,
    flooded: bool,
) -> Run:
    floods_s, warm_s, seconds = (1.0, 1.0, 6.0) if options.quick else (10.0, 30.0, 210.0)
    async with _platform(model, path, scheduler) as (services, url):
        names = [f"light{number}" for number in range(_LIGHT)] + ["flood"] * flooded
        begun = monotonic()
        clients = [
            Client(
                member=name,
                key=await _key_of(services, name),
                url=url,
                model=model.id,
                clock=lambda: monotonic() - begun,
                draw=random.Random(name),
            )
            for name in names
        ]
        begun = monotonic()
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(client.chat(_THINK_S))
                for client in clients
                if client.member != "flood"
            ]
            await asyncio.sleep(floods_s)
            if flooded:
                flood = clients[-1].flood(_AT_ONCE, prompt=_PROMPT, output=_OUTPUT)
                running.append(tasks.create_task(flood))
            await asyncio.sleep(seconds - floods_s)
            for task in running:
                task.cancel()
        answers = [answer for client in clients for answer in client.answers]
        return Run(answers=answers, since=warm_s, until=seconds)


async def _key_of(services: Services, name: str) -> str:
    """A key for a person of the bench's project, who is added."""
    known = {member.id for member in services.members.members()}
    for member in ("bench", _PROJECT, f"{_PROJECT}/{name}"):
        if member not in known:
            await services.members.add_member(member)
    text, _ = await services.members.create_key(f"{_PROJECT}/{name}")
    return text
