"""The store's file: whether it is ours, whole and of a version that we know, and how it grows.

Migrations are the files sql/NNNN_*.sql, forward only, each in one transaction together with the
number that says it is done (`PRAGMA user_version`): an interrupted one has not happened. A file
whose write-ahead log was left behind was not closed; it is checked before it is used.
"""

from __future__ import annotations

import os
import sqlite3
from importlib.resources import files
from pathlib import Path

from anser.adapters.sqlite_connection import corrupt, sql_text, transaction
from anser.core import limits
from anser.core.errors import StoreError, StoreFull, StoreNewer

__all__ = ["APPLICATION_ID", "create_file", "migrations", "prepare", "unclean"]

APPLICATION_ID = int.from_bytes(b"Ansr", "big")
_OLDEST_SQLITE = (3, 37)  # STRICT tables
_SMALL_TABLES = ("members", "keys", "nodes", "batches")


def create_file(path: Path) -> None:
    """Make sure that the file exists and nobody else may read it. Raises StoreFull, StoreError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # its log and index take the same mode from it
        finally:
            os.close(descriptor)
    except IsADirectoryError:
        raise StoreError(f"{path} is a folder, not a database.") from None
    except OSError as error:
        raise StoreFull(f"{path} cannot be written: {error.strerror}.") from error


def unclean(path: Path) -> bool:
    """Whether the file was not closed by its last user."""
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def prepare(connection: sqlite3.Connection, path: Path, *, check: bool) -> None:
    """Refuse what is not ours or newer, check what was not closed, migrate what is older."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StoreError(
            f"This Python brings SQLite {sqlite3.sqlite_version}; Anser needs 3.37 or newer."
            " Use another Python."
        )
    version = _version(connection)
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID and (tables or version or application):
        raise StoreError(f"{path} is a database of another program. Move it, or choose a folder.")
    steps = migrations()
    if version > len(steps):
        raise StoreNewer(
            f"{path} was written by a newer Anser (form {version}; this one knows {len(steps)})."
            " Upgrade Anser, or choose another data folder."
        )
    if check and tables:
        _check(connection, path)
    _log_ahead(connection, path)
    for number, name in enumerate(steps, start=1):
        _migrate(connection, number=number, script=sql_text(name))


def migrations() -> list[str]:
    """The names of the migrations, in order."""
    names = (entry.name for entry in (files("anser.adapters") / "sql").iterdir())
    return sorted(name for name in names if name[:4].isdigit())


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Look for damage: in the whole file, or in all but the receipts of a very large one."""
    if path.stat().st_size <= limits.STORE_CHECK_BYTES_MAX:
        _quick_check(connection, path, "PRAGMA quick_check(1)")
    else:
        for table in _SMALL_TABLES:
            _quick_check(connection, path, f"PRAGMA quick_check({table})")


def _quick_check(connection: sqlite3.Connection, path: Path, pragma: str) -> None:
    found = connection.execute(pragma).fetchone()[0]
    if found != "ok":
        raise corrupt(path, found.splitlines()[-1])


def _log_ahead(connection: sqlite3.Connection, path: Path) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StoreError(
            f"{path} is on a file system without shared memory. Choose a data folder on a local"
            " disk."
        )


def _migrate(connection: sqlite3.Connection, *, number: int, script: str) -> None:
    if _version(connection) >= number:
        return
    with transaction(connection):
        if _version(connection) >= number:  # another process was quicker
            return
        for statement in _statements(script):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {number}")


def _statements(script: str) -> list[str]:
    """The script's statements; each ends at the end of a line."""
    statements, text = list[str](), ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            statements.append(text)
            text = ""
    assert not text.strip(), "a migration ends in the middle of a statement"
    return statements


def _version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version
