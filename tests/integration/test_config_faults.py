"""Settings that are wrong: the start stops, and one line names the place and the cure."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import serving

START_S = 30.0


def serve(
    *options: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Try to start a platform that must not start; returns when it has ended."""
    return subprocess.run(
        [sys.executable, "-m", "anser", "serve", *map(str, options)],
        env={**os.environ, "ANSER_LANG": "en", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


def complaint(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why it did not start; nothing else was printed."""
    assert ended.returncode == 1, ended
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"[server]\nprot = 8000\n", ["server.prot", "Did you mean server.port?"]),
        (b"[sever]\nport = 8000\n", ["sever", "Did you mean [server]?"]),
        (b'[server]\nport = "8000"\n', ["server.port", "whole number from 0 to 65,535"]),
        (b"[server]\nport = 70000\n", ["server.port", "not 70000"]),
        (b"[members]\nanonymous = true\n", ["members.anonymous", "on, off, auto"]),
        (b"[nonsense]\nx = 1\n", ["nonsense", "anser config"]),
        (b"[server]\nport = 8000\nhost =\n", ["line 3"]),
        (b"[server]\n# caf\xe9\n", ["line 2", "UTF-8"]),
    ],
)
def test_a_wrong_file_stops_the_start(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    """A typo, a wrong type, an unknown key, a syntax error: file, key path or line, and cure."""
    file, data = tmp_path / "mine.toml", tmp_path / "data"
    file.write_bytes(content)
    line = complaint(serve("--config", file, "--data-dir", data))
    assert line.startswith(f"anser: {file}")
    assert [part for part in parts if part not in line] == []
    assert not data.exists(), "a start that is refused leaves nothing behind"


def test_a_wrong_variable_stops_the_start(data_dir: Path) -> None:
    """A variable is named itself, with the setting that it is for."""
    line = complaint(serve("--data-dir", data_dir, environment={"ANSER_SERVER_PORT": "eighty"}))
    assert "ANSER_SERVER_PORT (server.port) must be a whole number" in line
    line = complaint(serve("--data-dir", data_dir, environment={"ANSER_ENGINE_SLOT": "2"}))
    assert "ANSER_ENGINE_SLOT is not a setting. Did you mean ANSER_ENGINE_SLOTS?" in line


def test_a_wrong_option_stops_the_start(data_dir: Path) -> None:
    """An option out of range is named by its key path; one that is no number is a usage error."""
    line = complaint(serve("--data-dir", data_dir, "--port", "70000"))
    assert "command line: server.port" in line
    ended = serve("--data-dir", data_dir, "--port", "eighty")
    assert ended.returncode == 2
    assert "--port" in ended.stderr
    assert "anser serve --help" in ended.stderr


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    """The file that --config or $ANSER_CONFIG names must be there."""
    missing = tmp_path / "missing.toml"
    assert str(missing) in complaint(serve("--config", missing, "--data-dir", tmp_path / "d"))
    environment = {"ANSER_CONFIG": str(missing)}
    assert str(missing) in complaint(serve("--data-dir", tmp_path / "d", environment=environment))


def test_programs_get_the_reason_as_json(tmp_path: Path) -> None:
    """With --json the reason is the API's envelope on standard output."""
    file = tmp_path / "mine.toml"
    file.write_text("[server]\nprot = 1\n")
    ended = serve("--json", "--config", file, "--data-dir", tmp_path / "data")
    assert (ended.returncode, ended.stderr) == (1, "")
    error = json.loads(ended.stdout)["error"]
    assert (error["code"], error["param"]) == ("config_error", "server.prot")


def test_a_model_that_is_not_there_stops_the_start(data_dir: Path, tmp_path: Path) -> None:
    """A model's name that nobody knows, and a file that is missing, are told before anything."""
    at = ("--data-dir", data_dir, "--port", "0")
    line = complaint(serve("--model", "smollm3", *at))
    assert "smollm3" in line
    assert "smollm2-135m-instruct" in line
    missing = tmp_path / "missing.gguf"
    line = complaint(serve("--model", missing, *at))
    assert f"command line: engine.model: there is no file {missing}" in line
    environment = {"ANSER_ENGINE_MODEL": str(missing)}
    line = complaint(serve(*at, environment=environment))
    assert "ANSER_ENGINE_MODEL: engine.model: there is no file" in line


@pytest.mark.parametrize("secret", ["pepper", "signing.key"])
def test_a_secret_that_others_can_read_stops_the_start(data_dir: Path, secret: str) -> None:
    """A secret with the wrong mode is refused, with the command that mends it."""
    with serving(data_dir, "--no-engine"):
        pass
    (data_dir / secret).chmod(0o644)
    line = complaint(serve("--data-dir", data_dir, "--port", "0"))
    assert f"chmod 600 {data_dir / secret}" in line


def test_two_platforms_cannot_share_a_data_folder(data_dir: Path) -> None:
    """The second one stops and names the folder, its holder and --data-dir; the first serves on."""
    with serving(data_dir, "--no-engine") as first:
        line = complaint(serve("--data-dir", data_dir, "--port", "0"))
        assert str(data_dir) in line
        assert str(first.process.pid) in line
        assert "--data-dir" in line
        assert first.pool()["draining"] is False


def test_two_platforms_with_two_data_folders_run_side_by_side(tmp_path: Path) -> None:
    """Two platforms on one machine do not see each other's members."""
    with (
        serving(tmp_path / "a", "--no-engine") as one,
        serving(tmp_path / "b", "--no-engine") as other,
    ):
        one.admin("POST", "/members", {"id": "physics"})
        assert "physics" in [row["id"] for row in one.admin("GET", "/members")["members"]]
        assert "physics" not in [row["id"] for row in other.admin("GET", "/members")["members"]]


def test_a_port_that_is_taken_stops_the_start(data_dir: Path) -> None:
    """A port in use is named, with --port as the way out."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = complaint(serve("--data-dir", data_dir, "--port", str(port)))
    assert str(port) in line
    assert "--port" in line


def test_an_address_of_another_machine_stops_the_start(data_dir: Path) -> None:
    """Another port would not help: another --host does."""
    line = complaint(serve("--data-dir", data_dir, "--host", "192.0.2.1", "--port", "0"))
    assert "192.0.2.1 is not an address of this machine. Choose another --host." in line


def test_a_data_folder_that_cannot_be_one_stops_the_start(tmp_path: Path) -> None:
    """A file in the place of the folder, and a path too long for a socket, are named."""
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in complaint(serve("--data-dir", file, "--port", "0"))
    deep = tmp_path / ("d" * 120)
    line = complaint(serve("--data-dir", deep, "--port", "0"))
    assert "anser.sock" in line
    assert "shorter" in line
