"""`python -m tests.simulation SEED` tells one world's story; with SEED END, it runs all of them.

`--jobs N` shares the seeds out among N processes. A seed that fails is named with its cause and the
end of its story.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.simulation.story import aloud, failure, quiet

_TOLD_EVERY_S = 30.0
_SHARE = 10  # seeds that a process takes at once


def main(arguments: Sequence[str]) -> int:
    """Run one seed aloud, or a range of seeds and name those that fail."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("end", type=int, nargs="?", help="the first seed that is not run")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    options = parser.parse_args(arguments)
    if options.end is None:
        return aloud(options.seed)
    return _all(range(options.seed, options.end), options.jobs)


def _all(seeds: range, jobs: int) -> int:
    failed: list[int] = []
    began = told = time.monotonic()
    for done, (seed, found) in enumerate(_failures(seeds, jobs), start=1):
        if found is not None:
            failed.append(seed)
            print(found, flush=True)
        if time.monotonic() - told >= _TOLD_EVERY_S:
            told = time.monotonic()
            print(f"{done} of {len(seeds)} in {told - began:.0f} s", flush=True)
    print(f"{len(seeds)} seeds, {len(failed)} failed: {failed}")
    return bool(failed)


def _failures(seeds: range, jobs: int) -> Iterator[tuple[int, str | None]]:
    """Each seed in order, with what it found."""
    if jobs == 1:
        yield from zip(seeds, map(failure, seeds), strict=True)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=quiet) as pool:
        yield from zip(seeds, pool.map(failure, seeds, chunksize=_SHARE), strict=True)


if __name__ == "__main__":
    quiet()
    sys.exit(main(sys.argv[1:]))
