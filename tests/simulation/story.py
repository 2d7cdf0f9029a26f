"""What a world's seed tells: its story, up to where it ends well or an invariant is broken."""

from __future__ import annotations

import logging
import traceback

import structlog

from tests.simulation.world import World, live

__all__ = ["aloud", "failure", "quiet"]

_LINES = 25  # of the end of a story


def quiet() -> None:
    """Log nothing in this process: the story says it all."""
    logging.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def aloud(seed: int) -> int:
    """Tell all of it; returns 1 if it ends badly."""
    world = World(seed)
    cause = _cause(world)
    print(_beginning(world))
    print("\n".join(world.story))
    print(f"{world.moments} moments, {len(world.clients)} clients, {world.scheduler!r}")
    siblings = world.scheduler.siblings
    print(f"siblings met {siblings.met} times, at most {siblings.worst:.2f} of their bound apart")
    if cause is not None:
        print(f"{world.clock.now():9.3f} BROKEN: {cause}")
    return cause is not None


def failure(seed: int) -> str | None:
    """What broke, and what led to it; None if nothing did."""
    world = World(seed)
    cause = _cause(world)
    if cause is None:
        return None
    left_out = max(0, len(world.story) - _LINES)
    lines = [f"seed {seed}: {cause}", _beginning(world)]
    if left_out:
        lines.append(f"          ({left_out} lines: python -m tests.simulation {seed})")
    lines += [*world.story[-_LINES:], f"{world.clock.now():9.3f} BROKEN: {cause}"]
    return "\n".join(lines)


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


def _cause(world: World) -> str | None:
    """The first failure of this world's life, and where it was raised."""
    try:
        live(world)
    except Exception as raised:  # noqa: BLE001  whatever it is, the seed is the report
        error: BaseException = world.scheduler.broken or raised
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        where = traceback.extract_tb(error.__traceback__)[-1]
        file = where.filename.rpartition("/")[2]
        return f"{file}:{where.lineno} {where.line}: {error!r}"[:500]
    return None
