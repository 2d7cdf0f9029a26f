"""From decoded JSON to checked fields, and from what is wrong to an error that names it."""

from __future__ import annotations

import re
from typing import TypeVar, cast

import msgspec

from anser.api.errors import echo
from anser.core.errors import InvalidField, RequestError, UnknownField

__all__ = ["check_fields"]

_Fields = TypeVar("_Fields", bound=msgspec.Struct)

_ANY_VALUE = "[...]"  # msgspec does not say which
_DROPPED_MAX = 64  # unknown fields in one body, where they are dropped
_AT = " - at `"
_SENTENCE_CHARS_MAX = 200
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`\Z")
_WRONG_CHOICE = re.compile(r"Invalid (?:enum )?value '?(.*?)'?\Z", re.DOTALL)
_PART_TYPE = re.compile(r"\.content\[\d+\]\.type\Z")
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_WORDS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def check_fields(
    body: dict[str, object], kind: type[_Fields], *, drop_unknown: bool = False
) -> _Fields:
    """`body` as `kind`. Raises InvalidField or UnknownField, whose `param` is the field's path.

    A field of the body that is null is not there, whatever its name. With `drop_unknown`, unknown
    fields are taken out instead, up to a limit.
    """
    body = {name: value for name, value in body.items() if value is not None}
    for _ in range(_DROPPED_MAX if drop_unknown else 0):
        try:
            return msgspec.convert(body, kind)
        except msgspec.ValidationError as error:
            text, path = _located(error, body)
            unknown = _UNKNOWN.match(text)
            ambiguous = path and _AT in text  # part of its name looks like a path
            if unknown is None or ambiguous or not _drop(body, path, unknown[1]):
                raise _fault(text, path) from None
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise _fault(*_located(error, body)) from None


def _located(error: msgspec.ValidationError, body: dict[str, object]) -> tuple[str, str]:
    """msgspec's "Expected `int` - at `$.messages[0].n`" as its sentence and the path."""
    whole = str(error)
    text, at, path = whole.rpartition(_AT)
    unknown = _UNKNOWN.match(whole)
    if not at or (unknown is not None and unknown[1] in body):
        return whole, ""
    return text, path.removesuffix("`").removeprefix("$").removeprefix(".")


def _fault(text: str, path: str) -> RequestError:
    if found := _UNKNOWN.match(text):
        name = f"{path}.{found[1]}" if path else found[1]
        return UnknownField(f"Unknown field {echo(name)}.", param=name)
    if found := _MISSING.match(text):
        name = f"{path}.{found[1]}" if path else found[1]
        return InvalidField(f"`{name}` is required.", param=name)
    if found := _WRONG_CHOICE.match(text):
        return InvalidField(f"`{path}`: {_wrong_choice(found[1], path)}", param=path)
    if path.startswith("key` in `$."):
        text, path = f"{text} as each key", path.removeprefix("key` in `$.")
    if path.endswith(_ANY_VALUE):
        text, path = f"{text} as a value", path.removesuffix(_ANY_VALUE)
    return InvalidField(f"`{path or 'body'}`: {_reworded(text)}.", param=path or None)


def _wrong_choice(value: str, path: str) -> str:
    if _PART_TYPE.search(path):
        return f"{echo(value)} is not read here: only text parts are, and nothing is fetched."
    return f"{echo(value)} is not one of the values that it may have."


def _reworded(text: str) -> str:
    """msgspec's sentence with JSON's names of types."""
    words = re.sub(r"`([^`]*)`", lambda found: _in_json(found[1]), text[:_SENTENCE_CHARS_MAX])
    return words[:1].lower() + words[1:]


def _in_json(types: str) -> str:
    return " or ".join(_WORDS.get(name, name) for name in types.split(" | "))


def _drop(body: dict[str, object], path: str, name: str) -> bool:
    """Take the field `name` out of the object at `path`; whether it was there."""
    parent: object = body
    for step in _STEP.finditer(path):
        if isinstance(parent, list) and step[2] is not None:
            parent = cast("list[object]", parent)[int(step[2])]
        elif isinstance(parent, dict):
            parent = cast("dict[str, object]", parent).get(step[1])
    if not isinstance(parent, dict) or name not in parent:
        return False
    del parent[name]
    return True
