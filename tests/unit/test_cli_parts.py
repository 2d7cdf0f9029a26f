"""The smaller parts of commands: snippets, progress, memory, and reading a chat's events."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import structlog
from starlette.types import Receive, Scope, Send

from anser.cli.chat import Talk
from anser.cli.control import Control
from anser.cli.doctor import Verdict, memory_free, packages, python, room
from anser.cli.logs import log_to_stderr
from anser.cli.messages import program
from anser.cli.progress import Steps, shown_progress
from anser.cli.serve import People, curl_line, python_lines
from anser.cli.transport import AppTransport
from anser.config import load
from anser.core.errors import AnserError
from anser.platform import Listening
from tests.unit.test_cli_control import answering


def listening(
    *, key: str | None = "hf_x", model: str | None = "m", anonymous: bool = True
) -> Listening:
    """A platform that has just opened its sockets."""
    return Listening(
        url="http://127.0.0.1:1",
        admin_socket=Path("/d/anser.sock"),
        admin_url=None,
        key=key,
        model=model,
        anonymous=anonymous,
    )


@pytest.mark.parametrize(
    ("key", "anonymous", "sent"),
    [("hf_x", True, "hf_x"), (None, False, "YOUR_KEY"), (None, True, None)],
)
def test_the_curl_line_is_one_shell_command(key: str | None, anonymous: bool, sent: str) -> None:
    """Its words are what curl takes; a key is in it where one is needed."""
    words = shlex.split(curl_line(listening(key=key, anonymous=anonymous), "m"))
    assert words[:2] == ["curl", "http://127.0.0.1:1/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "m"
    keys = [word for word in words if word.startswith("Authorization: ")]
    assert keys == ([] if sent is None else [f"Authorization: Bearer {sent}"])


@pytest.mark.parametrize("model", ["m", 'it\'s "quoted"', "é\\n"])
def test_the_python_program_is_one(model: str) -> None:
    """It can be parsed whatever the model is called, and names model and key."""
    tree = ast.parse("\n".join(python_lines(listening(), model)))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert {model, "hf_x", "http://127.0.0.1:1/v1"} <= set(texts)


@pytest.mark.parametrize("model", ["m", None])
def test_nothing_is_printed_that_cannot_work(
    model: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no model can be asked, all that is shown is the way to one, data folder included."""
    given = load(file=None, environ={}, overrides={"data_dir": tmp_path / "my data"})
    People(given).listening(listening(model=model))
    said = capsys.readouterr().out
    assert ("curl" in said) == ("import OpenAI" in said) == (model is not None)
    command = f"node add --data-dir '{tmp_path}/my data' URL"
    assert (command in said) == (model is None)


def test_the_program_is_named_as_it_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name where the PATH has this very program, else by its place, else by its module."""
    here = tmp_path / "my folder" / "anser"
    here.parent.mkdir()
    here.write_text("#!/bin/sh\n")
    here.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(here)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == f"'{here}'"
    (tmp_path / "anser").symlink_to(here)
    assert program() == "anser"
    (tmp_path / "anser").unlink()
    (tmp_path / "anser").write_text("another")
    (tmp_path / "anser").chmod(0o755)
    assert program() == f"'{here}'"
    monkeypatch.setattr(sys, "argv", ["/x/__main__.py"])
    assert program().endswith(" -m anser")


def test_progress_is_told_in_tenths() -> None:
    """However often a download reports, it is told at its start, each tenth, and its end."""
    told: list[int] = []
    steps = Steps(lambda done, _total: told.append(done))
    for done in range(1_001):
        steps(done, 1_000)
    assert told == list(range(0, 1_001, 100))


def test_progress_of_unknown_length_is_told_now_and_then() -> None:
    """Where the length is unknown it is told every 16 MiB."""
    told: list[int] = []
    steps = Steps(lambda done, _total: told.append(done))
    for done in range(0, 64 * 2**20 + 1, 2**20):
        steps(done, None)
    assert told == [0, 16 * 2**20, 32 * 2**20, 48 * 2**20, 64 * 2**20]


def test_progress_off_a_terminal_is_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where standard error is no terminal, each step is one line there with its share."""
    monkeypatch.setenv("ANSER_LANG", "en")
    with shown_progress() as progress:
        progress(0, 2_000_000)
        progress(1_000_000, 2_000_000)
        progress(2_000_000, 2_000_000)
        progress(0, None)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[1:] == [
        "Fetching the model: 50 % (1 of 2 MB)",
        "Fetching the model: 100 % (2 of 2 MB)",
        "Fetching the model: 0 MB",
    ]


@pytest.mark.parametrize(
    ("free", "verdict"),
    [(None, Verdict.WARN), (10**12, Verdict.OK), (10**9, Verdict.WARN), (10**6, Verdict.FAIL)],
)
def test_room_is_judged_by_what_is_left(free: int | None, verdict: Verdict) -> None:
    """Plenty is fine, little is a warning with a way out, next to nothing a failure."""
    check = room("disk", free)
    assert check.verdict is verdict
    assert bool(check.way) == (free is not None and verdict is not Verdict.OK)


def test_python_must_be_new_enough() -> None:
    """An interpreter below 3.11 is a failure."""
    assert python((3, 10, 9)).verdict is Verdict.FAIL
    assert python((3, 11, 0)).verdict is Verdict.OK


def test_every_package_is_checked() -> None:
    """A missing one fails with what to install; one that is there has its version."""
    wanted = ["httpx>=0.28", "no-such-package>=1", "x>=1; extra == 'test'", "jinja2[a]<9"]
    found = {check.name: check for check in packages(wanted)}
    assert found.keys() == {"httpx", "no-such-package", "jinja2"}
    assert found["no-such-package"].verdict is Verdict.FAIL
    assert "no-such-package>=1" in found["no-such-package"].way
    assert found["httpx"].verdict is Verdict.OK
    assert found["httpx"].found[0].isdigit()


def test_free_memory_is_known_on_this_machine() -> None:
    """On Linux the memory that may still be taken is told, in bytes."""
    free = memory_free()
    if Path("/proc/meminfo").exists():
        assert free is not None
        assert 0 < free < 2**50


def test_the_log_forges_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A log line is one line of JSON on standard error, whatever is in it."""
    try:
        log_to_stderr()
        structlog.get_logger("t").info("seen", text='a"\n{"event": "forged"}\x1b[2J', number=5)
        try:
            raise ValueError("bad\x1b[0m")
        except ValueError:
            structlog.get_logger("t").exception("failed")
        log_to_stderr(quiet=True)
        structlog.get_logger("t").info("not worth a word")
    finally:
        structlog.reset_defaults()
    out, err = capsys.readouterr()
    assert out == ""
    first, second = (json.loads(line) for line in err.splitlines())
    assert (first["event"], first["number"], first["level"]) == ("seen", 5, "info")
    assert "\x1b" not in err
    assert "ValueError" in second["exception"]


UNREAD = """
import structlog
from anser.cli.logs import log_to_stderr
from anser.cli.progress import shown_progress
log_to_stderr()
with shown_progress() as progress:
    progress(0, 10)
    structlog.get_logger("t").info("seen")
    progress(10, 10)
print("went on")
"""


def test_what_is_told_on_the_way_may_find_no_reader() -> None:
    """A closed standard error, as after `2>&1 | head`, stops neither progress nor log."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", UNREAD]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stdout) == (0, b"went on\n")


@pytest.mark.anyio
async def test_a_conversation_forgets_its_beginning() -> None:
    """When the model can take no more, the oldest turns go, it is said once, and it goes on."""
    asked: list[int] = []
    long = b'{"error": {"message": "too long", "type": "x", "code": "context_length_exceeded"}}'
    good = b'data: {"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}\n\n'

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        said = json.loads((await receive())["body"])["messages"]
        asked.append(len(said))
        status, body = (
            (400, long)
            if len(said) > 2 or "endless" in said[-1]["content"]
            else (200, good + b"data: [DONE]\n\n")
        )
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    client = httpx.AsyncClient(transport=AppTransport(app), base_url="http://localhost")
    shown: list[str] = []
    async with client:
        talk = Talk(Control(client, "socket"), "m")
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
        talk.messages = [{"role": "system", "content": "be brief"}, *turns]
        await talk.ask("well?", shown.append)
        assert asked == [6, 4, 2]
        assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
        assert (len(shown), "".join(shown[1:])) == (2, "yes")
        with pytest.raises(AnserError, match="too long"):
            await talk.ask("endless", shown.append)


@pytest.mark.anyio
async def test_a_conversation_remembers_what_came_to_its_end() -> None:
    """Question and answer are kept for the next turn once the answer is whole, else neither is."""
    head = b'data: {"id": "chatcmpl-1", "choices": [{"delta": {"content": "one "}}]}\n\n'
    more = b'data: {"choices": [{"delta": {"content": "two"}, "finish_reason": "stop"}]}\n\n'
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n'
    shown: list[str] = []
    async with answering(200, head, more, usage) as control:
        talk = Talk(control, "m")
        found = await talk.ask("count", shown.append)
    assert "".join(shown) == "one two"
    assert found == {
        "request": "chatcmpl-1",
        "model": "m",
        "content": "one two",
        "finish_reason": "stop",
        "usage": {"completion_tokens": 2},
    }
    said = [(message["role"], message["content"]) for message in talk.messages]
    assert said == [("user", "count"), ("assistant", "one two")]
    async with answering(200, head, b'data: {"error": {}}\n\n') as control:
        talk = Talk(control, "m")
        with pytest.raises(AnserError):
            await talk.ask("count", shown.append)
    assert talk.messages == []
