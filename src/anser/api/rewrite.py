"""Chunks of a stream on their way to the client: what is the platform's own is written into them.

An answer has one identity, whichever engines made it: `id`, `object`, `created` and `model` of
every chunk are the platform's, so is each choice's `index`. Usage is taken out: the platform
reports its own count. Reasoning is there under both of its names, log probabilities of
/v1/completions in OpenAI's form. A chat begins with its role, also where an engine leaves that out.
All else is spliced in byte for byte, undecoded. A chunk that is left without a choice is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Raw

from anser.api.demands import Asked
from anser.api.logprobs import TextLogprobs
from anser.core.errors import EngineBroken
from anser.ports import Route

__all__ = ["Rewriter"]

_Fields = dict[str, Raw]

_CHUNK = msgspec.json.Decoder(_Fields)
_CHOICES = msgspec.json.Decoder(list[_Fields])
_LOGPROBS = msgspec.json.Decoder(dict[str, object] | None)
_NONE = Raw(b"[]")
_NULL = Raw(b"null")
_ASSISTANT = Raw(b'"assistant"')
_REASONING = b'"reasoning'
_NAMES = ("reasoning", "reasoning_content")


class Rewriter:
    """The chunks of one request's answers; `head` is what every chunk says of the answer."""

    __slots__ = ("_begins", "_head", "_indices", "_logprobs", "_opens")

    def __init__(self, asked: Asked, head: dict[str, object]) -> None:
        self._head = {name: Raw(msgspec.json.encode(value)) for name, value in head.items()}
        count = len(asked.demands)
        self._indices = [Raw(b"%d" % index) for index in range(count)]
        is_chat = asked.demands[0].route is Route.CHAT
        self._opens = count > 1 and is_chat
        self._begins = count == 1 and is_chat  # no delta has come yet
        self._logprobs = [TextLogprobs() for _ in asked.demands] if asked.text_logprobs else []

    def __repr__(self) -> str:
        return f"<Rewriter choices={len(self._indices)} logprobs={bool(self._logprobs)}>"

    def opening(self) -> Iterator[bytes]:
        """What a stream of several chat answers begins with: the role of each, in their order.

        OpenAI's clients number choices in the order in which they appear; engines begin in any.
        """
        for index in self._indices if self._opens else ():
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield msgspec.json.encode({**self._head, "choices": [choice]})

    def chunk(self, data: bytes, index: int = 0) -> bytes | None:
        """What the client gets for this chunk of a choice, if anything. Raises EngineBroken."""
        try:
            chunk = _CHUNK.decode(data)
            choices = _CHOICES.decode(chunk.pop("choices", _NONE))
            for choice in choices:
                self._rewrite(choice, index, reasons=_REASONING in data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise EngineBroken("The engine sent a chunk that is not an OpenAI chunk.") from error
        if not choices:
            return None
        chunk.pop("usage", None)
        return msgspec.json.encode({**chunk, **self._head, "choices": choices})

    def _rewrite(self, choice: _Fields, index: int, *, reasons: bool) -> None:
        choice["index"] = self._indices[index]
        if "delta" in choice and (reasons or self._opens):
            choice["delta"] = self._delta(choice["delta"])
        if self._begins and "delta" in choice:
            choice["delta"] = self._first(choice["delta"])
        if self._logprobs:
            logprobs = _LOGPROBS.decode(choice.get("logprobs", _NULL))
            if logprobs is not None:
                choice["logprobs"] = Raw(msgspec.json.encode(self._logprobs[index].add(logprobs)))

    def _delta(self, raw: Raw) -> Raw:
        """The delta with reasoning under both names, without a role that was sent before."""
        if bytes(raw) == b"null":
            return raw
        delta = _CHUNK.decode(raw)
        if self._opens:
            delta.pop("role", None)
        for name, other in (_NAMES, _NAMES[::-1]):
            if name in delta and bytes(delta.get(other, _NULL)) == b"null":
                delta[other] = delta[name]
        return Raw(msgspec.json.encode(delta))

    def _first(self, raw: Raw) -> Raw:
        """The answer's first delta, with a role.

        llama.cpp's server tells it with the first whole character, or never.
        """
        if bytes(raw) == b"null":
            return raw
        self._begins = False
        delta = _CHUNK.decode(raw)
        if bytes(delta.get("role", _NULL)) != b"null":
            return raw
        return Raw(msgspec.json.encode({"role": _ASSISTANT} | delta | {"role": _ASSISTANT}))
