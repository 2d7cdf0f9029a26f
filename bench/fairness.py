"""The experiments of docs/explanation/fairness, one function each: `anser bench fairness`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench import faults, latency, locality, pools, shards, sharing
from bench.rows import Options, Row

__all__ = ["EXPERIMENTS", "NEED_TRACES", "measure"]

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
}
NEED_TRACES = frozenset(("E4", "E7"))
"""Those that replay recorded traffic."""


def measure(options: Options, experiment: str | None = None) -> list[Row]:
    """All experiments, or one; those that want traces are left out where there are none."""
    rows: list[Row] = []
    for name in [experiment] if experiment else EXPERIMENTS:
        if name in NEED_TRACES and options.traces is None:
            options.tell(
                f"{name} is left out: it replays recorded traffic; name its folder (--traces)"
            )
            continue
        rows += EXPERIMENTS[name](options)
    return rows
