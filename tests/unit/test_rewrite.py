"""api.rewrite: what of an engine's chunks is written anew, and what goes on as it came."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from anser.api.demands import Asked
from anser.api.rewrite import Rewriter
from anser.core.errors import EngineBroken
from anser.ports import Route
from tests.pool import demand

HEAD: dict[str, object] = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1_700_000_000,
    "model": "foo",
}


def rewriter(
    answers: int = 1, *, route: Route = Route.CHAT, text_logprobs: bool = False
) -> Rewriter:
    asked = Asked(
        demands=tuple(demand(f"r-{index}", route=route) for index in range(answers)),
        answers_per_prompt=answers,
        stream=True,
        include_usage=False,
        text_logprobs=text_logprobs,
    )
    return Rewriter(asked, HEAD)


def encoded(chunk: object) -> bytes:
    return chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()


def begun(answers: int = 1) -> Rewriter:
    """One whose answers have had their first chunks."""
    found = rewriter(answers)
    for index in range(answers):
        found.chunk(encoded({"choices": [{"delta": {"role": "assistant"}}]}), index)
    return found


def rewritten(chunk: object, *, of: Rewriter | None = None, index: int = 0) -> Any:
    data = (of or rewriter()).chunk(encoded(chunk), index)
    return None if data is None else json.loads(data)


def test_identity_is_the_platforms() -> None:
    """Engines' ids, times and model names differ; a client sees one answer of the model asked."""
    theirs = {"id": "x-7", "object": "?", "created": 1, "model": "Org/Model-X"}
    for told in (theirs, {"model": "Org/Model-X"}, {}):
        chunk = rewritten({**told, "choices": [{"index": 0, "delta": {"content": "a"}}]})
        assert {name: chunk[name] for name in HEAD} == HEAD
        assert chunk.keys() == {*HEAD, "choices"}


def test_what_is_not_the_platforms_goes_on_byte_for_byte() -> None:
    """Numbers, escapes and fields that nobody here knows are the engine's to the last byte."""
    delta = b'{"content": "\\u00e9\\/ \xc3\xa9", "x_new": 1.50e+01}'
    data = b'{"x_more": [1.0, 12345678901234567890], "choices": [{"delta": %b, "x": 0.10}]}' % delta
    sent = begun().chunk(data)
    assert sent is not None
    for same in (b'"x_more":[1.0, 12345678901234567890]', b'"delta":' + delta, b'"x":0.10'):
        assert same in sent


@pytest.mark.parametrize("told", [{}, {"index": 7}, {"index": 0}])
def test_the_index_is_the_choices_own(told: dict[str, int]) -> None:
    """Each engine numbers its only choice as it likes."""
    chunk = {"choices": [{**told, "delta": {"content": "a"}}]}
    assert rewritten(chunk)["choices"][0]["index"] == 0
    several = rewriter(3)
    assert rewritten(chunk, of=several, index=2)["choices"][0]["index"] == 2


@pytest.mark.parametrize("answers", [1, 2])
def test_a_chunk_without_a_choice_is_dropped(answers: int) -> None:
    """Clients take the first choice of a chunk unseen; usage comes from the platform alone."""
    for chunk in ({}, {"choices": []}, {"choices": [], "usage": {}}, {"prompt_filter_results": []}):
        assert rewritten(chunk, of=rewriter(answers)) is None


def test_an_engines_usage_is_taken_out() -> None:
    """The platform reports its own count, in a chunk of its own, if it was asked for."""
    choice = {"delta": {"content": "a"}, "finish_reason": "stop"}
    assert "usage" not in rewritten({"choices": [choice], "usage": {"prompt_tokens": 1}})


@pytest.mark.parametrize(
    "chunk",
    [b'{"choices":5}', b'{"choices":[5]}', b'{"\xff":1}', b'{"choices":[{"delta":"reasoning"}]}'],
)
def test_what_is_no_chunk_is_the_engines_failure(chunk: bytes) -> None:
    """Never a fault of the platform's."""
    with pytest.raises(EngineBroken):
        rewriter(2).chunk(encoded(chunk))


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_streamed_under_both_names(name: str) -> None:
    """Engines differ in the name of reasoning; clients find it under either."""
    for other in ({}, {"reasoning": None, "reasoning_content": None}):
        delta = rewritten({"choices": [{"delta": {**other, name: "hm"}}]}, of=begun())["choices"][
            0
        ]["delta"]
        assert delta == {"reasoning": "hm", "reasoning_content": "hm"}


def test_a_delta_without_reasoning_stays_as_it_is() -> None:
    """Only what an engine has sent gets a second name."""
    for delta in ({"content": '"reasoning'}, {"reasoning": "a", "reasoning_content": "b"}, None):
        for answers in (1, 2):
            chunk = rewritten({"choices": [{"delta": delta}]}, of=begun(answers))
            assert chunk["choices"][0]["delta"] == delta


@pytest.mark.parametrize("told", [{}, {"role": None}, {"role": "assistant"}])
def test_a_chat_begins_with_its_role(told: dict[str, str | None]) -> None:
    """llama.cpp's server leaves it out if its first token is no whole character: a client's first
    delta has it all the same, later ones do not, and what else the engine sent is as it was."""
    chat = rewriter()
    assert rewritten({"choices": [{"delta": None}]}, of=chat)["choices"][0]["delta"] is None
    sent = chat.chunk(b'{"choices":[{"delta":{%b"content":"\\u00e9"}}]}' % _members(told))
    assert sent is not None
    assert b'"content":"\\u00e9"' in sent
    assert sent.count(b'"role"') == 1
    assert json.loads(sent)["choices"][0]["delta"] == {"role": "assistant", "content": "é"}
    assert rewritten({"choices": [{"delta": {}}]}, of=chat)["choices"][0]["delta"] == {}


def _members(values: dict[str, str | None]) -> bytes:
    """As the beginning of a JSON object."""
    return "".join(
        f"{json.dumps(name)}:{json.dumps(value)}," for name, value in values.items()
    ).encode()


def test_only_a_chat_has_a_role() -> None:
    """A text completion is passed on without one."""
    choice = rewritten({"choices": [{"text": "a"}]}, of=rewriter(route=Route.COMPLETIONS))
    assert choice["choices"] == [{"text": "a", "index": 0}]


def test_logprobs_of_text_have_openais_form() -> None:
    """A choice without any, or with null, has none."""
    text = rewriter(route=Route.COMPLETIONS, text_logprobs=True)
    logprobs = {"content": [{"token": "a", "logprob": -1.0}]}
    (choice,) = rewritten({"choices": [{"text": "a", "logprobs": logprobs}]}, of=text)["choices"]
    assert choice["logprobs"]["tokens"] == ["a"]
    for none in ({}, {"logprobs": None}):
        assert rewritten({"choices": [{"text": "", **none}]}, of=text)["choices"][0] == {
            "text": "",
            "index": 0,
            **none,
        }


def test_several_chats_begin_in_their_order_whichever_engine_is_first() -> None:
    """OpenAI's client numbers choices as they appear: each is announced, with its role, once."""
    three = rewriter(3)
    state = ChatCompletionStreamState()
    sent = list(three.opening())
    for index in (2, 1, 0):
        for delta in ({"role": "assistant", "content": None}, {"content": f"text {index}"}, None):
            ending = {"finish_reason": None if delta else "stop"}
            data = three.chunk(encoded({"choices": [{"delta": delta or {}, **ending}]}), index)
            assert data is not None
            sent.append(data)
    for data in sent:
        state.handle_chunk(ChatCompletionChunk.model_validate_json(data))
    choices = state.get_final_completion().choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert [choice.message.content for choice in choices] == ["text 0", "text 1", "text 2"]
    assert {choice.message.role for choice in choices} == {"assistant"}


@pytest.mark.parametrize(("answers", "route"), [(1, Route.CHAT), (3, Route.COMPLETIONS)])
def test_one_chat_and_texts_begin_as_their_engines_do(answers: int, route: Route) -> None:
    """Nothing is announced where nothing can be mixed up."""
    assert list(rewriter(answers, route=route).opening()) == []
    assert repr(rewriter(answers, route=route)) == f"<Rewriter choices={answers} logprobs=False>"
