"""Any bytes as a file of settings."""

from __future__ import annotations

import tempfile
from pathlib import Path

from anser.config import load
from anser.core.errors import ConfigError

__all__ = ["check"]


def check(data: bytes) -> None:
    """They give settings that know their source, or one printable line that names the file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        name = file.name
        try:
            loaded = load(file=Path(name), environ={"ANSER_DATA_DIR": "/d"}, overrides={})
        except ConfigError as error:
            _told(error.message, name)
            return
    assert set(loaded.sources.values()) <= {"default", name, "ANSER_DATA_DIR"}


def _told(message: str, name: str) -> None:
    """It is one line that names the file."""
    assert message.startswith(name)
    assert message.isprintable()
    assert len(message) < 10_000
