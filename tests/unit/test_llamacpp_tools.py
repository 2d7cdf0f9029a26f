"""Tools for llama.cpp: what becomes a grammar, what the model sees, and how calls come back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.adapters.llamacpp_body import prepare
from anser.adapters.llamacpp_tools import ChosenCallTranslator, ForcedCallTranslator
from anser.core.errors import EngineRefused
from anser.ports import Call, Route
from tests import gbnf


def call(route: Route = Route.CHAT, **body: object) -> Call:
    messages = [{"role": "user", "content": "Hi."}]
    return Call(lease="a", route=route, body={"messages": messages, **body})


def prepared(route: Route = Route.CHAT, **body: object) -> dict[str, Any]:
    data, _ = prepare(call(route, **body), "m", frozenset({1, 2}))
    made: dict[str, Any] = json.loads(data)
    return made


PARAMETERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/b"}},
    "$defs": {"b": {"type": "string"}},
}
FUNCTION = {"name": "f", "parameters": PARAMETERS}
OTHER = {"name": "g", "description": "Does g."}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": OTHER}]


def test_tools_become_a_grammar() -> None:
    """llama.cpp sees no schema: what must be called is a grammar, what may be called a text."""
    body = prepared(tools=TOOLS, tool_choice="required", parallel_tool_calls=True, stop=["}"])
    assert not {"tools", "tool_choice", "parallel_tool_calls", "stop"} & set(body)
    calls = gbnf.matcher(body["grammar"])
    assert calls('{"name":"f", "arguments":{"a":"x"}}')
    assert calls('{"name":"g", "arguments":{}}')
    assert not calls('{"name":"g", "arguments":{"a":"x"}}')
    assert not calls('{"name":"h", "arguments":{}}')
    assert body["messages"][0]["role"] == "system"
    assert "Does g." in body["messages"][0]["content"]


def test_a_function_without_parameters_takes_none() -> None:
    """OpenAI: parameters that are left out are an empty list of them."""
    body = prepared(tools=TOOLS[1:], tool_choice="required")
    assert gbnf.matcher(body["grammar"])("{}")
    assert not gbnf.matcher(body["grammar"])('{"a":1}')


def test_a_free_choice_is_text_or_a_call() -> None:
    """`auto`: the mark at the very start makes it a call, which is then held to its form."""
    body = prepared(tools=TOOLS, stop=["x"])
    assert body["stop"] == ["x"]
    assert "Does g." in body["messages"][0]["content"]
    fits = gbnf.matcher(body["grammar"])
    assert fits('<tool_call>{"name":"g", "arguments":{}}</tool_call>')
    for text in ("", "<", "<tool", "Sunny.", "<b>Sunny</b>\n", " <tool_call>{", '{"a":1}'):
        assert fits(text)
    for text in ("<tool_call>", "<tool_call>x", '<tool_call>{"name":"h", "arguments":{}}'):
        assert not fits(text)


def test_a_free_choice_keeps_the_form_of_its_answer() -> None:
    """With a `response_format` what is not a call has that form."""
    body = prepared(tools=TOOLS, response_format={"type": "json_object"})
    fits = gbnf.matcher(body["grammar"])
    assert fits("{}")
    assert fits('<tool_call>{"name":"g", "arguments":{}}</tool_call>')
    assert not fits("Sunny.")


def test_tools_that_may_not_be_called_are_left_out() -> None:
    """`none`: as if there were no tools."""
    body = prepared(tools=TOOLS, tool_choice="none", logprobs=True)
    assert "tools" not in body
    assert "grammar" not in body
    assert len(body["messages"]) == 1


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_logprobs_and_tools_exclude_each_other(choice: str) -> None:
    """A call has no logprobs here: whoever asks for both is told so, by the field's name."""
    with pytest.raises(EngineRefused, match="leave out") as caught:
        prepared(tools=TOOLS, tool_choice=choice, logprobs=True)
    assert caught.value.param == "logprobs"


def test_what_was_called_is_shown_to_the_model() -> None:
    """Earlier calls and results become text: a template that knows no tools would drop them."""
    function = {"name": "f", "arguments": '{"a": "b"}'}
    talk = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [{"function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "two"}]},
    ]
    _, called, told = prepared(messages=talk)["messages"]
    assert called["role"] == "assistant"
    assert called["content"].startswith("Let me see.\n<tool_call>")
    assert '{"a": "b"}' in called["content"]
    assert told == {"role": "user", "content": "The tool answered: one\nThe tool answered: two"}


@pytest.mark.parametrize(
    ("first", "check"),
    [
        (
            {"role": "system", "content": "Be brief."},
            lambda c: c.startswith("Be brief.\n\nThe functions"),
        ),
        ({"role": "developer", "content": None}, lambda c: "Call a function" in c),
        (
            {"role": "system", "content": [{"type": "text", "text": "x"}]},
            lambda c: c.startswith("x\n\nThe"),
        ),
    ],
)
def test_the_note_joins_the_system_message(
    first: dict[str, Any], check: Callable[[Any], bool]
) -> None:
    """There is one system message, in whatever form it came."""
    talk = [first, {"role": "user", "content": "Hi."}]
    choice = {"type": "function", "function": {"name": "g"}}
    body = prepared(messages=talk, tools=TOOLS, tool_choice=choice)
    assert len(body["messages"]) == 2
    assert check(body["messages"][0]["content"])


def chunk(delta: dict[str, object], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"id": "x", "model": "m", "choices": [choice]}).encode()


def translate(translator: ForcedCallTranslator, parts: Iterable[str], finish: str) -> list[Any]:
    said = [chunk({"role": "assistant", "content": None})]
    said += [chunk({"content": part}) for part in parts]
    said += [chunk({}, finish), b'{"choices":[],"usage":{}}']
    return [json.loads(made) for each in said for made in translator.feed(each)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CUTS = st.lists(st.integers(0, 200), max_size=12)


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(
    st.text(min_size=1, max_size=8),
    st.dictionaries(st.text(), JSON, max_size=4),
    CUTS,
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_a_forced_call_survives_any_split(
    name: str, arguments: dict[str, Any], cuts: list[int], named: bool, indent: int | None
) -> None:
    """However the tokens cut the forced JSON, name and arguments come out whole and in order."""
    inner = json.dumps(arguments, indent=indent)
    whole = json.dumps({"name": name, "arguments": arguments}, indent=indent)
    text = f"\n {inner if named else whole} \n"
    translator = ForcedCallTranslator(name if named else None)
    made = translate(translator, split(text, cuts), "stop")
    deltas = [each["choices"][0]["delta"] for each in made if each["choices"]]
    calls = [each for delta in deltas for each in delta.get("tool_calls") or ()]
    assert calls[0]["function"] == {"name": name, "arguments": ""}
    assert all(each["index"] == 0 for each in calls)
    said = "".join(each["function"]["arguments"] for each in calls)
    assert json.loads(said) == arguments
    assert said == said.strip()
    assert made[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert made[-1]["choices"] == []
    assert not any(delta.get("content") for delta in deltas)


def test_a_call_cut_before_its_name_is_no_call() -> None:
    """Without a name there is nothing to call; the finish tells why."""
    made = translate(ForcedCallTranslator(None), ['{"name": "we'], "length")
    assert made[-2]["choices"][0]["finish_reason"] == "length"
    assert not any(each["choices"][0]["delta"].get("tool_calls") for each in made[:-1])
    assert "undecided" in repr(ForcedCallTranslator(None))


def test_a_call_that_was_stopped_is_no_call() -> None:
    """Arguments that are cut are not said to be a call, whatever cut them."""
    made = translate(ForcedCallTranslator("f"), ['{"a": "b'], "stop")
    assert made[-2]["choices"][0]["finish_reason"] == "stop"


@given(CUTS, st.sampled_from(["Sunny.", "<", "<tool_", "<tool_bag>", "", "{}"]))
def test_a_text_survives_any_split(cuts: list[int], text: str) -> None:
    """Text that only begins like a call is delivered whole."""
    translator = ChosenCallTranslator()
    made = translate(translator, split(text, cuts), "stop")
    deltas = [each["choices"][0]["delta"] for each in made if each["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == text
    assert made[-2]["choices"][0]["finish_reason"] == "stop"
    assert repr(translator).endswith(" text>")


@given(CUTS)
def test_a_chosen_call_survives_any_split(cuts: list[int]) -> None:
    """A call behind its mark comes as a call, and nothing of the mark is text."""
    translator = ChosenCallTranslator()
    assert "undecided" in repr(translator)
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    made = translate(translator, split(text, cuts), "stop")
    deltas = [each["choices"][0]["delta"] for each in made if each["choices"]]
    calls = [each for delta in deltas for each in delta.get("tool_calls") or ()]
    assert calls[0]["function"]["name"] == "f"
    assert json.loads("".join(each["function"]["arguments"] for each in calls)) == {"a": 1}
    assert not any(delta.get("content") for delta in deltas)
    assert made[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert repr(translator).endswith(" call>")
