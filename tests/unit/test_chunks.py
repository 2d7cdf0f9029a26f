"""services.chunks: what an engine's chunk says, and how far it is believed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anser.core.errors import EngineBroken
from anser.core.ledger import Usage
from anser.services.chunks import Tally, cut_short, read_embedding_usage


def tally() -> Tally:
    return Tally(prompt_estimate=10, prompt_bytes=40)


def chunk(delta: dict[str, Any] | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": None}
    return json.dumps({"choices": [choice | more]}).encode()


def usage(prompt: Any, completion: Any, cached: Any = None) -> bytes:
    claimed = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        claimed["prompt_tokens_details"] = {"cached_tokens": cached}
    return json.dumps({"choices": [], "usage": claimed}).encode()


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        (chunk({"content": "hello"}), 1),
        (chunk({"content": ""}), 0),
        (chunk({"role": "assistant", "content": None}), 0),
        (chunk({"reasoning": "hm"}), 1),
        (chunk({"reasoning_content": "hm"}), 1),
        (chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}), 1),
        (chunk({"tool_calls": [{"index": 0}]}), 0),
        (chunk({"content": "abc"}, logprobs={"content": [{}, {}, {}]}), 3),
        (b'{"choices":[{"text":"x","index":0}]}', 1),
        (b'{"choices":[]}', 0),
        (b"{}", 0),
    ],
)
def test_a_chunk_counts_what_it_carries(data: bytes, tokens: int) -> None:
    """Text is at least one token; logprobs tell exactly; a chunk without text is none."""
    piece, counted = tally().read(data)
    assert counted == tokens
    assert piece.data == data


@pytest.mark.parametrize(
    "data", [b"", b"no", b"[]", b'{"choices":{}}', b"[" * 100_000, b'{"choices":[{"text":"\xff"}]}']
)
def test_what_is_not_a_chunk_is_the_engines_fault(data: bytes) -> None:
    """Garbage raises EngineBroken, never anything else."""
    with pytest.raises(EngineBroken):
        tally().read(data)


def test_the_first_finish_reason_stands() -> None:
    """An answer ends once."""
    count = tally()
    piece, _ = count.read(chunk(finish_reason="stop"))
    count.read(chunk(finish_reason="length"))
    assert piece.finish == "stop"
    assert count.finish == "stop"


def test_a_true_usage_is_taken() -> None:
    """The engine's figures rule where they can be true."""
    count = tally()
    for _ in range(5):
        count.read(chunk({"content": "word "}))
    piece, _ = count.read(usage(35, 6, 30))
    assert piece.usage == Usage(prompt_tokens=35, cached_tokens=30, completion_tokens=6)
    assert count.settled() == piece.usage


@pytest.mark.parametrize("completion", [-1, 10**12, None, 0])
def test_a_completion_count_that_cannot_be_true_is_replaced(completion: Any) -> None:
    """Negative, absurd, missing or far too few: the gateway's own count stands."""
    count = tally()
    for _ in range(50):
        count.read(chunk({"content": "x"}))
    count.read(usage(10, completion))
    assert count.settled().completion_tokens == 50


@pytest.mark.parametrize("prompt", [0, -5, 10**12])
def test_a_prompt_count_that_cannot_be_true_is_replaced(prompt: int) -> None:
    """A prompt has at least one token and at most its bytes and a template's."""
    count = tally()
    count.read(usage(prompt, 0, 10**9))
    settled = count.settled()
    assert settled.prompt_tokens == 10
    assert settled.cached_tokens == 10


def test_usage_in_the_last_chunk_is_read_as_well() -> None:
    """Engines that put the usage beside the finish_reason are believed too."""
    count = tally()
    count.read(chunk({"content": "x"}))
    last = json.dumps(
        {
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 12, "completion_tokens": 1},
        }
    ).encode()
    piece, _ = count.read(last)
    assert piece.usage is None
    assert piece.finish == "stop"
    assert count.settled().prompt_tokens == 12


def test_running_usage_beside_text_is_not_the_end() -> None:
    """Engines that report usage in every chunk do not settle early."""
    count = tally()
    data = json.dumps(
        {
            "choices": [{"index": 0, "delta": {"content": "x"}}],
            "usage": {"prompt_tokens": 12, "completion_tokens": 1},
        }
    ).encode()
    count.read(data)
    assert count.usage is None


def test_what_was_cut_off_is_not_charged() -> None:
    """Of an answer cut off only the delivered tokens count, whatever the engine had reported."""
    count = tally()
    for _ in range(9):
        count.read(chunk({"content": "x"}))
    count.read(usage(12, 9))
    count.cut(5)
    assert count.settled() == Usage(prompt_tokens=10, completion_tokens=5)


def test_without_usage_the_own_count_is_charged() -> None:
    """No usage: the estimate of the prompt and the count of the text."""
    count = tally()
    count.read(chunk({"content": "x"}))
    assert count.settled() == Usage(prompt_tokens=10, completion_tokens=1)


@pytest.mark.parametrize(
    ("last", "ending"),
    [
        (b'{"id":"c","object":"chat.completion.chunk","choices":[],"usage":{}}', {"delta": {}}),
        (b'{"id":"c","object":"text_completion","choices":[]}', {"text": ""}),
    ],
)
def test_an_answer_cut_short_ends_in_its_own_shape(last: bytes, ending: dict[str, Any]) -> None:
    """The chunk that ends an overlong answer says `length` and keeps the answer's identifier."""
    made = json.loads(cut_short(last))
    assert made["id"] == "c"
    assert made["choices"] == [{"index": 0, **ending, "finish_reason": "length"}]
    assert "usage" not in made


def test_embedding_usage_is_read_or_estimated() -> None:
    """Embeddings count prompt tokens only; without usage the estimate stands."""
    told = read_embedding_usage(b'{"data":[],"usage":{"prompt_tokens":7}}', tally())
    assert told == Usage(prompt_tokens=7)
    assert read_embedding_usage(b'{"data":[]}', tally()) == Usage(prompt_tokens=10)
    with pytest.raises(EngineBroken):
        read_embedding_usage(b"[]", tally())
