"""The command `anser` against a platform that runs, with the real model."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hostile import SSE_HEAD, Talk, delta, stream
from tests.integration.test_cli import anser, failure, told
from tests.model import model_path
from tests.outside import listed
from tests.server import Server, serving, serving_model, wait_until

pytestmark = pytest.mark.engine

WAIT_S = 60.0
OWN_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C on it is a signal
from anser.__main__ import main
main()
"""
LONG = "Write a very long story about a lighthouse."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the platform of this module."""
    return tmp_path_factory.mktemp("live") / "data"


@pytest.fixture(scope="module")
def live(data: Path) -> Iterator[Server]:
    """A platform with the real model."""
    with serving_model(data, "--no-key") as server:
        yield server


def running(server: Server) -> int:
    """How many answers hold a lease now."""
    count: int = server.pool()["running"]
    return count


# ---------------------------------------------------------------------------------- asking


@pytest.mark.usefixtures("live")
def test_one_question_is_answered(data: Path) -> None:
    """`anser chat "question"` prints the answer and nothing else."""
    ended = anser("chat", "Say hello.", "--max-tokens", "8", "--data-dir", data)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.strip()


def test_a_question_for_programs(live: Server, data: Path) -> None:
    """With --json an answer comes with its model, request, reason of ending and usage."""
    words = ("chat", live.model, "Say hello.", "--max-tokens", "8")
    found = told(*words, "--data-dir", data)
    assert found["model"] == live.model
    assert found["content"]
    assert found["finish_reason"] in ("stop", "length")
    assert 0 < found["usage"]["completion_tokens"] <= 8


@pytest.mark.usefixtures("live")
def test_a_question_may_be_piped_in(data: Path) -> None:
    """Without words the question is standard input; with a dash it is put in its place."""
    at = ("--max-tokens", "4", "--data-dir", data)
    whole = told("chat", *at, piped="Say hello.")
    same = told("chat", "Say", "-", *at, piped="hello.")
    assert whole["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]
    assert "no question" in failure("chat", *at)


@pytest.mark.usefixtures("live")
def test_an_unknown_model_is_refused(data: Path) -> None:
    """A model that there is not ends with the platform's own message."""
    line = failure("chat", "--model", "gpt-99", "hi", "--data-dir", data)
    assert "gpt-99" in line


def test_ctrl_c_stops_an_answer_and_frees_its_slot(live: Server, data: Path) -> None:
    """One question: Ctrl-C ends the command with code 130, and the model stops working on it."""
    command = [sys.executable, "-m", "anser", "chat", LONG, "--data-dir", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    wait_until(lambda: running(live) == 0)
    assert next(row["cancelled"] for row in told("usage", "--data-dir", data)["usage"]) >= 1


@contextmanager
def terminal(*words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command on a terminal of its own, and the hand on its keyboard."""
    keyboard, screen = pty.openpty()
    environment = {**os.environ, "ANSER_LANG": "en", "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL, *words],
        stdin=screen,
        stdout=screen,
        stderr=screen,
        env=environment,
        start_new_session=True,
    ) as process:
        os.close(screen)
        try:
            yield process, keyboard
        finally:
            if process.poll() is None:
                process.kill()
            os.close(keyboard)


def read_until(keyboard: int, pattern: str) -> str:
    """What the screen shows until `pattern` is there."""
    shown, deadline = "", time.monotonic() + WAIT_S
    while not re.search(pattern, shown):
        ready, _, _ = select.select([keyboard], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {pattern!r} in {shown!r}"
        try:
            shown += os.read(keyboard, 4_096).decode(errors="replace")
        except OSError:
            break
    assert re.search(pattern, shown), shown
    return shown


def test_a_conversation_on_a_terminal(live: Server, data: Path) -> None:
    """Turn by turn: Ctrl-C stops an answer and leaves the chat open; at the prompt it ends it."""
    with terminal("chat", "--data-dir", str(data)) as (process, keyboard):
        read_until(keyboard, r"> $")
        os.write(keyboard, f"{LONG}\n".encode())
        read_until(keyboard, r"lighthouse\.\r\n\s*\S")
        os.write(keyboard, b"\x03")
        read_until(keyboard, r"\[stopped\][\s\S]*> $")
        wait_until(lambda: running(live) == 0)
        os.write(keyboard, b"Say hello.\n")
        read_until(keyboard, r"hello\.\r\n[\s\S]*\S[\s\S]*\r\n[\s\S]*> $")
        assert interrupted(process, keyboard) == 130


def interrupted(process: subprocess.Popen[bytes], keyboard: int) -> int:
    """The exit code after Ctrl-C at a prompt, pressed as often as a person would.

    CPython passes over one that comes between writing its prompt and beginning to read.
    """
    for _ in range(5):
        os.write(keyboard, b"\x03")
        with suppress(subprocess.TimeoutExpired):
            return process.wait(3)
    return process.wait(WAIT_S)


@pytest.mark.usefixtures("live")
def test_end_of_input_ends_a_conversation(data: Path) -> None:
    """Ctrl-D at the prompt ends the chat with code 0."""
    with terminal("chat", "--data-dir", str(data)) as (process, keyboard):
        read_until(keyboard, r"> $")
        os.write(keyboard, b"\x04")
        assert process.wait(WAIT_S) == 0


@pytest.mark.usefixtures("live")
def test_top_is_live_on_a_terminal(data: Path) -> None:
    """On a terminal top shows itself again and again, until Ctrl-C ends it with code 130."""
    with terminal("top", "--interval", "0.2", "--data-dir", str(data)) as (process, keyboard):
        read_until(keyboard, r"tokens/s[\s\S]*builtin[\s\S]*tokens/s[\s\S]*builtin")
        os.write(keyboard, b"\x03")
        assert process.wait(WAIT_S) == 130


# ---------------------------------------------------------------------------------- accounts


def test_a_receipt_is_fetched_and_checked(live: Server, data: Path, tmp_path: Path) -> None:
    """An answer's receipt verifies offline, by the platform's key; a changed one does not."""
    request = told("chat", "Say hello.", "--max-tokens", "4", "--data-dir", data)["request"]
    file = tmp_path / "receipt.json"
    told("receipt", "get", request, "-o", file, "--data-dir", data)
    found = told("receipt", "verify", file)
    assert (found["valid"], found["member"]) == (True, "local/default/owner")
    public_key = httpx.get(f"{live.url}/v1/signing-key").json()["public_key"]
    assert told("receipt", "verify", file, "--public-key", public_key)["valid"] is True
    other = "00" * 32
    assert "another key" in failure("receipt", "verify", file, "--public-key", other)
    document = json.loads(file.read_text())
    document["receipt"]["usage"]["completion_tokens"] += 1
    file.write_text(json.dumps(document))
    assert "changed" in failure("receipt", "verify", file)
    piped = anser("receipt", "get", request, "--data-dir", data).stdout
    assert anser("receipt", "verify", "-", piped=piped).returncode == 0


def test_why_is_told_in_words(live: Server, data: Path) -> None:
    """An answer's id leads to why it went where it went, in words and for programs."""
    request = told("chat", "Say hello.", "--max-tokens", "4", "--data-dir", data)["request"]
    found = told("why", request, "--data-dir", data)
    name = request.removeprefix("chatcmpl-")
    assert (found["request"], found["leases"][0]["rule"]) == (f"req_{name}", "free")
    assert "no such request" in failure("why", request, "--url", live.url)  # without its key
    said = anser("why", request, "--data-dir", data).stdout
    assert "did not have to wait" in said
    assert "builtin" in said
    assert "no such request" in failure("why", "req_none", "--data-dir", data)


def test_usage_is_told_by_member_and_model(live: Server, data: Path) -> None:
    """What was asked is in the sums of the member who asked, and only there."""
    told("chat", "Say hello.", "--max-tokens", "4", "--data-dir", data)
    rows = told("usage", "local", "--data-dir", data)["usage"]
    assert [(row["member"], row["model"]) for row in rows] == [("local/default/owner", live.model)]
    assert rows[0]["completion_tokens"] > 0
    assert told("usage", "anonymous", "--since", "1h", "--data-dir", data)["usage"] == []


def test_fairness_is_told(live: Server, data: Path) -> None:
    """An operator sees every row and all in one figure; others their own path, without names."""
    told("chat", "Say hello.", "--max-tokens", "4", "--data-dir", data)
    found = told("usage", "--fairness", "--data-dir", data)
    assert "local/default/owner" in {row["member"] for row in found["members"]}
    assert found["all"]["jain"] is not None
    said = anser("usage", "--fairness", "--data-dir", data).stdout
    assert "local/default" in said
    assert "Jain" in said
    visitor = anser("usage", "--fairness", "--url", live.url).stdout
    assert "anonymous" in visitor
    assert "local" not in visitor


def test_the_pool_and_the_models_are_told(live: Server, data: Path) -> None:
    """top, models and node list show the built-in node and its model."""
    pool = told("top", "--data-dir", data)
    assert [(node["id"], node["state"]) for node in pool["nodes"]] == [("builtin", "up")]
    models = told("models", "--data-dir", data)["data"]
    assert [model["id"] for model in models] == [live.model]
    shown = anser("node", "list", "--data-dir", data).stdout
    assert live.model in shown
    assert "up" in shown


# ---------------------------------------------------------------------------------- elsewhere


def test_a_platform_elsewhere_is_asked_with_a_key(live: Server, data: Path, tmp_path: Path) -> None:
    """--url and --key reach a platform's public address; what is one's own can be seen there."""
    told("member", "add", "guests", "--data-dir", data)
    key = told("key", "create", "guests", "--data-dir", data)["key"]
    away = {"ANSER_URL": live.url, "ANSER_API_KEY": key, "ANSER_DATA_DIR": str(tmp_path / "none")}
    answer = told("chat", "Say hello.", "--max-tokens", "4", environment=away)
    rows = told("usage", environment=away)["usage"]
    assert [row["member"] for row in rows] == ["guests"]
    receipt = told("receipt", "get", answer["request"], environment=away)
    assert receipt["receipt"]["member"] == "guests"
    assert told("top", environment=away)["nodes"]
    assert not (tmp_path / "none").exists()
    wrong = {**away, "ANSER_API_KEY": "hf_wrong"}
    ended = anser("usage", environment=wrong)
    assert ended.returncode == 1
    assert "ANSER_API_KEY" in ended.stderr
    ended = anser("member", "list", environment=away)
    assert ended.returncode == 1
    assert "server.admin_listen" in ended.stderr
    same = {**away, "ANSER_URL": f"{live.url}/v1/"}  # as other clients want it
    assert told("models", environment=same)["data"]


def test_the_admin_listener_wants_an_operators_key(data_dir: Path) -> None:
    """On the admin listener commands need an operator's key; others are told how to get one."""
    environment = {"ANSER_SERVER_ADMIN_LISTEN": "127.0.0.1:0"}
    with serving(data_dir, "--no-engine", environment=environment) as server:
        at = ("--data-dir", data_dir)
        plain = told("key", "create", "local", *at)["key"]
        operator = told("key", "create", "local", "--operator", *at)["key"]
        url = server.events[0]["admin_url"]

        def asked(key: str) -> subprocess.CompletedProcess[str]:
            return anser("member", "list", "--url", url, environment={"ANSER_API_KEY": key})

        assert asked(operator).returncode == 0
        assert "--operator" in asked(plain).stderr
        assert "key" in asked("").stderr
        settings = told("config", "--url", url, environment={"ANSER_API_KEY": operator})
        rows = {row["path"]: row["value"] for row in settings["settings"]}
        assert rows["engine.enabled"] is False


# ---------------------------------------------------------------------------------- hostile


@pytest.mark.anyio
async def test_an_engines_words_cannot_drive_the_terminal(data_dir: Path) -> None:
    """Escape sequences and reordering marks in an answer are shown as text; its lines stay."""

    async def play(talk: Talk) -> None:
        await talk.say(stream("\x1b]0;owned\x07", "one\n\ttwo", "\x1b[2J\u202e"))

    with serving(data_dir, "--no-engine") as server:
        async with listed(server, play):
            ended = await asyncio.to_thread(anser, "chat", "hi", "--data-dir", data_dir)
    assert ended.returncode == 0, ended
    assert ended.stdout == "\\x1b]0;owned\\x07one\n\ttwo\\x1b[2J\\u202e\n"


@pytest.mark.anyio
async def test_an_answer_that_breaks_off_is_a_failure(data_dir: Path) -> None:
    """A node lost in mid-answer ends the command with code 1 and the reason, after the text."""

    async def play(talk: Talk) -> None:
        await talk.say(SSE_HEAD, delta("one "))
        talk.reset()

    with serving(data_dir, "--no-engine") as server:
        async with listed(server, play):
            ended = await asyncio.to_thread(anser, "chat", "hi", "--data-dir", data_dir)
    assert ended.returncode == 1, ended
    assert len(ended.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------- serve


def test_serve_prints_what_works_when_pasted(data_dir: Path, tmp_path: Path) -> None:
    """The curl line and the Python program that serve prints work as they stand."""
    command = [sys.executable, "-m", "anser", "serve", "--port", "0", "--data-dir", str(data_dir)]
    with subprocess.Popen(
        [*command, "--model", str(model_path())],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "ANSER_LANG": "en"},
    ) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if "is ready" in line:
                    break
            answer = pasted(next(line for line in lines if line.startswith("curl ")))
            assert answer["choices"][0]["message"]["content"]
            start = lines.index("from openai import OpenAI")
            program = tmp_path / "ask.py"
            program.write_text("\n".join(lines[start : lines.index("", start)]))
            ended = subprocess.run(
                [sys.executable, str(program)],
                capture_output=True,
                text=True,
                timeout=WAIT_S,
                check=True,
            )
            assert ended.stdout.strip()
        finally:
            process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(WAIT_S) == 0
    assert "Stopping" in rest
    assert rest.endswith("Stopped.\n")


def pasted(line: str) -> Any:
    """What the shell would do with a curl line, checked word by word, and its answer."""
    words = shlex.split(line)
    assert words[0] == "curl"
    assert words[2::2] == ["-H", "-H", "-d"]
    headers = dict(word.split(": ", 1) for word in (words[3], words[5]))
    response = httpx.post(words[1], headers=headers, content=words[7], timeout=WAIT_S)
    assert response.status_code == 200, response.text
    return response.json()


def test_serve_names_a_model_of_its_nodes(live: Server, data_dir: Path) -> None:
    """Without an engine of its own it names a model that a stored node serves, or none."""
    with serving(data_dir, "--no-engine") as server:
        assert server.model == ""
        server.admin("POST", "/nodes", {"url": live.url})
    with serving(data_dir, "--no-engine") as server:
        assert server.model == live.model


def test_serve_goes_on_when_nobody_reads_what_it_says(data_dir: Path) -> None:
    """`anser serve | head -1` serves on: its output is no reason to stop."""
    command = [sys.executable, "-m", "anser", "serve", "--port", "0", "--no-engine", "--json"]
    with subprocess.Popen(
        [*command, "--data-dir", str(data_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        process.stdout.close()
        assert httpx.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(WAIT_S) == 0


def test_serve_tells_programs_each_event(data_dir: Path) -> None:
    """With --json every line is one event, from listening to stopped, and SIGTERM ends with 0."""
    with serving_model(data_dir) as server:
        listening = server.events[0]
        assert listening["event"] == "listening"
        assert listening["key"].startswith("hf_")
        assert listening["api"] == f"{server.url}/v1"
        assert listening["pid"] == server.process.pid
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) == 0
    names = [event["event"] for event in server.events]
    assert names == ["listening", "model_ready"]


def test_a_first_start_tells_its_download(live: Server, data_dir: Path) -> None:
    """A start without the model's file fetches it, here from another platform, and tells so."""
    environment = {"ANSER_ENGINE_MIRRORS": live.url}
    with serving(data_dir, ready="model_ready", environment=environment) as server:
        steps = [event for event in server.events if event["event"] == "downloading"]
        done = [step["bytes"] for step in steps]
        assert len(steps) > 2
        assert done == sorted(done)
        assert done[-1] == steps[-1]["total"]
        # Two tokens may be half a character, which is no text yet.
        assert told("chat", "Say hello.", "--max-tokens", "8", "--data-dir", data_dir)["content"]


def test_chat_without_a_platform_loads_the_model(tmp_path: Path) -> None:
    """Where no platform runs, the model is loaded for the question, and the receipt stays."""
    with serving_model(tmp_path / "data", "--no-key"):
        pass
    found = told("chat", "Say hello.", "--max-tokens", "4", "--data-dir", tmp_path / "data")
    assert found["content"]
    receipt = told("receipt", "get", found["request"], "--data-dir", tmp_path / "data")
    assert receipt["receipt"]["outcome"] == "finished"
