"""What an engine's error means: whose fault it is, and what of its words may be shown.

The words are a stranger's: cut, made printable, and the node's key taken out of them.
"""

from __future__ import annotations

import re

import msgspec

from anser.core.errors import (
    ContextTooLong,
    EngineBroken,
    EngineDeclined,
    EngineError,
    EngineRefused,
    EngineUnreachable,
)
from anser.core.limits import ENGINE_MESSAGE_CHARS_MAX

__all__ = ["broken_json", "error_in", "error_of", "error_of_status"]

# 4xx that tell of the node: its key, its account, its models and routes, its load.
_NODES_OWN = {401, 402, 403, 404, 405, 407, 408, 421, 425, 426, 429}
_TOO_MANY = 429
_BUSY = {_TOO_MANY, 503}
_RETRY_AFTER_MAX_S = 3_600.0
_PARAM_CHARS_MAX = 64
_TOO_LONG = re.compile(
    r"context (length|size|window)|maximum context|input is too long", re.IGNORECASE
)
_MEANINGS = {
    401: "The engine does not accept the node's key; see the node's key file.",
    402: "The account that the node's key belongs to cannot pay.",
    403: "The engine does not let the node's key do this.",
    404: "The engine knows no such model or route.",
}


class _Words(msgspec.Struct):
    message: str | None = None
    code: object = None
    param: object = None


def broken_json(what: str) -> EngineBroken:
    """The error for JSON that is none, or has no shape that it may have."""
    return EngineBroken(f"The engine sent {what} not as the OpenAI API has it.")


def error_of(status: int, retry_after: bytes, data: bytes, key: str | None) -> EngineError:
    """What an answer with this error status and body means, and when to come back."""
    error = error_of_status(status, data, key)
    if status in _BUSY:
        error.retry_after_s = _seconds(retry_after)
    return error


def error_of_status(
    status: int, data: bytes, key: str | None, *, of_node: bool = False
) -> EngineError:
    """What this status with this body means. `of_node`: the question was the platform's own."""
    words = _words(data)
    said = _shown(words.message, key)
    if status in _MEANINGS:
        return EngineDeclined(_MEANINGS[status])
    if 300 <= status < 400:
        return EngineBroken(f"The engine redirects ({status}), which is never followed.")
    if status in _BUSY:
        busy = EngineDeclined if status == _TOO_MANY else EngineUnreachable
        return busy.quoting(f"The engine is busy ({status})", said)
    if status in _NODES_OWN:
        return EngineDeclined.quoting(f"The engine answered with status {status}", said)
    if 400 <= status < 500 and not of_node:
        text = said or "The engine refused the request."
        param = words.param if isinstance(words.param, str) else None
        refusal = EngineRefused(
            text, status=status, param=param and _shown(param, key)[:_PARAM_CHARS_MAX]
        )
        if words.code == ContextTooLong.code or _TOO_LONG.search(text):
            refusal.code = ContextTooLong.code  # what clients look for, to shorten the prompt
        return refusal
    return EngineBroken.quoting(f"The engine answered with status {status}", said)


def error_in(data: bytes, key: str | None) -> EngineError | None:
    """What an error object means that came with status 200, or in a stream; None if it is none."""
    words = _words(data)
    if words == _Words():
        return None
    status = words.code if isinstance(words.code, int) else 500
    return error_of_status(status if 400 <= status < 600 else 500, data, key)


def _words(data: bytes) -> _Words:
    """The error object's fields, in any of the shapes that engines use."""
    try:
        value = msgspec.json.decode(data, type=dict[str, object])
        inner = value.get("error", value.get("detail", value))
        if isinstance(inner, str):
            return _Words(message=inner, code=value.get("code"))
        return msgspec.convert(inner, _Words)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _Words()


def _shown(message: str | None, key: str | None) -> str:
    """A stranger's words, fit to end a sentence of ours."""
    text = message or ""
    if key:
        text = text.replace(key, "[key]")
    text = _clean(text)
    if len(text) > ENGINE_MESSAGE_CHARS_MAX:
        text = text[: ENGINE_MESSAGE_CHARS_MAX - 1] + "…"
    return text


def _clean(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text[:4_096]).split())


def _seconds(value: bytes) -> float | None:
    digits = value.strip()
    if not digits.isdigit() or len(digits) > 9:
        return None
    return min(float(digits), _RETRY_AFTER_MAX_S)
