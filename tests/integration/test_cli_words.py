"""What commands say to people, run in this process on a data folder of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from anser.cli.app import main
from anser.core.hub import DEFAULT_MODEL
from tests.model import model_path
from tests.receipts import make_receipt
from tests.test_tidy import commands

Say = Callable[..., str]


@pytest.fixture
def say(
    data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Say]:
    """Run one command on the data folder and return all that it said; it must end as expected."""
    monkeypatch.setenv("ANSER_LANG", "en")
    monkeypatch.setenv("ANSER_DATA_DIR", str(data_dir))
    monkeypatch.setenv("ANSER_ENGINE_ENABLED", "off")

    def said(*words: str | Path, code: int = 0) -> str:
        ended = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert ended == code, err
        return out + err

    yield said
    structlog.reset_defaults()


@pytest.mark.parametrize("words", sorted(commands()))
def test_every_command_explains_itself(say: Say, words: str) -> None:
    """Each command's help has an example, and says how it ends."""
    told = say(*words.split()[1:], "--help")
    leads_on = "COMMAND" in told.splitlines()[0]
    assert leads_on or f"`{words}" in told, "no example"
    assert "Exit codes" in told
    assert "─ Parameters" not in told, "the usage line calls them options"
    assert "default: False" not in told, "a switch is off until it is given"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nod"], ["nod", "node", "anser --help"]),
        (["node", "ad"], ["ad", "add"]),
        (["serve", "--prot", "1"], ["--prot", "--port", "anser serve --help"]),
        (["key", "create"], ["MEMBER", "anser key create --help"]),
        (["key", "create", "a", "--expires", "soon"], ["--expires", "30d"]),
        (["member", "add", "a", "--weight", "0"], ["--weight"]),
        (["member", "add", "a", "--weight", "inf"], ["--weight"]),
        (["models", "--data-dir", ""], ["--data-dir", "folder"]),
        (["receipt", "verify", "a", "b"], ["b"]),
        (["top", "--interval", "\x1b[31m"], ["--interval", "\\x1b[31m"]),
    ],
)
def test_a_wrong_call_is_told_in_one_line(say: Say, words: list[str], parts: list[str]) -> None:
    """A wrong call ends with code 2 and one line that offers what was meant."""
    line = say(*words, code=2)
    assert [part for part in parts if part not in line] == []
    assert "\x1b" not in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["member", "add", "local"], ["local", "exists"]),
        (["member", "add", "a/b"], ["Add a first"]),
        (["member", "set", "local"], ["what to change", "--weight"]),
        (["member", "set", "nobody", "--weight", "2"], ["nobody"]),
        (["member", "add", "Physics!"], ["a-z"]),
        (["key", "create", "nobody"], ["nobody"]),
        (["key", "create", "local", "--label", "a\nb"], ["printable"]),
        (["key", "revoke", "key_0"], ["key_0"]),
        (["node", "drain", "nobody"], ["nobody"]),
        (["node", "remove", "../members"], ["members"]),
        (["node", "add", "ftp://x"], ["http"]),
        (["receipt", "get", "req_0"], ["no such receipt"]),
        (["usage", "--since", "9999999w"], ["since_s"]),
        (["usage", "nobody"], ["no member", "nobody"]),
        (["chat", "--url", "http://127.0.0.1:1"], ["http://127.0.0.1:1", "--url"]),
        (["models", "--url", "no such host"], ["--url"]),
    ],
)
def test_a_failure_is_one_line(say: Say, words: list[str], parts: list[str]) -> None:
    """What cannot be done ends with code 1 and one line that says why."""
    line = say(*words, code=1)
    assert [part for part in parts if part not in line] == []
    assert line.startswith("anser: ")
    assert line.count("\n") == 1


def test_members_are_listed_in_columns(say: Say) -> None:
    """Each member is a line with its weight and limits; what is not set is a dash."""
    assert say("member", "add", "physics", "--weight", "0.5") == "Added the member physics.\n"
    say("member", "add", "physics/lattice", "--queued-max", "7")
    head, *rows = say("member", "list").splitlines()
    assert head.split()[:2] == ["member", "weight"]
    assert [row.split() for row in rows if row.startswith("physics")] == [
        ["physics", "0.5", "-", "-", "-", "-"],
        ["physics/lattice", "1.0", "-", "7", "-", "-"],
    ]
    changed = say("member", "set", "physics/lattice", "--weight", "3", "--queued-max", "0")
    assert changed == "Changed the member physics/lattice.\n"
    say("member", "set", "physics/lattice", "--in-flight-max", "2")
    assert say("member", "list").splitlines()[-1].split() == [
        "physics/lattice", "3.0", "2", "-", "-", "-",
    ]  # fmt: skip


def test_keys_are_listed_in_columns(say: Say) -> None:
    """Each key is a line with its id, and revoking says which one was closed."""
    made = say("key", "create", "local", "--label", "my laptop", "--expires", "2d")
    assert made.startswith("hf_")
    assert "the only time" in made
    head, row = say("key", "list", "local").splitlines()
    assert head.split()[0] == "key"
    assert "my laptop" in row
    key = row.split()[0]
    assert say("key", "revoke", key) == f"Closed the key {key}.\n"


def test_nodes_are_told_in_words(say: Say) -> None:
    """Adding, draining and removing say what was done, and the list shows what is wrong."""
    added = say("node", "add", "http://127.0.0.1:9", "--name", "gpu-1", "--model", "m")
    assert added.splitlines()[0] == "Added the node gpu-1."
    assert "gpu-1" in say("node", "list")
    assert say("models").splitlines()[1].split() == ["m", "-", "1", "openai", "not", "ready"]
    assert "gpu-1 finishes" in say("node", "drain", "gpu-1")
    assert "gpu-1 takes requests again" in say("node", "resume", "gpu-1")
    assert say("node", "remove", "gpu-1") == "Removed the node gpu-1.\n"
    assert "no node gpu-1" in say("node", "remove", "gpu-1", code=1).replace("'", "")


def test_nothing_used_is_an_empty_table(say: Say) -> None:
    """Usage of nothing is the head of the table alone."""
    assert say("usage").split() == [
        "member", "model", "requests", "failed", "cancelled", "prompt", "cached", "completion",
    ]  # fmt: skip
    assert say("usage", "local").count("\n") == 1


def test_settings_are_told_in_columns(say: Say, data_dir: Path) -> None:
    """Each setting is a line; switches, lists and nothing are written as people would."""
    (data_dir / "anser.toml").write_text('[engine]\nmirrors = ["http://a", "http://b"]\n')
    rows = {line.split()[0]: line.split()[1:] for line in say("config").splitlines()}
    assert rows["engine.enabled"] == ["false", "ANSER_ENGINE_ENABLED"]
    assert rows["engine.mirrors"][:2] == ["http://a,", "http://b"]
    assert rows["server.admin_listen"] == ["-", "default"]
    assert rows["Settings"] == ["file:", str(data_dir / "anser.toml")]


def test_a_receipt_is_told_in_words(say: Say, data_dir: Path, tmp_path: Path) -> None:
    """A valid receipt says whose it is and what it says; against which key it was checked too."""
    file = tmp_path / "receipt.json"
    public_key = recorded(data_dir)
    request = make_receipt(1).request
    assert say("receipt", "get", request, "-o", file) == f"Wrote {file}.\n"
    assert say("receipt", "verify", file).startswith("Whole, and signed with the key named in it")
    told = say("receipt", "verify", file, "--public-key", public_key.hex())
    assert told.startswith(f"Valid, and signed with the key given: request {request}")
    assert "another key" in say("receipt", "verify", file, "--public-key", "00" * 32, code=1)
    assert "64 hexadecimal" in say("receipt", "verify", file, "--public-key", "xyz", code=1)


def recorded(data_dir: Path) -> bytes:
    """Put one receipt into the ledger of the data folder; returns the key that signed it."""
    import asyncio

    from anser.config import Config, EngineSettings
    from anser.platform import open_platform

    async def record() -> bytes:
        config = Config(data_dir=data_dir, engine=EngineSettings(enabled=False))
        async with open_platform(config, engine=False) as platform:
            await platform.services.ledger.record(make_receipt(1))
            return platform.services.ledger.public_key

    return asyncio.run(record())


# ---------------------------------------------------------------------------------- doctor


def verdicts(text: str) -> dict[str, str]:
    """The verdict of each check, by its name's first word."""
    return {line.split()[1]: line.split()[0] for line in text.splitlines()}


def test_doctor_says_each_check_in_a_line(say: Say, free_port: int, data_dir: Path) -> None:
    """Each line begins with a verdict; a healthy machine has none that fails."""
    (data_dir / "anser.toml").write_text(f"[server]\nport = {free_port}\n")
    found = verdicts(say("doctor"))
    assert {"python", "settings", "data", "disk", "memory", "port", "model"} <= set(found)
    assert set(found.values()) <= {"ok", "warn"}


def test_doctor_judges_the_data_folder(say: Say, tmp_path: Path) -> None:
    """A folder that cannot be one, and a path too long for a socket, fail with the way out."""
    file = tmp_path / "file"
    file.write_text("")
    told = say("doctor", "--data-dir", file / "below", code=1)
    assert verdicts(told)["data"] == "fail"
    long = say("doctor", "--data-dir", tmp_path / ("d" * 150), code=1)
    assert verdicts(long)["data"] == "fail"
    assert "103" in long


def test_doctor_tells_of_a_model_that_is_not_here(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing model is told with which mirrors have it; a file that is there is told too."""
    monkeypatch.setenv("ANSER_ENGINE_ENABLED", "on")
    file = tmp_path / "a.gguf"
    monkeypatch.setenv("ANSER_ENGINE_MODEL", str(file))
    checks = json.loads(say("doctor", "--json", code=1))["checks"]
    model = next(check for check in checks if check["name"] == "model")
    assert (model["verdict"], "--model" in model["way"]) == ("fail", True)
    file.write_text("x")
    checks = json.loads(say("doctor", "--json", code=1))["checks"]
    model = next(check for check in checks if check["name"] == "model")
    assert (model["verdict"], "truncated" in model["way"]) == ("fail", True), model
    assert str(file) in model["found"]
    monkeypatch.setenv("ANSER_ENGINE_MODEL", str(model_path()))
    checks = json.loads(say("doctor", "--json"))["checks"]
    model = next(check for check in checks if check["name"] == "model")
    assert (model["verdict"], model["found"].split(":")[0]) == ("ok", DEFAULT_MODEL.id)
    monkeypatch.setenv("ANSER_ENGINE_MODEL", "nonsense")
    checks = json.loads(say("doctor", "--json", code=1))["checks"]
    settings = next(check for check in checks if check["name"] == "settings")
    assert settings["verdict"] == "fail"
    assert "nonsense" in settings["found"]
