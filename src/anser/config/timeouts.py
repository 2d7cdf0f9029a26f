"""How long each stage of a request may take: for all models, and for those that are named.

`gateway.model_timeouts` has an entry for each model that differs, such as
`"llama-405b queue=600 first_token=900 gap=120 answer=7200"`; what an entry leaves out is as for all
others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

__all__ = ["LONGEST_S", "SHORTEST_S", "Timeouts", "read_timeouts"]

SHORTEST_S, LONGEST_S = 0.1, 86_400.0
_STAGES = {
    "queue": "queue_s",
    "first_token": "first_token_s",
    "gap": "token_gap_s",
    "answer": "answer_s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """The longest that each stage may take, in seconds."""

    queue_s: float  # a slot
    first_token_s: float
    token_gap_s: float  # silence between two tokens
    answer_s: float  # all of it, from its first slot


def read_timeouts(entries: Iterable[str], usual: Timeouts) -> Mapping[str, Timeouts]:
    """The times of each model that has an entry.

    Raises ValueError, which says what is wrong with which entry, and the cure.

    >>> usual = Timeouts(queue_s=120.0, first_token_s=120.0, token_gap_s=30.0, answer_s=3600.0)
    >>> read_timeouts(["big queue=600 gap=90.5"], usual)["big"]
    Timeouts(queue_s=600.0, first_token_s=120.0, token_gap_s=90.5, answer_s=3600.0)
    """
    found: dict[str, Timeouts] = {}
    for entry in entries:
        model, *parts = entry.split() or [""]
        shown = f'"{_short(entry)}"'
        if not parts or "=" in model:
            raise ValueError(f'{shown} must be a model and its stages, like "big queue=600 gap=90"')
        if model in found:
            raise ValueError(f"{shown} names {_short(model)} again; write one entry for it")
        given: dict[str, float] = {}
        for part in parts:
            stage, seconds = _read(part, shown)
            if stage in given:
                raise ValueError(f"{shown} has {part.partition('=')[0]} twice; leave one out")
            given[stage] = seconds
        found[model] = replace(usual, **given)
    return found


def _read(part: str, entry: str) -> tuple[str, float]:
    """One stage of an entry, and its seconds."""
    name, _, text = part.partition("=")
    if name not in _STAGES:
        stages = ", ".join(_STAGES)
        raise ValueError(f'{entry} has no stage "{_short(name)}"; the stages are {stages}')
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST_S <= seconds <= LONGEST_S:  # NaN is neither
        between = f"{SHORTEST_S:g} to {LONGEST_S:,.0f}"
        raise ValueError(f"{entry}: {name} must be seconds from {between}, like {name}=60")
    return _STAGES[name], seconds


def _short(text: str) -> str:
    """The operator's own text, short and without control characters."""
    kept = "".join(letter if letter.isprintable() else "?" for letter in text[:100])
    return kept + ("..." if len(text) > 100 else "")
