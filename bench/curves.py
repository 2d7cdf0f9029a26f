"""Figures as pictures: an experiment hands over curves, and `drawer` makes a PNG of each set.

matplotlib is an extra: it is loaded only where somebody wants pictures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Curves", "Points", "distribution", "drawer"]

Points = Sequence[tuple[float, float]]

_INCHES = (8, 5)
_DOTS_PER_INCH = 120
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """One picture: lines by what they are called, and what its axes are."""

    name: str  # begins with the experiment's
    x: str
    y: str
    lines: Mapping[str, Points]
    log_x: bool = False
    limits: Mapping[str, float] | None = None  # levels that lines should stay below


def distribution(values: Iterable[float]) -> Points:
    """Which part of `values` is at most x, for each of them."""
    order = sorted(values)
    return [(value, (place + 1) / len(order)) for place, value in enumerate(order)]


def drawer(folder: Path) -> Callable[[Curves], None]:
    """What draws into `folder`, made if need be. Raises ImportError without matplotlib, OSError."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra; its types are partly unknown

    folder.mkdir(parents=True, exist_ok=True)

    def draw(curves: Curves) -> None:
        figure: Any = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot(title=curves.name, xlabel=curves.x, ylabel=curves.y)
        for name, points in curves.lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], label=name)
        for name, level in (curves.limits or {}).items():
            axes.axhline(level, linestyle="--", color="grey", label=name)
        if curves.log_x:
            axes.set_xscale("log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        name = _NOT_IN_NAME.sub("-", curves.name).strip("-")
        figure.savefig(folder / f"{name}.png", dpi=_DOTS_PER_INCH)

    return draw
