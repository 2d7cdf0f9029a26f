"""The README's command for starting, tried as a newcomer would: in a fresh clone, as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "start",
    "tools/python",
    "requirements/run.txt",
    "requirements/build.txt",
    "pyproject.toml",
)

INSTALL_S = 600.0  # fetching the packages and the first model, over a slow line
ANSWER_S = 120.0
STOP_S = 60.0
OVERHEAD_S = 0.1


def readme_command(section: str) -> str:
    """The first sh block below the README's heading `section`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", readme, flags=re.MULTILINE | re.DOTALL)
    block = part and re.search(r"^```sh\n(.*?)^```$", part[1], flags=re.MULTILINE | re.DOTALL)
    assert block, f"README.md has no sh block under {section}"
    return block[1].strip()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A newcomer's environment: none of the tests' own, and no data from earlier."""
    own = str(Path(sys.prefix) / "bin")
    foreign = ("ANSER_", "COVERAGE_", "PYTHON", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    path = env.get("PATH", os.defpath).split(os.pathsep)
    env["PATH"] = os.pathsep.join(folder for folder in path if folder != own)
    env["XDG_DATA_HOME"] = str(tmp_path / "data")
    env["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    return env


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer gets: the last commit, and nothing that is only in the work tree."""
    folder = tmp_path_factory.mktemp("fresh") / "anser"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture
def uninstalled(tmp_path: Path) -> Path:
    """Only what ./start reads, so that a test may break it."""
    folder = tmp_path / "copy"
    for name in NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


class Started:
    """A command that runs in the background, with its output in files."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self.out = out
        self.err = err

    def line(self, pattern: str, *, within_s: float) -> str:
        """The first line on standard output that matches, as soon as it is there."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.out.read_text("utf-8"), flags=re.MULTILINE)
            if found:
                return found[0].strip()
            if ended:
                break
            time.sleep(0.1)
        pytest.fail(f"no line {pattern!r}; {self.told()}")

    def stop(self) -> int:
        """Press Ctrl-C and return the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running {STOP_S} s after Ctrl-C; {self.told()}")

    def told(self) -> str:
        """All that it said."""
        return f"status {self.process.poll()}\n{self.out.read_text()}\n{self.err.read_text()}"


@contextmanager
def started(command: str, folder: Path, env: dict[str, str]) -> Iterator[Started]:
    """Run a shell command in `folder` as from a terminal of its own; nothing outlives the test."""
    out, err = folder.parent / "out", folder.parent / "err"
    with out.open("wb") as to_out, err.open("wb") as to_err:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=to_out,
            stderr=to_err,
            start_new_session=True,
        )
    try:
        yield Started(process, out, err)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_S)


def start(folder: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run ./start to its end."""
    return subprocess.run(
        ["./start", *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


# ------------------------------------------------------------------------------ in a fresh clone


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(INSTALL_S + ANSWER_S + STOP_S)
def test_the_readme_leads_to_an_answer(clone: Path, environment: dict[str, str]) -> None:
    """The README's one command prints a curl line; that line gets an answer; Ctrl-C ends well."""
    with started(readme_command("Start"), clone, environment) as platform:
        line = platform.line(r"^\s*curl .+$", within_s=INSTALL_S)
        asked = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
        assert asked.returncode == 0, f"{line}\n{asked.stderr}\n{platform.told()}"
        answer = json.loads(asked.stdout)
        assert answer["choices"][0]["message"]["content"].strip(), answer
        assert answer["usage"]["completion_tokens"] > 0, answer
        assert platform.stop() == 0, platform.told()


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_S)
def test_later_starts_add_little(clone: Path, environment: dict[str, str]) -> None:
    """Once installed, ./start adds less than 100 ms to what it starts, and says nothing."""
    first = start(clone, environment, "--help")
    assert first.returncode == 0, first.stderr
    command = clone / ".venv" / "bin" / "anser"
    installed = command.read_text()
    command.write_text("#!/bin/sh\n")  # what it starts takes no time now
    took_s = []
    for _ in range(20):
        begun = time.perf_counter()
        again = start(clone, environment)
        took_s.append(time.perf_counter() - begun)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    command.write_text(installed)
    assert min(took_s) < OVERHEAD_S


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_S)
@pytest.mark.parametrize("changed", ["requirements/run.txt", "pyproject.toml", "its place"])
def test_what_was_installed_is_checked(
    clone: Path, environment: dict[str, str], changed: str
) -> None:
    """A changed lock, changed metadata or a moved folder means installing anew."""
    assert start(clone, environment, "--help").returncode == 0
    environment["PYTHON"] = "no-such-python"  # so that it shows the wish and ends there
    moved = clone.with_name("moved")
    if changed == "its place":
        clone.rename(moved)
        found = start(moved, environment, "--help")
        moved.rename(clone)
    else:
        before = (clone / changed).read_text()
        (clone / changed).write_text(before + "# changed\n")
        found = start(clone, environment, "--help")
        (clone / changed).write_text(before)
    assert found.returncode == 1
    assert "needs Python 3.11" in found.stderr
    assert start(clone, environment, "--help").returncode == 0


# ------------------------------------------------------------------------------ what goes wrong


def test_an_old_python_is_named(uninstalled: Path, environment: dict[str, str]) -> None:
    """With no Python that will do, the start says which it found and where to get one."""
    old = uninstalled / "python3.6"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.6.1 && exit\nexit 1\n')
    old.chmod(0o755)
    found = start(uninstalled, {**environment, "PYTHON": str(old)})
    assert found.returncode == 1
    assert "needs Python 3.11 or newer" in found.stderr
    assert f"Python 3.6.1 ({old})" in found.stderr
    assert "apt-get install python3" in found.stderr
    assert not (uninstalled / ".venv").exists()


def test_no_network_is_explained(uninstalled: Path, environment: dict[str, str]) -> None:
    """When pip cannot get the packages, the start says what to do; the next one tries anew."""
    alone = {**environment, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    alone["PIP_FIND_LINKS"] = str(uninstalled)
    for _ in range(2):
        found = start(uninstalled, alone)
        assert found.returncode == 1
        assert "could not be installed" in found.stderr
        assert "mirror" in found.stderr
        assert not (uninstalled / ".venv.lock").exists()


def test_two_starts_do_not_install_at_once(uninstalled: Path, environment: dict[str, str]) -> None:
    """While one start installs, another in the same folder says so and leaves it alone."""
    (uninstalled / ".venv.lock").mkdir()
    found = start(uninstalled, environment)
    assert found.returncode == 1
    assert "Another ./start is installing" in found.stderr
    assert (uninstalled / ".venv.lock").is_dir()
    assert not (uninstalled / ".venv").exists()


def test_a_start_that_was_killed_is_no_hindrance(
    uninstalled: Path, environment: dict[str, str]
) -> None:
    """Its lock is taken over once its process is gone, and not before."""
    alone = {**environment, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    alone["PIP_FIND_LINKS"] = str(uninstalled)
    lock = uninstalled / ".venv.lock"
    with subprocess.Popen(["sleep", "60"]) as other:
        lock.mkdir()
        (lock / "pid").write_text(f"{other.pid}\n")
        assert "Another ./start is installing" in start(uninstalled, alone).stderr
        other.kill()
    assert "could not be installed" in start(uninstalled, alone).stderr
    assert not lock.exists()


def test_what_differs_from_the_lock_is_refused(
    uninstalled: Path, environment: dict[str, str]
) -> None:
    """A package whose bytes are not those that were locked is not installed."""
    lock = uninstalled / "requirements" / "build.txt"
    lock.write_text(re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", lock.read_text()))
    found = start(uninstalled, environment)
    assert found.returncode == 1
    assert "DO NOT MATCH THE HASHES" in found.stderr
    assert not (uninstalled / ".venv" / "bin" / "anser").exists()
