"""The answers to one request as one: a single one as it is, several (`n`, prompts) merged.

Theory of operation. All demands get their place in the member's limits at once, or none does. Then
each runs in a task of its own and puts its pieces, in the order in which they come, into one
bounded queue; whoever reads the merged answer takes them from there, each with its choice's index.
The first answer to begin begins the whole; if one fails, so does the whole, and the others are
cancelled at their engines.

Invariants: the queue holds at most STREAM_BUFFER_MAX entries, so a slow reader slows every engine;
no task and no place outlives `answer_all`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from anser.api.demands import Asked
from anser.core.errors import AnserError
from anser.core.ledger import Usage
from anser.core.limits import STREAM_BUFFER_MAX
from anser.services.chunks import Piece
from anser.services.gateway import Answer, Demand, Gateway
from anser.services.members import Members
from anser.services.reservation import Reservation

__all__ = ["Answers", "Merged", "Part", "answer_all", "places_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of the choice `index`."""

    index: int
    piece: Piece


class Answers(Protocol):
    """All answers to one request: iterate their parts; `usage` is known at the end."""

    @property
    def node(self) -> str:
        """The node of the first answer."""
        ...

    @property
    def lease(self) -> str:
        """Its lease."""
        ...

    @property
    def limits(self) -> dict[str, str]:
        """The x-ratelimit headers of the member who asks."""
        ...

    @property
    def usage(self) -> Usage:
        """What it has cost: each prompt once, every answer's tokens."""
        ...

    def __aiter__(self) -> AsyncIterator[Part]: ...


@asynccontextmanager
async def answer_all(gateway: Gateway, asked: Asked) -> AsyncGenerator[Answers]:
    """Start every demand; yields once the first has begun. Leaving early cancels them all.

    Raises what `Gateway.answer` raises, also between the parts.
    """
    if len(asked.demands) == 1:
        async with gateway.answer(asked.demands[0]) as answer:
            yield _Single(answer)
        return
    with places_for(gateway.members, asked.demands, param="n") as places:
        async with _merged(gateway, asked, places) as merged:
            yield merged


@asynccontextmanager
async def _merged(
    gateway: Gateway, asked: Asked, places: list[Reservation]
) -> AsyncGenerator[Merged]:
    merged = Merged(asked)
    failure: AnserError | None = None
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(merged.run(gateway, index, place))
            for index, place in enumerate(places)
        ]
        try:
            await merged.begin()
            yield merged
        except AnserError as error:
            failure = error
        for task in tasks:
            task.cancel()
    if failure is not None:
        raise failure


@contextmanager
def places_for(
    members: Members, demands: Sequence[Demand], *, param: str
) -> Generator[list[Reservation]]:
    """A place for each demand of one request; those that are left over are given back.

    Raises LimitReached, or InvalidField for `param` where the member can never have so many.
    """
    sizes = [(demand.prompt_tokens, demand.output_tokens_max) for demand in demands]
    places = members.reserve_all(demands[0].member, sizes, param=param)
    try:
        yield places
    finally:
        for place in places:
            place.withdraw()


@dataclass(frozen=True, slots=True)
class _Single:
    """One answer, with its pieces numbered 0."""

    answer: Answer

    @property
    def node(self) -> str:
        return self.answer.node

    @property
    def lease(self) -> str:
        return self.answer.lease

    @property
    def limits(self) -> dict[str, str]:
        return self.answer.limits

    @property
    def usage(self) -> Usage:
        return self.answer.usage

    async def __aiter__(self) -> AsyncIterator[Part]:
        async for piece in self.answer:
            yield Part(index=0, piece=piece)


@dataclass(frozen=True, slots=True)
class _Ended:
    """One answer is whole."""


_Entry = Part | Answer | AnserError | _Ended


@dataclass(slots=True)
class Merged:
    """Several answers under way, as Answers."""

    asked: Asked
    node: str = ""
    lease: str = ""
    limits: dict[str, str] = field(default_factory=dict[str, str])
    _answers: list[Answer | None] = field(default_factory=list[Answer | None])
    _queue: asyncio.Queue[_Entry] = field(
        default_factory=lambda: asyncio.Queue[_Entry](STREAM_BUFFER_MAX)
    )

    def __post_init__(self) -> None:
        self._answers = [None] * len(self.asked.demands)

    def __repr__(self) -> str:
        begun = sum(answer is not None for answer in self._answers)
        return f"<Merged {begun}/{len(self._answers)} begun, {self._queue.qsize()} waiting>"

    @property
    def usage(self) -> Usage:
        """Each prompt's tokens once, every answer's own."""
        total = Usage()
        for index, answer in enumerate(self._answers):
            if answer is None:
                continue
            usage = answer.usage
            if index % self.asked.answers_per_prompt:
                usage = Usage(completion_tokens=usage.completion_tokens)
            total += usage
        return total

    def __aiter__(self) -> AsyncIterator[Part]:
        return self._parts()

    async def begin(self) -> None:
        """Wait until the first answer has begun. Raises what keeps an answer from beginning."""
        entry = await self._queue.get()
        if isinstance(entry, AnserError):
            raise entry
        assert isinstance(entry, Answer)
        self.node, self.lease, self.limits = entry.node, entry.lease, entry.limits

    async def run(self, gateway: Gateway, index: int, place: Reservation) -> None:
        """Carry one answer into the queue."""
        try:
            async with gateway.answer(self.asked.demands[index], place) as answer:
                self._answers[index] = answer
                await self._queue.put(answer)
                async for piece in answer:
                    await self._queue.put(Part(index=index, piece=piece))
            await self._queue.put(_Ended())
        except AnserError as error:
            await self._queue.put(error)

    async def _parts(self) -> AsyncIterator[Part]:
        under_way = len(self._answers)
        while under_way:
            entry = await self._queue.get()
            if isinstance(entry, Part):
                yield entry
            elif isinstance(entry, AnserError):
                raise entry
            elif isinstance(entry, _Ended):
                under_way -= 1
