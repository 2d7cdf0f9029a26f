"""Files by their sha256, in a folder.

Theory of operation: a download grows in `partial/HEX`; `commit` hashes it, makes it durable and
renames it to `sha256/HEX`, so that whatever has that name is whole and right. A lock on
`partial/HEX.lock` keeps other processes off; the system drops it when its holder dies. `names/`
notes the digest that a name was found to have.

Invariant: nothing is in `sha256/` whose digest was not computed from the very bytes in it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from anser.core import limits
from anser.core.errors import DigestMismatch, SourceError
from anser.core.hub import is_sha256

__all__ = ["DiskBlobs"]

_POLL_S = 0.2


class DiskBlobs:
    """Blobs in a folder, which is made when needed."""

    def __init__(self, root: Path) -> None:
        self._whole = root / "sha256"
        self._partial = root / "partial"
        self._names = root / "names"

    def __repr__(self) -> str:
        return f"<DiskBlobs {self._whole.parent}>"

    def validate(self) -> None:
        """Every whole file is named by a digest (the digest itself is costly: not computed)."""
        if self._whole.exists():
            assert all(is_sha256(path.name) for path in self._whole.iterdir())

    def find(self, sha256: str) -> Path | None:
        """The file, if it is whole and has been checked."""
        path = self._whole / _checked(sha256)
        return path if path.is_file() else None

    def partial(self, sha256: str) -> Path:
        """Where a download of this file accumulates, so that it can be resumed."""
        return _folder(self._partial) / _checked(sha256)

    @asynccontextmanager
    async def hold(self, sha256: str) -> AsyncGenerator[None]:
        """Be the only one, in any process, that works on the partial file. Raises SourceError."""
        path = self.partial(sha256)
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            await _lock(lock)
            yield
        finally:
            os.close(lock)

    async def commit(self, sha256: str) -> Path:
        """Check the partial file and keep it. Raises DigestMismatch or SourceError."""
        return await asyncio.to_thread(self._commit, sha256)

    def _commit(self, sha256: str) -> Path:
        partial = self.partial(sha256)
        found = _digest(partial)
        if found != sha256:
            partial.unlink(missing_ok=True)
            raise DigestMismatch(f"The file has sha256 {found}, not {sha256}: it was deleted.")
        target = _folder(self._whole) / sha256
        try:
            os.replace(partial, target)
            _sync(target.parent)
            self._tidy(sha256)
        except OSError as error:
            raise _foreign(error) from error
        return target

    def _tidy(self, sha256: str) -> None:
        """Drop what lies beside the partial file, except the lock, which somebody may hold."""
        for path in self._partial.glob(f"{sha256}.*"):
            if path.is_dir():  # of a download that was killed
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix != ".lock":
                path.unlink(missing_ok=True)

    def remember(self, name: str, sha256: str) -> None:
        """Note the digest of the file of this name; idempotent."""
        path = self._note(name)
        fresh = path.with_suffix(f".{os.getpid()}")
        try:
            _folder(self._names)
            fresh.write_text(f"{_checked(sha256)} {name}\n")
            os.replace(fresh, path)
        except OSError as error:
            raise _foreign(error) from error

    def recall(self, name: str) -> str | None:
        """The digest that was noted last."""
        try:
            sha256 = self._note(name).read_text().partition(" ")[0]
        except FileNotFoundError:
            return None
        return sha256 if is_sha256(sha256) else None

    def _note(self, name: str) -> Path:
        return self._names / hashlib.sha256(name.encode()).hexdigest()


def _checked(sha256: str) -> str:
    assert is_sha256(sha256), "a digest that was not checked would name any path"
    return sha256


def _folder(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _foreign(error) from error
    return path


def _digest(path: Path) -> str:
    """The sha256 of a file that is then known to be on the disk."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    except OSError as error:
        raise _foreign(error) from error
    return digest


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _foreign(error: OSError) -> SourceError:
    return SourceError(f"The model's file could not be kept: {error.strerror} ({error.filename}).")


async def _lock(descriptor: int) -> None:
    """Wait, at most so long, until the lock is free."""
    for _ in range(int(limits.DOWNLOAD_WAIT_S / _POLL_S)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(_POLL_S)
        else:
            return
    raise SourceError("Another process has been downloading the same file for too long.")
