"""How long a prompt is in tokens before a tokenizer has seen it: learnt for each model.

Theory of operation. Tokens per byte differ between models and languages, and a gateway has no
tokenizer at hand. So a quarter of a token per byte is assumed until an engine has counted a prompt
of the model; then its counts are smoothed (`pace.Smooth`, which no outlier moves far). Short
prompts teach nothing: they measure the chat template. What is estimated wrongly is corrected when
the request ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from anser.core.limits import LENGTHS_MAX
from anser.core.pace import Smooth

__all__ = ["Lengths"]

_TOKENS_PER_BYTE = 0.25
_LEAST, _MOST = 1 / 16, 1.0  # of any tokenizer, for any text that is worth it
_SAMPLE_BYTES_MIN = 256


@dataclass(slots=True)
class Lengths:
    """Tokens per byte of prompt, by model."""

    _rates: dict[str, Smooth] = field(default_factory=dict[str, Smooth])

    def tokens(self, model: str, size_bytes: int) -> int:
        """About how many tokens a prompt of so many bytes is, rounded up."""
        rate = self._rates.get(model)
        per_byte = _TOKENS_PER_BYTE if rate is None else min(max(rate.value, _LEAST), _MOST)
        return math.ceil(size_bytes * per_byte)

    def observe(self, model: str, *, tokens: int, size_bytes: int) -> None:
        """An engine has counted so many tokens in a prompt of so many bytes."""
        if size_bytes < _SAMPLE_BYTES_MIN or tokens <= 0:
            return
        rate = self._rates.pop(model, None) or Smooth(_TOKENS_PER_BYTE)
        rate.observe(tokens / size_bytes)
        self._rates[model] = rate  # the last of those that are remembered
        if len(self._rates) > LENGTHS_MAX:
            del self._rates[next(iter(self._rates))]

    def __repr__(self) -> str:
        return f"<Lengths of {len(self._rates)} models>"
