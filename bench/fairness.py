"""The experiments of docs/explanation/fairness, one function each: `anser bench fairness`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from anser.core.errors import AnserError
from bench import faults, latency, locality, pools, real, shards, sharing
from bench.rows import Options, Row

__all__ = ["EXPERIMENTS", "NEED_TRACES", "REAL", "measure"]

EXPERIMENTS: Mapping[str, Callable[[Options], list[Row]]] = {
    "E1": sharing.overload,
    "E2": sharing.weighted,
    "E3": sharing.idleness,
    "E4": latency.arena,
    "E5": latency.flood,
    "E6": locality.agents,
    "E7": locality.mooncake,
    "E8": sharing.tenants,
    "E9": shards.shards,
    "E10": faults.faults,
    "E11": pools.pools,
    "real": real.flood,
}
NEED_TRACES = frozenset(("E4", "E7"))
"""Those that replay recorded traffic."""
REAL = frozenset(("real",))
"""Those that run on real engines, in real time."""


def measure(options: Options, experiment: str | None = None) -> list[Row]:
    """All experiments, or one.

    Of all, those that want traces are left out where there are none, and those on real engines
    where there is no engine or no model. Raises AnserError if the one that was named cannot run.
    """
    rows: list[Row] = []
    for name in [experiment] if experiment else EXPERIMENTS:
        if name in NEED_TRACES and options.traces is None:
            options.tell(
                f"{name} is left out: it replays recorded traffic; name its folder (--traces)"
            )
            continue
        try:
            rows += EXPERIMENTS[name](options)
        except AnserError as error:
            if experiment:
                raise
            options.tell(f"{name} is left out: {error.message}")
    return rows
