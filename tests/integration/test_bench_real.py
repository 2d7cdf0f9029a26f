"""The experiment on real engines: small, but with all that is real in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import fairness
from bench.clients import Answer
from bench.curves import drawer
from bench.real import Run
from bench.rows import Options
from tests.server import give_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.timeout(300)
def test_the_experiment_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines, six members, three runs through the HTTP API: figures of each, a picture, and
    nobody is refused or cut off."""
    give_model(tmp_path / "home")
    monkeypatch.setenv("ANSER_DATA_DIR", str(tmp_path / "home"))
    options = Options(quick=True, draw=drawer(tmp_path / "curves"))
    rows = {row.name: row for row in fairness.measure(options, "real")}
    assert all(name.startswith("E5 real ") for name in rows)
    assert rows["E5 real errors"].holds
    for kind in ("alone", "flood", "flood FCFS"):
        assert rows[f"E5 real {kind}, tokens"].value > 0
    assert rows["E5 real alone, light requests"].value > 0
    reads = [rows[f"E5 real {node} reads, alone, node"].value for node in ("fast", "slow")]
    assert all(speed > 0 for speed in reads)
    assert [path.suffix for path in (tmp_path / "curves").iterdir()] == [".png"]


def answer(member: str, at: float, first_at: float | None = None, *, error: str = "") -> Answer:
    times = [] if first_at is None else [first_at, first_at + 1]
    return Answer(
        member=member,
        at=at,
        first_at=first_at,
        times=times,
        prompt_tokens=13,
        cached_tokens=3,
        output_tokens=4,
        error=error,
    )


def test_waits_are_of_those_who_chat_and_count_who_still_waits() -> None:
    """Who waits at the end has waited at least so long, or a policy that serves nobody would look
    best; whoever came just before the end says nothing, nor does who was served while warming up,
    but who came then and was served later does."""
    answers = [
        answer("light0", 5.0, 6.0),
        answer("light1", 7.0, 19.0),
        answer("light0", 12.0, 14.5),
        answer("light1", 20.0),
        answer("light2", 95.0),
        answer("light2", 50.0, error="503"),
        answer("flood", 15.0, 90.0),
    ]
    run = Run(answers=answers, since=10.0, until=100.0)
    assert run.waits == [12.0, 2.5, 80.0]
    assert run.errors == 1


def test_tokens_count_when_they_come() -> None:
    """What was fresh of a prompt counts with its first token, output as it came, each within the
    time measured."""
    one = answer("flood", 0.0, 10.0)
    assert one.tokens_in(0, 100) == 14
    assert one.tokens_in(10.5, 100) == 2
    assert one.tokens_in(0, 10.5) == 12
    assert answer("flood", 0.0).tokens_in(0, 100) == 0
