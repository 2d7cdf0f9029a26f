"""Everything that reads strangers' bytes, under any bytes.

Each target is a module with a function `check(data: bytes) -> None`, which raises AssertionError,
or whatever it is that should never be raised, if these bytes break a rule. `test_fuzz.py` runs it
on what is kept in `corpus/`, and on variations; `python -m tests.fuzz NAME --seconds N` lets
atheris look for bytes that find more.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

__all__ = ["CORPUS", "TARGETS", "Check", "check_of", "cut", "kept"]

Check = Callable[[bytes], None]

TARGETS = ("body", "config", "framing", "guard", "sse", "upstream")
CORPUS = Path(__file__).parent / "corpus"
_PARTS_MAX = 8


def check_of(name: str) -> Check:
    """What this target asserts; it is imported only now, so that its coverage can be watched."""
    check: Check = import_module(f"{__name__}.{name}").check
    return check


def kept(name: str) -> list[bytes]:
    """The corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def cut(data: bytes) -> tuple[bytes, list[bytes]]:
    """All but the first byte; and the same in as many equal parts as that byte says.

    >>> cut(b"\\x02abcdef")
    (b'abcdef', [b'ab', b'cd', b'ef'])
    """
    stream = data[1:]
    count = 1 + data[0] % _PARTS_MAX if data else 1
    size = max(1, -(-len(stream) // count))
    return stream, [stream[at : at + size] for at in range(0, len(stream), size)]
