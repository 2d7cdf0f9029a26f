"""Chunks of a stream, changed only where they must be; all others go on byte for byte.

Changed are those of several answers (each engine numbers its only choice 0, under an identifier
of its own), log probabilities of /v1/completions, and an engine's claim of usage in a last chunk:
the platform reports its own count.
"""

from __future__ import annotations

from typing import cast

import msgspec

from anser.api.demands import Asked
from anser.api.logprobs import TextLogprobs
from anser.api.merge import Part

__all__ = ["Rewriter"]

_CHUNK = msgspec.json.Decoder(dict[str, object])


class Rewriter:
    """The chunks of one request's answers on their way to the client."""

    __slots__ = ("_answer_id", "_logprobs", "_several")

    def __init__(self, asked: Asked, *, answer_id: str) -> None:
        self._answer_id = answer_id
        self._several = len(asked.demands) > 1
        self._logprobs = [TextLogprobs() for _ in asked.demands] if asked.text_logprobs else []

    def __repr__(self) -> str:
        return f"<Rewriter several={self._several} logprobs={bool(self._logprobs)}>"

    def chunk(self, part: Part) -> bytes:
        """What the client gets for `part`. Raises EngineBroken."""
        data = part.piece.data
        ends = part.piece.finish is not None
        if not (self._several or self._logprobs or (ends and b'"usage"' in data)):
            return data
        chunk = _CHUNK.decode(data)
        chunk.pop("usage", None)
        if self._several:
            chunk["id"] = self._answer_id
        for choice in cast("list[dict[str, object]]", chunk["choices"]):
            self._renumber(choice, part.index)
        return msgspec.json.encode(chunk)

    def _renumber(self, choice: dict[str, object], index: int) -> None:
        if self._several:
            choice["index"] = index
        logprobs = choice.get("logprobs")
        if self._logprobs and isinstance(logprobs, dict):
            found = cast("dict[str, object]", logprobs)
            choice["logprobs"] = self._logprobs[index].add(found)
