"""What all commands share: their common options, and how a duration is written."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, cast
from urllib.parse import quote

from cyclopts import Group, Parameter, Token

from anser.core.errors import AnserError

if TYPE_CHECKING:
    from anser.config import Loaded

__all__ = [
    "ANYWHERE",
    "AT_HOME",
    "OPTIONS",
    "PLAIN",
    "STANDARD_INPUT",
    "Anywhere",
    "AtHome",
    "Duration",
    "Home",
    "Place",
    "Shape",
    "Shaped",
    "duration_s",
    "moment",
    "quoted",
    "run",
    "unwrapped",
]

STANDARD_INPUT = "/dev/stdin"
"""What a dash on the command line stands for."""
_Result = TypeVar("_Result")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])\Z")
_GROUP = Group("Common options", sort_key=100)
OPTIONS = Group("Options", sort_key=50)
"""The heading over a command's own options."""


def _read_folder(_: type, tokens: Sequence[Token]) -> Path:
    if not tokens[0].value:  # or it would be the working folder
        raise ValueError("name a folder")
    return Path(tokens[0].value)


_Folder = Annotated[Path, Parameter(converter=_read_folder, n_tokens=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Options of every command: how to print."""

    json: Annotated[bool, Parameter(negative="", show_default=False)] = False
    """Print one JSON document for programs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Home(Shape):
    """Options of a command on this machine: where the platform's data are."""

    data_dir: _Folder | None = None
    """Data folder of the platform; ~/.local/share/anser if not given. [env var: ANSER_DATA_DIR]"""
    config: Path | None = None
    """Settings file. [env var: ANSER_CONFIG]"""

    def load(self, overrides: Mapping[str, object] | None = None) -> Loaded:
        """The settings of this machine. Raises ConfigError."""
        from anser.config import load

        given = dict(overrides or {})
        if self.data_dir is not None:
            given["data_dir"] = self.data_dir
        return load(file=self.config, environ=os.environ, overrides=given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place(Home):
    """Options of a command that talks to a platform, here or elsewhere."""

    url: Annotated[str | None, Parameter(env_var="ANSER_URL")] = None
    """Address of a platform elsewhere; without it, the one on this machine."""
    key: Annotated[str | None, Parameter(env_var="ANSER_API_KEY")] = None
    """Key for that platform; better given by the variable than typed."""


AtHome = Annotated[Home, Parameter(name="*", group=_GROUP)]
Anywhere = Annotated[Place, Parameter(name="*", group=_GROUP)]
Shaped = Annotated[Shape, Parameter(name="*", group=_GROUP)]
AT_HOME = Home()
ANYWHERE = Place()
PLAIN = Shape()


def duration_s(text: str) -> float:
    """Seconds of a duration like 90s, 15m, 12h, 30d or 2w; ValueError if it is none.

    >>> duration_s("2h")
    7200.0
    """
    match = _DURATION.match(text.strip().lower())
    if match is None or not int(match[1]):
        raise ValueError("write a duration like 90s, 15m, 12h, 30d or 2w")
    return int(match[1]) * _UNITS_S[match[2]]


def _read_duration(_: type, tokens: Sequence[Token]) -> float:
    return duration_s(tokens[0].value)


Duration = Annotated[float, Parameter(converter=_read_duration, n_tokens=1, metavar="DURATION")]


def moment(unix_s: float | None) -> str | None:
    """A date and time of this machine's zone, to the minute."""
    if unix_s is None:
        return None
    return datetime.fromtimestamp(unix_s, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def quoted(part: str) -> str:
    """One part of a path, whatever is in it."""
    return quote(part, safe="")


def run(
    work: Coroutine[None, None, _Result],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> _Result:
    """Run a command's work to its end; of a group of failures, the first expected one is raised."""
    with unwrapped(), asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(work)


@contextmanager
def unwrapped() -> Generator[None]:
    """Of a group of failures raised inside, raise the first expected one instead."""
    try:
        yield
    except BaseExceptionGroup as group:
        expected = _expected(group)
        if expected is None:
            raise
        raise expected from group


def _expected(error: BaseException) -> AnserError | None:
    if isinstance(error, AnserError):
        return error
    inner = cast("BaseExceptionGroup[BaseException]", error)
    below = inner.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return next((found for each in below if (found := _expected(each))), None)
