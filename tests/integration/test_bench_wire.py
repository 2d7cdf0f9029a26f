"""The mock engine and the load as they are compiled, and one short run of all of it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anser.cli.app import main
from bench.wire.kernel import family
from bench.wire.programs import Ask, Gateway, Tools, WireError, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the harness reads Linux's /proc"),
    pytest.mark.skipif(
        not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler on this machine"
    ),
]

_SMALL = Ask(connections=2, seconds=1, warm_ms=0, chunks=3)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    """Both programs, compiled once."""
    return Tools.make(tmp_path_factory.mktemp("wire"))


def completion(port: int, prompt: str, **fields: Any) -> tuple[http.client.HTTPResponse, bytes]:
    """One answer of the engine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = {"model": "wire", "messages": [{"role": "user", "content": prompt}], **fields}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response, text


def test_the_engine_answers_as_it_is_asked(tools: Tools) -> None:
    """As many tokens as the prompt says, whole or streamed, with usage where it is asked for; what
    a client writes about streams inside its prompt is no order."""
    with tools.engines(2) as (_, ports):
        prompt = '@chunks=3 @every_us=1000 "stream":true'
        response, text = completion(ports[1], prompt)
        whole = json.loads(text)
        assert response.status == 200
        assert whole["choices"][0]["message"]["content"].count("~ ") == 3
        assert whole["usage"]["completion_tokens"] == 3
        response, text = completion(
            ports[0], prompt, stream=True, stream_options={"include_usage": True}
        )
        events = [line.removeprefix(b"data: ") for line in text.split(b"\n\n") if line]
        assert events.pop() == b"[DONE]"
        chunks = [json.loads(event) for event in events]
        tokens = [c["choices"][0]["delta"].get("content") for c in chunks[:-1]]
        assert [str(token).split(":")[0] for token in tokens] == ["", "~0", "~1", "~2", "None"]
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "ask",
    [
        _SMALL,
        Ask(connections=2, seconds=1, warm_ms=0, rate=50),
        Ask(connections=2, seconds=1, warm_ms=0, stream=True, every_us=1_000),
        Ask(connections=4, seconds=1, warm_ms=0, prompt=16_384, stream=True),
        Ask(connections=8, idle=6, seconds=1, warm_ms=0, stream=True, chunks=999, every_us=10_000),
    ],
    ids=["whole", "rate", "paced", "large", "idle"],
)
def test_the_load_counts_what_the_engine_answers(tools: Tools, ask: Ask) -> None:
    """Without a gateway, all that is asked is answered right, and counted."""
    with tools.engines(1) as (engine, ports):
        window = tools.window(ask, Gateway(pid=None, port=ports[0]), engine)
    assert window.chunks > 0
    assert window.cpu_s == 0
    assert (window.requests == 0) == bool(ask.idle)
    if ask.rate:
        assert 0 < window.requests <= 55


@contextmanager
def answering(*pieces: bytes) -> Iterator[int]:
    """A server that gives these bytes, each in a segment of its own, to whatever it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk(client: socket.socket) -> None:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with client:
                try:
                    while client.recv(65_536):
                        for piece in pieces:
                            client.sendall(piece)
                except OSError:
                    return

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(client,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def _whole(text: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text)


_TEXT = b"~0:5~ ~1:5~ ~2:5~ "
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "wrong"),
    [
        ([_whole(_TEXT)], ""),
        ([bytes([one]) for one in _whole(_TEXT)], ""),
        ([_CHUNKED, b"9\r\n~0:5~ ~1:\r\n9;x\r\n5~ ~2:5~ \r\n", b"0\r\nz: 1\r\n\r\n"], ""),
        ([_whole(_TEXT, b"500 No")], "not answered"),
        ([_whole(b"~0:5~ ~2:5~ ~1:5~ ")], "tokens"),
        ([_whole(b"~0:5~ ~1:5~ ")], "tokens"),
        ([_whole(_TEXT + b"~3:5~ ")], "tokens"),
        ([_whole(_TEXT) + b"HTTP"], "bytes after an answer"),
    ],
    ids=["right", "dribble", "chunked", "status", "order", "short", "long", "more"],
)
def test_a_wrong_answer_is_an_error(tools: Tools, pieces: list[bytes], wrong: str) -> None:
    """Right answers count however they are cut; a wrong one, and be it one, makes no result."""
    with tools.engines(1) as (engine, _), answering(*pieces) as port:
        if not wrong:
            assert tools.window(_SMALL, Gateway(pid=None, port=port), engine).requests > 0
            return
        with pytest.raises(WireError, match=f"wrong answers.*{wrong}|too many errors.*{wrong}"):
            tools.window(_SMALL, Gateway(pid=None, port=port), engine)


def test_a_stream_without_its_end_is_an_error(tools: Tools) -> None:
    """All tokens are not enough: a stream ends with [DONE]."""
    ask = Ask(connections=1, seconds=1, warm_ms=0, chunks=3, stream=True)
    with (
        tools.engines(1) as (engine, _),
        answering(_whole(_TEXT)) as port,
        pytest.raises(WireError, match="no end"),
    ):
        tools.window(ask, Gateway(pid=None, port=port), engine)


def test_nothing_is_left_when_the_harness_is_killed(tools: Tools) -> None:
    """The engine ends with whoever has started it, even by kill -9."""
    code = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid); p.wait()"
    command = [sys.executable, "-uc", code, str(tools.engine), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = {process.stdout.readline(), process.stdout.readline()}
        assert len(said) == 2
        process.kill()
        assert process.stdout.read() == ""  # its output is closed, so it has ended


def test_sigterm_leaves_nothing_running(tmp_path: Path) -> None:
    """A harness that is told to end stops the platform that it has started, and its folders go."""
    command = [sys.executable, "-m", "anser", "bench", "wire", "--anser-only", "--quick"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(list(tmp_path.glob("wire-*/data/anser.sock"))) == 1, 60)
        started = [one.pid for one in family(process.pid)]
        assert len(started) >= 3
        process.terminate()
        assert process.wait(60) == 143
    assert [pid for pid in started if family(pid)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(180)
def test_a_short_run_gives_each_figure(capsys: pytest.CaptureFixture[str]) -> None:
    """Through a real platform with its policy on: every figure comes out, no answer is wrong; what
    needs a peer is left out, and nothing is said to hold that was not measured."""
    assert main(["bench", "wire", "--anser-only", "--quick", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    for name in (
        "ready to accept",
        "memory, idle",
        "memory that 50 streams add",
        "16 KB prompts / small prompts, rate",
        "added p50 at 100/s",
    ):
        assert rows[name]["target"]
        assert rows[name]["holds"] in (True, False)
    for name in ("request CPU, anser", "chunk CPU, anser", "requests, none", "p99 at 100/s, anser"):
        assert rows[name]["value"] > 0
        assert rows[name]["holds"] is None
    assert not [name for name in rows if "nginx" in name or "litellm" in name]
