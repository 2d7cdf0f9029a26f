"""Fields beyond OpenAI's that shape the choice of tokens, by the kinds of engine that read them.

Only such fields are here: none changes a price, a place in a queue, a cache or a slot, and none
makes an engine fetch. A model may be served by engines of several kinds, and which of them answers
is decided late, so a field is understood where every kind that serves the model reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from anser.core.fleet import EngineKind

__all__ = ["BY_ENGINE", "HINTS", "sampling_fields"]

BY_ENGINE: Mapping[EngineKind, frozenset[str]] = MappingProxyType(
    {
        EngineKind.LLAMACPP: frozenset(
            {
                "dry_allowed_length",
                "dry_base",
                "dry_multiplier",
                "dry_penalty_last_n",
                "dynatemp_exponent",
                "dynatemp_range",
                "min_p",
                "mirostat",
                "mirostat_eta",
                "mirostat_tau",
                "repeat_last_n",
                "repeat_penalty",
                "top_k",
                "top_n_sigma",
                "typical_p",
                "xtc_probability",
                "xtc_threshold",
            }
        ),
        EngineKind.VLLM: frozenset(
            {"min_p", "min_tokens", "reasoning_effort", "repetition_penalty", "top_k"}
        ),
        EngineKind.SGLANG: frozenset(
            {"min_p", "min_tokens", "reasoning_effort", "repetition_penalty", "top_k"}
        ),
        EngineKind.LMDEPLOY: frozenset({"min_p", "repetition_penalty", "top_k"}),
        EngineKind.MINDIE: frozenset({"repetition_penalty", "top_k"}),
        EngineKind.OLLAMA: frozenset({"reasoning_effort"}),
        EngineKind.TGI: frozenset[str](),
        EngineKind.OPENAI: frozenset({"reasoning_effort"}),
    }
)
"""What each kind of engine reads in an OpenAI body."""

HINTS = frozenset({"reasoning_effort"})
"""Fields that may be left out where they are not understood: the answer is right without them."""


def sampling_fields(kinds: Iterable[EngineKind]) -> frozenset[str]:
    """The fields that every one of these kinds reads; none if there are no kinds."""
    first, *others = [BY_ENGINE[kind] for kind in set(kinds)] or [frozenset[str]()]
    return first.intersection(*others)
