"""The doors to the outside world: small protocols that adapters fill and services call.

Each has a contract suite in tests/contract; an adapter is finished when that suite passes on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from anser.core.contribution import Credit
from anser.core.errors import AnserError
from anser.core.fleet import EngineReport, Node
from anser.core.hub import ModelFile
from anser.core.ledger import Receipt
from anser.core.members import Key, Member

__all__ = [
    "Blobs",
    "Call",
    "Clock",
    "Engine",
    "MemberStore",
    "Mirror",
    "NodeStore",
    "Progress",
    "ReceiptStore",
    "Receiver",
    "Route",
    "SignedBatch",
    "Signer",
    "Starter",
    "StoredReceipt",
    "Stream",
    "UsageRow",
]


class Clock(Protocol):
    """Time. Durations come from `now`, dates from `wall`; the two are never mixed."""

    def now(self) -> float:
        """Monotonic seconds since an arbitrary origin."""
        ...

    def wall(self) -> float:
        """Unix seconds; may jump."""
        ...


class Route(Enum):
    """The inference routes that an engine is asked on."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One question to an engine: an OpenAI body of checked fields, in the engine's own names.

    For CHAT and COMPLETIONS the body always has `stream: true`, `stream_options.include_usage`
    and `n: 1`.
    """

    lease: str
    route: Route
    body: Mapping[str, object]


class Engine(Protocol):
    """Something that runs a model. Safe to call from many tasks at once."""

    async def inspect(self) -> EngineReport:
        """Ask what it serves. Raises EngineUnreachable or EngineBroken."""
        ...

    def generate(self, call: Call) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Open one answer: an iterator of OpenAI chunks, each one JSON object in one line of bytes.

        Ends normally only after the engine's own end of stream. Leaving the context aborts the
        work at the engine: within one token while it decodes, within one batch while it prefills;
        on return the engine no longer works on it. Raises EngineUnreachable, EngineBroken,
        EngineRefused, also between chunks.
        """
        ...

    async def embed(self, call: Call) -> bytes:
        """The OpenAI embeddings answer as JSON. Raises as `generate` does."""
        ...

    async def aclose(self) -> None:
        """Release everything; idempotent."""
        ...


class Receiver(Protocol):
    """Who is told of one answer as it comes, by calls on the event loop's thread."""

    def chunk(self, data: bytes) -> None:
        """The next OpenAI chunk, one JSON object in one line."""
        ...

    def ended(self) -> None:
        """The engine's own end of the stream has come: it no longer works on it."""
        ...

    def failed(self, error: AnserError) -> None:
        """The answer ends here, for the node's fault (EngineError) or the request's own.

        The engine no longer works on it, as far as can be known.
        """
        ...


class Stream(Protocol):
    """One answer under way at an engine."""

    def pause(self) -> None:
        """Tell of no more chunks, and soon take none from the engine; idempotent."""
        ...

    def resume(self) -> None:
        """Go on; idempotent."""
        ...

    def abort(self, stopped: Callable[[], None]) -> None:
        """Stop the engine; its receiver hears no more.

        `stopped` is called once, here or later, when the engine no longer works on it; at once
        where it has ended or failed. To be called once.
        """
        ...

    def hurry(self) -> None:
        """After `abort`: wait no longer for an engine that is slow to stop; idempotent."""
        ...


class Starter(ABC):
    """An engine that tells of its chunks by itself, without a task for each answer."""

    @abstractmethod
    def start(self, call: Call, receiver: Receiver) -> Stream:
        """Open one answer, as `Engine.generate` does; whatever fails is told to `receiver`.

        `receiver` hears nothing before this has returned, and nothing after `ended` or `failed`.
        """


class MemberStore(Protocol):
    """Members and keys that last. Every verb is durable on return and idempotent."""

    async def members(self) -> list[Member]:
        """All members, parents before children."""
        ...

    async def put_member(self, member: Member) -> None:
        """Insert or replace by `id`."""
        ...

    async def keys(self) -> list[Key]:
        """All keys, also expired and revoked ones."""
        ...

    async def put_key(self, key: Key) -> None:
        """Insert or replace by `id`."""
        ...

    async def forget_keys(self, ids: tuple[str, ...]) -> None:
        """Delete these keys; unknown ones are passed over."""
        ...


class NodeStore(Protocol):
    """Listed nodes that last. Every verb is durable on return and idempotent."""

    async def nodes(self) -> list[Node]:
        """All nodes, by id."""
        ...

    async def put_node(self, node: Node) -> None:
        """Insert or replace by `id`."""
        ...

    async def forget_node(self, node: str) -> None:
        """Delete; an unknown one is passed over."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedBatch:
    """One group commit: receipts as canonical JSON leaves, their Merkle root and its signature."""

    leaves: tuple[bytes, ...]
    receipts: tuple[Receipt, ...]
    root: bytes
    public_key: bytes
    signature: bytes
    signed_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredReceipt:
    """A receipt with what its proof needs: its index in the batch and all leaves of the batch."""

    index: int
    batch: SignedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """Sums of delivered tokens and counts of requests of one member and model."""

    member: str
    model: str
    requests: int
    failed: int
    cancelled: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class ReceiptStore(Protocol):
    """Receipts that last."""

    async def append(self, batch: SignedBatch) -> None:
        """Store a whole batch or nothing; durable on return.

        Appending the same receipts again changes nothing. Raises StoreFull, StoreLocked,
        StoreCorrupt.
        """
        ...

    async def find(self, request: str) -> StoredReceipt | None:
        """The receipt of one request."""
        ...

    async def usage(self, *, since_ms: int, until_ms: int, member: str | None) -> list[UsageRow]:
        """Sums over receipts ended in [since, until), of `member` and all below it, or of all."""
        ...

    async def recent(self, *, limit: int, member: str | None) -> list[Receipt]:
        """The newest receipts first, of `member` and all below it, or of all."""
        ...

    async def credits(self, *, since_ms: int, until_ms: int) -> list[Credit]:
        """Sums of credit (`core.contribution`) of receipts ended in [since, until).

        One for each owner and some hours; its time is the mean of those hours' receipts, by credit.
        """
        ...


class Signer(Protocol):
    """An Ed25519 key (RFC 8032) whose private part never leaves the adapter."""

    @property
    def public_key(self) -> bytes:
        """32 bytes."""
        ...

    def sign(self, message: bytes) -> bytes:
        """64 bytes over `message`."""
        ...


Progress = Callable[[int, int | None], None]
"""Called with (bytes so far, bytes in all if known)."""


class Blobs(Protocol):
    """Files by their sha256 (hex), and the digests that names were found to have."""

    def find(self, sha256: str) -> Path | None:
        """The file, if it is whole and has been checked."""
        ...

    def partial(self, sha256: str) -> Path:
        """Where a download of this file accumulates, so that it can be resumed."""
        ...

    def hold(self, sha256: str) -> AbstractAsyncContextManager[None]:
        """Be the only one, in any process, that works on the partial file. Raises SourceError."""
        ...

    async def commit(self, sha256: str) -> Path:
        """Check the partial file and keep it. Raises DigestMismatch: then it is deleted, never
        used; SourceError if there is none."""
        ...

    def remember(self, name: str, sha256: str) -> None:
        """Note the digest of the file of this name; idempotent."""
        ...

    def recall(self, name: str) -> str | None:
        """The digest that was noted last."""
        ...


class Mirror(Protocol):
    """A place that may hold a model's file."""

    @property
    def name(self) -> str:
        """For messages: "Hugging Face", "package index", ..."""
        ...

    def holds(self, file: ModelFile) -> bool:
        """Whether it is worth asking: without any I/O."""
        ...

    async def look(self, file: ModelFile) -> ModelFile:
        """Ask whether it can be fetched: within seconds, without fetching. Raises SourceError.

        Returns the file with the sha256 and size that this mirror states, where those that were
        given are None.
        """
        ...

    async def fetch(self, file: ModelFile, into: Path, progress: Progress) -> None:
        """Append to `into` what is missing, from its present length on. Raises SourceError.

        On return `into` has the size that the mirror states; whether it is the right file is
        for the caller to check. What came before a failure stays, so that it can be resumed.
        """
        ...
