"""Models and the way of their files to this machine.

Theory of operation: `ensure` looks for the file on this machine, then asks all mirrors at once
whether they have it, and takes them in their order. A mirror that breaks off is resumed while it
makes progress; the next one goes on from what is there, for the sha256 fixes every byte. Only the
sha256 makes a file usable. If bytes of two mirrors do not fit together, the last one gets a second
chance from the start, so that one liar cannot spoil an honest mirror's file.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from anser.core import limits
from anser.core.errors import DigestMismatch, NoMirror, SourceError
from anser.core.hub import KNOWN_MODELS, Model, ModelFile, read_spec
from anser.ports import Blobs, Mirror, Progress

__all__ = ["Hub"]

_FACTOR_PARAMETERS = 8_000_000  # of one thousandth: a model of 8 billion has the factor 1


class Hub:
    """The models that can be asked for, and their files."""

    def __init__(self, mirrors: Sequence[Mirror], blobs: Blobs) -> None:
        self._mirrors = tuple(mirrors)
        self._blobs = blobs
        self._digests: dict[tuple[str, int, int], str] = {}

    def __repr__(self) -> str:
        return f"<Hub {[mirror.name for mirror in self._mirrors]}>"

    def models(self) -> list[Model]:
        """The models that have a name of their own."""
        return list(KNOWN_MODELS)

    def factor_milli(self, model: str) -> int:
        """A model's price factor in thousandths: its parameters per 8 billion, 1,000 if unknown."""
        known = next((each for each in KNOWN_MODELS if each.id == model), None)
        if known is None or known.parameters is None:
            return 1_000
        return max(1, round(known.parameters / _FACTOR_PARAMETERS))

    def resolve(self, spec: str) -> Model:
        """A known name, a path to a GGUF file, or hf:org/repo/file. Raises RequestError.

        A file by path that is a known model's is that model. (Only one of the same size is hashed,
        and only once.)
        """
        model = read_spec(spec)
        path = self.find(model) if model.file.path is not None else None
        return model if path is None else self._recognised(model, path)

    def _recognised(self, model: Model, path: Path) -> Model:
        try:
            facts = path.stat()
            alike = [known for known in KNOWN_MODELS if known.file.size_bytes == facts.st_size]
            if not alike:
                return model
            key = (str(path), facts.st_ino, facts.st_mtime_ns)
            if key not in self._digests:
                with path.open("rb") as file:
                    self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return model  # whoever loads it will say why it cannot be read
        same = (known for known in alike if known.file.sha256 == self._digests[key])
        known = next(same, None)
        return model if known is None else replace(known, file=replace(known.file, path=str(path)))

    def find(self, model: Model) -> Path | None:
        """The model's file, if it is whole and on this machine."""
        file = model.file
        if file.path is not None:
            path = Path(file.path).expanduser()
            return path if path.is_file() else None
        return None if file.sha256 is None else self._blobs.find(file.sha256)

    async def survey(self, model: Model) -> dict[str, str | None]:
        """Each mirror that may hold the model's file: None if it has it, else its trouble."""
        file = model.file
        mirrors = [mirror for mirror in self._mirrors if mirror.holds(file)]
        seen = await asyncio.gather(*(_look(mirror, file) for mirror in mirrors))
        return {
            mirror.name: look.message if isinstance(look, SourceError) else None
            for mirror, look in zip(mirrors, seen, strict=True)
        }

    async def ensure(self, model: Model, progress: Progress) -> Path:
        """The model's file on this machine, fetched if need be. Raises SourceError."""
        file = model.file
        if file.path is not None:
            return await asyncio.to_thread(_local, Path(file.path))
        if file.sha256 is None and file.hugging_face is not None:
            file = replace(file, sha256=self._blobs.recall(file.hugging_face))
        found = None if file.sha256 is None else self._blobs.find(file.sha256)
        return found if found is not None else await self._obtain(file, progress)

    async def _obtain(self, file: ModelFile, progress: Progress) -> Path:
        """Ask all mirrors at once, then take them in their order."""
        reasons: list[str] = []
        async with asyncio.TaskGroup() as group:
            looks = [
                (mirror, group.create_task(_look(mirror, file)))
                for mirror in self._mirrors
                if mirror.holds(file)
            ]
            for mirror, look in looks:
                seen = await look
                try:
                    if isinstance(seen, SourceError):
                        raise seen
                    self._pin(file, seen)
                    path = await self._obtain_from(mirror, seen, progress)
                except SourceError as error:
                    reasons.append(f"{mirror.name}: {error.message}")
                    continue
                for _, other in looks:
                    other.cancel()
                return path
        listed = " | ".join(reasons) or "none is configured that could"
        raise NoMirror(f"No mirror had {file.name}. {listed}")

    def _pin(self, file: ModelFile, seen: ModelFile) -> None:
        """Keep the digest that was stated first: a later one would be another file."""
        if file.sha256 is None and seen.sha256 is not None and file.hugging_face is not None:
            self._blobs.remember(file.hugging_face, seen.sha256)

    async def _obtain_from(self, mirror: Mirror, file: ModelFile, progress: Progress) -> Path:
        if file.sha256 is None:
            raise SourceError("it states no sha256, so nothing could be checked")
        async with self._blobs.hold(file.sha256):
            found = self._blobs.find(file.sha256)
            if found is not None:
                return found
            if _size(self._blobs.partial(file.sha256)):
                with suppress(DigestMismatch):
                    return await self._download(mirror, file, file.sha256, progress)
            return await self._download(mirror, file, file.sha256, progress)

    async def _download(
        self, mirror: Mirror, file: ModelFile, sha256: str, progress: Progress
    ) -> Path:
        """Fetch, going on after a failure as long as there is progress.

        Progress is what the mirror tells, for only it knows where its bytes go: the file may be
        inside another one.
        """
        partial = self._blobs.partial(sha256)
        furthest = _size(partial)

        def note(done: int, total: int | None) -> None:
            nonlocal furthest
            furthest = max(furthest, done)
            progress(done, total)

        for _ in range(limits.DOWNLOAD_RETRIES_MAX):
            before = furthest
            try:
                await mirror.fetch(file, partial, note)
            except SourceError:
                if furthest <= before:
                    raise
                continue
            return await self._blobs.commit(sha256)
        raise SourceError("it broke off too often")


async def _look(mirror: Mirror, file: ModelFile) -> ModelFile | SourceError:
    try:
        return await mirror.look(file)
    except SourceError as error:
        return error


def _local(path: Path) -> Path:
    if not path.expanduser().is_file():
        raise SourceError(f"There is no file {path}.")
    return path.expanduser().resolve()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
