"""The contract of the Blobs port, on every adapter."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from anser.adapters.blobs import DiskBlobs
from anser.core.errors import DigestMismatch, SourceError
from anser.ports import Blobs

pytestmark = pytest.mark.anyio

DATA = b"the bytes of a model"
SHA256 = hashlib.sha256(DATA).hexdigest()
OTHER = "0" * 64


@pytest.fixture(params=["disk"])
def blobs(tmp_path: Path) -> Blobs:
    """Each adapter in turn, empty."""
    return DiskBlobs(tmp_path / "deep" / "blobs")


async def test_only_a_committed_file_is_found(blobs: Blobs) -> None:
    """A partial file is not a file; a committed one is found with its bytes, again and again."""
    assert blobs.find(SHA256) is None
    partial = blobs.partial(SHA256)
    partial.write_bytes(DATA)
    assert blobs.find(SHA256) is None
    path = await blobs.commit(SHA256)
    assert blobs.find(SHA256) == path
    assert path.read_bytes() == DATA
    assert not partial.exists()


async def test_a_wrong_file_is_deleted(blobs: Blobs) -> None:
    """What has another digest is never kept and never used."""
    partial = blobs.partial(OTHER)
    partial.write_bytes(DATA)
    with pytest.raises(DigestMismatch, match=SHA256):
        await blobs.commit(OTHER)
    assert blobs.find(OTHER) is None
    assert not partial.exists()


async def test_committing_nothing_fails(blobs: Blobs) -> None:
    """Without a partial file there is nothing to keep."""
    with pytest.raises(SourceError):
        await blobs.commit(SHA256)


async def test_a_partial_file_stays_where_it_was(blobs: Blobs) -> None:
    """A later process finds the partial file at the same place, to go on with it."""
    blobs.partial(SHA256).write_bytes(DATA[:5])
    assert blobs.partial(SHA256).read_bytes() == DATA[:5]


async def test_one_holder_at_a_time(blobs: Blobs) -> None:
    """Whoever else wants the same file waits; another file is free."""
    order: list[str] = []

    async def second() -> None:
        async with blobs.hold(SHA256):
            order.append("second")

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks, blobs.hold(SHA256):
        tasks.create_task(second())
        async with blobs.hold(OTHER):
            await asyncio.sleep(0.3)
        order.append("first")
    assert order == ["first", "second"]


async def test_names_are_remembered(blobs: Blobs) -> None:
    """The last digest noted for a name is recalled; any text is a name."""
    for name in ("a/b/c.gguf", "../../etc/passwd", "名" * 500):
        assert blobs.recall(name) is None
        blobs.remember(name, OTHER)
        blobs.remember(name, SHA256)
        assert blobs.recall(name) == SHA256


class TestDisk:
    """What only files on a disk can get wrong."""

    async def test_what_a_download_left_beside_is_tidied(self, tmp_path: Path) -> None:
        """After a commit nothing but the lock is left of the download."""
        blobs = DiskBlobs(tmp_path)
        async with blobs.hold(SHA256):
            partial = blobs.partial(SHA256)
            partial.write_bytes(DATA)
            partial.with_name(f"{partial.name}.from").write_text("{}")
            partial.with_name(f"{partial.name}.killed").mkdir()
            await blobs.commit(SHA256)
        assert [path.suffix for path in (tmp_path / "partial").iterdir()] == [".lock"]
        blobs.validate()
        assert str(tmp_path) in repr(blobs)

    async def test_a_damaged_note_is_no_note(self, tmp_path: Path) -> None:
        """A digest that is none would name another file."""
        blobs = DiskBlobs(tmp_path)
        blobs.remember("a", SHA256)
        (note,) = (tmp_path / "names").iterdir()
        note.write_text("../../elsewhere a")
        assert blobs.recall("a") is None

    async def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        """A file in the way, or no space: the error says so and where."""
        (tmp_path / "blobs").write_text("in the way")
        blobs = DiskBlobs(tmp_path / "blobs")
        with pytest.raises(SourceError, match="blobs"):
            blobs.partial(SHA256)
        with pytest.raises(SourceError):
            blobs.remember("a", SHA256)

    async def test_only_the_owner_reads_it(self, tmp_path: Path) -> None:
        """Models may be private: folders are the owner's alone."""
        blobs = DiskBlobs(tmp_path / "blobs")
        assert os.stat(blobs.partial(SHA256).parent).st_mode & 0o077 == 0
