"""`/v1/embeddings`: OpenAI's dialect; engines are asked for floats, the platform converts.

Many inputs are several demands, one after another: so no engine is held for long, nor asked for an
answer of unbounded size, and others get their turn in between.
"""

from __future__ import annotations

import sys
from array import array
from base64 import b64encode
from dataclasses import dataclass, field

import msgspec

from anser.api.checks import check_fields
from anser.api.demands import Asker, asker_of, plain_texts
from anser.api.errors import Headers
from anser.api.exchange import Exchange
from anser.api.fields import EmbeddingFields
from anser.api.merge import places_for
from anser.api.models import served
from anser.api.openai import node_headers
from anser.api.why import why_headers
from anser.core.errors import ContextTooLong, EngineBroken, InvalidField
from anser.core.fleet import Ability
from anser.core.ledger import Usage
from anser.core.limits import EMBEDDING_BATCH_MAX, EMBEDDINGS_BYTES_MAX
from anser.ports import Route
from anser.services.gateway import Demand, Embedded
from anser.services.members import Principal

__all__ = ["Vectors", "embed", "to_base64"]

_CHARS_PER_TOKEN_MAX = 256


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Answer(msgspec.Struct):
    data: list[_Vector]


_ANSWER = msgspec.json.Decoder(_Answer)


async def embed(exchange: Exchange, principal: Principal) -> None:
    """POST /v1/embeddings."""
    services = exchange.services
    asker = asker_of(services, exchange.id, principal.member, exchange.header)
    fields = check_fields(await exchange.read(), EmbeddingFields, drop_unknown=asker.drops_unknown)
    demands = _demands(asker, fields)
    vectors = Vectors(fields)
    async with exchange.watched():
        with places_for(services.gateway.members, demands, param="input") as places:
            for demand, place in zip(demands, places, strict=True):
                vectors.add(await services.gateway.embed(demand, place))
        told = why_headers(services, demands[0].id, exchange.header)
        await exchange.reply(200, vectors.encoded(), [*vectors.headers, *told])


def to_base64(vector: list[float]) -> str:
    """The vector as float32, little-endian, in base64.

    >>> to_base64([1.0, -2.0])
    'AACAPwAAAMA='
    """
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats.tobytes()).decode()


def _demands(asker: Asker, fields: EmbeddingFields) -> list[Demand]:
    """One demand for each batch of inputs. Raises RequestError, NoNode."""
    texts = plain_texts(fields.input, param="input")
    model = served(asker.services, fields.model, Ability.EMBEDDINGS)
    longest = max(len(text) for text in texts) // _CHARS_PER_TOKEN_MAX
    if model.context_tokens is not None and longest > model.context_tokens:
        message = (
            f"This model's maximum context length is {model.context_tokens} tokens;"
            f" an input has at least {longest}."
        )
        raise ContextTooLong(message, param="input")
    size = EMBEDDING_BATCH_MAX
    batches = [texts[at : at + size] for at in range(0, len(texts), size)]
    return [
        _demand(asker, model.model, batch, suffix="" if len(batches) == 1 else f"-{index}")
        for index, batch in enumerate(batches)
    ]


def _demand(asker: Asker, model: str, texts: tuple[str, ...], *, suffix: str) -> Demand:
    size_bytes = sum(len(text.encode()) for text in texts)
    return Demand(
        id=asker.request_id + suffix,
        member=asker.member,
        route=Route.EMBEDDINGS,
        model=model,
        body={"input": list(texts), "encoding_format": "float"},
        prompt_tokens=asker.services.gateway.lengths.tokens(model, size_bytes),
        prompt_bytes=size_bytes,
        output_tokens_max=0,
        deadline=asker.deadline,
    )


@dataclass(slots=True)
class Vectors:
    """The vectors of all inputs so far, each as the client shall see it."""

    fields: EmbeddingFields
    bytes_max: int = EMBEDDINGS_BYTES_MAX
    headers: Headers = field(default_factory=Headers)
    usage: Usage = field(default_factory=Usage)
    _rows: list[msgspec.Raw] = field(default_factory=list[msgspec.Raw])
    _size: int = 0

    def __repr__(self) -> str:
        return f"<Vectors {len(self._rows)} of {self._size} bytes>"

    def validate(self) -> None:
        """Assert the invariants: what is held is within its bound."""
        assert sum(map(len, self._rows)) == self._size <= self.bytes_max, self

    def add(self, embedded: Embedded) -> None:
        """The next batch's, in the order of its inputs. Raises EngineBroken, RequestError."""
        inputs = 1 if isinstance(self.fields.input, str) else len(self.fields.input)
        vectors = _decoded(embedded, min(inputs - len(self._rows), EMBEDDING_BATCH_MAX))
        _check_dimensions(self.fields, len(vectors[0]))
        self.headers = node_headers(embedded.node, embedded.limits)
        self.usage += embedded.usage
        for vector in vectors:
            row = self._row(vector)
            if self._size + len(row) > self.bytes_max:
                message = "The vectors of so many inputs are too long for one answer: send fewer"
                raise InvalidField(f"{message}, or ask for base64.", param="input")
            self._rows.append(msgspec.Raw(row))
            self._size += len(row)

    def encoded(self) -> bytes:
        """The whole answer."""
        tokens = self.usage.prompt_tokens
        answer = {
            "object": "list",
            "data": self._rows,
            "model": self.fields.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return msgspec.json.encode(answer)

    def _row(self, vector: list[float]) -> bytes:
        as_text = self.fields.encoding_format == "base64"
        row = {
            "object": "embedding",
            "index": len(self._rows),
            "embedding": to_base64(vector) if as_text else vector,
        }
        return msgspec.json.encode(row)


def _decoded(embedded: Embedded, count: int) -> list[list[float]]:
    """The vectors in the order of the inputs. Raises EngineBroken."""
    try:
        data = _ANSWER.decode(embedded.data).data
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EngineBroken("The engine's embeddings are not an OpenAI answer.") from error
    if sorted(vector.index for vector in data) != list(range(count)):
        raise EngineBroken(f"The engine gave {len(data)} embeddings for {count} inputs.")
    return [vector.embedding for vector in sorted(data, key=lambda vector: vector.index)]


def _check_dimensions(fields: EmbeddingFields, found: int) -> None:
    wanted = fields.dimensions
    if wanted is not None and wanted != found:
        message = f"This model's embeddings have {found} dimensions, and are not cut."
        raise InvalidField(message, param="dimensions")
