"""Files of models for other platforms: `/v1/blobs/{sha256}` over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import httpx
import pytest

from anser.core.hub import DEFAULT_MODEL
from tests.model import model_path
from tests.server import give_model, serving

DIGEST = str(DEFAULT_MODEL.file.sha256)
SIZE = int(DEFAULT_MODEL.file.size_bytes or 0)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a platform that has the default model's file, and wants a key."""
    folder = tmp_path_factory.mktemp("blobs") / "data"
    give_model(folder)
    environment = {"ANSER_MEMBERS_ANONYMOUS": "off"}
    with serving(folder, "--no-engine", environment=environment) as server:
        headers = {"authorization": f"Bearer {server.key}"}
        with httpx.Client(base_url=f"{server.url}/v1/blobs", headers=headers) as client:
            yield client


def test_a_file_is_what_its_name_says(http: httpx.Client) -> None:
    """The whole file comes, and its digest is the one that was asked for."""
    digest, size = sha256(), 0
    with http.stream("GET", f"/{DIGEST}") as response:
        assert response.status_code == 200
        assert response.headers["content-length"] == str(SIZE)
        assert response.headers["x-request-id"].startswith("req_")
        for part in response.iter_bytes():
            digest.update(part)
            size += len(part)
    assert (digest.hexdigest(), size) == (DIGEST, SIZE)


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-3", 0, 4),
        (f"bytes={SIZE - 5}-", SIZE - 5, SIZE),
        ("bytes=1000-1999", 1_000, 2_000),
    ],
)
def test_a_part_is_sent(http: httpx.Client, wanted: str, start: int, end: int) -> None:
    """A range is answered with just that part, so that a download can be resumed."""
    response = http.get(f"/{DIGEST}", headers={"range": wanted})
    assert response.status_code == 206
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    with model_path().open("rb") as file:
        file.seek(start)
        assert response.content == file.read(end - start)


def test_the_head_tells_size_and_name(http: httpx.Client) -> None:
    """HEAD says how large the file is and that parts may be asked for."""
    response = http.head(f"/{DIGEST}")
    assert response.status_code == 200
    assert response.headers["content-length"] == str(SIZE)
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["etag"] == f'"{DIGEST}"'


def test_impossible_ranges_are_refused(http: httpx.Client) -> None:
    """A range beyond the end is 416; many ranges in one request are 400."""
    beyond = http.get(f"/{DIGEST}", headers={"range": f"bytes={SIZE}-"})
    many = http.get(f"/{DIGEST}", headers={"range": "bytes=0-0,2-2,4-4"})
    assert (beyond.status_code, many.status_code) == (416, 400)


@pytest.mark.parametrize(
    "name", ["0" * 64, DIGEST.upper(), DIGEST[:-1], f"{DIGEST}/", "x", "sha256"]
)
def test_other_names_are_not_found(http: httpx.Client, name: str) -> None:
    """Only digests that the hub knows have a file, spelled in one way."""
    response = http.get(f"/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_files_want_a_key_like_everything_else(http: httpx.Client) -> None:
    """Where anonymous use is off, a file is for members."""
    assert httpx.get(f"{http.base_url}{DIGEST}").status_code == 401
