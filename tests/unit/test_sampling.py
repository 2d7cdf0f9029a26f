"""core.sampling and api.fields: what may reach an engine."""

from __future__ import annotations

import pytest

from anser.api.fields import (
    CHAT_FORWARDED,
    COMPLETION_FORWARDED,
    EXTRA,
    STAYS_HERE,
    ChatFields,
    CompletionFields,
    EmbeddingFields,
)
from anser.core.fleet import EngineKind
from anser.core.sampling import BY_ENGINE, HINTS, sampling_fields

NEVER = {
    "best_of",
    "cache_prompt",
    "cache_salt",
    "id_slot",
    "image_url",
    "kv_transfer_params",
    "lora",
    "n_keep",
    "n_predict",
    "n_probs",
    "priority",
    "prompt_cache_key",
    "service_tier",
    "slot_id",
    "user",
}


def test_every_kind_of_engine_has_its_list() -> None:
    """No kind of engine is forgotten."""
    assert set(BY_ENGINE) == set(EngineKind)


def test_one_kind_reads_its_own_list() -> None:
    """A model served by one kind of engine takes all that this kind reads."""
    assert sampling_fields([EngineKind.LLAMACPP]) == BY_ENGINE[EngineKind.LLAMACPP]


def test_several_kinds_read_what_they_share() -> None:
    """Which node answers is decided late, so only what every kind reads is understood."""
    kinds = [EngineKind.LLAMACPP, EngineKind.VLLM, EngineKind.LLAMACPP]
    assert sampling_fields(kinds) == {"min_p", "top_k"}


def test_no_kind_reads_nothing() -> None:
    """Without an engine, nothing is understood."""
    assert sampling_fields([]) == frozenset()


def test_nothing_reaches_an_engine_that_changes_price_cache_or_slot() -> None:
    """The fields that change price, priority, cache or slot are in no list of what is forwarded."""
    assert not NEVER & (CHAT_FORWARDED | COMPLETION_FORWARDED | EXTRA)
    assert HINTS <= EXTRA


REWRITTEN = {"messages", "tools", "tool_choice", "response_format", "prompt", "input"}


@pytest.mark.parametrize(
    ("fields", "forwarded"),
    [
        (ChatFields, CHAT_FORWARDED | EXTRA),
        (CompletionFields, COMPLETION_FORWARDED | EXTRA),
        (EmbeddingFields, frozenset[str]()),
    ],
)
def test_each_field_is_forwarded_rewritten_or_stays(
    fields: type[ChatFields], forwarded: frozenset[str]
) -> None:
    """What happens to each documented field is written down, and only one thing happens."""
    names = set(fields.__struct_fields__)
    assert names == (names & forwarded) | (names & REWRITTEN) | (names & STAYS_HERE.keys())
    assert forwarded <= names
    assert not forwarded & STAYS_HERE.keys()
