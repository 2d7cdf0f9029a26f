"""What stands between OpenAI's bodies and llama.cpp's: translation without a model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from anser.adapters.llamacpp_body import prepare, split_inputs
from anser.adapters.llamacpp_native import Plan, usable_cores
from anser.adapters.llamacpp_stream import AnswerStream, error_from, refusal_from
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


@pytest.mark.parametrize("seed", [-1, 0xFFFFFFFF, 2**63 - 1, -(2**32) - 1])
def test_every_seed_is_a_seed(seed: int) -> None:
    """llama.cpp reads 32 bits, and all ones as "choose one yourself": no seed becomes that."""
    for route in (Route.CHAT, Route.COMPLETIONS):
        made = prepared(route, seed=seed, prompt="a")["seed"]
        assert 0 <= made < 0xFFFFFFFF
    assert prepared(seed=7)["seed"] == 7


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


# ------------------------------------------------------------------------------ logprobs


@pytest.mark.parametrize("asked", [{}, {"top_logprobs": 0}])
def test_logprobs_come_without_alternatives(asked: dict[str, int]) -> None:
    """`logprobs` alone: the chosen tokens, and no alternatives."""
    data, translator = prepare(call(logprobs=True, **asked), "m", frozenset())
    assert json.loads(data)["top_logprobs"] == 1
    token = {"token": "a", "logprob": -1.0, "top_logprobs": [{"token": "a", "logprob": -1.0}]}
    delta = {"role": "assistant", "content": "a"}
    said = {"choices": [{"index": 0, "delta": delta, "logprobs": {"content": [token]}}]}
    (made,) = translator.feed(json.dumps(said, separators=(",", ":")).encode())
    (given_,) = json.loads(made)["choices"][0]["logprobs"]["content"]
    assert given_ == {"token": "a", "logprob": -1.0, "top_logprobs": []}
    assert list(translator.feed(b'{"choices":[]}')) == [b'{"choices":[]}']


def test_alternatives_come_if_asked_for() -> None:
    """So many as were asked for."""
    assert prepared(logprobs=True, top_logprobs=3)["top_logprobs"] == 3


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
        raise error_from(data, asked="prompt")


def test_a_prompt_that_is_too_long_is_named() -> None:
    """The error names the field that holds the prompt."""
    assert error_from(TOO_LONG, asked="messages").param == "messages"
    assert error_from(TOO_LARGE, asked="input").param == "input"


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
