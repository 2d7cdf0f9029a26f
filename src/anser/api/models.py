"""`/v1/models`: what can be asked for here, and who serves it."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

import msgspec

from anser.api.context import Services
from anser.api.errors import echo
from anser.api.exchange import Exchange
from anser.core.errors import InvalidField, ModelNotFound, NoNode
from anser.core.fleet import Ability, EngineKind
from anser.core.hub import Model
from anser.services.members import Principal
from anser.services.pool import ModelView, view_of

__all__ = ["Served", "list_models", "served", "show_model"]

_PREFIX = "/v1/models/"
_NEAR_MAX = 3
_NEAR_CHARS_MAX = 128  # comparing longer names costs more than it helps
_RETRY_AFTER_S = 10.0
_UNABLE = {
    Ability.CHAT: "makes embeddings only: ask it at /v1/embeddings.",
    Ability.EMBEDDINGS: "makes no embeddings: ask it at /v1/chat/completions.",
}


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """A model as a request meets it: the longest context that some node has, if all tell."""

    model: str
    context_tokens: int | None
    kinds: frozenset[EngineKind]


def served(services: Services, model: str, ability: Ability) -> Served:
    """What serves `model`. Raises ModelNotFound with near names, NoNode, or InvalidField."""
    models = services.fleet.models()
    offers = models.get(model)
    if not offers:
        if any(known.id == model for known in services.hub.models()):
            message = f"No node serves {model} now."
            raise NoNode(message, param="model", retry_after_s=_RETRY_AFTER_S)
        raise _not_found(model, models.keys())
    if not any(ability in offer.ability for offer in offers):
        raise InvalidField(f"{model} {_UNABLE[ability]}", param="model")
    contexts = [offer.context_tokens for offer in offers if offer.context_tokens is not None]
    return Served(
        model=model,
        context_tokens=max(contexts) if len(contexts) == len(offers) else None,
        kinds=frozenset(offer.engine for offer in offers),
    )


def _not_found(model: str, known: Collection[str]) -> ModelNotFound:
    message = f"There is no model {echo(model)} here."
    near = get_close_matches(model[:_NEAR_CHARS_MAX], known, n=_NEAR_MAX, cutoff=0.5)
    if near:
        message += f" Near names: {', '.join(near)}."
    elif known:
        message += " GET /v1/models lists what there is."
    return ModelNotFound(message, param="model")


async def list_models(exchange: Exchange, _: Principal) -> None:
    """GET /v1/models."""
    rows = sorted(_rows(exchange.services).items())
    listed = {"object": "list", "data": [row for _, row in rows]}
    await exchange.reply(200, msgspec.json.encode(listed))


async def show_model(exchange: Exchange, _: Principal) -> None:
    """GET /v1/models/{model}. Raises ModelNotFound."""
    services, model = exchange.services, exchange.scope["path"].removeprefix(_PREFIX)
    models = services.fleet.models()
    if model not in models:
        raise _not_found(model, models.keys())
    await exchange.reply(200, msgspec.json.encode(_rows(services)[model]))


def _rows(services: Services) -> dict[str, dict[str, object]]:
    """Each model as a row."""
    pool = view_of(services.fleet, services.gateway)
    known = {model.id: model for model in services.hub.models()}
    return {
        view.id: _row(view, known.get(view.id)) | {"default": view.id == pool.default}
        for view in pool.models
    }


def _row(view: ModelView, known: Model | None) -> dict[str, object]:
    """OpenAI's four fields, and what people want to know besides."""
    row: dict[str, object] = {
        "id": view.id,
        "object": "model",
        "created": 0,  # nobody knows when an engine's model was made
        "owned_by": "anser",
        "context_length": view.context_tokens,
        "nodes": view.nodes,
        "ready": view.ready,
        "capabilities": view.ability.words,
        "engines": sorted(kind.value for kind in view.engines),
    }
    if known is not None:
        row |= {"title": known.title, "licence": known.licence, "sha256": known.file.sha256}
    return row
