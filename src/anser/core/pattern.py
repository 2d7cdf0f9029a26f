"""How large a regular expression becomes when an engine writes it out as a grammar.

Counted repetitions are written out, so `((a{99}){99}){99}` is a million times `a`. A counted
repetition of what may be empty is worse: each of its copies may be there or not, and an engine
follows all of these ways at once, for every token of every answer. `check_pattern` refuses both.

It reads ECMA 262's syntax (JSON Schema's) as far as that takes: groups, alternatives, classes,
escapes, quantifiers. Whether the rest is supported is for the engine to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from anser.core import limits

__all__ = ["PatternError", "check_pattern"]

_QUANTIFIER = re.compile(r"([*+?]|\{(\d*)(,?)(\d*)\})\??")
_GROUP = re.compile(r"\((\?(:|=|!|<=|<!|<\w+>))?")
_ATOM = re.compile(r"\[\^?(?:[^\]\\]|\\.)*\]|\\.|[^()|\\\[]", re.DOTALL)
_DIGITS_MAX = 6


class PatternError(Exception):
    """The pattern may not reach an engine; the message is the rest of a sentence."""


def check_pattern(pattern: str) -> None:
    """Raise PatternError unless an engine can write `pattern` out."""
    reader = _Reader(pattern)
    reader.alternatives(depth=1)
    if reader.at < len(pattern):
        raise PatternError("has a bracket too many")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """How many atoms a part is when written out, and whether it may match nothing."""

    size: int
    empty: bool


class _Reader:
    """Reads forward through one pattern."""

    __slots__ = ("_pattern", "at")

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.at = 0

    def alternatives(self, depth: int) -> _Part:
        """`a|b|c`, up to the closing bracket or the end."""
        if depth > limits.JSON_DEPTH_MAX:
            raise PatternError("is nested too deeply")
        branches = [self._sequence(depth)]
        while self._pattern.startswith("|", self.at):
            self.at += 1
            branches.append(self._sequence(depth))
        size = sum(branch.size for branch in branches)
        return _bounded(_Part(size=size, empty=any(branch.empty for branch in branches)))

    def _sequence(self, depth: int) -> _Part:
        size, empty = 0, True
        while self.at < len(self._pattern) and self._pattern[self.at] not in "|)":
            part = self._repeated(self._atom(depth))
            size, empty = size + part.size, empty and part.empty
        return _Part(size=size, empty=empty)

    def _atom(self, depth: int) -> _Part:
        group = _GROUP.match(self._pattern, self.at)
        if group is not None:
            self.at = group.end()
            inner = self.alternatives(depth + 1)
            if not self._pattern.startswith(")", self.at):
                raise PatternError("has a bracket that is not closed")
            self.at += 1
            return inner
        atom = _ATOM.match(self._pattern, self.at)
        if atom is None:
            raise PatternError("ends in the middle of something")
        self.at = atom.end()
        width = 0 if atom[0] in "^$" else 1
        return _Part(size=width, empty=width == 0)

    def _repeated(self, part: _Part) -> _Part:
        """`part` with all quantifiers that follow it."""
        while True:
            found = _QUANTIFIER.match(self._pattern, self.at)
            if found is None or found[1] in {"{}", "{,}"}:
                return part
            self.at = found.end()
            if found[1] in "*+?":
                part = _Part(size=part.size + 1, empty=part.empty or found[1] != "+")
            else:
                part = _counted(part, *_counts(found))


def _counts(found: re.Match[str]) -> tuple[int, int]:
    """The least and the most of a counted repetition; without an upper bound the least counts."""
    low, comma, high = found[2], found[3], found[4]
    if max(len(low), len(high)) > _DIGITS_MAX:
        raise PatternError("repeats something too often")
    least = int(low or 0)
    most = int(high) if high else max(least, 1)
    return least, most if comma else least


def _counted(part: _Part, least: int, most: int) -> _Part:
    if least > most:
        raise PatternError("repeats something at least so often and at most less often")
    if part.empty and most > 1:
        raise PatternError("repeats what may be empty a counted number of times: use *")
    return _bounded(_Part(size=part.size * most, empty=part.empty or least == 0))


def _bounded(part: _Part) -> _Part:
    if part.size > limits.SCHEMA_PATTERN_ATOMS_MAX:
        most = limits.SCHEMA_PATTERN_ATOMS_MAX
        raise PatternError(f"has more than {most} parts once its repetitions are written out")
    return part
