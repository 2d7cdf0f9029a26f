"""The real model's file for tests: obtained through the project's own hub, once per machine."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from anser.adapters.blobs import DiskBlobs
from anser.adapters.mirrors import mirrors_for
from anser.core.hub import DEFAULT_MODEL
from anser.services.hub import Hub

__all__ = ["cache_folder", "model_path"]


_NAMED = os.environ.get("ANSER_TEST_CACHE")  # read before a fixture hides it


def cache_folder() -> Path:
    """ANSER_TEST_CACHE, or a folder in the user's cache."""
    if _NAMED:
        return Path(_NAMED)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anser-test"


@cache
def model_path() -> Path:
    """The default model's file; the first call on a machine downloads it."""
    hub = Hub(mirrors_for(()), DiskBlobs(cache_folder()))
    with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop of its own
        return thread.submit(asyncio.run, hub.ensure(DEFAULT_MODEL, _quiet)).result()


def _quiet(_done: int, _total: int | None) -> None:
    """Progress that nobody watches."""
