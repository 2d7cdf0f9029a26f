"""The harness of the wire, as far as it needs no compiler: what it reads, and in which order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anser.cli.app import main
from bench.wire.figures import alternate
from bench.wire.gateways import PEERS, Place, program
from bench.wire.kernel import cpu_s, family, memory_mb, parse_stat, pinned
from bench.wire.profile import by_module
from bench.wire.programs import Ask, WireError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the harness reads Linux's /proc")

_BURN = """
import subprocess, sys, time
if len(sys.argv) > 1:
    child = subprocess.Popen([sys.executable, sys.argv[0]], stdout=subprocess.PIPE, text=True)
while time.process_time() < 0.3:
    pass
used = time.process_time() + (float(child.stdout.readline()) if len(sys.argv) > 1 else 0)
print(used, flush=True)
time.sleep(60)
"""


def test_the_times_of_a_process_are_read_whatever_its_name() -> None:
    """A name may hold brackets and spaces; time of children that were waited for counts."""
    line = "42 (a) R (b c) S 7 42 42 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 1 0 5"
    stat = parse_stat(line)
    assert (stat.pid, stat.parent, stat.ticks) == (42, 7, 110)


def test_cpu_time_is_that_of_all_processes_below(tmp_path: Path) -> None:
    """What the kernel tells of a process and its child is what both say of themselves."""
    script = tmp_path / "burn.py"
    script.write_text(_BURN)
    command = [sys.executable, str(script), "and a child"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = float(process.stdout.readline())
            assert len(family(process.pid)) == 2
            assert said - 0.05 < cpu_s(process.pid) < said + 0.1
            assert memory_mb(process.pid) > 2
        finally:
            for one in reversed(family(process.pid)):
                os.kill(one.pid, signal.SIGTERM)


def test_a_process_that_is_gone_has_nothing() -> None:
    """No process, no time and no memory; nothing is raised while processes come and go."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert (family(process.pid), cpu_s(process.pid), memory_mb(process.pid)) == ([], 0, 0)


def test_who_is_started_inside_is_pinned_and_nobody_after() -> None:
    """A core is given to what is started, and the harness has its own back."""
    command = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    before = subprocess.check_output(command)
    core = int(before.split()[0])
    with pinned(core):
        assert subprocess.check_output(command).split() == [str(core).encode()]
    assert subprocess.check_output(command) == before


def test_rounds_alternate() -> None:
    """Each is asked once a round, and each round begins with another."""
    assert list(alternate(["a", "b", "c"], 2)) == ["a", "b", "c", "b", "c", "a"]
    assert list(alternate([], 2)) == []
    assert sorted(alternate(["a", "b"], 5)) == ["a"] * 5 + ["b"] * 5


def test_the_load_is_told_all_that_it_is_asked() -> None:
    """Every field is a word of the load's, as a whole number."""
    words = Ask(stream=True, every_us=7).words
    assert {"stream=1", "every_us=7", "connections=64", "rate=0"} < set(words)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_given_its_port_and_every_address(name: str, tmp_path: Path) -> None:
    """Whatever its configuration looks like, each address of the engine is in it."""
    place = Place(program=f"bin/{name}", folder=tmp_path, port=1234, engines=[2345, 3456])
    command = PEERS[name](place)
    said = " ".join([*command, *(path.read_text() for path in tmp_path.iterdir())])
    assert command[0] == f"bin/{name}"
    assert all(str(port) in said for port in (1234, 2345, 3456))


def test_a_program_is_found_or_said_to_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program, or the environment that has it, may be named; what is neither is refused."""
    (tmp_path / "bin").mkdir()
    place = tmp_path / "bin" / "vllm-router"
    place.touch(mode=0o700)
    assert program("vllm-router", tmp_path) == str(place)
    assert program("vllm-router", place) == str(place)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert program("vllm-router", None) == str(place)
    assert program("litellm", None) is None
    for wrong in (tmp_path / "none", tmp_path / "bin"):
        with pytest.raises(WireError, match="neither litellm"):
            program("litellm", wrong)


def test_a_profile_is_summed_by_module() -> None:
    """The innermost frame counts, for its module; of other packages, for the package."""
    stacks = """main (/x/src/anser/__main__.py:9);run (/x/src/anser/wire/server.py:12) 5
main (/x/src/anser/__main__.py:9);send (/v/lib/python3.11/site-packages/uvicorn/a/b.py:7) 3
run (/usr/lib/python3.11/asyncio/events.py:80) 2
wait (/usr/lib/python3.11/threading.py:1);<lambda> (/x/src/anser/wire/server.py:3) 1
"""
    want = {"anser.wire.server": 6, "uvicorn": 3, "asyncio": 2}
    assert by_module(stacks) == want


def test_without_a_compiler_the_way_out_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is measured, and one line says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["bench", "wire", "--anser-only"]) == 1
    told = capsys.readouterr()
    assert "C compiler" in told.err
    assert "gcc" in told.err
    assert told.out == ""
