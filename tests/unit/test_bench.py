"""The measurements: each runs, says what it should, and its pool neither loses nor invents."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from anser.cli.app import main
from anser.core.errors import AnserError
from bench import fairness, scheduler
from bench.curves import Curves, drawer
from bench.engine_model import FLEET, Answer, Engine
from bench.policies import POLICIES, Fcfs
from bench.real import FirstCome
from bench.rows import Options, Row
from bench.trace import jain, percentile
from bench.workloads import Rate, Source, Text, chats, leaving, openly
from bench.world import Fault, run

_EXACT = ("difference / bound", "lost requests", "charged less delivered")  # whatever the size


def shows_lines(path: Path) -> bool:
    """Whether it is a picture with lines in colour in it."""
    picture = imread(path)
    assert picture.shape[0] > 400
    assert picture.shape[1] > 600
    colours = picture[..., :3]
    coloured = colours.max(axis=2) - colours.min(axis=2) > 0.3
    return bool(coloured.mean() > 0.001)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A folder with a little recorded traffic."""
    rows = [f"{n / 4},{n % 3},{20 + n},{10 + n}" for n in range(30)]
    head = "req_time_s,client,prompt_tokens,output_tokens"
    (tmp_path / "vtc_arena_real.csv").write_text("\n".join((head, *rows)))
    lines = [
        {"timestamp": 500 * n, "input_length": 2_048, "output_length": 80, "hash_ids": names}
        for n, names in enumerate(([0, 1, 2, 3], [0, 1, 2, 4], [0, 5, 6, 7], [0, 1, 2, 3]))
    ]
    text = "\n".join(map(json.dumps, lines))
    for kind in ("conversation", "synthetic"):
        (tmp_path / f"mooncake_{kind}_sample.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", [n for n in fairness.EXPERIMENTS if n not in fairness.REAL])
def test_an_experiment_runs(name: str, traces: Path, tmp_path: Path) -> None:
    """Each gives named figures, and those that do not depend on its size meet their targets; those
    with curves draw them."""
    options = Options(quick=True, traces=traces, draw=drawer(tmp_path / "curves"))
    rows = fairness.measure(options, name)
    assert rows
    pictures = list((tmp_path / "curves").iterdir())
    assert bool(pictures) == (name in {"E1", "E2", "E3", "E5", "E6"})
    assert all(one.name.startswith(f"{name}-") and shows_lines(one) for one in pictures)
    assert all(row.name.startswith(f"{name} ") and row.unit for row in rows)
    assert len({row.name for row in rows}) == len(rows)
    assert all((row.holds is None) == (not row.target) for row in rows)
    assert [row for row in rows if row.name.endswith(_EXACT) and not row.holds] == []


def test_without_traffic_its_replay_is_left_out_and_said() -> None:
    """What replays recorded traffic is not run without a folder, and says what is missing."""
    told: list[str] = []
    assert fairness.measure(Options(quick=True, tell=told.append), "E7") == []
    assert [line for line in told if "--traces" in line]


def test_without_a_model_what_needs_one_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was measured until then is not lost, unless it is just this that was asked for."""
    monkeypatch.setenv("ANSER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ANSER_ENGINE_MODEL", str(tmp_path / "none.gguf"))
    all_of_them = {"E11": fairness.EXPERIMENTS["E11"], "real": fairness.EXPERIMENTS["real"]}
    monkeypatch.setattr(fairness, "EXPERIMENTS", all_of_them)
    told: list[str] = []
    options = Options(quick=True, tell=told.append)
    assert fairness.measure(options)
    assert told[-1].startswith("real is left out: ")
    with pytest.raises(AnserError, match=r"none\.gguf"):
        fairness.measure(options, "real")


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_loses_nothing(name: str) -> None:
    """Under every policy each request ends once, whole or as its client or a dead node left it."""
    draw = random.Random(name)
    sources = [leaving(one, draw, 0.2) for one in chats(1, 8)]
    rate = Rate(per_s=1, prompt=500, output=80, ends=25)
    sources.append(openly("flood", random.Random(2), rate))
    faults = (Fault(at=10, node="a", speed=0.0), Fault(at=15, node="a", speed=1.0))
    policy = POLICIES[name]()
    trace = run(policy, sources, 120, faults=faults)
    flood = [record for record in trace.records if record.ask.member == "flood"]
    assert flood
    assert all(record.outcome for record in flood)
    for record in trace.records:
        tokens = record.ask.output_tokens
        assert record.output == tokens or record.outcome != "finished"
        assert record.output <= tokens
        assert 0 <= record.cached < record.ask.prompt_tokens
    assert sum(trace.served.values()) == pytest.approx(sum(r.cost for r in trace.records))


def test_a_seed_is_a_run() -> None:
    """The same seed gives the same run, to the moment of each first token."""
    runs = [run(POLICIES["anser"](), chats(7, 6), 40) for _ in range(2)]
    first, second = ([(r.at, r.node, r.first_at, r.cached) for r in one.records] for one in runs)
    assert len(first) > 10
    assert first == second


def test_an_engine_remembers_what_fits() -> None:
    """A prompt asked again is cached but for its last token; what came last is kept longest."""
    engine, text = Engine(FLEET[3]), Text()
    prompt = text.grow(640)

    def ask(lease: str, blocks: tuple[bytes, ...]) -> int:
        tokens = 64 * len(blocks)
        answer = Answer(
            lease=lease, prompt=blocks, prompt_tokens=tokens, output_tokens=1, after=blocks
        )
        engine.admit(answer)
        while engine.running:
            assert engine.begin() > 0
            engine.end()
        return answer.cached

    assert [ask("1", prompt), ask("2", prompt)] == [0, 639]
    assert ask("3", Text().grow(FLEET[3].cache_tokens)) == 0
    assert ask("4", prompt) == 0


def test_figures() -> None:
    """Jain's index is 1 for equals and 1/n for one who has all; a percentile is a value."""
    assert jain([2.0, 2.0]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_what_a_decision_costs_is_measured() -> None:
    """The figures of the scheduler are positive; nothing is asserted about this machine's speed."""
    rows = scheduler.measure(Options(quick=True))
    assert all(isinstance(row, Row) and row.value >= 0 for row in rows)
    assert [row.name for row in rows if row.target] == [
        "queued decision",
        "free slot",
        "memory of an idle member",
    ]


def test_the_command_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` gives a list of objects, else a table; an experiment that there is not is named."""
    assert main(["bench", "fairness", "--experiment", "E1", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {tuple(row) for row in rows} == {("name", "value", "unit", "target", "holds")}
    assert main(["bench", "fairness", "--experiment", "E1", "--quick"]) == 0
    assert "E1 difference" in capsys.readouterr().out
    assert main(["bench", "fairness", "--experiment", "E99"]) == 1
    assert "E11" in capsys.readouterr().err


def test_a_picture_is_named_for_what_it_shows(tmp_path: Path) -> None:
    """Whatever is in the name, there is one file of that name, in a folder that is made."""
    lines = {"one": [(0.0, 1.0), (1.0, 2.0)]}
    draw = drawer(tmp_path / "a" / "b")
    draw(Curves(name="E0 a/../b, c", x="s", y="1", lines=lines, limits={"bound": 3.0}))
    draw(Curves(name="E0 empty", x="s", y="1", lines={"none": []}, log_x=True))
    found = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert found == ["E0-a-b-c.png", "E0-empty.png"]
    assert shows_lines(tmp_path / "a" / "b" / found[0])


@pytest.mark.parametrize("folder", ["new", "file", "file/below"])
def test_what_curves_need_is_said_before_anything_is_measured(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without matplotlib, or without a folder, the command says so and the way out, at once."""
    (tmp_path / "file").touch()
    if folder == "new":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "fairness", "--curves", str(tmp_path / folder)]) == 1
    told = capsys.readouterr()
    assert ("pip install matplotlib" if folder == "new" else "folder for curves") in told.err
    assert told.out == ""
    assert "E1" not in told.err


def test_first_come_first_served_is_just_that() -> None:
    """The baseline of the experiment on real engines serves in the order of the readable one."""

    class Paying(FirstCome):
        def paid(self) -> dict[str, int]:
            return {}

    def sources() -> list[Source]:
        rate = Rate(per_s=3, prompt=300, output=200)
        return [*chats(3, 6), openly("flood", random.Random(4), rate)]

    runs = [
        run(policy, sources(), 90, fleet=FLEET[3:]) for policy in (Fcfs(), Paying(1_000_000, 3))
    ]
    first, second = ([(r.at, r.first_at, r.ended_at) for r in one.records] for one in runs)
    assert len({record.ask.member for record in runs[0].records if record.first_at}) > 3
    assert first == second


def test_the_command_wants_a_checkout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the measurements are not beside the package, the command says where they are."""
    module = importlib.import_module("anser.cli.bench")
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    monkeypatch.delitem(sys.modules, "bench")
    assert main(["bench", "scheduler"]) == 1
    assert "checkout" in capsys.readouterr().err


def test_the_command_finds_its_measurements_by_their_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are loaded from beside the package, whatever the working folder is."""
    for name in [one for one in sys.modules if one.partition(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["bench", "fairness", "--experiment", "E4", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
