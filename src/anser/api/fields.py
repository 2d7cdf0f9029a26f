"""The documented fields of chat, completions and embeddings, with their types and ranges.

What is not a field here is unknown, and refused by name (or dropped, if the operator says so). Of
the known ones only those in a route's `forwarded` set reach an engine, so nothing that a caller
writes can change a price, a place in a queue, a cache or a slot, or make an engine fetch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from anser.api.messages import Message
from anser.api.tools import ResponseFormat, Tool, ToolChoice
from anser.core.limits import (
    ANSWERS_MAX,
    EMBEDDING_INPUTS_MAX,
    MESSAGES_MAX,
    PROMPTS_MAX,
    STOP_CHARS_MAX,
    STOP_MAX,
    TOOLS_MAX,
    TOP_LOGPROBS_MAX,
)
from anser.core.sampling import BY_ENGINE

__all__ = [
    "CHAT_FORWARDED",
    "COMPLETION_FORWARDED",
    "EXTRA",
    "STAYS_HERE",
    "ChatFields",
    "CompletionFields",
    "EmbeddingFields",
    "Generation",
]

_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1_000)]
_Small = Annotated[float, msgspec.Meta(ge=0, le=100)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
_TokenId = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,10}$")]
_ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=STOP_CHARS_MAX)]
_Label = Annotated[str, msgspec.Meta(max_length=512)]


class _Fields(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What each body has. `user` and its like stay here: members are known by their keys."""

    model: _ModelName
    user: _Label | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How a stream is sent; obfuscation is never added."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(_Fields, kw_only=True):
    """What chat and completions have in common."""

    # How it is sent
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=ANSWERS_MAX)] | None = None

    # OpenAI's own
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[_TokenId, _Bias], msgspec.Meta(max_length=1_024)] | None = None
    max_tokens: _Count | None = None
    presence_penalty: _Penalty | None = None
    seed: _Int64 | None = None
    stop: _Stop | Annotated[list[_Stop], msgspec.Meta(max_length=STOP_MAX)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: _Share | None = None

    # What some engines read beyond these (core/sampling.py says which)
    dry_allowed_length: _Natural | None = None
    dry_base: Annotated[float, msgspec.Meta(ge=1, le=100)] | None = None
    dry_multiplier: _Small | None = None
    dry_penalty_last_n: Annotated[int, msgspec.Meta(ge=-1, le=2**20)] | None = None
    dynatemp_exponent: _Small | None = None
    dynatemp_range: _Small | None = None
    min_p: _Share | None = None
    min_tokens: _Natural | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_eta: _Share | None = None
    mirostat_tau: _Positive | None = None
    repeat_last_n: Annotated[int, msgspec.Meta(ge=-1, le=2**20)] | None = None
    repeat_penalty: _Positive | None = None
    repetition_penalty: _Positive | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**20)] | None = None
    top_n_sigma: Annotated[float, msgspec.Meta(ge=-1, le=100)] | None = None
    typical_p: _Share | None = None
    xtc_probability: _Share | None = None
    xtc_threshold: _Share | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )


class ChatFields(Generation, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=MESSAGES_MAX)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    max_completion_tokens: _Count | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    # Read and left here
    metadata: Annotated[dict[str, _Label], msgspec.Meta(max_length=16)] | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, object] | None = None
    prompt_cache_key: _Label | None = None
    prompt_cache_options: dict[str, object] | None = None
    prompt_cache_retention: _Label | None = None
    safety_identifier: _Label | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    store: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class CompletionFields(Generation, kw_only=True):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str | int | list[int]], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)]
    )
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=ANSWERS_MAX)] | None = None
    echo: bool | None = None
    suffix: str | None = None


class EmbeddingFields(_Fields, kw_only=True):
    """The body of /v1/embeddings."""

    input: (
        str
        | Annotated[
            list[str | int | list[int]],
            msgspec.Meta(min_length=1, max_length=EMBEDDING_INPUTS_MAX),
        ]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _Count | None = None


EXTRA = frozenset[str]().union(*BY_ENGINE.values())
"""Fields beyond OpenAI's, forwarded only where every engine of the model reads them."""

_COMMON = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "presence_penalty",
        "seed",
        "stop",
        "temperature",
        "top_p",
    }
)

CHAT_FORWARDED = _COMMON | {"parallel_tool_calls", "top_logprobs"}
"""Chat's fields that reach an engine as they came; messages, tools and format are rewritten."""

COMPLETION_FORWARDED = _COMMON
"""Completions' fields that reach an engine as they came; each prompt becomes one demand."""

STAYS_HERE = {
    "best_of": "only as many as are returned are made",
    "dimensions": "checked against the engine's answer",
    "echo": "not done: must be false",
    "encoding_format": "the platform converts",
    "max_completion_tokens": "reaches engines as max_tokens",
    "max_tokens": "reaches engines as max_tokens, with the platform's default",
    "metadata": "not kept",
    "modalities": "text is the only one",
    "model": "each node has its own name for it",
    "n": "each answer is a demand of its own",
    "prediction": "a hint; the answer is right without it",
    "prompt_cache_key": "caches are kept apart by member, not by what a caller says",
    "prompt_cache_options": "as prompt_cache_key",
    "prompt_cache_retention": "as prompt_cache_key",
    "safety_identifier": "not kept",
    "service_tier": "flex is the batch band; otherwise shares decide who goes first",
    "store": "nothing is kept",
    "stream": "engines always stream",
    "stream_options": "engines always report usage",
    "suffix": "not done: must be null or empty",
    "user": "members are known by their keys",
    "verbosity": "a hint; the answer is right without it",
}
"""Documented fields that are read, and why no engine sees them."""
