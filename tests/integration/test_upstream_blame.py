"""Whose fault an engine's error is, and what of it is shown, over a real socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anser.adapters.engine_http import HttpEngine
from anser.core.errors import (
    EngineBroken,
    EngineDeclined,
    EngineError,
    EngineRefused,
    EngineUnreachable,
    InvalidField,
)
from anser.core.fleet import EngineKind, Node
from tests.hostile import Hostile, Talk, answer, chunked, stream
from tests.hostile_engine import EMBED, KEY, chunks_of, engine_for, fault, saying

pytestmark = pytest.mark.anyio

# 22: whose fault


def error_body(message: str, **fields: object) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


@pytest.mark.parametrize("status", [400, 413, 415, 422])
async def test_the_requests_own_fault_is_passed_through(status: int) -> None:
    """A 4xx about the request keeps its status and the engine's words."""
    body = error_body("This model's maximum context length is 8 tokens.", param="messages")
    error = await fault(answer(body, status=f"{status} Bad"))
    assert isinstance(error, EngineRefused)
    assert (error.status, error.param) == (status, "messages")
    assert error.message == "This model's maximum context length is 8 tokens."


async def test_an_engine_cannot_show_its_key_as_a_fields_name() -> None:
    """Neither an error's words nor the field that it names tell the node's key."""
    body = error_body(f"{KEY} is no field", param=f"messages[{KEY}]")
    error = await fault(answer(body, status="400 Bad"))
    assert (error.message, error.param) == ("[key] is no field", "messages[[key]]")


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 407, 408, 426])
async def test_the_nodes_own_4xx_is_never_the_requests(status: int) -> None:
    """A refused key or a lost model is the node's condition: another node is tried."""
    error = await fault(answer(error_body(f"Bad key {KEY}"), status=f"{status} X"))
    assert isinstance(error, EngineDeclined)
    assert KEY not in error.message


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_node_says_when_to_come_back(status: int) -> None:
    """Too many requests are the node's load, not the client's fault."""
    head = b"HTTP/1.1 %d Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n" % status
    error = await fault(head)
    assert isinstance(error, EngineDeclined if status == 429 else EngineUnreachable)
    assert error.retry_after_s == 7.0
    odd = head.replace(b"7", b"Wed, 21 Oct 2015 07:28:00 GMT")
    assert (await fault(odd)).retry_after_s is None


@pytest.mark.parametrize("status", [500, 502, 504, 599])
async def test_5xx_is_the_nodes_failure(status: int) -> None:
    """A 5xx before the first byte is the node's."""
    error = await fault(answer(error_body("CUDA out of memory"), status=f"{status} X"))
    assert isinstance(error, EngineBroken)
    assert error.message == f"The engine answered with status {status}: CUDA out of memory"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": "text"}', "text"),
        (b'{"detail": "text"}', "text"),
        (b'{"message": "text", "code": 400, "object": "error"}', "text"),
        (b'{"error": {"message": null}}', "The engine refused the request."),
        (b'{"error": {"message": ["x"]}}', "The engine refused the request."),
        (b"<html>no</html>", "The engine refused the request."),
        (b"", "The engine refused the request."),
        (b"[" * 20_000, "The engine refused the request."),
        (b'{"error": {"message": "a\\u001b[31m\\r\\nb\\u0000"}}', "a [31m b"),
        (b'{"error": {"message": "' + KEY.encode() + b'!"}}', "[key]!"),
        (b'{"error": {"message": "' + b"a" * 9_999 + b'"}}', "a" * 299 + "…"),
    ],
)
async def test_an_engines_words_are_cut_and_cleaned(body: bytes, words: str) -> None:
    """Whatever shape an error has, what is shown of it is short, printable and without the key."""
    error = await fault(answer(body, status="400 Bad"))
    assert isinstance(error, EngineRefused)
    assert error.message == words


async def test_an_endless_error_body_is_cut_off() -> None:
    """Of an error's body only so much is read; its status is enough."""
    head = b"HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert isinstance(await fault(head, *[chunked(b"x" * 16_384)] * 64), EngineBroken)


# What is no stream


async def test_one_document_instead_of_a_stream_is_broken() -> None:
    """An engine that ignores `stream` is not converted: it could not be cancelled either."""
    whole = b'{"object": "chat.completion", "choices": []}'
    assert isinstance(await fault(answer(whole)), EngineBroken)
    assert isinstance(await fault(answer(b"<html>", kind="text/html")), EngineBroken)
    assert isinstance(await fault(answer(b"data: {}\n\n", kind="")), EngineBroken)
    refused = await fault(answer(b'{"error": {"message": "no", "code": 422}}'))
    assert isinstance(refused, EngineRefused)


async def test_embeddings_come_through_as_they_were_sent() -> None:
    """An embeddings answer is passed on byte for byte, if it is one."""
    body = b'{"object":"list","data":[{"embedding":[0.1,2e-5]}],"usage":{"prompt_tokens":1}}'
    async with engine_for(saying(answer(body))) as (hostile, engine):
        assert await engine.embed(EMBED) == body
        assert hostile.seen[0].path == "/v1/embeddings"
    for wrong, kind in [
        (b"{}", EngineBroken),
        (b'{"data": 1}', EngineBroken),
        (b"nonsense", EngineBroken),
        (b'{"error": {"message": "x", "code": 400}}', EngineRefused),
    ]:
        async with engine_for(saying(answer(wrong))) as (_, engine):
            with pytest.raises(EngineError) as caught:
                await engine.embed(EMBED)
            assert type(caught.value) is kind


async def test_embeddings_that_are_refused() -> None:
    """An error's status means for embeddings what it means for answers."""
    body = error_body("too many inputs", param="input")
    busy = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"
    endless = b"HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"x" * 65_537)
    for said, kind, words, after_s in [
        (answer(body, status="400 Bad"), EngineRefused, "too many inputs", None),
        (busy, EngineUnreachable, "busy", 7.0),
        (endless, EngineBroken, "status 500", None),
    ]:
        async with engine_for(saying(said, stay=True)) as (_, engine):
            with pytest.raises(EngineError, match=words) as caught:
                await engine.embed(EMBED)
            assert type(caught.value) is kind
            assert caught.value.retry_after_s == after_s


# What it serves


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (answer(b"not json"), EngineBroken, "a list of models"),
        (answer(b"null"), EngineBroken, "a list of models"),
        (answer(b"[" * 100_000), EngineBroken, "a list of models"),
        (answer(b'{"data": ["\xff"]}'), EngineBroken, "a list of models"),
        (answer(error_body("no"), status="401 X"), EngineDeclined, "key file"),
        (answer(error_body("no"), status="400 X"), EngineBroken, "status 400: no"),
        (answer(b"", status="302 X"), EngineBroken, "never followed"),
        (answer(error_body("Loading model"), status="503 X"), EngineUnreachable, "Loading model"),
        (answer(b" " * 4_200_000), EngineBroken, "more than"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", EngineBroken, "how long"),
    ],
)
async def test_a_list_of_models_that_is_none(
    said: bytes, error: type[EngineError], words: str
) -> None:
    """An engine that does not say what it serves is no engine, whatever it says instead."""
    async with engine_for(saying(said)) as (hostile, engine):
        with pytest.raises(error, match=words) as caught:
            await engine.inspect()
        assert type(caught.value) is error
        assert hostile.seen[0].path == "/v1/models"


async def test_questions_that_an_engine_does_not_know() -> None:
    """Beside its list, an engine may fail at any question; it is then as much as it told."""

    async def curt(talk: Talk) -> None:
        while True:
            seen = await talk.request()
            if seen.path == "/props":
                talk.reset()
                return
            if seen.path == "/v1/models":
                await talk.say(answer(b'{"data": [{"id": "m"}]}'))
            else:
                await talk.say(answer(b"<html>", kind="text/html"))

    async with engine_for(curt) as (hostile, engine):
        for _ in range(2):
            report = await engine.inspect()
            assert (report.kind, report.slots) == (EngineKind.OPENAI, None)
            assert [model.name for model in report.models] == ["m"]
        paths = [seen.path for seen in hostile.seen]
        assert paths.count("/info") == 1  # what is known is not asked again
        assert repr(engine).startswith("<HttpEngine openai ")


async def test_an_engine_that_tells_in_metrics() -> None:
    """Metrics are no JSON, and read all the same."""

    async def told(talk: Talk) -> None:
        while True:
            seen = await talk.request()
            if seen.path == "/v1/models":
                await talk.say(answer(b'{"data": [{"id": "m", "owned_by": "vllm"}]}'))
            elif seen.path == "/metrics":
                line = b'vllm:cache_config_info{block_size="16",num_gpu_blocks="90"} 1.0\n\xff'
                await talk.say(answer(line, kind="text/plain; version=0.0.4"))
            else:
                await talk.say(answer(b"{}"))

    async with engine_for(told) as (_, engine):
        report = await engine.inspect()
        assert (report.kind, report.cache_tokens) == (EngineKind.VLLM, 1_440)


async def test_an_engine_without_a_list() -> None:
    """Where there is no list of models, the engine's own account of itself serves."""

    async def old(talk: Talk) -> None:
        while True:
            seen = await talk.request()
            info = b'{"model_id": "org/m", "max_concurrent_requests": 9, "version": "1"}'
            if seen.path == "/info":
                await talk.say(answer(info))
            else:
                await talk.say(answer(b"", status="404 Not Found"))

    async with engine_for(old) as (_, engine):
        report = await engine.inspect()
        assert (report.kind, [model.name for model in report.models]) == (EngineKind.TGI, ["org/m"])


# The node's key


async def test_the_key_is_read_from_its_file(tmp_path: Path) -> None:
    """The key file's content goes to the engine, and a changed file is read again."""
    file = tmp_path / "key"
    file.write_text("first\n")
    file.chmod(0o600)

    async def script(talk: Talk) -> None:
        while True:
            seen = await talk.request()
            await talk.say(answer(b'{"data": []}') if seen.method == "GET" else stream("a"))

    async with Hostile(script) as hostile:
        engine = HttpEngine(Node(id="n", url=hostile.url, key_file=str(file)))
        await chunks_of(engine)
        file.write_text("second")
        await engine.inspect()
        await chunks_of(engine)
        keys = [seen.headers["authorization"] for seen in hostile.seen if seen.method == "POST"]
        assert keys == ["Bearer first", "Bearer second"]
        await engine.aclose()


@pytest.mark.parametrize(
    ("content", "mode", "cure"),
    [
        (b"key", 0o640, "chmod 600"),
        (b"key", 0o604, "chmod 600"),
        (b"", 0o600, "must hold one key"),
        (b"two keys", 0o600, "must hold one key"),
        (b"a\nb", 0o600, "must hold one key"),
        (b"k\xc3\xa9y", 0o600, "must hold one key"),
        (b"k" * 4_097, 0o600, "must hold one key"),
        (None, 0, "cannot be read"),
    ],
)
async def test_an_unsafe_key_file_is_refused(
    tmp_path: Path, content: bytes | None, mode: int, cure: str
) -> None:
    """A key that others can read, or that is none, is refused with the cure."""
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    engine = HttpEngine(Node(id="n", url="http://127.0.0.1:1", key_file=str(file)))
    with pytest.raises(InvalidField, match=cure) as caught:
        await engine.inspect()
    assert caught.value.param == "key_file"
    with pytest.raises(InvalidField, match=cure):
        await chunks_of(engine)
