"""The way of a model's file to this machine, past mirrors that cut, lie, change and dawdle."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from anser.adapters import download as download_module
from anser.adapters.blobs import DiskBlobs
from anser.adapters.mirrors import (
    AnserMirror,
    HuggingFaceMirror,
    ModelScopeMirror,
    mirrors_for,
)
from anser.config import Config, EngineSettings
from anser.core import limits
from anser.core.errors import NoMirror, SourceError
from anser.core.health import NodeState
from anser.core.hub import DEFAULT_MODEL, read_spec
from anser.platform import BUILTIN, open_platform
from anser.services.hub import Hub
from tests.file_server import FileServer, serving
from tests.model import model_path
from tests.tiny import DATA, FILE, SHA256, UNPINNED, ensure, quiet

pytestmark = pytest.mark.anyio


def offsets(server: FileServer) -> list[str]:
    return [request.headers.get("range", "all") for request in server.gets()]


# ---------------------------------------------------------------- servers that misbehave


async def test_a_cut_download_goes_on(tmp_path: Path) -> None:
    """Each break is resumed where it was, as long as there is progress."""
    server = FileServer(data=DATA, cuts=[100_000, 50_000, 1])
    async with serving(server):
        path = await ensure([AnserMirror(server.url)], tmp_path)
    assert path.read_bytes() == DATA
    assert offsets(server) == ["all", "bytes=100000-", "bytes=150000-", "bytes=150001-"]


async def test_a_server_that_always_breaks_is_given_up(tmp_path: Path) -> None:
    """Without progress there is no second try, with endless little progress no endless tries."""
    dead = FileServer(data=DATA, cuts=[0] * 99)
    drip = FileServer(data=DATA, cuts=[1] * 99)
    async with serving(dead, drip):
        for server, tries in ((dead, 1), (drip, limits.DOWNLOAD_RETRIES_MAX)):
            with pytest.raises(NoMirror):
                await ensure([AnserMirror(server.url)], tmp_path / str(server.port))
            assert len(server.gets()) == tries


async def test_a_server_without_ranges_starts_anew(tmp_path: Path) -> None:
    """A server that answers 200 to a range sends everything: so the partial file starts anew."""
    server = FileServer(data=DATA, cuts=[100_000], ranges=False)
    async with serving(server):
        path = await ensure([AnserMirror(server.url)], tmp_path)
    assert path.read_bytes() == DATA
    assert offsets(server) == ["all", "bytes=100000-"]


async def test_a_file_that_changed_starts_anew(tmp_path: Path) -> None:
    """If-Range asks for the rest of the same file only; of another one everything comes."""
    server = FileServer(data=bytes(len(DATA)), etag='"old"', cuts=[100_000])
    async with serving(server):
        mirror = AnserMirror(server.url)
        with pytest.raises(SourceError, match=r"ended|no answer"):
            await mirror.fetch(FILE, DiskBlobs(tmp_path).partial(SHA256), quiet)
        server.data, server.etag = DATA, '"new"'
        path = await ensure([mirror], tmp_path)
    assert path.read_bytes() == DATA
    assert server.gets()[-1].headers["if-range"] == '"old"'


async def test_a_file_that_changed_unseen_is_found_out(tmp_path: Path) -> None:
    """Without an ETag the parts of two files are joined: the sha256 tells, and it starts anew."""
    server = FileServer(data=bytes(len(DATA)), etag="", cuts=[100_000])
    async with serving(server):
        mirror = AnserMirror(server.url)
        with pytest.raises(SourceError):
            await mirror.fetch(FILE, DiskBlobs(tmp_path).partial(SHA256), quiet)
        server.data = DATA
        path = await ensure([mirror], tmp_path)
    assert path.read_bytes() == DATA
    assert offsets(server) == ["all", "bytes=100000-", "all"]


async def test_a_wrong_file_is_never_used(tmp_path: Path) -> None:
    """Right length, wrong bytes: refused, deleted, and said."""
    server = FileServer(data=bytes(len(DATA)))
    async with serving(server):
        with pytest.raises(NoMirror, match="sha256"):
            await ensure([AnserMirror(server.url)], tmp_path)
    blobs = DiskBlobs(tmp_path)
    assert blobs.find(SHA256) is None
    assert not blobs.partial(SHA256).exists()


async def test_a_liar_does_not_spoil_an_honest_mirror(tmp_path: Path) -> None:
    """Wrong bytes that a liar left are not held against the mirror that went on from them."""
    liar = FileServer(data=bytes(len(DATA)), cuts=[100_000, 0])
    honest = FileServer(data=DATA)
    async with serving(liar, honest):
        path = await ensure([AnserMirror(liar.url), AnserMirror(honest.url)], tmp_path)
    assert path.read_bytes() == DATA
    assert offsets(honest) == ["bytes=100000-", "all"]


async def test_the_next_mirror_goes_on(tmp_path: Path) -> None:
    """What one mirror sent before it broke need not be sent by the next one again."""
    first = FileServer(data=DATA, cuts=[300_000, 0])
    second = FileServer(data=DATA)
    async with serving(first, second):
        path = await ensure([AnserMirror(first.url), HuggingFaceMirror(second.url)], tmp_path)
    assert path.read_bytes() == DATA
    assert offsets(second) == ["bytes=300000-"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"wrong_part": 7}, "another part"),
        ({"extra_bytes": 9}, "another file, of"),
        ({"announce": len(DATA) + 5}, "another file, of"),
        ({"extra_headers": {"content-encoding": "gzip"}}, "compressed"),
        ({"statuses": [206]}, "HTTP 206"),
        ({"statuses": [403]}, "HTTP 403"),
        ({"statuses": [500]}, "HTTP 500"),
        ({"redirect": "http://127.0.0.1:9/secret"}, "HTTP 302"),
    ],
)
async def test_nonsense_is_refused(tmp_path: Path, fault: dict[str, object], words: str) -> None:
    """Another part than asked for, another size, compression, a redirect: each is an error."""
    server = FileServer(data=DATA, **fault)  # type: ignore[arg-type]
    into = tmp_path / "partial"
    if "wrong_part" in fault:
        into.write_bytes(DATA[:1_000])
    async with serving(server):
        with pytest.raises(SourceError, match=words):
            await AnserMirror(server.url).fetch(FILE, into, quiet)


async def test_a_body_without_a_length_is_bounded(tmp_path: Path) -> None:
    """More bytes than the file has are not even written."""
    server = FileServer(data=DATA + DATA)
    into = tmp_path / "partial"
    into.write_bytes(DATA[:1_000])
    async with serving(server):
        with pytest.raises(SourceError, match="another file"):
            await AnserMirror(server.url).fetch(FILE, into, quiet)
    assert into.stat().st_size <= len(DATA)


async def test_a_partial_file_that_is_too_long_starts_anew(tmp_path: Path) -> None:
    """Whatever is there beyond the file's size cannot be its beginning."""
    server = FileServer(data=DATA)
    DiskBlobs(tmp_path).partial(SHA256).write_bytes(DATA + b"more")
    async with serving(server):
        path = await ensure([AnserMirror(server.url)], tmp_path)
    assert path.read_bytes() == DATA


async def test_a_server_with_less_than_is_there(tmp_path: Path) -> None:
    """416: the server has no such part, so the partial file was of another one."""
    server = FileServer(data=DATA[:1_000])
    unsized = replace(FILE, size_bytes=None, sha256=hashlib.sha256(DATA[:1_000]).hexdigest())
    into = tmp_path / "partial"
    into.write_bytes(DATA)
    async with serving(server):
        await AnserMirror(server.url).fetch(unsized, into, quiet)
    assert into.read_bytes() == DATA[:1_000]


async def test_a_trickle_is_as_good_as_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends too little in a while is left for the next one."""
    monkeypatch.setattr(download_module, "_RATE_WINDOW_S", 0.5)
    monkeypatch.setattr(limits, "DOWNLOAD_RATE_MIN", 100_000)
    slow = FileServer(data=DATA, chunk_s=0.1)
    quick = FileServer(data=DATA)
    began = time.monotonic()
    async with serving(slow, quick):
        path = await ensure([AnserMirror(slow.url), AnserMirror(quick.url)], tmp_path)
    assert path.read_bytes() == DATA
    assert time.monotonic() - began < 20


async def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """The disk's own refusal is passed on, and is no reason to doubt the mirror's words."""
    into = tmp_path / "partial"
    into.symlink_to("/dev/full")
    server = FileServer(data=DATA)
    async with serving(server):
        with pytest.raises(SourceError, match="could not be written"):
            await AnserMirror(server.url).fetch(replace(FILE, size_bytes=None), into, quiet)


# ------------------------------------------------------------------------ several mirrors


async def test_an_unreachable_mirror_costs_little(tmp_path: Path) -> None:
    """Mirrors that do not answer are asked all at once, and not for long."""
    silent = [FileServer(silent=True) for _ in range(5)]
    good = FileServer(data=DATA)
    async with serving(*silent, good):
        began = time.monotonic()
        urls = [server.url for server in [*silent, good]] + ["http://name.invalid"]
        path = await ensure([AnserMirror(url) for url in urls], tmp_path)
        took = time.monotonic() - began
    assert path.read_bytes() == DATA
    assert took < limits.MIRROR_ANSWER_TIMEOUT_S + 3


async def test_the_first_mirror_that_has_it_is_taken(tmp_path: Path) -> None:
    """Order is preference: a later one is not fetched from, however quick it is."""
    first, second = FileServer(data=DATA, chunk_s=0.002), FileServer(data=DATA)
    async with serving(first, second):
        await ensure([AnserMirror(first.url), AnserMirror(second.url)], tmp_path)
    assert len(first.gets()) == 1
    assert not second.gets()


async def test_every_reason_is_listed(tmp_path: Path) -> None:
    """When no mirror has it, people read why, mirror by mirror."""
    gone, broken = FileServer(statuses=[404] * 9), FileServer(statuses=[500] * 9)
    async with serving(gone, broken):
        mirrors = [AnserMirror(gone.url), HuggingFaceMirror(broken.url)]
        with pytest.raises(NoMirror, match=r"HTTP 404.*Hugging Face: .*HTTP 500"):
            await ensure(mirrors, tmp_path)
    with pytest.raises(NoMirror, match="none is configured"):
        await ensure([], tmp_path)


async def test_what_is_here_is_not_fetched(tmp_path: Path) -> None:
    """A second time, nobody is asked."""
    server = FileServer(data=DATA)
    async with serving(server):
        first = await ensure([AnserMirror(server.url)], tmp_path)
        asked = len(server.requests)
        assert await ensure([AnserMirror(server.url)], tmp_path) == first
        assert len(server.requests) == asked
    assert await ensure([], tmp_path) == first


async def test_two_at_once_fetch_once(tmp_path: Path) -> None:
    """Two hubs on one folder: one downloads, the other waits and finds the file."""
    server = FileServer(data=DATA, chunk_s=0.001)
    async with serving(server):
        mirrors = [AnserMirror(server.url)]
        paths = await asyncio.gather(*(ensure(mirrors, tmp_path) for _ in range(3)))
    assert len(set(paths)) == 1
    assert len(server.gets()) == 1


# ------------------------------------------------------------------------ Hugging Face


async def test_hugging_face_states_the_digest(tmp_path: Path) -> None:
    """hf:org/repo/file: the digest is asked for, checked, kept, and later needs nobody."""
    facts = {"x-linked-etag": f'"{SHA256}"', "x-linked-size": str(len(DATA))}
    server = FileServer(data=DATA, extra_headers=facts)
    async with serving(server):
        path = await ensure([HuggingFaceMirror(server.url)], tmp_path, UNPINNED)
        assert server.requests[0].path == "/org/repo/resolve/main/tiny.gguf"
    assert path.name == SHA256
    assert await ensure([], tmp_path, UNPINNED) == path


async def test_a_file_without_a_digest_is_refused(tmp_path: Path) -> None:
    """Where nobody states a sha256, there is nothing to check: the file is not taken."""
    server = FileServer(data=DATA, extra_headers={"x-linked-etag": '"abc"'})
    async with serving(server):
        mirrors = [HuggingFaceMirror(server.url), ModelScopeMirror(server.url)]
        with pytest.raises(NoMirror, match="states no sha256"):
            await ensure(mirrors, tmp_path, UNPINNED)
    assert not server.gets()


async def test_hugging_face_with_another_file_is_passed_over(tmp_path: Path) -> None:
    """A file that was replaced there has another digest: not even its head is believed."""
    server = FileServer(data=DATA, extra_headers={"x-linked-etag": "0" * 64})
    async with serving(server):
        with pytest.raises(NoMirror, match="another file by this name"):
            await ensure([HuggingFaceMirror(server.url)], tmp_path)


async def test_the_token_stays_with_its_host(tmp_path: Path) -> None:
    """Hugging Face's token goes to Hugging Face, never to the host that it redirects to."""
    store = FileServer(data=DATA)
    facts = {"x-linked-etag": SHA256}
    front = FileServer(extra_headers=facts)
    async with serving(store, front):
        front.redirect = store.url.replace("127.0.0.1", "localhost") + "/file"
        await ensure([HuggingFaceMirror(front.url, token="hf_secret")], tmp_path)
    assert {request.headers.get("authorization") for request in front.requests} == {
        "Bearer hf_secret"
    }
    assert all("authorization" not in request.headers for request in store.requests)


async def test_redirects_end(tmp_path: Path) -> None:
    """A circle of redirects is left."""
    server = FileServer(data=DATA)
    async with serving(server):
        server.redirect = f"{server.url}/again"
        with pytest.raises(SourceError, match="redirects too often"):
            await HuggingFaceMirror(server.url).fetch(FILE, tmp_path / "partial", quiet)
    assert len(server.requests) == limits.REDIRECTS_MAX


def test_the_environment_chooses_hugging_faces_address() -> None:
    """HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to Hugging Face's own tools."""
    named = mirrors_for(["http://peer"], {"HF_ENDPOINT": "https://hf-mirror.example/"})
    assert "https://hf-mirror.example" in repr(named)
    names = [mirror.name for mirror in named]
    assert names == ["http://peer", "Hugging Face", "ModelScope", "package index"]
    offline = [mirror.name for mirror in mirrors_for([], {"HF_HUB_OFFLINE": "1"})]
    assert offline == ["package index"]


# --------------------------------------------------------------------------- local files


async def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    """A file of one's own is used where it lies; one that is not there is named."""
    file = tmp_path / "own.gguf"
    file.write_bytes(b"GGUF")
    hub = Hub([], DiskBlobs(tmp_path / "blobs"))
    assert await hub.ensure(hub.resolve(str(file)), quiet) == file
    with pytest.raises(SourceError, match="no file"):
        await hub.ensure(read_spec("/nowhere/absent.gguf"), quiet)
    assert DEFAULT_MODEL in hub.models()
    assert repr(hub) == "<Hub []>"


# ---------------------------------------------------------------------- killed in between

CHILD = """
import asyncio, sys
from pathlib import Path
from anser.adapters.blobs import DiskBlobs
from anser.adapters.mirrors import AnserMirror
from anser.services.hub import Hub
from tests.tiny import TINY
progress = lambda done, total: print(done, flush=True)
hub = Hub([AnserMirror(sys.argv[1])], DiskBlobs(Path(sys.argv[2])))
asyncio.run(hub.ensure(TINY, progress))
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
        ("HTTP_PROXY", "ht!tp://x"),
    ],
)
async def test_an_odd_environment_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Variables that no request can be made with are told, like any mirror's trouble."""
    monkeypatch.setenv(name, value)
    with pytest.raises(NoMirror, match=r"no request can be made|no answer"):
        await ensure([AnserMirror("http://anser.invalid")], tmp_path)


async def test_a_token_with_odd_letters_is_a_reason(tmp_path: Path) -> None:
    """It is told, without the token."""
    mirror = HuggingFaceMirror("http://127.0.0.1:1", token="hf_schlüssel")
    with pytest.raises(NoMirror, match="letters in it that no token has") as caught:
        await ensure([mirror], tmp_path)
    assert "hf_" not in caught.value.message


def test_a_file_by_path_is_known_by_its_bytes(tmp_path: Path) -> None:
    """A known model's own file is that model, by whatever name; another of its size is not."""
    hub = Hub([], DiskBlobs(tmp_path / "blobs"))
    mine = tmp_path / "mine.gguf"
    mine.symlink_to(model_path())
    for _ in range(2):
        found = hub.resolve(str(mine))
        assert (found.id, found.file.path) == (DEFAULT_MODEL.id, str(mine))
        assert hub.find(found) == mine
    mine.unlink()
    with mine.open("wb") as file:
        file.truncate(DEFAULT_MODEL.file.size_bytes)
    assert hub.resolve(str(mine)).id == "mine"
    mine.chmod(0)
    assert hub.resolve(str(mine)).id == "mine"
    assert hub.resolve(str(tmp_path / "absent.gguf")).id == "absent"


async def test_a_model_that_could_not_be_fetched_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A platform that starts without a network says so, and serves once there is one."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(name, value)
    server = FileServer(data=model_path().read_bytes(), statuses=[503])
    states: list[tuple[NodeState, str]] = []
    async with serving(server), asyncio.timeout(120):
        engine = EngineSettings(mirrors=(server.url,), slots=1, context_tokens=512)
        config = Config(data_dir=tmp_path / "data", engine=engine)
        async with open_platform(config) as platform:
            while NodeState.UP not in [state for state, _ in states]:
                status = platform.services.fleet.status(BUILTIN)
                if not states or states[-1][0] is not status.state:
                    states.append((status.state, status.error or ""))
                await asyncio.sleep(0.02)
    assert [state for state, _ in states] == [NodeState.STARTING, NodeState.DOWN, NodeState.UP]
    assert "HTTP 503" in states[1][1]
    assert "tried again in 5 s" in states[1][1]


async def test_a_killed_download_goes_on(tmp_path: Path) -> None:
    """kill -9 in mid-download: the next process goes on from there, and nobody waits for a lock."""
    server = FileServer(data=DATA, cuts=[200_000], chunk_s=0.002)
    async with serving(server):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD, server.url, str(tmp_path),
            stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert child.stdout is not None
        async with asyncio.timeout(60):
            while int(await child.stdout.readline() or b"1") == 0:
                pass
            child.send_signal(signal.SIGKILL)
            await child.wait()
        server.cuts.clear()
        path = await ensure([AnserMirror(server.url)], tmp_path)
    assert path.read_bytes() == DATA
