"""What an engine is, what it serves and how much at once: found out by asking it.

Theory of operation. Every engine lists its models at /v1/models; who it is stands in `owned_by`.
Where that tells nothing, a few questions are asked that only one kind of engine answers. Then the
kind's own questions are asked for slots and context. Nothing is guessed from names: what is not
told stays `None`, and a model of which nobody tells what it does may be asked for anything. What
neither lists models nor answers a kind's questions is some web server, and no engine. Answers are
strangers' JSON: of any shape, and read with care.

Where it is written: vLLM and SGLang give `max_model_len` in the list; llama.cpp tells slots and
context in /props; Ollama's effective context is known only for models that are loaded (/api/ps),
because it cuts longer prompts off silently whatever the model could take. How many tokens of
prompts are kept for later ones is in vLLM's /metrics and in SGLang's server info.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from anser.core.errors import EngineBroken
from anser.core.fleet import Ability, EngineKind, EngineReport, ServedModel
from anser.core.limits import MODEL_NAME_CHARS_MAX, NODE_MODELS_MAX, NODE_SLOTS_MAX

__all__ = ["Ask", "inspect"]

Ask = Callable[[str], Awaitable[object]]
"""GET this path: the decoded JSON of a 200, or its text, else None.

Raises EngineUnreachable on no answer.
"""

_VERSION_CHARS_MAX = 64
_CONTEXT_MAX = 1 << 30
_CACHE_TOKENS_MAX = 1 << 40
_CACHE_CONFIG = re.compile(r"^vllm:cache_config_info\{([^}\n]{0,4096})\}", re.MULTILINE)
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')
_OWNERS = {
    "vllm": EngineKind.VLLM,
    "sglang": EngineKind.SGLANG,
    "llamacpp": EngineKind.LLAMACPP,
    "library": EngineKind.OLLAMA,
    "lmdeploy": EngineKind.LMDEPLOY,
    "mindie server": EngineKind.MINDIE,
}
_RECOGNISED = (EngineKind.OLLAMA, EngineKind.TGI, EngineKind.LLAMACPP)  # by their own answers
_GENERATES = {"completion", "completions", "chat", "generate", "text-generation"}
_EMBEDS = {"embedding", "embeddings"}
_CONTEXT_FIELDS = ("max_model_len", "context_length", "context_window", "max_context_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What a kind's own questions brought."""

    version: str | None = None
    slots: int | None = None
    cache_tokens: int | None = None
    context: int | None = None  # of every model
    contexts: Mapping[str, int] = field(default_factory=dict[str, int])
    abilities: Mapping[str, Ability] = field(default_factory=dict[str, Ability])  # if told


async def inspect(
    listed: object, ask: Ask, known: EngineKind | None = None, *, named: str | None = None
) -> EngineReport:
    """What the engine is that has given `listed` as its models (None: it has no such list).

    `known` is what it was found to be before. `named` is the one model that its operator wants:
    of a longer list it is not cut off, and without a list the operator's word is taken. Raises
    EngineBroken for what is no engine.
    """
    every = list(_rows(listed))
    rows = [row for row in every if row["id"] == named] or every[:NODE_MODELS_MAX]
    owner = _owner(rows)
    kind, found = owner or known, None
    questions = None if kind is None else _QUESTIONS.get(kind)
    if questions is not None:
        found = await questions(ask, rows)
    if kind is None or (owner is None and questions is not None and found is None):
        kind, found = await _search(ask, rows)
    taken_at_word = listed is None and named is not None
    if not (taken_at_word or kind in _RECOGNISED or isinstance(_get(listed, "data"), list)):
        raise EngineBroken("It is no OpenAI-compatible engine: it gives no list at /v1/models.")
    found = found or _Found()
    if taken_at_word and not rows:
        rows.append({"id": named})
    return EngineReport(
        kind=kind,
        version=found.version,
        models=tuple(_model(row, found) for row in rows),
        slots=found.slots,
        cache_tokens=found.cache_tokens,
        listed=len(every),
    )


async def _search(ask: Ask, rows: list[_Row]) -> tuple[EngineKind, _Found | None]:
    for kind in _RECOGNISED:
        found = await _QUESTIONS[kind](ask, rows)
        if found is not None:
            return kind, found
    return EngineKind.OPENAI, None


# The list

_Row = dict[str, object]


def _rows(listed: object) -> Iterator[_Row]:
    """The rows of a list of models that have a usable name."""
    for row in _items(_get(listed, "data")):
        name = _get(row, "id")
        if isinstance(name, str) and _is_name(name):
            yield cast("_Row", row)


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MODEL_NAME_CHARS_MAX and name.isprintable()


def _owner(rows: list[_Row]) -> EngineKind | None:
    for row in rows:
        kind = _OWNERS.get(str(row.get("owned_by")).lower())
        if kind is not None:
            return kind
    return None


def _model(row: _Row, found: _Found) -> ServedModel:
    name = str(row["id"])
    counts = (_count(row.get(key), _CONTEXT_MAX) for key in _CONTEXT_FIELDS)
    context = found.contexts.get(name) or found.context or next((n for n in counts if n), None)
    told = _items(row.get("capabilities")) or [row.get("type"), row.get("task")]
    return ServedModel(
        name=name, context_tokens=context, ability=found.abilities.get(name) or _ability(told)
    )


def _ability(told: object) -> Ability:
    """What a list of words says that a model can do; all, where it says nothing of it."""
    words = {str(word).lower() for word in _items(told)}
    chat = Ability.CHAT if words & _GENERATES else Ability(0)
    embeddings = Ability.EMBEDDINGS if words & _EMBEDS else Ability(0)
    return chat | embeddings or Ability.BOTH


# Each kind's own questions: None when it is not of that kind


async def _llamacpp(ask: Ask, rows: list[_Row]) -> _Found | None:
    props = await ask("/props")
    settings = _get(props, "default_generation_settings")
    slots = _count(_get(props, "total_slots"), NODE_SLOTS_MAX)
    if slots is None and settings is None:
        return None
    context = _count(_get(settings, "n_ctx"), _CONTEXT_MAX)
    metas = (_count(_get(row.get("meta"), "n_ctx"), _CONTEXT_MAX) for row in rows)
    return _Found(
        version=_word(_get(props, "build_info")),
        slots=slots,
        context=context or next((n for n in metas if n), None),
    )


async def _vllm(ask: Ask, rows: list[_Row]) -> _Found | None:
    del rows
    version = _word(_get(await ask("/version"), "version"))
    return _Found(version=version, cache_tokens=_vllm_cache(await ask("/metrics")))


def _vllm_cache(metrics: object) -> int | None:
    """How many tokens its caches keep, of all its engine processes together."""
    tokens: int | None = None
    for line in _CACHE_CONFIG.findall(metrics) if isinstance(metrics, str) else ():
        labels = dict(_LABEL.findall(line))
        blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
        if labels.get("enable_prefix_caching") == "False":
            return 0
        if blocks.isdecimal() and size.isdecimal():
            tokens = min((tokens or 0) + int(blocks[:9]) * int(size[:9]), _CACHE_TOKENS_MAX)
    return tokens


async def _sglang(ask: Ask, rows: list[_Row]) -> _Found | None:
    info = await ask("/server_info") or await ask("/get_server_info")
    states = _items(_get(info, "internal_states"))
    running = _get(states[0], "effective_max_running_requests_per_dp") if states else None
    slots = _count(_get(info, "max_running_requests"), NODE_SLOTS_MAX)
    cache_tokens = _count(_get(info, "max_total_num_tokens"), _CACHE_TOKENS_MAX)
    generates = _get(await ask("/get_model_info"), "is_generation")
    told = {True: Ability.CHAT, False: Ability.EMBEDDINGS}
    ability = told[generates] if isinstance(generates, bool) else Ability.BOTH
    return _Found(
        version=_word(_get(info, "version")),
        slots=_count(running, NODE_SLOTS_MAX) or slots,
        cache_tokens=0 if _get(info, "disable_radix_cache") is True else cache_tokens,
        abilities={str(row["id"]): ability for row in rows},
    )


async def _ollama(ask: Ask, rows: list[_Row]) -> _Found | None:
    del rows
    version = _word(_get(await ask("/api/version"), "version"))
    if version is None:
        return None
    abilities: dict[str, Ability] = {}
    for tag in _items(_get(await ask("/api/tags"), "models"))[:NODE_MODELS_MAX]:
        family = _get(_get(tag, "details"), "family")
        embeds = isinstance(family, str) and "bert" in family  # older ones tell no more
        if embeds or _ability(_get(tag, "capabilities")) is Ability.EMBEDDINGS:
            abilities[str(_get(tag, "name"))] = Ability.EMBEDDINGS
    contexts: dict[str, int] = {}
    for loaded in _items(_get(await ask("/api/ps"), "models"))[:NODE_MODELS_MAX]:
        context = _count(_get(loaded, "context_length"), _CONTEXT_MAX)
        if context is not None:
            contexts[str(_get(loaded, "name"))] = context
    return _Found(version=version, contexts=contexts, abilities=abilities)


async def _tgi(ask: Ask, rows: list[_Row]) -> _Found | None:
    info = await ask("/info")
    model = _get(info, "model_id")
    if not isinstance(model, str) or _get(info, "max_concurrent_requests") is None:
        return None
    if not rows and _is_name(model):
        rows.append({"id": model})  # older ones have no list of models
    return _Found(
        version=_word(_get(info, "version")),
        context=_count(_get(info, "max_total_tokens"), _CONTEXT_MAX),
    )


_QUESTIONS: Mapping[EngineKind, Callable[[Ask, list[_Row]], Awaitable[_Found | None]]] = {
    EngineKind.LLAMACPP: _llamacpp,
    EngineKind.VLLM: _vllm,
    EngineKind.SGLANG: _sglang,
    EngineKind.OLLAMA: _ollama,
    EngineKind.TGI: _tgi,
}

# Strangers' JSON


def _get(value: object, key: str) -> object:
    return cast("_Row", value).get(key) if isinstance(value, dict) else None


def _items(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _count(value: object, most: int) -> int | None:
    """A whole number from 1 to `most`; more is told as `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return None
    return min(value, most)


def _word(value: object) -> str | None:
    good = isinstance(value, str) and value.isprintable() and 0 < len(value) <= _VERSION_CHARS_MAX
    return str(value) if good else None
