"""A regular expression as a piece of llama.cpp's grammar (GBNF), for the inside of a JSON string.

ECMA 262's syntax (JSON Schema's), as far as a grammar can say it: what it cannot say (looking
around, referring back, anchors inside) is refused. Nothing of the pattern is copied: it is read
into sets of characters, alternatives and repetitions, and these are written anew.

A grammar sees the string as JSON has it, so quotes, backslashes and line ends are written as their
escapes, and sets such as `.` or `[^@]` leave them out. What is written therefore never matches more
than the pattern does, and sometimes a little less.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from anser.core.pattern import PatternError, check_pattern

__all__ = ["Shape", "in_quotes", "pattern_shape"]

_Ranges = list[tuple[int, int]]

_LAST = 0x10FFFF
_UNWRITABLE: _Ranges = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x9F), (0xD800, 0xDFFF)]
_ESCAPED = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r"}
_DIGITS: _Ranges = [(0x30, 0x39)]
_WORDS: _Ranges = [*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACES: _Ranges = [
    *((0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680)),
    *((0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
    (0xFEFF, 0xFEFF),
]
_CLASSES = {"d": _DIGITS, "w": _WORDS, "s": _SPACES}
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0}
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}")
_QUANTIFIER = re.compile(r"(?:([*+?])|\{(\d+)(,?)(\d*)\})\??")
_GROUP = re.compile(r"\((?:\?(?::|P?<\w+>))?(?!\?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A piece of grammar, and how many characters what it matches has (None: no upper bound)."""

    text: str
    least: int
    most: int | None


def in_quotes(text: str) -> str:
    """A literal of the grammar, in plain ASCII."""
    return '"' + "".join(_literal(ord(char)) for char in text) + '"'


def pattern_shape(pattern: str) -> Shape:
    """The pattern, which may match anywhere in the string. Raises PatternError."""
    check_pattern(pattern)
    return _Reader(pattern).whole()


class _Reader:
    """Reads forward through one pattern."""

    __slots__ = ("_at", "_pattern")

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def whole(self) -> Shape:
        """Alternatives at the top, each with anchors of its own or none."""
        branches = [self._anchored()]
        while self._skip("|"):
            branches.append(self._anchored())
        return _either(branches)

    def _anchored(self) -> Shape:
        anywhere = _repeated(_set(_complement([])), 0, None)
        parts = [] if self._skip("^") else [anywhere]
        parts.append(self._sequence())
        if not self._skip("$"):
            parts.append(anywhere)
        return _joined(parts)

    def _skip(self, char: str) -> bool:
        found = self._pattern.startswith(char, self._at)
        self._at += found
        return found

    def _sequence(self) -> Shape:
        parts: list[Shape] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            if self._pattern[self._at] == "$" and self._pattern[self._at + 1 :][:1] in {"", "|"}:
                break
            parts.append(self._quantified(self._atom()))
        return _joined(parts)

    def _quantified(self, part: Shape) -> Shape:
        found = _QUANTIFIER.match(self._pattern, self._at)
        if found is None:
            return part
        self._at = found.end()
        if found[1] is not None:
            return _repeated(part, int(found[1] == "+"), 1 if found[1] == "?" else None)
        least = int(found[2])
        most = least if not found[3] else int(found[4]) if found[4] else None
        return _repeated(part, least, most)

    def _atom(self) -> Shape:
        char = self._pattern[self._at]
        if char == "(":
            return self._group()
        if char in "^$":
            raise PatternError("has an anchor inside, which no grammar can express")
        if char in "{}*+?":
            raise PatternError("repeats what cannot be repeated")
        self._at += 1
        if char == ".":
            return _set(_complement([(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]))
        if char == "[":
            return self._class()
        return _set(self._escape() if char == "\\" else [(ord(char), ord(char))])

    def _group(self) -> Shape:
        found = _GROUP.match(self._pattern, self._at)
        if found is None:
            raise PatternError("looks around, which no grammar can express")
        self._at = found.end()
        branches = [self._sequence()]
        while self._skip("|"):
            branches.append(self._sequence())
        if not self._skip(")"):
            raise PatternError("has an anchor inside, which no grammar can express")
        return _either(branches)

    def _class(self) -> Shape:
        negated = self._skip("^")
        ranges: _Ranges = []
        while not self._skip("]"):
            low = self._class_atom()
            if len(low) == 1 and low[0][0] == low[0][1] and self._is_range():
                self._at += 1
                high = self._class_atom()
                if len(high) != 1 or not low[0][0] <= high[0][0] == high[0][1]:
                    raise PatternError("has a range in brackets that is none")
                low = [(low[0][0], high[0][0])]
            ranges += low
        return _set(_complement(ranges) if negated else ranges)

    def _is_range(self) -> bool:
        rest = self._pattern[self._at : self._at + 2]
        return rest.startswith("-") and rest != "-]"

    def _class_atom(self) -> _Ranges:
        char = self._pattern[self._at]
        self._at += 1
        if char == "\\":
            return [(8, 8)] if self._skip("b") else self._escape()
        return [(ord(char), ord(char))]

    def _escape(self) -> _Ranges:
        """The characters that the escape after a backslash stands for."""
        hexadecimal = _HEX.match(self._pattern, self._at)
        if hexadecimal is not None:
            self._at = hexadecimal.end()
            code = int(next(digits for digits in hexadecimal.groups() if digits), 16)
            return [(code, code)]
        char = self._pattern[self._at]
        self._at += 1
        if char.lower() in _CLASSES:
            ranges = _CLASSES[char.lower()]
            return ranges if char.islower() else _complement(ranges)
        if char in _CONTROLS:
            return [(_CONTROLS[char], _CONTROLS[char])]
        if char.isalnum():
            raise PatternError(f"has \\{char}, which no grammar can express")
        return [(ord(char), ord(char))]


# ------------------------------------------------------------------- sets of characters


def _complement(ranges: _Ranges) -> _Ranges:
    """All characters that stand for themselves in a JSON string, except these."""
    free: _Ranges = []
    start = 0
    for low, high in sorted([*ranges, *_UNWRITABLE]):
        if start < low:
            free.append((start, low - 1))
        start = max(start, high + 1)
    return [*free, (start, _LAST)] if start <= _LAST else free


def _set(ranges: _Ranges) -> Shape:
    """One character of these; those that JSON escapes are written as their escapes."""
    plain = _complement(_complement(ranges))
    branches = ["[" + "".join(map(_range, plain)) + "]"] if plain else []
    for code, letter in _ESCAPED.items():
        if any(low <= code <= high for low, high in ranges):
            branches.append(in_quotes("\\" + letter))
    if not branches:
        raise PatternError("asks for a character that does not occur in JSON texts")
    text = branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"
    return Shape(text=text, least=1, most=1)


def _range(ends: tuple[int, int]) -> str:
    low, high = ends
    return _code(low) if low == high else f"{_code(low)}-{_code(high)}"


def _code(code: int) -> str:
    return chr(code) if code < 128 and chr(code).isalnum() else f"\\U{code:08X}"


def _literal(code: int) -> str:
    plain = 0x20 <= code < 0x7F and code not in {0x22, 0x5C}
    return chr(code) if plain else f"\\U{code:08X}"


# ------------------------------------------------------------------------ putting together


def _joined(parts: list[Shape]) -> Shape:
    most = [part.most for part in parts]
    return Shape(
        text=" ".join(part.text for part in parts) or '""',
        least=sum(part.least for part in parts),
        most=None if None in most else sum(filter(None, most)),
    )


def _either(branches: list[Shape]) -> Shape:
    most = [branch.most for branch in branches]
    return Shape(
        text=f"({' | '.join(branch.text for branch in branches)})",
        least=min(branch.least for branch in branches),
        most=None if None in most else max(filter(None, most), default=0),
    )


def _repeated(part: Shape, least: int, most: int | None) -> Shape:
    if most == 0:
        return Shape(text='""', least=0, most=0)
    if part.least == 0 and most != 1:
        raise PatternError("repeats what may be empty")
    unbounded = most is None or part.most is None
    return Shape(
        text=f"{part.text}{{{least},{'' if most is None else most}}}",
        least=part.least * least,
        most=None if unbounded else (part.most or 0) * (most or 0),
    )
