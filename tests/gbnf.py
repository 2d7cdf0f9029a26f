"""Reads llama.cpp's grammars (GBNF) as regular expressions, for tests without a model.

Rules that call themselves are followed a few levels deep, which is enough for short examples.
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["expression", "matcher"]

_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|(\[(?:[^\]\\]|\\.)*\])|([a-z][a-z0-9]*)|\s+|(.)')
_ESCAPE = re.compile(r"\\U([0-9A-F]{8})|\\(.)")
_LEVELS = 3


def matcher(grammar: str) -> Callable[[str], bool]:
    """Whether a text fits the grammar."""
    rules = dict(line.split(" ::= ") for line in grammar.splitlines() if line)
    pattern = re.compile(_written(rules, "root", {}), re.DOTALL)
    return lambda text: pattern.fullmatch(text) is not None


def expression(text: str) -> str:
    """One piece of grammar, which refers to no rules."""
    return _translated({"root": text}, "root", {})


def _written(rules: dict[str, str], name: str, open_: dict[str, int]) -> str:
    levels = open_.get(name, 0)
    if levels == _LEVELS:
        return "(?!)"
    return f"(?:{_translated(rules, name, {**open_, name: levels + 1})})"


def _translated(rules: dict[str, str], name: str, open_: dict[str, int]) -> str:
    written: list[str] = []
    for literal, chars, other, sign in _TOKEN.findall(rules[name].removeprefix("| ") or '""'):
        if other:
            written.append(_written(rules, other, open_))
        elif chars:
            written.append(chars)
        elif literal:
            written.append(f"(?:{re.escape(_ESCAPE.sub(_meant, literal))})")
        elif sign:
            written.append(sign)
    empty = "|" if rules[name].startswith("| ") else ""
    return empty + "".join(written)


def _meant(escape: re.Match[str]) -> str:
    if escape[1]:
        return chr(int(escape[1], 16))
    return {"n": "\n", "t": "\t"}.get(escape[2], escape[2])
