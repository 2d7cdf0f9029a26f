"""api.embeddings: an answer put together from batches."""

from __future__ import annotations

import json

import msgspec
import pytest

from anser.api.embeddings import Vectors
from anser.api.fields import EmbeddingFields
from anser.core.errors import EngineBroken, InvalidField
from anser.core.ledger import Usage
from anser.services.gateway import Embedded


def embedded(*indexes: int) -> Embedded:
    """An engine's answer with these indexes."""
    data = [{"index": index, "embedding": [index, 0.5]} for index in indexes]
    return Embedded(
        data=json.dumps({"data": data}).encode(),
        node="one",
        lease="l",
        limits={},
        usage=Usage(prompt_tokens=3),
    )


def vectors(inputs: int, *, bytes_max: int = 10_000, dimensions: int | None = None) -> Vectors:
    fields = EmbeddingFields(model="m", input=["x"] * inputs, dimensions=dimensions)
    return Vectors(fields, bytes_max)


def test_vectors_come_in_the_order_of_their_inputs() -> None:
    """An engine may mix them; the answer does not."""
    found = vectors(3)
    found.add(embedded(2, 0, 1))
    answer = msgspec.json.decode(found.encoded())
    assert [row["embedding"][0] for row in answer["data"]] == [0, 1, 2]
    assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    found.validate()


def test_vectors_are_held_up_to_their_limit() -> None:
    """An answer of exactly `bytes_max` bytes of vectors is made; one byte less is too few."""
    whole = vectors(2)
    whole.add(embedded(0, 1))
    size = sum(len(msgspec.json.encode(row)) for row in json.loads(whole.encoded())["data"])
    assert repr(whole) == f"<Vectors 2 of {size} bytes>"
    vectors(2, bytes_max=size).add(embedded(0, 1))
    short = vectors(2, bytes_max=size - 1)
    with pytest.raises(InvalidField, match="send fewer") as caught:
        short.add(embedded(0, 1))
    assert caught.value.param == "input"
    short.validate()


def test_an_engine_answers_each_input_once() -> None:
    """A missing, doubled or surplus vector is the engine's fault."""
    for wrong in ((0,), (0, 0), (0, 1, 2), (1, 2)):
        with pytest.raises(EngineBroken, match="for 2 inputs"):
            vectors(2).add(embedded(*wrong))


def test_dimensions_are_the_models_own() -> None:
    """A number of dimensions that the model does not have is refused, not cut."""
    vectors(1, dimensions=2).add(embedded(0))
    with pytest.raises(InvalidField) as caught:
        vectors(1, dimensions=1).add(embedded(0))
    assert caught.value.param == "dimensions"
