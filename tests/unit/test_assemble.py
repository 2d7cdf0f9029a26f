"""api.assemble, api.logprobs and api.sse: what becomes of an engine's chunks."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from anser.api import sse
from anser.api.assemble import ChatChoice, TextChoice, usage_object
from anser.api.logprobs import TextLogprobs
from anser.core.errors import EngineBroken
from anser.core.ledger import Usage
from anser.core.limits import TOOLS_MAX


def chat_chunk(delta: object = None, **choice: object) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": delta, **choice}]}).encode()


def text_chunk(text: str | None, **choice: object) -> bytes:
    return json.dumps({"choices": [{"index": 0, "text": text, **choice}]}).encode()


def whole_chat(*chunks: bytes) -> dict[str, Any]:
    choice = ChatChoice()
    for chunk in chunks:
        choice.add(chunk)
    finished: dict[str, Any] = json.loads(msgspec.json.encode(choice.finished(3)))
    return finished


def test_text_is_joined() -> None:
    """Content is the deltas in their order; role, empty and null deltas add nothing."""
    finished = whole_chat(
        chat_chunk({"role": "assistant", "content": None}),
        chat_chunk({"content": "Hel"}),
        chat_chunk({"content": ""}),
        chat_chunk({"content": "lo 世界"}),
        chat_chunk({}, finish_reason="stop"),
    )
    assert finished == {
        "index": 3,
        "message": {"role": "assistant", "content": "Hello 世界", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_given_under_both_names(name: str) -> None:
    """Engines differ in the name of reasoning; clients find it under either."""
    message = whole_chat(chat_chunk({name: "a"}), chat_chunk({name: "b", "content": "c"}))[
        "message"
    ]
    assert (message["reasoning"], message["reasoning_content"]) == ("ab", "ab")
    assert message["content"] == "c"


def test_a_refusal_is_joined() -> None:
    """A refusal is a text of its own."""
    message = whole_chat(chat_chunk({"refusal": "I "}), chat_chunk({"refusal": "won't"}))["message"]
    assert message["refusal"] == "I won't"


def call(index: int, **fields: object) -> dict[str, object]:
    return {"tool_calls": [{"index": index, **fields}]}


def test_tool_calls_are_merged_by_index() -> None:
    """Interleaved pieces of several calls become whole calls in the order of their index."""
    finished = whole_chat(
        chat_chunk(call(1, id="b", type="function", function={"name": "g", "arguments": ""})),
        chat_chunk(call(0, id="a", type="function", function={"name": "f", "arguments": '{"x'})),
        chat_chunk(call(1, function={"arguments": "{}"})),
        chat_chunk(call(0, function={"arguments": '":1}'})),
        chat_chunk({}, finish_reason="tool_calls"),
    )
    assert finished["message"]["content"] is None
    assert finished["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_an_engine_cannot_make_endless_tool_calls() -> None:
    """At most TOOLS_MAX calls are put together; one more is the engine's failure."""
    choice = ChatChoice()
    for index in range(TOOLS_MAX):
        choice.add(chat_chunk(call(index, id=str(index))))
    with pytest.raises(EngineBroken):
        choice.add(chat_chunk(call(TOOLS_MAX)))


def test_chat_logprobs_are_joined_as_they_came() -> None:
    """Entries of log probabilities pass through byte for byte."""
    entries = [{"token": t, "logprob": -0.1, "bytes": [1], "top_logprobs": []} for t in "ab"]
    finished = whole_chat(
        chat_chunk({"content": "a"}, logprobs={"content": entries[:1]}),
        chat_chunk({"content": "b"}, logprobs={"content": entries[1:]}),
        chat_chunk({}, logprobs=None, finish_reason="length"),
    )
    assert finished["logprobs"] == {"content": entries, "refusal": None}


@pytest.mark.parametrize("choice", [ChatChoice, TextChoice])
@pytest.mark.parametrize(
    "chunk",
    [
        b"{",
        b'{"choices": 5}',
        b'{"choices": [{"delta": 1, "text": 1}]}',
        b'{"choices": [{"delta": {"content": "\xff"}, "text": "\xff"}]}',
    ],
)
def test_what_is_no_chunk_is_the_engines_failure(
    choice: type[ChatChoice] | type[TextChoice], chunk: bytes
) -> None:
    """A chunk that cannot be read never reaches the client as if it had been."""
    with pytest.raises(EngineBroken):
        choice().add(chunk)


CONTENT = {
    "content": [
        {"token": " the", "logprob": -1.5, "top_logprobs": [{"token": " a", "logprob": -2.0}]},
        {"token": "é", "logprob": -0.5},
    ]
}
LISTS = {
    "tokens": [" the", "é"],
    "token_logprobs": [-1.5, -0.5],
    "top_logprobs": [{" a": -2.0}, None],
    "text_offset": [0, 4],
}


@pytest.mark.parametrize("form", [CONTENT, LISTS], ids=["as llama.cpp", "as OpenAI"])
def test_text_logprobs_have_openais_form(form: dict[str, object]) -> None:
    """Either form becomes parallel lists, with offsets into the text."""
    choice = TextChoice()
    choice.add(text_chunk(" theé", logprobs=form))
    choice.add(text_chunk("", logprobs=None, finish_reason="stop"))
    assert choice.finished(0) == {
        "index": 0,
        "text": " theé",
        "logprobs": LISTS,
        "finish_reason": "stop",
    }


def test_text_offsets_run_on_from_chunk_to_chunk() -> None:
    """Each chunk of a stream has its own tokens, at their place in the whole text."""
    logprobs = TextLogprobs()
    assert logprobs.add(CONTENT) == LISTS
    again = logprobs.add(CONTENT)
    assert again is not None
    assert again["text_offset"] == [5, 9]


@pytest.mark.parametrize(
    "form",
    [
        {"content": 5},
        {"tokens": ["a"], "token_logprobs": [1.0, 2.0]},
        {"tokens": ["a"], "token_logprobs": ["x"]},
    ],
)
def test_malformed_logprobs_are_the_engines_failure(form: dict[str, object]) -> None:
    """Log probabilities in no known form are not passed off as any."""
    with pytest.raises(EngineBroken):
        TextLogprobs().add(form)


def test_text_without_logprobs_has_none() -> None:
    """Where none were asked for, `logprobs` is null."""
    choice = TextChoice()
    choice.add(text_chunk("a"))
    assert choice.finished(0)["logprobs"] is None


def test_usage_is_openais() -> None:
    """Usage has its total and the cached part of the prompt."""
    usage = Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=3)
    assert usage_object(usage) == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_an_event_is_one_line() -> None:
    """White space between an engine's tokens cannot end an event or begin another."""
    event = sse.event(b'{"a":1,\r\n"b":\n\ndata: [DONE]}')
    assert event == b'data: {"a":1,  "b":  data: [DONE]}\n\n'


def test_a_keep_alive_is_a_comment() -> None:
    """Clients in wide use break on anything but a comment."""
    assert sse.KEEP_ALIVE.startswith(b": ")
    assert sse.KEEP_ALIVE.endswith(b"\n\n")
