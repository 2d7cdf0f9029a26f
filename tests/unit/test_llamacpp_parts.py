"""What stands between OpenAI's bodies and llama.cpp's: translation without a model."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.adapters.llamacpp_body import prepare, rebased, split_inputs
from anser.adapters.llamacpp_native import Plan, usable_cores
from anser.adapters.llamacpp_stream import AnswerStream, error_from, refusal_from
from anser.adapters.llamacpp_tools import ForcedCallTranslator
from anser.core import limits
from anser.core.errors import (
    AnserError,
    ContextTooLong,
    EngineBroken,
    EngineRefused,
    EngineStalled,
    EngineUnreachable,
)
from anser.ports import Call, Route


def call(route: Route = Route.CHAT, **body: object) -> Call:
    messages = [{"role": "user", "content": "Hi."}]
    return Call(lease="a", route=route, body={"messages": messages, **body})


def prepared(route: Route = Route.CHAT, **body: object) -> dict[str, Any]:
    data, _ = prepare(call(route, **body), "m", frozenset({1, 2}))
    made: dict[str, Any] = json.loads(data)
    return made


# ------------------------------------------------------------------------------- bodies


def test_what_the_platform_relies_on_is_always_asked_for() -> None:
    """Streamed, with usage and progress, under the one model's name, one answer."""
    body = prepared(model="other", n=1, stream=False)
    assert body["model"] == "m"
    assert body["stream"] is body["return_progress"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert "n" not in body


@pytest.mark.parametrize("bias", [{"1": 1}, {"2": 0.5, "9": -1}])
def test_control_tokens_cannot_be_favoured(bias: dict[str, float]) -> None:
    """A token that renders as nothing would make an answer that cannot be aborted."""
    with pytest.raises(EngineRefused) as caught:
        prepared(logit_bias=bias)
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize("bias", [None, {}, {"1": -100}, {"9": 100}, {"x": 1}, [1]])
def test_any_other_bias_passes(bias: object) -> None:
    """Suppressing a control token, or favouring any other, is nobody's harm."""
    assert prepared(logit_bias=bias)["logit_bias"] == bias


def test_a_schema_is_moved_off_the_root() -> None:
    """llama.cpp follows references into "#/$defs/..." only."""
    schema = {"properties": {"a": {"$ref": "#"}, "b": {"$ref": "#/properties/a"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    made = prepared(response_format=form)["response_format"]["json_schema"]["schema"]
    assert made["$ref"] == "#/$defs/answer"
    inner = made["$defs"]["answer"]["properties"]
    assert inner["a"] == {"$ref": "#/$defs/answer"}
    assert inner["b"] == {"$ref": "#/$defs/answer/properties/a"}


def test_only_references_are_rebased() -> None:
    """Values that merely look like references, and properties of such names, stay as they are."""
    schema = {
        "const": {"$ref": "#/x"},
        "enum": [{"$ref": "#"}, True],
        "default": {"$ref": "#"},
        "properties": {"$ref": {"const": True}, "enum": {"$ref": "#/y"}, "any": True, "no": False},
        "additionalProperties": True,
        "anyOf": [True, {"$ref": "#/z"}],
    }
    made = rebased(schema, "#/$defs/f0")
    assert made["const"] == {"$ref": "#/x"}
    assert made["enum"] == [{"$ref": "#"}, True]
    assert made["default"] == {"$ref": "#"}
    assert made["properties"] == {
        "$ref": {"const": True},
        "enum": {"$ref": "#/$defs/f0/y"},
        "any": {},
        "no": False,
    }
    assert made["additionalProperties"] is True
    assert made["anyOf"] == [{}, {"$ref": "#/$defs/f0/z"}]


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([], [[]]),
    ],
)
def test_inputs_are_told_apart(given: object, inputs: list[object]) -> None:
    """A list of numbers is one input, a list of texts or lists is several."""
    assert split_inputs({"input": given}) == inputs


# ------------------------------------------------------------------------ forced calls

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/b"}},
    "$defs": {"b": {"type": "string"}},
}
FUNCTION = {"name": "f", "parameters": PARAMETERS}
OTHER = {"name": "g", "description": "Does g."}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": OTHER}]


def test_a_choice_among_tools_becomes_a_schema() -> None:
    """`required`: name and arguments, each function's references in its own place."""
    body = prepared(tools=TOOLS, tool_choice="required", logprobs=True, parallel_tool_calls=True)
    schema = body["response_format"]["json_schema"]["schema"]
    names = [each["properties"]["name"]["const"] for each in schema["anyOf"]]
    assert names == ["f", "g"]
    assert schema["$defs"]["f0"]["properties"]["a"] == {"$ref": "#/$defs/f0/$defs/b"}
    assert schema["$defs"]["f1"] == {"type": "object"}
    assert not {"tools", "tool_choice", "parallel_tool_calls", "logprobs"} & set(body)
    assert body["messages"][0]["role"] == "system"
    assert "Does g." in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("first", "check"),
    [
        ({"role": "system", "content": "Be brief."}, lambda c: c.startswith("Be brief.\n\nCall")),
        ({"role": "developer", "content": None}, lambda c: "Call a function" in c),
        ({"role": "system", "content": [{"type": "text", "text": "x"}]}, lambda c: len(c) == 2),
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


# ---------------------------------------------------------------------- text completions


def test_usage_gets_a_chunk_of_its_own() -> None:
    """The last chunk of a text completion carries both; they come apart."""
    _, translator = prepare(call(Route.COMPLETIONS, prompt="a"), "m", frozenset())
    plain = b'{"choices":[{"text":"a","finish_reason":null}]}'
    assert list(translator.feed(plain)) == [plain]
    both = (
        b'{"choices":[{"text":"","finish_reason":"stop"}],"usage":{"prompt_tokens":1},"timings":{}}'
    )
    last, usage = (json.loads(each) for each in translator.feed(both))
    assert last == {"choices": [{"text": "", "finish_reason": "stop"}]}
    assert usage == {"choices": [], "usage": {"prompt_tokens": 1}}


# -------------------------------------------------------------------------------- errors


TOO_LONG = json.dumps(
    {
        "error": {
            "code": 400,
            "type": "exceed_context_size_error",
            "message": "too long",
            "n_prompt_tokens": 9,
            "n_ctx": 8,
        }
    },
    separators=(",", ":"),
).encode()
TOO_LARGE = b'{"error":{"code":500,"message":"input (3001 tokens) is too large to process."}}'


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (TOO_LONG, ContextTooLong, "at most 8.*has 9"),
        (TOO_LARGE, ContextTooLong, "3001"),
        (b'{"error":{"code":400,"message":"no"}}', EngineRefused, "no"),
        (b'{"error":{"code":503,"message":"Loading model"}}', EngineUnreachable, "loads"),
        (b'{"error":{"code":500,"message":"boom"}}', EngineBroken, "boom"),
        (b'{"error":{"code":"x"}}', EngineBroken, "cannot be read"),
        (b'{"error":7}', EngineBroken, "cannot be read"),
        (b'{"error":', EngineBroken, "cannot be read"),
    ],
)
def test_errors_are_told_apart(data: bytes, kind: type[AnserError], words: str) -> None:
    """Whose fault it is decides what the client sees and whether the node is blamed."""
    with pytest.raises(kind, match=words):
        raise error_from(data)


def test_a_refusal_keeps_its_cause() -> None:
    """Of the library's long words the cause is kept."""
    words = "Unable to generate parser for this template. JSON schema error at #/a: bad"
    assert refusal_from(words).message == "JSON schema error at #/a: bad"
    assert len(refusal_from("x" * 9_000).message) <= 4 * limits.ECHO_CHARS_MAX


# ------------------------------------------------------------------------------ the bridge


class AsItIs:
    """Delivers chunks unchanged."""

    def feed(self, data: bytes) -> Iterable[bytes]:
        return (data,)


USAGE = b'{"choices":[],"usage":{}}'
Library = Callable[[Callable[[bytes], bool]], None]


async def through(library: Library, *, read: int | None = None) -> tuple[list[bytes], bool]:
    """Run a library call on a thread; returns what was read, and whether the thread came out."""
    stream = AnswerStream(AsItIs())
    thread = threading.Thread(target=stream.run, args=(library,))
    thread.start()
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(20):
            async for data in stream:
                chunks.append(data)
                stream.validate()
                if len(chunks) == read:
                    break
    finally:
        stream.leave()
        await asyncio.to_thread(thread.join, 20)
    assert repr(stream).startswith("<AnswerStream")
    return chunks, not thread.is_alive()


@pytest.mark.anyio
async def test_chunks_come_in_order_and_end() -> None:
    """What the library says is read in order; progress reports and nulls are not passed on."""

    def library(take: Callable[[bytes], bool]) -> None:
        for data in (b'{"choices":[],"prompt_progress":{}}', b"null", b"1", b"2", USAGE):
            assert take(data) is False

    assert await through(library) == ([b"1", b"2", USAGE], True)


@pytest.mark.anyio
async def test_an_answer_without_its_end_is_broken() -> None:
    """A library that returns before the usage has lost the answer's end."""

    def library(take: Callable[[bytes], bool]) -> None:
        take(b"1")

    with pytest.raises(EngineBroken, match="without its end"):
        await through(library)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fault", "kind"), [(ValueError("bad"), EngineRefused), (RuntimeError("bad"), EngineRefused),
                        (MemoryError(), EngineBroken)]
)  # fmt: skip
async def test_what_the_library_raises_is_translated(
    fault: Exception, kind: type[AnserError]
) -> None:
    """Nothing that it raises is lost on its thread."""

    def library(_take: Callable[[bytes], bool]) -> None:
        raise fault

    with pytest.raises(kind):
        await through(library)


@pytest.mark.anyio
async def test_an_error_chunk_ends_the_answer() -> None:
    """An error in mid-answer comes after the chunks before it."""

    def library(take: Callable[[bytes], bool]) -> None:
        take(b"1")
        assert take(b'{"error":{"code":500,"message":"boom"}}') is True

    with pytest.raises(EngineBroken, match="boom"):
        await through(library)


@pytest.mark.anyio
async def test_the_buffer_is_bounded_and_leaving_wakes_it() -> None:
    """A thread whose reader stops waits for room; when the reader leaves it is told to abort."""
    given: list[int] = []
    aborted = threading.Event()

    def library(take: Callable[[bytes], bool]) -> None:
        for number in range(10 * limits.STREAM_BUFFER_MAX):
            given.append(number)
            if take(b"1"):
                aborted.set()
                return

    stream = AnswerStream(AsItIs())
    thread = threading.Thread(target=stream.run, args=(library,))
    thread.start()
    await anext(stream)
    await asyncio.sleep(0.3)
    assert len(given) <= limits.STREAM_BUFFER_MAX + 2
    assert not aborted.is_set()
    stream.leave()
    await asyncio.to_thread(thread.join, 20)
    assert aborted.is_set()


@pytest.mark.anyio
async def test_a_reader_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the write timeout the thread aborts by itself."""
    monkeypatch.setattr(limits, "WRITE_TIMEOUT_S", 0.1)

    def library(take: Callable[[bytes], bool]) -> None:
        while not take(b"1"):
            pass

    stream = AnswerStream(AsItIs())
    thread = threading.Thread(target=stream.run, args=(library,))
    thread.start()
    await asyncio.to_thread(thread.join, 20)
    assert not thread.is_alive()
    with pytest.raises(EngineStalled):
        async for _ in stream:
            pass


@pytest.mark.anyio
async def test_an_answer_left_before_it_began_never_begins() -> None:
    """Nobody waits for it any more: the library is not even called."""
    stream = AnswerStream(AsItIs())
    stream.leave()
    called = threading.Event()
    await asyncio.to_thread(stream.run, lambda _take: called.set())
    assert not called.is_set()


@pytest.mark.anyio
async def test_a_chunk_that_is_none_is_the_engines_fault() -> None:
    """What cannot be translated ends the answer with an error and aborts the library."""
    _, translator = prepare(call(), "m", frozenset())
    stream = AnswerStream(translator)

    def library(take: Callable[[bytes], bool]) -> None:
        while not take(b"not json"):
            pass

    thread = threading.Thread(target=stream.run, args=(library,))
    thread.start()
    with pytest.raises(EngineBroken, match="not an OpenAI chunk"):
        await anext(stream)
    await asyncio.to_thread(thread.join, 20)
    assert not thread.is_alive()


def test_threads_follow_the_cores_unless_set() -> None:
    """One thread fewer decodes than computes prompts; a setting overrules both."""
    plan = Plan(slots=1, context_tokens=1, batch_tokens=1, threads=0)
    assert plan.batch_threads == usable_cores()
    assert plan.decode_threads == max(1, usable_cores() - 1)
    fixed = Plan(slots=1, context_tokens=1, batch_tokens=1, threads=3)
    assert (fixed.decode_threads, fixed.batch_threads) == (3, 3)
