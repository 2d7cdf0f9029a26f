"""JSON from a client, read strictly: bounded depth, no duplicate keys, nothing that is not JSON.

Theory of operation. msgspec refuses NaN, numbers out of range, lone surrogates and bytes that are
not UTF-8. What it does not see is read off the text's *skeleton*, its brackets, colons and commas
outside of strings: its length bounds the number of values; pairs of brackets are taken away from
the inside out, once for each level of depth; and there are as many colons as the decoded objects
have keys, unless a key came twice.

Most bodies need no skeleton: they are short, have few brackets, and each of their colons follows a
quotation mark or stands in a text, so that counting these marks tells that no key came twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

import msgspec

from anser.api.errors import echo
from anser.core.errors import InvalidField, RequestError
from anser.core.limits import JSON_DEPTH_MAX, JSON_MARKS_MAX

__all__ = ["decode_object", "depth_exceeds"]

_Object = dict[str, object]
_SQUARE = bytes.maketrans(b"{}", b"[]")
_NESTS = (dict, list)
_NOT_OPENING = bytes(set(range(256)) - set(b"{["))
_COLONS_MAX = 500  # more are counted otherwise
_SPACES = (b" ", b"\n", b"\t", b"\r", b"")
_NOT_SKELETON = bytes(set(range(256)) - set(b"{}[]:,"))


def decode_object(text: bytes) -> dict[str, object]:
    """The JSON object in `text`. Raises RequestError or InvalidField."""
    found = _decode_plain(text)
    return _decode_any(text) if found is None else found


def _decode_plain(text: bytes) -> _Object | None:
    """The object, if it is seen at once that nothing is wrong with it."""
    if len(text) > JSON_MARKS_MAX or len(text.translate(None, _NOT_OPENING)) > JSON_DEPTH_MAX:
        return None
    before = text.split(b":", _COLONS_MAX)
    if len(before) > _COLONS_MAX:
        return None
    marked = 0  # colons that follow a quotation mark
    for part in before[:-1]:
        last = part[-1:]
        if last in _SPACES:
            return None  # a colon may stand apart from its key
        marked += last == b'"'
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if isinstance(value, dict) and marked == _count_keys(cast("_Object", value)):
        return cast("_Object", value)
    return None


def _decode_any(text: bytes) -> dict[str, object]:
    skeleton = _skeleton(text)
    if depth_exceeds(skeleton.translate(None, b":,"), JSON_DEPTH_MAX):
        raise RequestError(f"The body's JSON is nested deeper than {JSON_DEPTH_MAX} levels.")
    try:
        value = msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        raise RequestError(f"The body is not JSON: {_trouble(error, text)}.") from None
    except UnicodeDecodeError:
        raise RequestError("The body is not UTF-8.") from None
    if not isinstance(value, dict):
        raise RequestError("The body is not a JSON object.")
    found = cast("dict[str, object]", value)
    if skeleton.count(b":") != _count_keys(found):
        name = _duplicate(text)
        raise InvalidField(f"The key {echo(name)} is there twice.", param=name)
    return found


def depth_exceeds(brackets: bytes, depth_max: int) -> bool:
    """Whether `brackets`, all of them square, nest deeper than `depth_max`; linear in each level.

    >>> depth_exceeds(b"[[][]]", 1), depth_exceeds(b"[[][]]", 2), depth_exceeds(b"[[[", 2)
    (True, False, True)
    """
    for _ in range(depth_max):
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    return b"[]" in brackets or brackets.count(b"[") > depth_max


def _trouble(error: msgspec.MsgspecError, text: bytes) -> str:
    """What is wrong, also where msgspec takes half a surrogate pair for the end of the text."""
    if "truncated" in str(error):
        with suppress(ValueError):
            json.loads(text)  # it takes lone surrogates
            return r"a \u escape is one half of a surrogate pair"
    return str(error)


def _skeleton(text: bytes) -> bytes:
    """Brackets (made square), colons and commas outside of strings. Raises RequestError."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = text.count(b'"')
    if quotes <= 2 * JSON_MARKS_MAX:
        skeleton = b"".join(text.split(b'"')[::2]).translate(_SQUARE, _NOT_SKELETON)
        if len(skeleton) <= JSON_MARKS_MAX:
            return skeleton
    raise RequestError(f"The body has more than {JSON_MARKS_MAX} values.")


def _count_keys(value: dict[str, object] | list[object]) -> int:
    count, within = 0, cast("Iterable[object]", value)
    if isinstance(value, dict):
        count, within = len(value), value.values()
    for each in within:
        if isinstance(each, _NESTS):
            count += _count_keys(cast("dict[str, object] | list[object]", each))
    return count


def _duplicate(text: bytes) -> str:
    """The first key that some object of `text` has twice."""
    found: list[str] = []

    def note(pairs: list[tuple[str, object]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found.append(key)
            seen.add(key)

    json.loads(text, object_pairs_hook=note)
    assert found, "fewer keys than colons, yet none twice"
    return found[0]
