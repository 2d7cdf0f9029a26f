"""The settings in force as people and programs see them: value, source and meaning; no secret."""

from __future__ import annotations

from functools import reduce
from typing import cast

from anser.config.loading import Loaded
from anser.config.values import settings

__all__ = ["shown", "without_password"]


def shown(loaded: Loaded) -> dict[str, object]:
    """The file that was read, and every setting with its value and where that came from."""
    rows = [
        {
            "path": setting.path,
            "value": _plain(reduce(getattr, setting.path.split("."), loaded.config)),
            "default": setting.default,
            "source": loaded.sources[setting.path],
            "environment": setting.environment,
            "meaning": setting.doc,
        }
        for setting in settings()
    ]
    return {"file": None if loaded.file is None else str(loaded.file), "settings": rows}


def without_password(url: str) -> str:
    """The address without what stands before an `@`.

    >>> without_password("https://me:secret@host/x")
    'https://host/x'
    """
    scheme, mark, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{mark}{place.rpartition('@')[2]}{slash}{path}" if mark else url


def _plain(value: object) -> object:
    """A setting's value as JSON has it."""
    if isinstance(value, tuple):
        return [without_password(str(part)) for part in cast("tuple[object, ...]", value)]
    return value if isinstance(value, (bool, int, float)) else str(value)
