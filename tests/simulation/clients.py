"""The clients: what each did, what it got, and what its receipt must therefore say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

from anser.core.errors import (
    AnserError,
    DeadlineUnreachable,
    EngineError,
    LimitReached,
    ModelNotFound,
    NoNode,
    Overloaded,
    StoreError,
)
from anser.core.ledger import Outcome, Receipt, Usage
from anser.core.prefix import chain
from anser.ports import Clock, Route
from anser.services.gateway import Demand, Gateway
from tests.simulation.machines import LIE_TOKENS
from tests.simulation.plan import Behaviour, ClientPlan

__all__ = ["Client"]

_REFUSED = (LimitReached, ModelNotFound, Overloaded)  # before admission: no receipt


@dataclass
class Client:
    """One request from its client's side."""

    plan: ClientPlan
    clock: Clock
    tell: Callable[[str], None]
    receipted: Callable[[str], bool]  # whether its receipt is durable now
    asked: bool = False
    text: str = ""
    tokens: int = 0
    before: int = 0  # of these, from nodes that have died since
    finishes: int = 0
    usage: Usage | None = None
    left: bool = False
    error: AnserError | None = None
    pieces: int = 0
    out_of_tries: bool = False  # the scheduler has sent it away: all its nodes failed
    pushed_out: bool = False  # or the queue was full, and others had less in it

    @property
    def demand(self) -> Demand:
        """What it asks for."""
        plan = self.plan
        prompt = " ".join(f"{plan.member}-{number}" for number in range(plan.words))
        wanted: dict[Route, dict[str, object]] = {
            Route.CHAT: {"messages": [{"role": "user", "content": prompt}]},
            Route.COMPLETIONS: {"prompt": prompt},
            Route.EMBEDDINGS: {"input": prompt},
        }
        length = {"max_tokens": plan.tokens_max} if plan.route is not Route.EMBEDDINGS else {}
        wait_s = plan.deadline_s
        return Demand(
            id=plan.id,
            member=plan.member,
            route=plan.route,
            model=plan.model,
            body=wanted[plan.route] | length,
            prompt_tokens=int(plan.words * plan.estimate),
            prompt_bytes=len(prompt),
            output_tokens_max=plan.tokens_max if length else 0,
            chain=chain(prompt.encode()) if plan.cached else (),
            batch=plan.batch,
            deadline=None if wait_s is None else self.clock.now() + wait_s,
        )

    async def live(self, gateway: Gateway) -> None:
        """Come, ask, take what comes, and go."""
        await asyncio.sleep(self.plan.at_s)
        self.asked = True
        self.tell(f"{self.plan.id} asks: {self.plan.behaviour.value}")
        try:
            if self.plan.behaviour is Behaviour.CANCEL:
                await self._hurry(gateway)
            else:
                await self._ask(gateway)
        except AnserError as error:
            self.error = error
        end = "left" if self.left else self.error.code if self.error else "got it all"
        self.tell(f"{self.plan.id} {end}, {self.tokens} tokens")

    async def _hurry(self, gateway: Gateway) -> None:
        """Ask in a task of its own that is cancelled, as a server does when its client is gone."""
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(self._ask(gateway))
            await asyncio.wait({asking}, timeout=self.plan.moment_s)
            self.left = asking.cancel()
            if self.plan.pieces % 2:  # a server that is stopped cancels what it cancels already
                await asyncio.wait({asking}, timeout=self.plan.pieces / 1_000)
                asking.cancel()

    async def _ask(self, gateway: Gateway) -> None:
        try:
            if self.plan.route is Route.EMBEDDINGS:
                self.usage = (await gateway.embed(self.demand)).usage
                self._finish()
            else:
                await self._converse(gateway)
        except AnserError as error:
            self.error = error  # not raised: it would take the task group with it

    async def _converse(self, gateway: Gateway) -> None:
        plan = self.plan
        async with gateway.answer(self.demand) as answer:
            async for piece in answer:
                self.pieces += 1
                assert self.finishes == 0 or piece.usage is not None, "something after the end"
                self._take(piece.data)
                if piece.finish is not None:
                    self._finish()
                self.usage = piece.usage or self.usage
                if plan.behaviour is Behaviour.LEAVE and self.pieces > plan.pieces:
                    self.left = True
                    return
                if plan.behaviour is Behaviour.DAWDLE:
                    await asyncio.sleep(plan.moment_s / 10)

    def _finish(self) -> None:
        self.finishes += 1
        assert self.receipted(self.plan.id), "an end before its receipt"

    def _take(self, data: bytes) -> None:
        for choice in json.loads(data)["choices"]:
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            self.text += text
            self.tokens += bool(text)

    def check(self, receipts: list[Receipt], expected: str, *, liars: set[str]) -> None:
        """Assert that what it saw and what the ledger says are one story.

        Of what came from `liars` the ledger may say a few tokens more or less than came.
        """
        assert self.finishes <= 1, "two ends"
        assert expected.startswith(self.text), "not the words of the engine"
        if self.error is None and not self.left:
            assert self.finishes, "neither an end nor an error"
        if self.out_of_tries and not self.left:
            assert isinstance(self.error, EngineError), "no word of its nodes"
        if self.pushed_out and not self.left:
            # Or it had just been told that its model has gone.
            assert isinstance(self.error, Overloaded | NoNode), "no word of the full queue"
        refused = isinstance(self.error, _REFUSED) and not self.pushed_out
        if not self.asked or refused:
            assert receipts == [], "a receipt of what was never admitted"
        elif isinstance(self.error, NoNode | DeadlineUnreachable):  # at the door, or later
            assert len(receipts) <= 1, "two receipts"
        else:
            assert len(receipts) == 1, f"{len(receipts)} receipts"
        for receipt in receipts:
            self._check_receipt(receipt, liars)

    def _check_receipt(self, receipt: Receipt, liars: set[str]) -> None:
        lied = bool(receipt.leases) and receipt.leases[-1].node in liars
        off = abs(receipt.usage.completion_tokens - self.tokens)
        assert off <= LIE_TOKENS * lied, "delivered is not what is receipted"
        assert receipt.member == self.plan.member
        assert receipt.model == self.plan.model
        leases = [ms for lease in receipt.leases for ms in (lease.started_ms, lease.ended_ms)]
        if any("+" in lease.lease for lease in receipt.leases):  # two ran at once
            assert all(lease.started_ms <= lease.ended_ms for lease in receipt.leases)
            leases = [lease.ended_ms for lease in receipt.leases]
        slower = [lease for lease in receipt.leases if lease.error == "hedged"]
        assert len(slower) <= 1, "hedged twice"
        assert not any(lease.completion_tokens for lease in slower), "the slower one said something"
        first = [] if receipt.first_token_ms is None else [receipt.first_token_ms]
        for moments in (leases, first):  # whatever the wall clock did meanwhile
            whole = [receipt.queued_ms, *moments, receipt.ended_ms]
            assert whole == sorted(whole), "time went back"
        assert sum(lease.error is None for lease in receipt.leases) <= 1
        assert len({lease.lease for lease in receipt.leases}) == len(receipt.leases)
        if self.finishes:
            assert receipt.outcome is Outcome.FINISHED
            assert self.usage is None or receipt.usage == self.usage
        elif isinstance(self.error, StoreError):
            assert receipt.outcome is Outcome.FINISHED, "all but its end was delivered"
        elif self.error is not None and not self.left:
            assert receipt.outcome is Outcome.FAILED
            assert receipt.error == self.error.code
