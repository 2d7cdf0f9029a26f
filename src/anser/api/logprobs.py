"""Log probabilities of /v1/completions in OpenAI's own form, whichever form an engine uses.

OpenAI's form is parallel lists: tokens, token_logprobs, top_logprobs, text_offset. llama.cpp sends
chat's form there: a list `content` with an entry for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from anser.core.errors import EngineBroken

__all__ = ["TextLogprobs"]


class _Alternative(msgspec.Struct):
    token: str
    logprob: float


class _Token(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[_Alternative] = []


class _Lists(msgspec.Struct):
    """Either form, as far as it is there."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


@dataclass(slots=True)
class TextLogprobs:
    """The lists of one choice, growing by chunks; offsets count characters of its text."""

    _tokens: list[str] = field(default_factory=list[str])
    _token_logprobs: list[float | None] = field(default_factory=list[float | None])
    _top: list[dict[str, float] | None] = field(default_factory=list[dict[str, float] | None])
    _offsets: list[int] = field(default_factory=list[int])
    _end: int = 0

    def add(self, logprobs: dict[str, object]) -> dict[str, object] | None:
        """Take in one chunk's `logprobs`; returns them in OpenAI's form. Raises EngineBroken."""
        try:
            lists = msgspec.convert(logprobs, _Lists)
        except msgspec.ValidationError as error:
            raise EngineBroken("The engine's logprobs have no known form.") from error
        start = len(self._tokens)
        if lists.content is not None:
            self._take_content(lists.content)
        else:
            self._take_lists(lists)
        return self._slice(start)

    def whole(self) -> dict[str, object] | None:
        """All lists so far; `None` if nothing came."""
        return self._slice(0)

    def _take_content(self, content: list[_Token]) -> None:
        for each in content:
            top = {other.token: other.logprob for other in each.top_logprobs}
            self._append(each.token, each.logprob, top or None)

    def _take_lists(self, lists: _Lists) -> None:
        tokens = lists.tokens or []
        values = lists.token_logprobs or [None] * len(tokens)
        tops = lists.top_logprobs or [None] * len(tokens)
        if not len(tokens) == len(values) == len(tops):
            raise EngineBroken("The engine's logprobs are lists of different lengths.")
        for token, value, top in zip(tokens, values, tops, strict=True):
            self._append(token, value, top)

    def _append(self, token: str, value: float | None, top: dict[str, float] | None) -> None:
        self._tokens.append(token)
        self._token_logprobs.append(value)
        self._top.append(top)
        self._offsets.append(self._end)
        self._end += len(token)

    def _slice(self, start: int) -> dict[str, object] | None:
        if start == len(self._tokens):
            return None
        return {
            "tokens": self._tokens[start:],
            "token_logprobs": self._token_logprobs[start:],
            "top_logprobs": self._top[start:],
            "text_offset": self._offsets[start:],
        }
