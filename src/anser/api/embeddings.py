"""`/v1/embeddings`: OpenAI's dialect; engines are asked for floats, the platform converts."""

from __future__ import annotations

import sys
from array import array
from base64 import b64encode

import msgspec

from anser.api.checks import check_fields
from anser.api.demands import Asker, estimate_tokens, plain_texts
from anser.api.exchange import Exchange
from anser.api.fields import EmbeddingFields
from anser.api.models import served
from anser.api.openai import node_headers
from anser.core.errors import ContextTooLong, EngineBroken, InvalidField
from anser.core.fleet import Ability
from anser.ports import Route
from anser.services.gateway import Demand, Embedded
from anser.services.members import Principal

__all__ = ["embed", "to_base64"]

_CHARS_PER_TOKEN_MAX = 256


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Answer(msgspec.Struct):
    data: list[_Vector]


_ANSWER = msgspec.json.Decoder(_Answer)


async def embed(exchange: Exchange, principal: Principal) -> None:
    """POST /v1/embeddings."""
    body = await exchange.read()
    services = exchange.services
    asker = Asker(services=services, member=principal.member, request_id=exchange.id)
    fields = check_fields(body, EmbeddingFields, drop_unknown=asker.drops_unknown)
    texts = plain_texts(fields.input, param="input")
    demand = _demand(asker, fields, texts)
    async with exchange.watched():
        embedded = await services.gateway.embed(demand)
        vectors = _vectors(embedded, len(texts))
        _check_dimensions(fields, vectors)
        headers = node_headers(embedded.node, embedded.limits)
        await exchange.reply(200, _encode(fields, vectors, embedded), headers)


def to_base64(vector: list[float]) -> str:
    """The vector as float32, little-endian, in base64.

    >>> to_base64([1.0, -2.0])
    'AACAPwAAAMA='
    """
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats.tobytes()).decode()


def _demand(asker: Asker, fields: EmbeddingFields, texts: tuple[str, ...]) -> Demand:
    model = served(asker.services, fields.model, Ability.EMBEDDINGS)
    longest = max(len(text) for text in texts) // _CHARS_PER_TOKEN_MAX
    if model.context_tokens is not None and longest > model.context_tokens:
        message = (
            f"This model's maximum context length is {model.context_tokens} tokens;"
            f" an input has at least {longest}."
        )
        raise ContextTooLong(message, param="input")
    size_bytes = sum(len(text.encode()) for text in texts)
    return Demand(
        id=asker.request_id,
        member=asker.member,
        route=Route.EMBEDDINGS,
        model=model.model,
        body={"input": list(texts), "encoding_format": "float"},
        prompt_tokens=estimate_tokens(size_bytes),
        prompt_bytes=size_bytes,
        output_tokens_max=0,
    )


def _vectors(embedded: Embedded, count: int) -> list[list[float]]:
    """The vectors in the order of the inputs. Raises EngineBroken."""
    try:
        data = _ANSWER.decode(embedded.data).data
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EngineBroken("The engine's embeddings are not an OpenAI answer.") from error
    if sorted(vector.index for vector in data) != list(range(count)):
        raise EngineBroken(f"The engine gave {len(data)} embeddings for {count} inputs.")
    return [vector.embedding for vector in sorted(data, key=lambda vector: vector.index)]


def _check_dimensions(fields: EmbeddingFields, vectors: list[list[float]]) -> None:
    wanted, found = fields.dimensions, len(vectors[0])
    if wanted is not None and wanted != found:
        message = f"This model's embeddings have {found} dimensions, and are not cut."
        raise InvalidField(message, param="dimensions")


def _encode(fields: EmbeddingFields, vectors: list[list[float]], embedded: Embedded) -> bytes:
    as_text = fields.encoding_format == "base64"
    rows = [
        {
            "object": "embedding",
            "index": index,
            "embedding": to_base64(vector) if as_text else vector,
        }
        for index, vector in enumerate(vectors)
    ]
    tokens = embedded.usage.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": rows, "model": fields.model, "usage": usage}
    return msgspec.json.encode(answer)
