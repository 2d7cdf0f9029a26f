"""The machines behind the nodes: engines in memory that go wrong, slow down and lie as planned.

Each machine counts by itself what it has made for each lease, so what the platform charges can be
held against it.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from anser.adapters.memory_engine import Fault, MemoryEngine, Pace
from anser.core.errors import EngineDeclined
from anser.core.fleet import EngineReport, ServedModel
from anser.core.ledger import Usage
from anser.ports import Call
from tests.simulation.plan import Lie, MachinePlan, draw_fault

__all__ = ["LIE_TOKENS", "Machine", "Made"]

LIE_TOKENS = 6  # few enough to be believed
_TEXT = re.compile(rb'"(?:content|text)":"[^"]')


@dataclass(slots=True)
class Made:
    """What a machine has made for one lease."""

    tokens: int = 0
    usage: Usage | None = None  # at its end, and whatever it then says


class Machine:
    """One node's machine: it lasts while its node is removed and listed again."""

    def __init__(self, plan: MachinePlan, seed: int) -> None:
        self.plan = plan
        self.open = 0
        self.declined = 0
        self.made: dict[str, Made] = {}
        self._seed = seed
        self._pace = plan.pace
        self._engine = self._boot()

    def connect(self) -> Machine._Connection:
        """Its engine, as the platform sees it from now on."""
        self._engine = self._boot()
        return Machine._Connection(self, self._engine)

    def crash(self) -> None:
        """Lose all that runs, and answer nothing."""
        self._engine.go_down()

    def recover(self) -> None:
        """Answer again."""
        self._engine.come_up()

    def slow_down(self, times: float) -> None:
        """Take so many times as long for everything from now on."""
        pace = self.plan.pace
        self._pace = self._engine._pace = Pace(
            step_s=pace.step_s * times,
            step_each_s=pace.step_each_s * times,
            prefill_tokens_s=pace.prefill_tokens_s / times,
            cache_tokens=pace.cache_tokens,
        )

    def validate(self) -> None:
        """It never has more to do at once than it says it has slots."""
        self._engine.validate()
        assert 0 <= self.open <= self.plan.claims, f"{self.plan.node} is overbooked"

    def _boot(self) -> MemoryEngine:
        return MemoryEngine(
            self.plan.models[0], slots=self.plan.slots, pace=self._pace, fault_of=self._fault
        )

    def _fault(self, call: Call) -> Fault | None:
        return draw_fault(random.Random(f"{self._seed} {call.lease}"), self.plan.faults)

    @contextmanager
    def _slot(self, call: Call) -> Iterator[Made]:
        assert call.lease not in self.made, f"{call.lease} runs twice"
        made = self.made[call.lease] = Made()
        self.open += 1
        try:
            self.validate()
            if self.plan.declines and self.open > self.plan.slots:
                self.declined += 1
                raise EngineDeclined("All slots are taken.")
            yield made
        finally:
            self.open -= 1

    def _tell(self, data: bytes, made: Made) -> bytes:
        """A chunk as it leaves the machine; its last one may lie."""
        made.tokens += _TEXT.search(data) is not None
        if b'"usage":{' not in data:
            return data
        answer: dict[str, Any] = json.loads(data)
        usage = answer["usage"]
        details = usage.setdefault("prompt_tokens_details", {})
        made.usage = Usage(
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=details.get("cached_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
        )
        match self.plan.lie:
            case None:
                return data
            case Lie.CACHED:
                details["cached_tokens"] = usage["prompt_tokens"] + 1_000
            case Lie.PROMPT:
                usage["prompt_tokens"] += LIE_TOKENS
            case Lie.MORE:
                usage["completion_tokens"] = made.tokens + LIE_TOKENS
            case Lie.LESS:
                usage["completion_tokens"] = made.tokens - LIE_TOKENS
            case Lie.WILD:
                usage |= {"prompt_tokens": 10**12, "completion_tokens": 10**12}
                details["cached_tokens"] = -7
        return json.dumps(answer, separators=(",", ":")).encode()

    def credible(self, made: Made, *, estimate: int, before: int) -> Usage:
        """What may be believed of a lease: its own word as far as that can be, else what came.

        What others had said `before` is no part of the prompt.
        """
        usage = self._credible(made, estimate=estimate)
        if not before or made.usage is None or self.plan.lie is Lie.WILD:
            return usage
        prompt = max(1, usage.prompt_tokens - before)
        cached = min(usage.cached_tokens, prompt)
        return replace(usage, prompt_tokens=prompt, cached_tokens=cached)

    def _credible(self, made: Made, *, estimate: int) -> Usage:
        word, tokens = made.usage, made.tokens
        if word is None or self.plan.lie is Lie.WILD:
            return Usage(prompt_tokens=estimate, completion_tokens=tokens)
        match self.plan.lie:
            case Lie.CACHED:
                return replace(word, cached_tokens=word.prompt_tokens)
            case Lie.PROMPT:
                return replace(word, prompt_tokens=word.prompt_tokens + LIE_TOKENS)
            case Lie.MORE:
                return replace(word, completion_tokens=tokens + LIE_TOKENS)
            case Lie.LESS if tokens > LIE_TOKENS:
                return replace(word, completion_tokens=tokens - LIE_TOKENS)
            case _:
                return word

    class _Connection:
        """Fills the Engine port."""

        def __init__(self, machine: Machine, engine: MemoryEngine) -> None:
            self._machine, self._engine = machine, engine

        async def inspect(self) -> EngineReport:
            plan, report = self._machine.plan, await self._engine.inspect()
            models = tuple(ServedModel(name=model, context_tokens=4_096) for model in plan.models)
            return replace(report, slots=plan.claims, models=models)

        @asynccontextmanager
        async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
            with self._machine._slot(call) as made:
                try:
                    async with (
                        self._engine.generate(call) as chunks,
                        aclosing(self._chunks(chunks, made)) as told,
                    ):
                        yield told
                finally:
                    await asyncio.sleep(self._machine.plan.stop_s)

        async def _chunks(self, chunks: AsyncIterator[bytes], made: Made) -> AsyncGenerator[bytes]:
            async for data in chunks:
                yield self._machine._tell(data, made)

        async def embed(self, call: Call) -> bytes:
            with self._machine._slot(call) as made:
                return self._machine._tell(await self._engine.embed(call), made)

        async def aclose(self) -> None:
            await self._engine.aclose()
