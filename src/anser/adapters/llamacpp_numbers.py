"""Ranges of numbers as pieces of llama.cpp's grammar: digits are all that a grammar knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Bounds", "integers", "numbers"]

_DIGITS_MAX = 15  # where no bound says otherwise: what a double holds exactly
_FRACTION = '("." [0-9]{1,15})?'
_ANY_INTEGER = f'"-"? ("0" | [1-9] [0-9]{{0,{_DIGITS_MAX - 1}}})'
_ANY_NUMBER = f"{_ANY_INTEGER} {_FRACTION} ([eE] [+-]? [0-9]{{1,2}})?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """From `low` to `high` (None: open), each of which may itself be left out."""

    low: float | None
    high: float | None
    without_low: bool
    without_high: bool

    @classmethod
    def of(cls, schema: dict[str, Any]) -> Bounds:
        """The tighter of a schema's bounds; draft 4's booleans say that a bound is left out."""
        low, without_low = _tighter(schema, "minimum", "exclusiveMinimum", max)
        high, without_high = _tighter(schema, "maximum", "exclusiveMaximum", min)
        return cls(low=low, high=high, without_low=without_low, without_high=without_high)

    def mirrored(self) -> Bounds:
        """The same bounds seen from the other side of zero."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Bounds(
            low=low, high=high, without_low=self.without_high, without_high=self.without_low
        )


def _tighter(schema: dict[str, Any], plain: str, strict: str, pick: Any) -> tuple[Any, bool]:
    bound, without = schema.get(plain), schema.get(strict)
    if isinstance(without, bool) or without is None:
        return bound, bound is not None and bool(without)
    if bound is None or pick(bound, without) == without:
        return without, True
    return bound, False


def integers(bounds: Bounds) -> str | None:
    """The whole numbers within these bounds; None if there is none."""
    low, high = bounds.low, bounds.high
    if low is not None:
        low = math.floor(low) + 1 if bounds.without_low else math.ceil(low)
    if high is not None:
        high = math.ceil(high) - 1 if bounds.without_high else math.floor(high)
    if low is None and high is None:
        return _ANY_INTEGER
    branches = [*_below_zero(low, high), *_from_zero(low, high)]
    return " | ".join(branches) or None


def _below_zero(low: int | None, high: int | None) -> list[str]:
    if low is not None and low >= 0:
        return []
    least = 1 if high is None or high >= 0 else -high
    return [f'"-" ({each})' for each in _natural(least, None if low is None else -low)]


def _from_zero(low: int | None, high: int | None) -> list[str]:
    return [] if high is not None and high < 0 else _natural(max(low or 0, 0), high)


def _natural(low: int, high: int | None) -> list[str]:
    """The numbers from `low`, which is not negative, to `high`, length by length."""
    most = 10 ** max(_DIGITS_MAX, len(str(low)) + 1) - 1 if high is None else high
    branches: list[str] = []
    for length in range(len(str(low)), len(str(most)) + 1):
        least, last = max(low, 10 ** (length - 1)), min(most, 10**length - 1)
        if length == 1:
            least = low
        if least <= last:
            branches.append(_digits(str(least), str(last)))
    return branches


def _digits(low: str, high: str) -> str:
    """The numbers of one length from `low` to `high`."""
    if not low:
        return '""'
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    if first == last:
        return f"[{first}] ({_digits(low[1:], high[1:])})" if rest else f"[{first}]"
    branches: list[str] = []
    if low[1:] != "0" * rest:
        branches.append(f"[{first}] ({_digits(low[1:], '9' * rest)})")
        first += 1
    top = "" if high[1:] == "9" * rest else f"[{last}] ({_digits('0' * rest, high[1:])})"
    last -= bool(top)
    if first <= last:
        branches.append(f"[{first}-{last}] [0-9]{{{rest}}}" if rest else f"[{first}-{last}]")
    return " | ".join([*branches, *([top] if top else [])])


def numbers(bounds: Bounds) -> str | None:
    """The decimal numbers within these bounds, which must be whole; None if there is none."""
    if bounds.low is None and bounds.high is None:
        return _ANY_NUMBER
    if any(end is not None and end != int(end) for end in (bounds.low, bounds.high)):
        return None
    branches = _not_negative(bounds)
    if bounds.low is None or bounds.low < 0:
        branches += [f'"-" ({each})' for each in _not_negative(bounds.mirrored())]
    return " | ".join(branches) or None


def _not_negative(bounds: Bounds) -> list[str]:
    """Those within the bounds that are not below zero."""
    high = None if bounds.high is None else int(bounds.high)
    if high is not None and (high < 0 or (high == 0 and bounds.without_high)):
        return []
    start, branches = 0, list[str]()
    if bounds.low is not None and bounds.low >= 0:
        start = int(bounds.low)
        if bounds.without_low:
            if high is None or start < high:
                branches.append(f'"{start}." [0-9]{{0,14}} [1-9]')
            start += 1
    if high != 0:
        wholes = _natural(start, None if high is None else high - 1)
        branches += [f"({whole}) {_FRACTION}" for whole in wholes]
    if high is not None and not bounds.without_high and start <= high:
        branches.append(f'"{high}" ("." "0"{{1,15}})?')
    return branches
