"""The engine for simulation keeps the step model, repeats itself exactly, and fails as told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from anser.adapters.memory import MemoryClock
from anser.adapters.memory_engine import Fault, FaultKind, MemoryEngine, Pace
from anser.core.errors import (
    ContextTooLong,
    EngineBroken,
    EngineError,
    EngineRefused,
    EngineUnreachable,
)
from anser.ports import Call, Route
from tests.simulation.virtual import run

_T = TypeVar("_T")
PACE = Pace(step_s=0.02, step_each_s=0.001, prefill_tokens_s=1_000, cache_tokens=128)


def virtually(main: Coroutine[Any, Any, _T]) -> tuple[_T, float]:
    """The outcome, and how long it took by the engine's own time."""
    clock = MemoryClock()
    began = clock.now()
    outcome = run(lambda: main, clock=clock, jumped=lambda: None)
    return outcome, clock.now() - began


def call(text: str = "hello", tokens: int = 10, **fields: object) -> Call:
    return Call(
        lease="a", route=Route.COMPLETIONS, body={"prompt": text, "max_tokens": tokens, **fields}
    )


async def collect(engine: MemoryEngine, ask: Call) -> list[dict[str, Any]]:
    async with engine.generate(ask) as answer:
        chunks = [json.loads(data) async for data in answer]
    engine.validate()
    return chunks


async def read_into(seen: list[bytes], engine: MemoryEngine) -> None:
    async with engine.generate(call()) as answer:
        async for data in answer:
            seen.append(data)  # noqa: PERF401 - what came before a failure counts


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in range(count))


def test_a_step_takes_longer_with_each_answer() -> None:
    """t0 + t1 x running answers for each token of each answer."""

    async def together(count: int) -> None:
        engine = MemoryEngine(pace=PACE)
        await asyncio.gather(*(collect(engine, call(f"p{n}")) for n in range(count)))

    _, alone_s = virtually(together(1))
    _, four_s = virtually(together(4))
    assert alone_s == pytest.approx(10 * 0.021 + 0.002, abs=0.01)
    assert four_s == pytest.approx(10 * 0.024 + 4 * 0.002, abs=0.01)


def test_prompts_take_their_turn() -> None:
    """Prompt tokens are computed at one rate for the whole engine, cached ones not at all."""

    async def one_after_the_other() -> list[int]:
        engine = MemoryEngine(pace=PACE)
        first = await collect(engine, call(words(100), 1))
        again = await collect(engine, call(words(100), 1))
        return [c[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] for c in (first, again)]

    cached, took_s = virtually(one_after_the_other())
    assert cached == [0, 64]
    assert took_s == pytest.approx(0.1 + 0.036 + 2 * 0.021, abs=0.01)


def test_the_cache_forgets_the_least_recently_used() -> None:
    """It holds as many tokens as it was given, and survives no outage."""

    async def crowd() -> list[int]:
        engine = MemoryEngine(pace=PACE)
        for text in (words(64), f"other {words(64)}", f"third {words(64)}"):
            await collect(engine, call(text, 1))
        old = await collect(engine, call(words(64), 1))
        new = await collect(engine, call(words(64), 1))
        engine.go_down()
        engine.come_up()
        fresh = await collect(engine, call(words(64), 1))
        usages = [chunks[-1]["usage"]["prompt_tokens_details"] for chunks in (old, new, fresh)]
        return [usage["cached_tokens"] for usage in usages]

    assert virtually(crowd())[0] == [0, 64, 0]


def test_it_repeats_itself() -> None:
    """The same prompt and seed give the same answer in any engine; others differ."""

    async def say(seed: int) -> str:
        return text_of(await collect(MemoryEngine(), call(seed=seed)))

    assert virtually(say(1))[0] == virtually(say(1))[0] != virtually(say(2))[0]


def test_an_answer_ends_by_itself_or_is_cut() -> None:
    """`stop` where it ends by itself, `length` where the caller or the context cuts it."""

    async def finish(tokens: int | None, context: int = 4_096) -> str:
        engine = MemoryEngine(context_tokens=context)
        body = {"prompt": "hello", **({} if tokens is None else {"max_tokens": tokens})}
        chunks = await collect(engine, Call(lease="a", route=Route.COMPLETIONS, body=body))
        return str(chunks[-2]["choices"][0]["finish_reason"])

    assert virtually(finish(None))[0] == virtually(finish(1_000))[0] == "stop"
    assert virtually(finish(3))[0] == virtually(finish(1_000, context=10))[0] == "length"


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize(
    ("kind", "error"), [(FaultKind.REFUSE, EngineRefused), (FaultKind.BREAK, EngineBroken)]
)
def test_it_fails_when_told(kind: FaultKind, error: type[EngineError], after: int) -> None:
    """Before the first token or after some: the chunks before the fault come, and the slot goes
    back."""

    async def fail() -> int:
        fault = Fault(kind=kind, after_tokens=after)
        engine = MemoryEngine(slots=1, fault_of=lambda ask: fault if ask.lease == "a" else None)
        seen: list[bytes] = []
        with pytest.raises(error):
            await read_into(seen, engine)
        good = Call(lease="b", route=Route.COMPLETIONS, body={"prompt": "x", "max_tokens": 1})
        assert await collect(engine, good)
        return len(seen)

    assert virtually(fail())[0] == after


def test_it_stalls_when_told() -> None:
    """A stalled answer says nothing more until its reader leaves."""

    async def stall() -> int:
        fault = Fault(kind=FaultKind.STALL, after_tokens=2)
        engine = MemoryEngine(slots=1, fault_of=lambda _: fault)
        seen: list[bytes] = []
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read_into(seen, engine), 60)
        engine.validate()
        return len(seen)

    seen, took_s = virtually(stall())
    assert seen == 2
    assert took_s == pytest.approx(60, abs=0.1)


def test_when_it_goes_down_everything_goes() -> None:
    """Running answers break off, nothing new is taken, and it says so when asked."""

    async def fall() -> int:
        engine = MemoryEngine(pace=PACE)
        broken = 0

        async def read() -> None:
            nonlocal broken
            try:
                await collect(engine, call(tokens=1_000))
            except EngineUnreachable:
                broken += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(read())
            await asyncio.sleep(0.1)
            engine.go_down()
            assert "down" in repr(engine)
        with pytest.raises(EngineUnreachable):
            await engine.inspect()
        engine.come_up()
        assert (await engine.inspect()).slots == 4
        return broken

    assert virtually(fall())[0] == 3


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    """As a real engine does."""

    async def ask() -> None:
        with pytest.raises(ContextTooLong, match="at most 64"):
            await collect(MemoryEngine(context_tokens=64), call(words(64)))

    virtually(ask())
