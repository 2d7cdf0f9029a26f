"""Any bytes as the body of a request: the JSON, then each route's fields."""

from __future__ import annotations

import json
from typing import Any

from anser.api.checks import check_fields
from anser.api.decode import decode_object
from anser.api.errors import body_of
from anser.api.fields import ChatFields, CompletionFields, EmbeddingFields
from anser.api.messages import engine_message
from anser.api.tools import engine_format, engine_tools
from anser.core.errors import RequestError
from anser.core.limits import JSON_DEPTH_MAX

__all__ = ["check"]

_KINDS: tuple[Any, ...] = (ChatFields, CompletionFields, EmbeddingFields)


def check(data: bytes) -> None:
    """JSON is what the standard library takes for it, strictly; all else is the caller's error,
    told shortly; what engines get can be written again.
    """
    try:
        body = decode_object(data)
    except RequestError as error:
        _told(error)
        assert not _is_sound(data)
        return
    assert json.dumps(body) == json.dumps(json.loads(data))
    for kind in _KINDS:
        for drop in (True, False):
            try:
                json.dumps(_lowered(check_fields(body, kind, drop_unknown=drop)), allow_nan=False)
            except RequestError as error:
                _told(error, named=True)


def _lowered(fields: Any) -> object:
    """What engines get of it, as far as it is changed."""
    if not isinstance(fields, ChatFields):
        return None
    tools = engine_tools(fields.tools, fields.tool_choice)
    messages = [engine_message(message) for message in fields.messages]
    assert all(isinstance(message.get("content", ""), str) for message in messages)
    return [tools, engine_format(fields.response_format), messages]


def _told(error: RequestError, *, named: bool = False) -> None:
    """It can be shown to its caller, with the field's name."""
    told = json.loads(body_of(error))["error"]
    assert 400 <= error.status < 500
    assert told["message"].isprintable()
    assert len(told["message"]) < 500
    assert told["param"] is not None or not named


def _is_sound(data: bytes) -> bool:
    """Whether it is an object that may come, read by the standard library alone."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_none)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and _depth(value) <= JSON_DEPTH_MAX


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _none(name: str) -> None:
    raise ValueError(name)


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    within = max(map(_depth, inner), default=0)
    return within + isinstance(value, dict | list)
