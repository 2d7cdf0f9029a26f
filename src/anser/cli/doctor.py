"""`anser doctor`: what could keep a platform from running here, and the way out of each."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from anser.cli.asking import ask
from anser.cli.common import AT_HOME, AtHome, Place, run
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, safe
from anser.core.errors import AnserError, ConfigError

if TYPE_CHECKING:
    from anser.config import Config, Loaded

__all__ = ["Check", "Verdict", "doctor", "examine", "memory_free", "packages", "python", "room"]

_ENOUGH = {"disk": 2 * 10**9, "memory": 10**9}  # bytes
_LEAST = {"disk": 2 * 10**8, "memory": 3 * 10**8}
_SOCKET_BYTES_MAX = 103
_RENEW_S = 14 * 86_400.0  # before a certificate's end
_SECRETS = ("pepper", "signing.key", "anser.db")
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Verdict(Enum):
    """What a check found."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at: what was found, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    way: str = ""


def doctor(*, at: AtHome = AT_HOME) -> int:
    """Check this machine: Python, packages, settings, data folder, memory, model, network, port.

    Ends with code 1 if anything would keep a platform from starting.

    Example: `anser doctor`
    """
    checks: list[Check] = []
    for check in examine(at):
        checks.append(check)
        if not at.json:
            _print(check)
    failed = any(check.verdict is Verdict.FAIL for check in checks)
    if at.json:
        rows = [
            {"name": c.name, "verdict": c.verdict.value, "found": c.found, "way": c.way}
            for c in checks
        ]
        print_json({"healthy": not failed, "checks": rows})
    return int(failed)


def examine(at: AtHome) -> Iterator[Check]:
    """All checks, in order; those that need the settings only if the settings can be read."""
    from importlib import metadata

    yield python(sys.version_info[:3])
    try:
        yield from packages(metadata.requires("anser") or ())
    except metadata.PackageNotFoundError:
        found, way = tr("doctor.source"), tr("doctor.package", package="anser")
        yield Check(name="anser", verdict=Verdict.WARN, found=found, way=way)
    try:
        loaded = at.load()
    except ConfigError as error:
        yield Check(name="settings", verdict=Verdict.FAIL, found=error.message)
        return
    found = str(loaded.file) if loaded.file else tr("doctor.defaults")
    yield Check(name="settings", verdict=Verdict.OK, found=found)
    yield from _certificate(loaded)
    yield from _here(at, loaded.config)


def python(version: tuple[int, ...]) -> Check:
    """Whether this Python is new enough."""
    found = f"{'.'.join(map(str, version))} ({sys.executable})"
    verdict = Verdict.OK if version >= (3, 11) else Verdict.FAIL
    return Check(name="python", verdict=verdict, found=found, way=tr("doctor.python"))


def packages(wanted: Iterable[str]) -> Iterator[Check]:
    """Whether what is required (as in a package's metadata) is installed."""
    from importlib import metadata

    for requirement in wanted:
        name, _, marker = requirement.partition(";")
        if "extra" in marker or "platform_system" in marker:
            continue
        distribution = re.split(r"[<>=!~\[ ]", name.strip(), maxsplit=1)[0]
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            way = tr("doctor.package", package=name.strip())
            yield Check(name=distribution, verdict=Verdict.FAIL, found="-", way=way)
        else:
            yield Check(name=distribution, verdict=Verdict.OK, found=version)


def memory_free() -> int | None:
    """Bytes of memory that this process may still take, by the machine and its container."""
    rooms: list[int] = []
    meminfo = _text(Path("/proc/meminfo"))
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    if available:
        rooms.append(int(available[1]) * 1_024)
    for most, used in _CGROUPS:
        limit, current = _text(Path(most)).strip(), _text(Path(used)).strip()
        if limit.isdecimal() and current.isdecimal():
            rooms.append(max(0, int(limit) - int(current)))
    return min(rooms, default=None)


def room(name: str, free: int | None) -> Check:
    """Whether so many bytes of "disk" or "memory" are enough."""
    if free is None:
        return Check(name=name, verdict=Verdict.WARN, found=tr("doctor.unknown"))
    found = tr("doctor.free", gigabytes=f"{free / 1e9:,.1f}")
    if free > _ENOUGH[name]:
        return Check(name=name, verdict=Verdict.OK, found=found)
    verdict = Verdict.FAIL if free < _LEAST[name] else Verdict.WARN
    return Check(name=name, verdict=verdict, found=found, way=tr(f"doctor.{name}_low"))


def _here(at: AtHome, config: Config) -> Iterator[Check]:
    from anser.cli.control import running

    yield _folder(config.data_dir)
    yield from _secrets(config.data_dir)
    alive = run(running(config))
    yield _socket(alive=alive)
    yield room("disk", shutil.disk_usage(_existing(config.data_dir)).free)
    yield room("memory", memory_free())
    yield from _model(at, config)
    if alive:
        yield Check(name="port", verdict=Verdict.OK, found=tr("doctor.running"))
    else:
        yield _port(config)


def _certificate(loaded: Loaded) -> Iterator[Check]:
    """Whether the certificate of the public listener, if it has one, can be shown to clients."""
    from anser.platform import identity_of

    try:
        found, trouble = identity_of(loaded, soon_s=_RENEW_S)
    except ConfigError as error:
        yield Check(name="certificate", verdict=Verdict.FAIL, found=error.message)
        return
    if found is not None:
        names = ", ".join(found.names) or "-"
        until = tr("doctor.until", names=names, day=f"{found.ends:%Y-%m-%d}")
        verdict = Verdict.OK if trouble is None else Verdict.WARN
        yield Check(name="certificate", verdict=verdict, found=until, way=trouble or "")


def _folder(folder: Path) -> Check:
    nearest = _existing(folder)
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    if not writable:
        way = tr("doctor.folder", folder=nearest)
        return Check(name="data folder", verdict=Verdict.FAIL, found=str(folder), way=way)
    if len(os.fsencode(folder / "anser.sock")) > _SOCKET_BYTES_MAX:
        way = tr("doctor.long", most=_SOCKET_BYTES_MAX)
        return Check(name="data folder", verdict=Verdict.FAIL, found=str(folder), way=way)
    new = "" if nearest == folder else f" ({tr('doctor.new')})"
    return Check(name="data folder", verdict=Verdict.OK, found=f"{folder}{new}")


def _secrets(folder: Path) -> Iterator[Check]:
    for name in _SECRETS:
        try:
            mode = stat.S_IMODE((folder / name).stat().st_mode)
        except OSError:
            continue
        if mode & 0o077:
            way, found = f"chmod 600 {folder / name}", tr("doctor.open", mode=f"{mode:03o}")
            yield Check(name=name, verdict=Verdict.FAIL, found=found, way=way)


def _socket(*, alive: bool) -> Check:
    found = tr("doctor.listens") if alive else tr("doctor.stopped")
    return Check(name="platform", verdict=Verdict.OK, found=found)


def _model(at: AtHome, config: Config) -> Iterator[Check]:
    """The built-in engine's file; where it is missing, which mirrors could give it."""
    with ExitStack() as stack:
        folder = config.data_dir
        if not folder.exists():  # a check leaves nothing behind
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield from _model_in(Place(data_dir=folder, config=at.config))


def _model_in(place: Place) -> Iterator[Check]:
    try:
        engine = ask(place, "GET", "/admin/v1/state")["engine"]
        if engine is None:
            yield Check(name="model", verdict=Verdict.OK, found=tr("doctor.no_engine"))
            return
        if engine["file"] is not None:
            yield _file(place, str(engine["model"]), str(engine["file"]))
            return
        mirrors = ask(place, "GET", "/admin/v1/mirrors")["mirrors"]
    except AnserError as error:
        yield Check(name="model", verdict=Verdict.FAIL, found=error.message)
        return
    reached = any(mirror["trouble"] is None for mirror in mirrors)
    verdict = Verdict.WARN if reached else Verdict.FAIL
    found = tr("doctor.absent", model=engine["model"])
    yield Check(name="model", verdict=verdict, found=found, way=tr("doctor.model"))
    for mirror in mirrors:
        fine = mirror["trouble"] is None
        yield Check(
            name=mirror["name"],
            verdict=Verdict.OK if fine else Verdict.WARN,
            found=tr("doctor.has_it") if fine else mirror["trouble"],
        )


def _file(place: Place, model: str, file: str) -> Check:
    """Whether the file is a model that can be loaded, and a platform that runs has loaded it."""
    from anser.platform import BUILTIN
    from anser.platform import examine as examine_file

    found = f"{model}: {file}"
    try:
        run(examine_file(Path(file)))
    except AnserError as error:
        return Check(name="model", verdict=Verdict.FAIL, found=found, way=error.message)
    for node in ask(place, "GET", "/admin/v1/nodes")["nodes"]:
        if node["id"] == BUILTIN and node["state"] == "down":
            way = str(node["error"])
            return Check(name="model", verdict=Verdict.FAIL, found=found, way=way)
    return Check(name="model", verdict=Verdict.OK, found=found)


def _port(config: Config) -> Check:
    host, port = config.server.host, config.server.port
    place = f"{host}:{port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        found = f"{place}: {error.strerror or error}"
        return Check(name="port", verdict=Verdict.FAIL, found=found, way=tr("doctor.port"))
    return Check(name="port", verdict=Verdict.OK, found=place)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _print(check: Check) -> None:
    way = f"  {tr('doctor.way', way=safe(check.way))}" if _needs_way(check) else ""
    print_line(f"{check.verdict.value:<5} {safe(check.name):<18} {safe(check.found)}{way}")


def _needs_way(check: Check) -> bool:
    return bool(check.way) and check.verdict is not Verdict.OK
