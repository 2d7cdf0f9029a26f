"""What a measurement prints: rows, each a figure with its target and whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.curves import Curves

__all__ = ["Options", "Row", "at_least", "at_most", "figure", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    target: str = ""
    holds: bool | None = None  # None: it has no target


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How much is measured."""

    seeds: int = 3
    quick: bool = False
    traces: Path | None = None
    tell: Callable[[str], None] = field(default=lambda _: None)
    draw: Callable[[Curves], None] = field(default=lambda _: None)
    anser_only: bool = False
    programs: Mapping[str, Path | None] = field(default_factory=dict[str, Path | None])

    @property
    def seconds(self) -> float:
        """Of virtual time, for one run."""
        return 45.0 if self.quick else 420.0

    @property
    def warm(self) -> float:
        """Of these, the first, which do not count."""
        return 10.0 if self.quick else 60.0

    @property
    def all_seeds(self) -> Sequence[int]:
        """The seeds of the runs."""
        return range(1 if self.quick else self.seeds)


def figure(name: str, value: float, unit: str) -> Row:
    """A figure without a target."""
    return Row(name=name, value=round(value, 4), unit=unit)


def at_most(name: str, value: float, unit: str, most: float) -> Row:
    """A figure that should be no more than this."""
    target = f"<= {most:.6g}"
    return Row(name=name, value=round(value, 4), unit=unit, target=target, holds=value <= most)


def at_least(name: str, value: float, unit: str, least: float) -> Row:
    """A figure that should be no less than this."""
    target = f">= {least:.6g}"
    return Row(name=name, value=round(value, 4), unit=unit, target=target, holds=value >= least)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
