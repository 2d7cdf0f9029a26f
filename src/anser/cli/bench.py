"""`anser bench`: measures the scheduler, with what is in `bench/` of a checkout.

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


_NO_FOLDERS = Folders()


def bench(
    name: Literal["fairness", "scheduler"],
    /,
    *,
    experiment: str | None = None,
    folders: Annotated[Folders, Parameter(name="*")] = _NO_FOLDERS,
    seeds: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=100))] = 3,
    quick: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    at: Shaped = PLAIN,
) -> None:
    """Measure the scheduler: how fair it is, or what a decision costs. From a checkout only.

    Example: `anser bench fairness --experiment E5`

    Parameters
    ----------
    experiment
        Only this one of the experiments of `fairness`, like E5.
    seeds
        Runs of each kind, each with chances of its own.
    quick
        Small sizes, to see that it works; the figures mean little.
    """
    _load()
    module = cast("_Bench", import_module(f"bench.{name}"))
    if experiment is not None and experiment not in module.EXPERIMENTS:
        known = ", ".join(module.EXPERIMENTS) or "-"
        raise AnserError(tr("bench.unknown", name=name, known=known))
    make = cast("Callable[..., Any]", import_module("bench.rows").Options)
    more = {} if folders.curves is None else {"draw": _drawer(folders.curves)}
    options = make(seeds=seeds, quick=quick, traces=folders.traces, tell=_tell, **more)
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
