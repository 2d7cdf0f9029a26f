"""A whole answer out of its chunks, for callers who did not ask for a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from anser.api.logprobs import TextLogprobs
from anser.core.errors import EngineBroken
from anser.core.ledger import Usage
from anser.core.limits import TOOLS_MAX
from anser.services.chunks import Delta, Piece, ToolCall

__all__ = ["ChatChoice", "Choice", "TextChoice", "usage_object"]


class _ChatLogprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None
    refusal: list[msgspec.Raw] | None = None


class _ChatPart(msgspec.Struct):
    delta: Delta | None = None
    logprobs: _ChatLogprobs | None = None
    finish_reason: str | None = None


class _ChatChunk(msgspec.Struct):
    choices: list[_ChatPart] = []


class _TextPart(msgspec.Struct):
    text: str | None = None
    logprobs: dict[str, object] | None = None
    finish_reason: str | None = None


class _TextChunk(msgspec.Struct):
    choices: list[_TextPart] = []


_CHAT = msgspec.json.Decoder(_ChatChunk)
_TEXT = msgspec.json.Decoder(_TextChunk)


@dataclass(slots=True)
class _Call:
    """A tool call as far as it has come."""

    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class ChatChoice:
    """One choice of a chat.completion, growing by chunks."""

    _content: list[str] = field(default_factory=list[str])
    _reasoning: list[str] = field(default_factory=list[str])
    _refusal: list[str] = field(default_factory=list[str])
    _calls: dict[int, _Call] = field(default_factory=dict[int, _Call])
    _logprobs: list[msgspec.Raw] = field(default_factory=list[msgspec.Raw])
    _finish: str | None = None

    def take(self, piece: Piece) -> None:
        """Take in one chunk that has been read before, again only where it is worth it."""
        if piece.listed or not piece.plain:
            self.add(piece.data)
            return
        if piece.text:
            self._content.append(piece.text)
        self._finish = piece.finish or self._finish

    def add(self, data: bytes) -> None:
        """Take in one chunk. Raises EngineBroken."""
        try:
            chunk = _CHAT.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise EngineBroken("The engine sent a chunk that is not a chat chunk.") from error
        for part in chunk.choices:
            self._finish = part.finish_reason or self._finish
            if part.delta is not None:
                self._grow(part.delta)
            if part.logprobs is not None:
                self._logprobs += part.logprobs.content or []

    def finished(self, index: int) -> dict[str, object]:
        """The choice as the answer has it."""
        logprobs = {"content": self._logprobs, "refusal": None} if self._logprobs else None
        return {
            "index": index,
            "message": self._message(),
            "logprobs": logprobs,
            "finish_reason": self._finish,
        }

    def _grow(self, delta: Delta) -> None:
        for text, parts in (
            (delta.content, self._content),
            (delta.reasoning or delta.reasoning_content, self._reasoning),
            (delta.refusal, self._refusal),
        ):
            if text:
                parts.append(text)
        for piece in delta.tool_calls or ():
            self._grow_call(piece)

    def _grow_call(self, piece: ToolCall) -> None:
        if piece.index not in self._calls and len(self._calls) >= TOOLS_MAX:
            raise EngineBroken(f"The engine made more than {TOOLS_MAX} tool calls.")
        call = self._calls.setdefault(piece.index, _Call())
        call.id = call.id or piece.id or ""
        if piece.function is not None:
            call.name = call.name or piece.function.name or ""
            call.arguments.append(piece.function.arguments or "")

    def _message(self) -> dict[str, object]:
        message: dict[str, object] = {
            "role": "assistant",
            "content": "".join(self._content) if self._content or not self._calls else None,
            "refusal": "".join(self._refusal) or None,
        }
        if self._reasoning:
            reasoning = "".join(self._reasoning)
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if self._calls:
            calls = sorted(self._calls.items())
            message["tool_calls"] = [_plain(call) for _, call in calls]
        return message


@dataclass(slots=True)
class TextChoice:
    """One choice of a text_completion, growing by chunks."""

    _text: list[str] = field(default_factory=list[str])
    _logprobs: TextLogprobs = field(default_factory=TextLogprobs)
    _finish: str | None = None

    def take(self, piece: Piece) -> None:
        """Take in one chunk that has been read before, again only where it is worth it."""
        if piece.listed or not piece.plain:
            self.add(piece.data)
            return
        self._text.append(piece.text)
        self._finish = piece.finish or self._finish

    def add(self, data: bytes) -> None:
        """Take in one chunk. Raises EngineBroken."""
        try:
            chunk = _TEXT.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise EngineBroken("The engine sent a chunk that is not a text chunk.") from error
        for part in chunk.choices:
            self._finish = part.finish_reason or self._finish
            self._text.append(part.text or "")
            if part.logprobs:
                self._logprobs.add(part.logprobs)

    def finished(self, index: int) -> dict[str, object]:
        """The choice as the answer has it."""
        return {
            "index": index,
            "text": "".join(self._text),
            "logprobs": self._logprobs.whole(),
            "finish_reason": self._finish,
        }


Choice = ChatChoice | TextChoice


def usage_object(usage: Usage) -> dict[str, object]:
    """Usage as OpenAI reports it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _plain(call: _Call) -> dict[str, object]:
    function = {"name": call.name, "arguments": "".join(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}
