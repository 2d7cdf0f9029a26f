"""`anser bench`: measures the scheduler and the wire, with what is in `bench/` of a checkout.

Measurements are no part of the package: they are loaded by their path beside `src/`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

from cyclopts import Parameter, validators

from anser.cli.common import PLAIN, Shaped
from anser.cli.messages import tr
from anser.cli.output import print_json, print_table
from anser.core.errors import AnserError

__all__ = ["bench"]

_FOLDER = Path(__file__).resolve().parents[3] / "bench"


class _Row(Protocol):
    """A figure of `bench.rows`."""

    name: str
    value: float
    unit: str
    target: str
    holds: bool | None


class _Bench(Protocol):
    """What a module of `bench/` that measures has."""

    EXPERIMENTS: Mapping[str, object]

    def measure(self, options: object, experiment: str | None) -> Sequence[_Row]:
        """The figures."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """What a measurement reads and draws."""

    traces: Path | None = None
    """Folder with recorded traffic; without it, what replays some is left out."""
    curves: Path | None = None
    """Folder for pictures of what has curves; matplotlib draws them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """What `wire` compares Anser to."""

    anser_only: Annotated[bool, Parameter(negative="", show_default=False)] = False
    """Compare `wire` to nothing; short enough for a laptop."""
    vllm_router: Path | None = None
    """Program of that name, or the Python environment that has it; else looked for on PATH."""
    sglang_router: Path | None = None
    """The same."""
    litellm: Path | None = None
    """The same."""

    @property
    def programs(self) -> dict[str, Path | None]:
        """Where each is said to be."""
        named = ("vllm_router", "sglang_router", "litellm")
        return {name.replace("_", "-"): getattr(self, name) for name in named}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    seeds: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=100))] = 3
    """Runs of each kind, each with chances of its own."""
    quick: Annotated[bool, Parameter(negative="", show_default=False)] = False
    """Small sizes, to see that it works; the figures mean little."""


_NO_FOLDERS, _ALL_PEERS, _USUAL = Folders(), Peers(), Size()


def bench(
    name: Literal["fairness", "scheduler", "wire"],
    /,
    *,
    experiment: str | None = None,
    folders: Annotated[Folders, Parameter(name="*")] = _NO_FOLDERS,
    peers: Annotated[Peers, Parameter(name="*")] = _ALL_PEERS,
    size: Annotated[Size, Parameter(name="*")] = _USUAL,
    at: Shaped = PLAIN,
) -> None:
    """Measure how fair the scheduler is, what a decision costs, or the wire. From a checkout only.

    Example: `anser bench fairness --experiment E5`

    Parameters
    ----------
    experiment
        Only this one of the experiments of `fairness`, like E5, or of `wire`, like requests.
    """
    _load()
    module = cast("_Bench", import_module(f"bench.{name}"))
    if experiment is not None and experiment not in module.EXPERIMENTS:
        known = ", ".join(module.EXPERIMENTS) or "-"
        raise AnserError(tr("bench.unknown", name=name, known=known))
    make = cast("Callable[..., Any]", import_module("bench.rows").Options)
    more = {} if folders.curves is None else {"draw": _drawer(folders.curves)}
    options = make(
        seeds=size.seeds,
        quick=size.quick,
        traces=folders.traces,
        tell=_tell,
        anser_only=peers.anser_only,
        programs=peers.programs,
        **more,
    )
    rows = module.measure(options, experiment)
    if at.json:
        print_json([_json(row) for row in rows])
    else:
        _print(rows)


def _load() -> None:
    """Make `bench` a package that can be imported, wherever this was started."""
    if "bench" in sys.modules:
        return
    place = _FOLDER / "__init__.py"
    if not place.is_file():
        raise AnserError(tr("bench.checkout"))
    spec = spec_from_file_location("bench", place, submodule_search_locations=[str(_FOLDER)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["bench"] = module_from_spec(spec)
    spec.loader.exec_module(module)


def _drawer(folder: Path) -> object:
    """What draws into `folder`; said before anything is measured if it cannot."""
    try:
        return import_module("bench.curves").drawer(folder)
    except ImportError as error:
        raise AnserError(tr("bench.matplotlib", python=sys.executable)) from error
    except OSError as error:
        raise AnserError(tr("bench.folder", folder=folder, reason=error.strerror)) from error


def _tell(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def _json(row: _Row) -> dict[str, object]:
    return {
        "name": row.name,
        "value": row.value if row.value == row.value else None,  # not a number: nothing came of it
        "unit": row.unit,
        "target": row.target or None,
        "holds": row.holds,
    }


def _print(rows: Sequence[_Row]) -> None:
    said = {None: "", True: tr("bench.holds"), False: tr("bench.missed")}
    print_table(
        [tr("bench.name"), tr("bench.value"), tr("bench.unit"), tr("bench.target"), ""],
        [(row.name, f"{row.value:,g}", row.unit, row.target, said[row.holds]) for row in rows],
    )
