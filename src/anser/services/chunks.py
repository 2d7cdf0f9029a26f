"""What an engine's chunk says: how many tokens it carries, whether it ends the answer, its usage.

A chunk is read only as far as counting needs; its bytes go on as they came. The
engine's own usage is believed within bounds that follow from the text itself: a token is at most
one chunk's worth and at least one byte, so a claim outside of these is the engine's error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from anser.core.errors import EngineBroken
from anser.core.ledger import Usage
from anser.core.limits import STREAM_BUFFER_MAX

__all__ = [
    "Delta",
    "Ending",
    "Function",
    "Piece",
    "Tally",
    "ToolCall",
    "cut_short",
    "read_embedding_usage",
]

_CLAIM_SLACK = 8  # tokens without text: end of turn, tool-call markers
_TEMPLATE_SLACK = 2_048  # prompt tokens that a chat template and tools may add


@dataclass(slots=True, kw_only=True)  # frozen ones take five times as long to make
class Piece:
    """One chunk on its way: its bytes, and what they say, end or report."""

    data: bytes
    text: str = ""
    plain: bool = True  # there is no more to it than text: no tool call, reasoning or refusal
    listed: bool = False  # log probabilities are in it
    tokens: int = 0  # at least so many are in it
    finish: str | None = None
    usage: Usage | None = None


class Function(msgspec.Struct):
    """A piece of a called function."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """A piece of the tool call `index`."""

    index: int = 0
    id: str | None = None
    function: Function | None = None


class Delta(msgspec.Struct):
    """What one chunk adds to a chat message."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None

    @property
    def plain(self) -> bool:
        """Whether there is nothing but content."""
        return not (self.tool_calls or self.reasoning or self.reasoning_content or self.refusal)


class _Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None
    tokens: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: Delta | None = None
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


class _Embeddings(msgspec.Struct):
    usage: _Usage | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)
_EMBEDDINGS = msgspec.json.Decoder(_Embeddings)


@dataclass(slots=True)
class Tally:
    """The gateway's own count of one lease's answer."""

    prompt_estimate: int
    prompt_bytes: int
    tokens: int = 0
    text_bytes: int = 0
    finish: str | None = None
    usage: Usage | None = None

    def read(self, data: bytes) -> tuple[Piece, int]:
        """Count one chunk; returns it with the tokens that it carries. Raises EngineBroken."""
        try:
            chunk = _CHUNK.decode(data)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise EngineBroken("The engine sent a chunk that is not an OpenAI chunk.") from error
        piece, tokens = Piece(data=data), 0
        for choice in chunk.choices:
            tokens += self._count(choice, piece)
        self.tokens += tokens
        piece.tokens = tokens
        self.finish = self.finish or piece.finish
        if chunk.usage is not None:
            self._take_usage(chunk.usage, piece, told_alone=not chunk.choices)
        return piece, tokens

    def _take_usage(self, claimed: _Usage, piece: Piece, *, told_alone: bool) -> None:
        if told_alone:
            piece.usage = self.usage = self.believe(claimed)
        elif piece.finish is not None:
            self.usage = self.believe(claimed)

    def cut(self, tokens: int) -> None:
        """Nothing counts but the first `tokens`: the engine's figures are of another answer."""
        self.tokens, self.usage = tokens, None

    def settled(self) -> Usage:
        """The usage to charge: the engine's, as far as it can be true, else the own count."""
        return self.usage or Usage(
            prompt_tokens=self.prompt_estimate, completion_tokens=self.tokens
        )

    def believe(self, claimed: _Usage) -> Usage:
        """The engine's claim, each figure replaced by the gateway's own where it cannot be true."""
        prompt = claimed.prompt_tokens
        if not 0 < prompt <= self.prompt_bytes + _TEMPLATE_SLACK:
            prompt = self.prompt_estimate
        completion = claimed.completion_tokens or 0
        most = max(self.text_bytes, self.tokens) + _CLAIM_SLACK
        least = max(self.tokens - _CLAIM_SLACK, min(self.tokens, 1))
        if not least <= completion <= most:
            completion = self.tokens
        details = claimed.prompt_tokens_details
        cached = (details.cached_tokens or 0) if details is not None else 0
        return Usage(
            prompt_tokens=prompt,
            cached_tokens=min(max(cached, 0), prompt),
            completion_tokens=completion,
        )

    def _count(self, choice: _Choice, piece: Piece) -> int:
        """Note what this choice says; returns at least how many tokens it carries.

        Its log probabilities tell exactly, text tells 1.
        """
        delta, text = choice.delta, choice.text or ""
        if delta is not None:
            text = delta.content or text
        size = len(text) if text.isascii() else len(text.encode())
        if delta is not None and not delta.plain:
            piece.plain = False
            size += _more_bytes(delta)
        piece.text += text
        piece.finish = choice.finish_reason or piece.finish
        self.text_bytes += size
        if choice.logprobs is not None:
            piece.listed = True
            listed = choice.logprobs.content or choice.logprobs.tokens
            if listed:
                return len(listed)
        return 1 if size else 0


@dataclass(slots=True)
class Ending:
    """What is held back of an answer until its receipt is durable: its end, and its usage.

    Text beyond `tokens_max` is held as well, for it may be the rest of the last token; only what
    comes next tells. Of what follows the end only the usage is kept, and not much may follow.
    """

    tokens_max: int
    finished: bool = False
    _held: list[Piece] = field(default_factory=list[Piece])
    _usage: Piece | None = None
    _seen: int = 0

    @property
    def pieces(self) -> list[Piece]:
        """What to send once the receipt is durable."""
        return self._held if self._usage is None else [*self._held, self._usage]

    def holds(self, piece: Piece, tokens: int, *, counted: int) -> bool:
        """Whether this piece, `tokens` of all `counted`, has to wait. Raises EngineBroken."""
        beyond = tokens > 0 and counted > self.tokens_max
        if not self._held and piece.finish is None and not beyond:
            return False
        self._seen += 1
        if self._seen > STREAM_BUFFER_MAX or (self.finished and tokens):
            raise EngineBroken("The engine went on after the end of its answer.")
        if piece.usage is not None:
            self._usage = piece
        elif tokens or not self.finished:
            self._held.append(piece)
            self.finished = piece.finish is not None
        return True

    def cut(self, last: Piece, finish: str = "length") -> None:
        """End the answer here, by default for its length, instead of with `last`."""
        self._held, self._usage = [Piece(data=cut_short(last.data, finish), finish=finish)], None
        self.finished = True


def cut_short(data: bytes, finish: str = "length") -> bytes:
    """A chunk that ends an answer, by default for its length, made from the last that came."""
    chunk = msgspec.json.decode(data, type=dict[str, object])
    ending: dict[str, object] = {"index": 0, "finish_reason": finish}
    if chunk.get("object") == "chat.completion.chunk":
        ending["delta"] = dict[str, object]()
    else:
        ending["text"] = ""
    chunk.pop("usage", None)
    chunk["choices"] = [ending]
    return msgspec.json.encode(chunk)


def _more_bytes(delta: Delta) -> int:
    """How long all is that is no content."""
    reasoning = delta.reasoning or delta.reasoning_content
    size = sum(len(part.encode()) for part in (reasoning, delta.refusal) if part)
    for call in delta.tool_calls or ():
        if call.function is not None:
            size += len(f"{call.function.name or ''}{call.function.arguments or ''}".encode())
    return size


def read_embedding_usage(data: bytes, tally: Tally) -> Usage:
    """The usage of an embeddings answer. Raises EngineBroken."""
    try:
        answer = _EMBEDDINGS.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise EngineBroken("The engine's embeddings are not an OpenAI answer.") from error
    return tally.settled() if answer.usage is None else tally.believe(answer.usage)
