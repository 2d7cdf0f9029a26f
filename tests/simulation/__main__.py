"""`python -m tests.simulation SEED` tells its stories; with SEED END, it runs all of those."""

from __future__ import annotations

import sys
import traceback

from tests.simulation import virtual
from tests.simulation.shards import ShardWorld, simulate_shards
from tests.simulation.world import World, simulate


def main(arguments: list[str]) -> int:
    """Run one seed aloud, or a range of seeds and name those that fail."""
    if len(arguments) == 1:
        return _aloud(int(arguments[0]))
    failed = [seed for seed in range(int(arguments[0]), int(arguments[1])) if not _passes(seed)]
    print(f"{len(failed)} failed: {failed}")
    return bool(failed)


def _aloud(seed: int) -> int:
    world = World(seed)
    try:
        virtual.run(world.live, clock=world.clock, jumped=world.jumped)
    finally:
        print("\n".join(world.story))
    print(f"{world.moments} moments, {len(world.clients)} clients, {world.scheduler!r}")
    shards = ShardWorld(seed)
    try:
        shards.run()
    finally:
        print("\n".join(shards.story))
    print(f"{shards.messages} messages between {len(shards.shards)} shards")
    return 0


def _passes(seed: int) -> bool:
    try:
        simulate(seed)
        simulate_shards(seed)
    except Exception as error:  # noqa: BLE001  whatever it is, the seed is the report
        print(f"seed {seed}: {_cause(error)}", flush=True)
        return False
    return True


def _cause(error: BaseException) -> str:
    """The innermost failure and where it was raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{where.filename.rpartition('/')[2]}:{where.lineno} {where.line}: {error!r}"[:500]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
