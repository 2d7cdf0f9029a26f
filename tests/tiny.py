"""A tiny model's file, and the way of it through a hub, for tests of mirrors."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anser.adapters.blobs import DiskBlobs
from anser.core.hub import Model, ModelFile
from anser.ports import Mirror
from anser.services.hub import Hub

__all__ = ["DATA", "FILE", "SHA256", "TINY", "UNPINNED", "ensure", "quiet"]

DATA = random.Random(3).randbytes(400_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
FILE = ModelFile(
    name="tiny.gguf",
    sha256=SHA256,
    size_bytes=len(DATA),
    hugging_face="org/repo/tiny.gguf",
    modelscope="org/repo/tiny.gguf",
)
TINY = Model(id="tiny", title="Tiny", licence="Apache-2.0", file=FILE)
UNPINNED = replace(TINY, file=replace(FILE, sha256=None, size_bytes=None))


def quiet(_done: int, _total: int | None) -> None:
    """Progress that nobody watches."""


async def ensure(mirrors: Sequence[Mirror], folder: Path, model: Model = TINY) -> Path:
    """The file, through these mirrors, kept in `folder`."""
    async with asyncio.timeout(60):
        return await Hub(mirrors, DiskBlobs(folder)).ensure(model, quiet)
