"""What a seed's worlds tell: their story, up to where it ends well or an invariant is broken.

A seed has two worlds: a gateway with its machines and clients, and schedulers that share a pool.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from tests.simulation.shards import ShardWorld
from tests.simulation.world import World, live

__all__ = ["aloud", "failure", "quiet"]

_LINES = 25  # of the end of a story


def quiet() -> None:
    """Log nothing in this process: the story says it all."""
    logging.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def aloud(seed: int) -> int:
    """Tell all of both; returns 1 if one ends badly."""
    world = World(seed)
    cause = _cause(partial(live, world), world)
    print(_beginning(world))
    print("\n".join(world.story))
    print(f"{world.moments} moments, {len(world.clients)} clients, {world.scheduler!r}")
    siblings = world.scheduler.siblings
    print(f"siblings met {siblings.met} times, at most {siblings.worst:.2f} of their bound apart")
    if cause is not None:
        print(f"{world.clock.now():9.3f} BROKEN: {cause}")
    shards = ShardWorld(seed)
    shards_cause = _cause(shards.run)
    print("\n".join(shards.story))
    print(f"{shards.messages} messages between {len(shards.shards)} shards")
    if shards_cause is not None:
        print(f"{shards.now:9.3f} BROKEN: {shards_cause}")
    return cause is not None or shards_cause is not None


def failure(seed: int) -> str | None:
    """What broke in either, and what led to it; None if nothing did."""
    world = World(seed)
    cause = _cause(partial(live, world), world)
    if cause is not None:
        lines = [_beginning(world), *_end(seed, world.story)]
        return "\n".join(
            [f"seed {seed}: {cause}", *lines, f"{world.clock.now():9.3f} BROKEN: {cause}"]
        )
    shards = ShardWorld(seed)
    cause = _cause(shards.run)
    if cause is not None:
        lines = _end(seed, shards.story)
        return "\n".join([f"seed {seed}: {cause}", *lines, f"{shards.now:9.3f} BROKEN: {cause}"])
    return None


def _end(seed: int, story: Sequence[str]) -> list[str]:
    left_out = max(0, len(story) - _LINES)
    more = [f"          ({left_out} lines: python -m tests.simulation {seed})"] if left_out else []
    return [*more, *story[-_LINES:]]


def _beginning(world: World) -> str:
    """Who and what is there."""
    plan = world.plan
    machines = [
        f"          {machine.node}: {machine.slots} slots ({machine.claims} claimed) for"
        f" {' and '.join(machine.models)}, a step {machine.pace.step_s:.2f} s,"
        f" {machine.faults:.0%} faults{f', says {machine.lie.value}' if machine.lie else ''}"
        for machine in plan.machines
    ]
    weights = ", ".join(f"{member} {weight}" for member, weight in sorted(plan.weights.items()))
    window = plan.rules.window // 1_000_000
    return "\n".join([*machines, f"          window {window} credits; weights: {weights}"])


def _cause(run: Callable[[], object], world: World | None = None) -> str | None:
    """The first failure of a world's life, and where it was raised."""
    try:
        run()
    except Exception as raised:  # noqa: BLE001  whatever it is, the seed is the report
        error: BaseException = (world and world.scheduler.broken) or raised
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        where = traceback.extract_tb(error.__traceback__)[-1]
        file = where.filename.rpartition("/")[2]
        return f"{file}:{where.lineno} {where.line}: {error!r}"[:500]
    return None
