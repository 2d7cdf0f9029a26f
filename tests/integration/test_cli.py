"""The command `anser` as a process, with no platform on the machine: what it does by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import serving

RUN_S = 60.0


def anser(
    *words: str | Path, piped: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "anser", *map(str, words)],
        env={**os.environ, "ANSER_LANG": "en", **(environment or {})},
        input=piped,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )


def told(*words: str | Path, **more: Any) -> Any:
    """What a command prints with --json; it must succeed, and say nothing else."""
    ended = anser(*words, "--json", **more)
    assert ended.returncode == 0, ended
    return json.loads(ended.stdout)


def failure(*words: str | Path, code: int = 1) -> str:
    """The one line of a command that must fail."""
    ended = anser(*words)
    assert ended.returncode == code, ended
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("anser: ")
    return ended.stderr


# ---------------------------------------------------------------------------------- help


def test_help_comes_at_once() -> None:
    """Help loads neither the platform nor an HTTP client: it is there in a moment."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "anser", "--help"],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    heavy = {"anser.platform", "anser.config", "httpx", "msgspec", "uvicorn", "xllamacpp"}
    assert loaded & heavy == set()
    assert "anser serve" in ended.stdout


def test_the_version_is_the_packages() -> None:
    """--version prints the version and nothing else."""
    from anser import __version__

    assert anser("--version").stdout == f"{__version__}\n"


def test_a_wrong_call_is_told_to_programs() -> None:
    """With --json a wrong call is the envelope on standard output, and code 2 still."""
    ended = anser("key", "create", "--json")
    assert (ended.returncode, ended.stderr) == (2, "")
    assert json.loads(ended.stdout)["error"]["type"] == "invalid_request_error"


# ---------------------------------------------------------------------------------- the store


def test_members_and_keys_without_a_platform(data_dir: Path) -> None:
    """Where no platform runs, commands work on the data folder, and a platform finds it all."""
    at = ("--data-dir", data_dir)
    added = told("member", "add", "physics", "--weight", "2", "--tokens-per-day", "500", *at)
    assert (added["id"], added["weight"], added["limits"]["tokens_per_day"]) == (
        "physics",
        2000,
        500,
    )
    told("member", "add", "physics/lattice", *at)
    listed = told("member", "list", *at)["members"]
    assert {"anonymous", "local", "physics", "physics/lattice"} <= {row["id"] for row in listed}
    made = told("key", "create", "physics/lattice", "--label", "laptop", "--expires", "1d", *at)
    assert made["expires_at"] - made["created_at"] == pytest.approx(86_400)
    keys = told("key", "list", "physics/lattice", *at)["keys"]
    assert [(row["id"], row["label"], row["scope"]) for row in keys] == [
        (made["id"], "laptop", "use")
    ]
    assert made["key"] not in json.dumps(keys)
    with serving(data_dir, "--no-engine") as server:
        bearer = {"authorization": f"Bearer {made['key']}"}
        assert httpx.get(f"{server.url}/v1/usage", headers=bearer).status_code == 200
        assert told("key", "revoke", made["id"], *at)["revoked_at"] is not None
        assert httpx.get(f"{server.url}/v1/usage", headers=bearer).status_code == 401
    (listed_still,) = told("key", "list", "physics/lattice", *at)["keys"]
    assert listed_still["revoked_at"] is not None


def test_only_the_key_is_on_standard_output(data_dir: Path) -> None:
    """A key can be piped into a file: what is said about it goes to standard error."""
    ended = anser("key", "create", "local/default/owner", "--data-dir", data_dir)
    assert ended.stdout.startswith("hf_")
    assert len(ended.stdout.split()) == 1
    assert "anser key revoke key_" in ended.stderr


def test_a_failure_for_programs(data_dir: Path) -> None:
    """With --json a failure is the platform's own envelope on standard output, and code 1."""
    ended = anser("member", "add", "local", "--data-dir", data_dir, "--json")
    assert (ended.returncode, ended.stderr) == (1, "")
    error = json.loads(ended.stdout)["error"]
    assert (error["code"], error["param"]) == ("conflict", "member")


def test_nodes_without_a_platform(data_dir: Path) -> None:
    """A node that does not answer is listed with its trouble, drained, and removed."""
    at = ("--data-dir", data_dir)
    key_file = data_dir.parent / "engine.key"
    key_file.touch(mode=0o600)
    key_file.write_text("secret\n")
    missing = failure("node", "add", "http://127.0.0.1:9", "--key-file", "/no/such/file", *at)
    assert "/no/such/file" in missing
    relative = os.path.relpath(key_file)
    added = told(
        "node", "add", "http://127.0.0.1:9", "--name", "gpu-1", "--model", "m", "--slots", "3",
        "--jurisdiction", "de", "--key-file", relative, *at,
    )  # fmt: skip
    assert (added["id"], added["slots"], added["jurisdiction"]) == ("gpu-1", 3, "DE")
    assert added["error"]
    assert Path(added["key_file"]).is_absolute()
    assert Path(added["key_file"]).samefile(key_file)
    assert added["member"] is None
    stranger = failure("node", "add", "http://127.0.0.1:8", "--member", "lab", *at)
    assert "anser member add lab" in stranger
    told("member", "add", "lab", *at)
    lent = told("node", "add", "http://127.0.0.1:8", "--member", "lab", *at)
    assert lent["member"] == "lab"
    assert "lab" in anser("node", "list", *at).stdout
    told("node", "remove", lent["id"], *at)
    assert told("node", "drain", "gpu-1", *at)["state"] in ("draining", "down")
    assert [row["id"] for row in told("node", "list", *at)["nodes"]] == ["gpu-1"]
    shown = anser("node", "list", *at).stdout
    assert "gpu-1" in shown
    told("node", "remove", "gpu-1", *at)
    assert told("node", "list", *at)["nodes"] == []


def test_commands_wait_for_each_other(data_dir: Path) -> None:
    """Commands at the same time on one data folder all succeed: one waits for the other."""
    at = ("--data-dir", data_dir)
    with ThreadPoolExecutor(3) as threads:
        names = [f"org{number}" for number in range(3)]
        ended = list(threads.map(lambda name: anser("member", "add", name, *at), names))
    assert [one.returncode for one in ended] == [0, 0, 0], ended
    listed = {row["id"] for row in told("member", "list", *at)["members"]}
    assert set(names) <= listed


def test_looking_without_a_platform(data_dir: Path) -> None:
    """models and usage answer without a platform too: nothing is there yet; the others say so."""
    at = ("--data-dir", data_dir)
    assert told("models", *at)["data"] == []
    assert told("usage", *at)["usage"] == []
    assert "anser serve" in anser("models", *at).stdout
    for words in (["top"], ["why", "req_1f"], ["usage", "--fairness"]):
        ended = anser(*words, *at)
        assert ended.returncode == 1
        assert "No platform runs on this data folder" in ended.stderr


# ---------------------------------------------------------------------------------- settings


def test_config_tells_each_value_and_its_source(tmp_path: Path) -> None:
    """`anser config` shows where each value comes from."""
    file = tmp_path / "mine.toml"
    file.write_text("[server]\nport = 1234\n")
    environment = {"ANSER_ENGINE_SLOTS": "7"}
    found = told("config", "--config", file, "--data-dir", tmp_path / "d", environment=environment)
    rows = {row["path"]: row for row in found["settings"]}
    assert found["file"] == str(file)
    assert (rows["server.port"]["value"], rows["server.port"]["source"]) == (1234, str(file))
    assert (rows["engine.slots"]["value"], rows["engine.slots"]["source"]) == (
        7,
        "ANSER_ENGINE_SLOTS",
    )
    assert (rows["data_dir"]["value"], rows["data_dir"]["source"]) == (
        str(tmp_path / "d"),
        "command line",
    )
    assert rows["server.host"]["source"] == "default"
    shown = anser("config", "--config", file).stdout
    assert f"Settings file: {file}" in shown
    assert not (tmp_path / "d").exists()


def test_config_asks_the_platform_that_runs(data_dir: Path) -> None:
    """Where a platform runs, its settings are told with their sources, not those of this shell."""
    with serving(data_dir, "--no-engine", environment={"ANSER_ENGINE_SLOTS": "7"}):
        found = told("config", "--data-dir", data_dir)
    rows = {row["path"]: (row["value"], row["source"]) for row in found["settings"]}
    assert rows["server.port"] == (0, "command line")
    assert rows["engine.enabled"] == (False, "command line")
    assert rows["engine.slots"] == (7, "ANSER_ENGINE_SLOTS")
    assert rows["server.host"] == ("127.0.0.1", "default")


def test_the_language_is_the_users(data_dir: Path) -> None:
    """Texts come in Chinese where that is asked for; names and codes stay."""
    ended = anser(
        "member", "add", "physics", "--data-dir", data_dir, environment={"ANSER_LANG": "zh"}
    )
    assert ended.stdout == "已添加成员 physics。\n"
    plain = {"ANSER_LANG": "zh", "PYTHONIOENCODING": "ascii"}
    ended = anser("key", "revoke", "key_0", "--data-dir", data_dir, environment=plain)
    assert ended.returncode == 1
    assert "key_0" in ended.stderr, "a terminal that lacks the letters still gets the message"


def test_a_reader_that_has_seen_enough_is_no_failure_with_a_traceback(data_dir: Path) -> None:
    """`anser ... | head -0` ends quietly."""
    command = f"{sys.executable} -m anser config --data-dir {data_dir} | true"
    ended = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert ended.stderr == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(data_dir: Path, closed: str) -> None:
    """A service manager may start a command without standard input, output or error."""
    command = f"{sys.executable} -m anser models --data-dir {data_dir} {closed}"
    ended = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# ---------------------------------------------------------------------------------- doctor


def test_doctor_finds_a_healthy_machine(data_dir: Path, free_port: int) -> None:
    """Each check has a verdict; a machine that can run a platform is healthy."""
    environment = {"ANSER_ENGINE_ENABLED": "off", "ANSER_SERVER_PORT": str(free_port)}
    found = told("doctor", "--data-dir", data_dir, environment=environment)
    assert found["healthy"] is True
    checks = {check["name"]: check for check in found["checks"]}
    assert {"python", "settings", "data folder", "disk", "memory", "port"} <= set(checks)
    assert {check["verdict"] for check in found["checks"]} <= {"ok", "warn"}


def test_doctor_names_the_way_out(data_dir: Path) -> None:
    """What would keep a platform from starting fails, with what to do about it."""
    (data_dir / "anser.toml").write_text("[server]\nprot = 1\n")
    ended = anser("doctor", "--data-dir", data_dir)
    assert ended.returncode == 1
    assert "Did you mean server.port?" in ended.stdout
    (data_dir / "anser.toml").write_text("[engine]\nenabled = false\n")
    told("member", "list", "--data-dir", data_dir)
    (data_dir / "pepper").chmod(0o644)
    ended = anser("doctor", "--data-dir", data_dir, "--json")
    assert ended.returncode == 1
    checks = {check["name"]: check for check in json.loads(ended.stdout)["checks"]}
    assert checks["pepper"]["verdict"] == "fail"
    assert checks["pepper"]["way"] == f"chmod 600 {data_dir / 'pepper'}"


def test_doctor_sees_a_taken_port_and_a_running_platform(data_dir: Path, tmp_path: Path) -> None:
    """The port of another program is a failure; that of the platform itself is not."""
    with serving(data_dir, "--no-engine") as server:
        environment = {"ANSER_ENGINE_ENABLED": "off", "ANSER_SERVER_PORT": str(server.port)}
        own = told("doctor", "--data-dir", data_dir, environment=environment)
        assert own["healthy"] is True
        other = anser("doctor", "--data-dir", tmp_path / "x", "--json", environment=environment)
    checks = {check["name"]: check for check in json.loads(other.stdout)["checks"]}
    assert other.returncode == 1
    assert checks["port"]["verdict"] == "fail"
    assert "--port" in checks["port"]["way"]
    assert not (tmp_path / "x").exists(), "a check leaves nothing behind"


# ---------------------------------------------------------------------------------- receipts


def test_what_is_no_receipt_is_refused(tmp_path: Path) -> None:
    """A file that is missing, no JSON, or no receipt fails with the first thing that is wrong."""
    file = tmp_path / "receipt.json"
    assert str(file) in failure("receipt", "verify", file)
    file.write_bytes(b"\xff\x00")
    assert "JSON" in failure("receipt", "verify", file)
    file.write_text("{}")
    assert "batch is missing" in failure("receipt", "verify", file)
    assert "64" in failure("receipt", "verify", file, "--public-key", "12")
    assert "longer" in failure("receipt", "verify", "/dev/zero")
