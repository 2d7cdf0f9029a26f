"""Legacy completions and embeddings through the official client."""

from __future__ import annotations

import base64
import math
import struct

import httpx
import openai
import pytest

from tests.server import Server

pytestmark = pytest.mark.engine


def test_a_prompt_is_completed(client: openai.OpenAI, server: Server) -> None:
    """A text completion has text, a reason and usage; without a maximum it has 16 tokens."""
    answer = client.completions.create(model=server.model, prompt="Once upon a time", seed=2)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16


def test_a_completion_is_streamed(client: openai.OpenAI, server: Server) -> None:
    """Chunks put together are the whole, usage only where asked for."""
    whole = client.completions.create(
        model=server.model, prompt="One, two, three,", max_tokens=8, temperature=0
    )
    chunks = list(
        client.completions.create(
            model=server.model,
            prompt="One, two, three,",
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].text
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []


def test_several_prompts_are_several_choices(client: openai.OpenAI, server: Server) -> None:
    """Each prompt has its `n` choices, in order; each prompt's tokens count once."""
    alone = [
        client.completions.create(model=server.model, prompt=prompt, max_tokens=3)
        for prompt in ("The sun", "The moon and the stars")
    ]
    answer = client.completions.create(
        model=server.model, prompt=["The sun", "The moon and the stars"], max_tokens=3, n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    total = sum(each.usage.prompt_tokens for each in alone if each.usage is not None)
    assert answer.usage.prompt_tokens == total


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_old_form(client: openai.OpenAI, server: Server, *, stream: bool) -> None:
    """Parallel lists of tokens, log probabilities, alternatives and offsets into the text."""
    answer = client.completions.create(
        model=server.model, prompt="Once upon", max_tokens=4, logprobs=2, stream=stream
    )
    parts = list(answer) if isinstance(answer, openai.Stream) else [answer]
    choices = [choice for part in parts for choice in part.choices]
    text = "".join(choice.text for choice in choices)
    found = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens = [token for each in found for token in each.tokens or []]
    assert "".join(tokens) == text
    assert len(tokens) == 4
    offsets = [offset for each in found for offset in each.text_offset or []]
    assert offsets == [len("".join(tokens[:index])) for index in range(4)]
    assert all(value <= 0 for each in found for value in each.token_logprobs or [])
    assert all(len(top) == 2 for each in found for top in each.top_logprobs or [])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": [1, 2, 3]}, "prompt[0]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_what_is_not_done_is_said(
    client: openai.OpenAI, server: Server, fields: dict[str, object], param: str
) -> None:
    """What this dialect does not do is a bad request that names the field."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(  # type: ignore[call-overload]
            **{"model": server.model, "prompt": "p", **fields}
        )
    assert caught.value.param == param


def test_embeddings_are_vectors(client: openai.OpenAI, server: Server) -> None:
    """Each input has a vector; the same text has the same, a near one is nearer than a far one."""
    texts = ["A cat sleeps.", "A cat sleeps.", "A kitten is asleep.", "Interest rates rose by 2 %."]
    answer = client.embeddings.create(model=server.model, input=texts, encoding_format="float")
    assert [each.index for each in answer.data] == [0, 1, 2, 3]
    first, same, near, far = (each.embedding for each in answer.data)
    assert cosine(first, same) == pytest.approx(1, abs=1e-3)
    assert cosine(first, near) > cosine(first, far)
    assert answer.usage.prompt_tokens > 10


def test_the_clients_default_encoding_is_served(client: openai.OpenAI, server: Server) -> None:
    """Without a format the client asks for base64, and decodes what floats would have said."""
    floats = client.embeddings.create(model=server.model, input="hello", encoding_format="float")
    default = client.embeddings.create(model=server.model, input="hello")
    assert default.data[0].embedding == pytest.approx(floats.data[0].embedding, abs=1e-5)
    raw = httpx.post(
        f"{server.base_url}/embeddings",
        headers={"authorization": f"Bearer {server.key}"},
        json={"model": server.model, "input": "hello", "encoding_format": "base64"},
    ).json()
    data = base64.b64decode(raw["data"][0]["embedding"])
    unpacked = list(struct.unpack(f"<{len(data) // 4}f", data))
    assert unpacked == pytest.approx(default.data[0].embedding, abs=1e-5)


def test_dimensions_are_not_cut(client: openai.OpenAI, server: Server) -> None:
    """The vectors' own length may be asked for, another one is refused."""
    plain = client.embeddings.create(model=server.model, input="hello")
    length = len(plain.data[0].embedding)
    client.embeddings.create(model=server.model, input="hello", dimensions=length)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=server.model, input="hello", dimensions=length - 1)
    assert caught.value.param == "dimensions"


def cosine(one: list[float], other: list[float]) -> float:
    """How alike two vectors point."""
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
