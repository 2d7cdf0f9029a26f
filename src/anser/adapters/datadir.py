"""The data folder: one platform at a time, secrets that nobody else can read.

Theory of operation. The folder is held by an advisory lock on its file `lock`, which the operating
system lets go when the process ends in whatever way; the file also says which process holds it.
Secrets are made once, whole or not at all, and refused if others can read them.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from anser.core.errors import ConfigError, DataDirInUse

__all__ = ["DataDir", "make_secret", "read_secret"]

_PEPPER_BYTES = 32
_SOCKET_CHARS_MAX = 103  # sockaddr_un: 104 bytes on macOS, 108 on Linux, with a zero at the end


class DataDir:
    """A data folder that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<DataDir {self.path}>"

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Generator[DataDir]:
        """Make the folder if need be and hold it. ConfigError names the folder and its holder."""
        path = Path(os.path.abspath(path))  # without `..`: the name of a socket must be short
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            message = f"The data folder {path} cannot be used: {error.strerror}."
            raise ConfigError(message) from error
        try:
            _hold(descriptor, path)
            yield cls(path)
        finally:
            os.close(descriptor)  # lets go of the lock

    @property
    def store(self) -> Path:
        """The database."""
        return self.path / "anser.db"

    @property
    def signing_key(self) -> Path:
        """The key that signs receipts."""
        return self.path / "signing.key"

    @property
    def socket(self) -> Path:
        """The admin socket. ConfigError if no socket can have so long a name."""
        path = self.path / "anser.sock"
        if len(os.fsencode(path)) > _SOCKET_CHARS_MAX:
            raise ConfigError(
                f"{path} is too long for a socket ({_SOCKET_CHARS_MAX} bytes): choose a data"
                " folder with a shorter path."
            )
        return path

    def pepper(self) -> bytes:
        """The 32 secret bytes that key all hashes; made at first use."""
        path = self.path / "pepper"
        if not path.exists():
            make_secret(path, secrets.token_bytes(_PEPPER_BYTES))
        pepper = read_secret(path)
        if len(pepper) != _PEPPER_BYTES:
            raise ConfigError(
                f"{path} must hold {_PEPPER_BYTES} bytes, not {len(pepper)}. Put its backup back;"
                " with another pepper no key that was handed out is valid."
            )
        return pepper


def make_secret(path: Path, content: bytes) -> None:
    """Write a file of mode 600 durably, whole or not at all; one that exists stays as it is."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _link(draft, path)
        finally:
            draft.unlink()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error


def read_secret(path: Path) -> bytes:
    """The content of a secret file. ConfigError if others than its owner can read or write it."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    if mode & 0o077:
        raise ConfigError(
            f"{path} is a secret that others can read (mode {mode:03o}): chmod 600 {path}"
        )
    return content


def _hold(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        raise DataDirInUse(
            f"The data folder {path} is in use by another Anser (process {holder}). Stop that"
            " one, or choose another folder with --data-dir."
        ) from None
    except OSError as error:
        raise ConfigError(f"The data folder {path} cannot be locked: {error.strerror}.") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _link(draft: Path, path: Path) -> None:
    """Give the finished file its name, durably, unless another process was quicker."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
