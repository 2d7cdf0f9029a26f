"""The seam of an answer: what its client has of it when its node dies, and how another goes on.

Theory of operation. What has reached the client is the beginning of the answer, whoever wrote it.
Another node is asked for the rest of it: a text with that beginning behind the prompt, a chat with
it as the assistant's own turn, which the engine is told to go on with in its own way (`go_on`).
What the dead node had made beyond it never reached anybody, and is made anew. Engines hold back
half a character and the half of a stop string, so neither can lie across the seam; for engines that
do not, a stop string that begins before the seam is looked for here (`Said.stops_in`).

There is no way on where the beginning is not plain text: a tool call, a form whose grammar would
start anew, reasoning that a template drops. Such an answer ends with its node's error.

Invariants: while `open`, `text` is all that the client has been sent, at most SEAM_CHARS_MAX
characters; else it is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import msgspec

from anser.core.errors import EngineRefused
from anser.core.fleet import EngineKind
from anser.core.limits import SEAM_CHARS_MAX
from anser.ports import Route
from anser.services.chunks import Piece

__all__ = ["Said", "go_on", "without_role"]

_Body = dict[str, object]

_FORMED = ("tools", "response_format")
_CONTINUES: Mapping[EngineKind, _Body] = {
    EngineKind.LLAMACPP: {},  # a last turn of the assistant's is gone on with
    EngineKind.OLLAMA: {},
    EngineKind.VLLM: {"continue_final_message": True, "add_generation_prompt": False},
    EngineKind.SGLANG: {"continue_final_message": True},
}
"""How an engine is told that the last message is the beginning of its answer."""


@dataclass(slots=True)
class Said:
    """What a client has been sent of one answer. `open`: another node could go on from it."""

    open: bool
    stops: tuple[str, ...] = ()
    last: Piece | None = field(default=None, repr=False)
    chars: int = 0
    _utf8: bytearray = field(default_factory=bytearray, repr=False)  # a tenth of a list's memory
    # The seam, from where a stop string across it could begin, and where in that it is:
    _around: str = field(default="", repr=False)
    _seam: int = 0
    _watched: int = 0  # characters to come in which such a string could end

    @classmethod
    def of(cls, body: Mapping[str, object]) -> Said:
        """Nothing yet, of an answer to this body."""
        stop = body.get("stop") or ()
        stops = (stop,) if isinstance(stop, str) else tuple(cast("list[str]", stop))
        return cls(not any(name in body for name in _FORMED), stops)

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        assert len(self.text) == self.chars <= SEAM_CHARS_MAX if self.open else not self._utf8
        assert 0 <= self._seam <= len(self._around)

    @property
    def text(self) -> str:
        """All of it."""
        return self._utf8.decode()

    def add(self, piece: Piece) -> None:
        """The client is sent this."""
        self.last = piece
        self.chars += len(piece.text)
        if not piece.plain or self.chars > SEAM_CHARS_MAX:
            self.open = False
        if self.open:
            self._utf8 += piece.text.encode()
        else:
            self._utf8.clear()

    def cut(self) -> None:
        """Another node goes on from here."""
        longest = max(map(len, self.stops), default=0)
        self._watched = max(0, longest - 1)
        self._around = self.text[-self._watched :] if self._watched else ""
        self._seam = len(self._around)

    def stops_in(self, piece: Piece) -> bool:
        """Whether a stop string that began before the seam ends in this piece."""
        if not self._watched or not piece.text:
            return False
        news = piece.text[: self._watched]
        self._around, self._watched = self._around + news, self._watched - len(news)
        return any(0 <= self._around.find(stop) < self._seam for stop in self.stops)


def go_on(
    body: Mapping[str, object], text: str, *, tokens: int, route: Route, kind: EngineKind
) -> _Body:
    """The body that asks for the rest of an answer that begins with `text`, of so many tokens.

    Raises EngineRefused where this kind of engine has no way to go on.
    """
    rest: _Body = {**body, "max_tokens": max(1, cast("int", body["max_tokens"]) - tokens)}
    if "min_tokens" in body:
        rest["min_tokens"] = max(0, cast("int", body["min_tokens"]) - tokens)
    if route is Route.COMPLETIONS:
        return {**rest, "prompt": f"{body['prompt']}{text}"}
    if kind not in _CONTINUES:
        raise EngineRefused(f"An engine of kind {kind.value} cannot go on with an answer.")
    messages = list(cast("list[_Body]", body["messages"]))
    return {**rest, **_CONTINUES[kind], "messages": _with_turn(messages, text, kind)}


def _with_turn(messages: list[_Body], text: str, kind: EngineKind) -> list[_Body]:
    """The conversation with the answer's beginning as the assistant's last turn."""
    last = messages[-1]
    begun = last.get("content") if last.get("role") == "assistant" else None
    if begun is None or _CONTINUES[kind]:
        return [*messages, {"role": "assistant", "content": text}]
    if not isinstance(begun, str):
        raise EngineRefused("What the caller began for the assistant is not plain text.")
    return [*messages[:-1], {**last, "content": begun + text}]


def without_role(piece: Piece) -> Piece | None:
    """A chunk of the node that goes on, which is nobody's beginning; None if nothing is left."""
    chunk = msgspec.json.decode(piece.data, type=_Body)
    for choice in cast("list[_Body]", chunk.get("choices") or []):
        delta = choice.get("delta")
        if isinstance(delta, dict):
            cast("_Body", delta).pop("role", None)
    if not piece.text and piece.plain and piece.finish is None and piece.usage is None:
        return None
    return Piece(
        data=msgspec.json.encode(chunk),
        text=piece.text,
        plain=piece.plain,
        listed=piece.listed,
        tokens=piece.tokens,
        finish=piece.finish,
        usage=piece.usage,
    )
