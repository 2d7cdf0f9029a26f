"""The engine in this process with the real model: what only llama.cpp itself can show."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from anser.adapters.engine_llamacpp import LlamaCppEngine
from anser.adapters.llamacpp_native import usable_cores
from anser.config import EngineSettings
from anser.core.errors import (
    EngineBroken,
    EngineError,
    EngineRefused,
    EngineUnreachable,
    ModelFileError,
)
from tests.gguf_maker import Blueprint, string
from tests.llamacpp import (
    LONG_S,
    MODEL,
    chat,
    choices,
    collect,
    completion,
    finish_of,
    loaded,
    text_of,
)
from tests.model import model_path

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for the module, so that the model is loaded once."""
    return "asyncio"


@pytest.fixture(scope="module")
async def engine() -> AsyncGenerator[LlamaCppEngine]:
    """The engine, loaded."""
    async with loaded() as made:
        yield made


# ------------------------------------------------------------------------ answers


async def test_a_chat_goes_on_from_its_cache_though_others_had_its_slot() -> None:
    """What a slot held is kept when another member's request takes it, or whoever chats beside many
    others would have all of the chat read anew at each turn."""
    engine = LlamaCppEngine(MODEL, EngineSettings(slots=1, context_tokens=512))
    await engine.start(model_path())
    words = "tree river stone house light " * 12
    try:
        cached: list[int] = []
        for text in (words, "Anything else. " * 30, "Another thing. " * 30, words + "Go on."):
            usage = (await collect(engine, chat(text)))[-1]["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    finally:
        await engine.aclose()
    assert cached[3] > 50
    assert max(cached[:3]) < 30


async def test_a_seed_repeats_an_answer(engine: LlamaCppEngine) -> None:
    """The same seed gives the same answer, another one another."""
    ask = {"temperature": 1.2, "max_tokens": 24}
    first, again, other = [
        text_of(await collect(engine, chat("Tell me a story.", seed=seed, **ask)))
        for seed in (7, 7, 8)
    ]
    assert first == again != other


async def test_a_stop_string_is_found_across_tokens(engine: LlamaCppEngine) -> None:
    """A stop string ends the answer before it, wherever the tokens split it; no part leaks."""
    ask = {"temperature": 0, "max_tokens": 60}
    whole = text_of(await collect(engine, chat("Name three trees.", **ask)))
    middle = len(whole) // 2
    stop = whole[middle : middle + 7]
    cut = await collect(engine, chat("Name three trees.", stop=[stop], **ask))
    assert text_of(cut) == whole[: whole.index(stop)]
    assert finish_of(cut) == "stop"


async def test_the_role_comes_even_if_the_first_token_is_no_character(
    engine: LlamaCppEngine,
) -> None:
    """A first token that is half an emoji makes no chunk, and llama.cpp forgets the role then."""
    trees = "\N{DECIDUOUS TREE}" * 9
    talk = [
        {"role": "user", "content": f"Repeat after me: {trees}"},
        {"role": "assistant", "content": trees},
        {"role": "user", "content": f"Again: {trees}"},
    ]
    chunks = await collect(engine, chat(messages=talk, max_tokens=9, temperature=0))
    assert text_of(chunks)[0] == trees[0]
    assert choices(chunks)[0]["delta"]["role"] == "assistant"
    assert [c for c in choices(chunks) if c["delta"].get("role")] == [choices(chunks)[0]]


async def test_characters_are_never_split(engine: LlamaCppEngine) -> None:
    """A character of several tokens comes in one piece: each chunk is valid by itself."""
    schema = {"const": "🎈漢字🦆é\u200d👩🏽‍🚀"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    chunks = await collect(engine, chat("Write.", response_format=form, max_tokens=100))
    assert json.loads(text_of(chunks)) == schema["const"]
    assert all("\ufffd" not in json.dumps(chunk, ensure_ascii=False) for chunk in chunks)
    assert len([c for c in choices(chunks) if c["delta"].get("content")]) > 5


async def test_logprobs_come_with_each_token(engine: LlamaCppEngine) -> None:
    """Each token has its log probability and as many alternatives as were asked for."""
    chunks = await collect(engine, chat(logprobs=True, top_logprobs=3, max_tokens=5))
    entries = [e for c in choices(chunks) if c.get("logprobs") for e in c["logprobs"]["content"]]
    assert len(entries) == chunks[-1]["usage"]["completion_tokens"]
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3 for entry in entries)


async def test_a_text_completion_has_logprobs_too(engine: LlamaCppEngine) -> None:
    """`logprobs: 0` still means the chosen tokens' own."""
    for wish in (0, 2):
        chunks = await collect(engine, completion(logprobs=wish, max_tokens=4))
        entries = [e for c in choices(chunks) if c["logprobs"] for e in c["logprobs"]["content"]]
        assert len(entries) == 4


async def test_the_model_is_named_and_its_path_is_not(engine: LlamaCppEngine) -> None:
    """No chunk tells where the model's file lies, whatever name was asked for."""
    for call in (chat(model="another"), completion(model="another")):
        chunks = await collect(engine, call)
        assert {chunk["model"] for chunk in chunks} == {MODEL}
        assert str(model_path().parent) not in json.dumps(chunks)


async def test_tokens_may_be_the_prompt(engine: LlamaCppEngine) -> None:
    """A prompt of token ids is taken; ids that do not exist are refused."""
    assert text_of(await collect(engine, completion([504, 3260, 314])))
    for bad in ([99_999_999], [-1]):
        with pytest.raises(EngineRefused):
            await collect(engine, completion(bad))


# ---------------------------------------------------------------------- together


async def test_answers_share_their_steps(engine: LlamaCppEngine) -> None:
    """Four answers at once are computed together, token by token, not one after the other."""
    ask = {"max_tokens": 48, "ignore_eos": True}
    calls = [chat(f"Write about the number {n}.", **ask) for n in range(4)]
    order: list[int] = []

    async def follow(number: int) -> None:
        async with engine.generate(calls[number]) as answer:
            async for _ in answer:
                order.append(number)  # noqa: PERF401 - as they come, not in the end

    await asyncio.gather(*(follow(number) for number in range(4)))  # prompts are cached now
    order.clear()
    await asyncio.gather(*(follow(number) for number in range(4)))
    assert set(order[len(order) // 4 : len(order) // 2]) == {0, 1, 2, 3}


async def test_more_answers_than_slots_wait_their_turn(engine: LlamaCppEngine) -> None:
    """Nobody is refused, nobody is lost."""
    answers = await asyncio.gather(
        *(collect(engine, chat(f"{n}?", max_tokens=4)) for n in range(9))
    )
    assert all(finish_of(chunks) in {"stop", "length"} for chunks in answers)


async def test_a_slow_reader_holds_up_nobody(engine: LlamaCppEngine) -> None:
    """An answer whose reader pauses keeps a bounded buffer while others go on, and is whole."""
    call = chat("Count to one hundred.", max_tokens=300, ignore_eos=True)
    async with asyncio.timeout(LONG_S), engine.generate(call) as slow:
        chunks = [json.loads(await anext(slow))]
        for _ in range(3):
            await collect(engine, chat("Hello.", max_tokens=40))
            for stream in engine._streams:
                stream.validate()
        chunks += [json.loads(data) async for data in slow]
    assert chunks[-1]["usage"]["completion_tokens"] == 300


# ------------------------------------------------------------------------ aborting


async def test_decoding_stops_within_a_token(engine: LlamaCppEngine) -> None:
    """Leaving while it decodes takes about one token's time, not the rest of the answer."""
    waits: list[float] = []
    gaps: list[float] = []
    for number in range(4):
        call = chat(f"Write a very long story about {number}.", max_tokens=1_500, ignore_eos=True)
        async with engine.generate(call) as answer:
            for _ in range(6):
                began = time.monotonic()
                await anext(answer)
                gaps.append(time.monotonic() - began)
            began = time.monotonic()
        waits.append(time.monotonic() - began)
    assert min(waits) < 5 * sorted(gaps)[len(gaps) // 2] + 0.05


async def test_a_freed_slot_is_free(engine: LlamaCppEngine) -> None:
    """After all slots were left in mid-answer, one short answer has the engine for itself."""

    async def leave(number: int) -> None:
        call = chat(f"Write a long story about {number}.", max_tokens=1_500, ignore_eos=True)
        async with engine.generate(call) as answer:
            for _ in range(3):
                await anext(answer)

    await collect(engine, chat("Hello.", max_tokens=8, ignore_eos=True))
    began = time.monotonic()
    await collect(engine, chat("Hello.", max_tokens=8, ignore_eos=True))
    quiet_s = time.monotonic() - began
    best_s = LONG_S
    for _ in range(3):
        await asyncio.gather(*(leave(number) for number in range(4)))
        began = time.monotonic()
        await collect(engine, chat("Hello.", max_tokens=8, ignore_eos=True))
        best_s = min(best_s, time.monotonic() - began)
    assert best_s < 4 * quiet_s + 0.5


LONG = " ".join(str(number) for number in range(250))


async def test_prefill_stops_within_a_batch(engine: LlamaCppEngine) -> None:
    """Leaving during a long prompt takes about one batch of it, not the rest of it."""
    began = time.monotonic()
    await collect(engine, chat(f"First: {LONG}", max_tokens=1))
    whole_s = time.monotonic() - began
    async with engine.generate(chat(f"Second: {LONG}", max_tokens=1)):
        await asyncio.sleep(whole_s / 10)
        began = time.monotonic()
    assert time.monotonic() - began < whole_s / 2


async def test_a_long_prompt_holds_up_nobody(engine: LlamaCppEngine) -> None:
    """While a long prompt is computed, another answer goes on, token by token."""
    during = 0
    async with asyncio.TaskGroup() as tasks:
        slow = tasks.create_task(collect(engine, chat(f"Third: {LONG}", max_tokens=1)))
        async with engine.generate(chat("Hi.", max_tokens=400, ignore_eos=True)) as answer:
            async for _ in answer:
                if slow.done():
                    break
                during += 1
    assert during > 8


async def test_hidden_tokens_cannot_be_forced(engine: LlamaCppEngine) -> None:
    """Control tokens make no chunk: an answer made of them could not be aborted."""
    with pytest.raises(EngineRefused, match="control token"):
        await collect(engine, chat(logit_bias={"5": 100}))
    chunks = await collect(engine, chat(logit_bias={"5": -100, "504": 5}, max_tokens=2))
    assert finish_of(chunks)


# --------------------------------------------------------------------------- its life


async def test_answers_wait_until_it_has_loaded() -> None:
    """An engine takes questions before its model is there, and says that it still loads."""
    made = LlamaCppEngine(MODEL, EngineSettings(slots=1, context_tokens=256))
    try:
        with pytest.raises(EngineUnreachable, match="loaded"):
            await made.inspect()
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(collect(made, chat(max_tokens=2)))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            made.validate()
            await made.start(model_path())
        assert finish_of(waiting.result())
    finally:
        await made.aclose()


async def test_a_model_that_cannot_load_is_told_to_all(tmp_path: Path) -> None:
    """A file that passes its examination but is no model: start raises, and so do answers."""
    plan = Blueprint(keys=[("general.architecture", string("no-such-architecture"))])
    file = tmp_path / "model.gguf"
    file.write_bytes(plan.build())
    made = LlamaCppEngine(MODEL, EngineSettings(slots=1))
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(_failure(made))
        with pytest.raises(EngineBroken, match="could not load"):
            await made.start(file)
    assert isinstance(waiting.result(), EngineError)
    with pytest.raises(EngineError):
        await made.inspect()
    made.validate()
    await made.aclose()


async def _failure(engine: LlamaCppEngine) -> Exception | None:
    try:
        await collect(engine, chat())
    except EngineError as error:
        return error
    return None


LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
DOUBLES = (
    "{% set n = namespace(x='ab') %}{% for m in messages %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
REACHES = "{{ messages.__class__.__base__.__subclasses__() }}"


@pytest.mark.parametrize("template", [LOOPS, DOUBLES, REACHES, "{% nonsense %}"])
async def test_a_hostile_template_is_never_loaded(tmp_path: Path, template: str) -> None:
    """A chat template that loops, explodes or reaches out is refused before llama.cpp runs it."""
    plan = Blueprint()
    plan.keys.append(("tokenizer.chat_template", string(template)))
    file = tmp_path / "model.gguf"
    file.write_bytes(plan.build())
    with pytest.raises(ModelFileError, match="chat template"):
        await LlamaCppEngine(MODEL, EngineSettings(slots=1)).start(file)


async def test_a_damaged_file_is_never_loaded(tmp_path: Path) -> None:
    """A truncated file, another kind of file, an endless header, none at all: each is refused."""
    endless = Blueprint(keys=[("k", b"\x09\0\0\0\x00\0\0\0" + (70 << 20).to_bytes(8, "little"))])
    cases = {
        "truncated": Blueprint().build()[:-8],
        "pickle": b"\x80\x04" * 40,
        "more than can be|truncated": endless.build(),
    }
    for number, (words, data) in enumerate(cases.items()):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(data)
        with pytest.raises(ModelFileError, match=words):
            await LlamaCppEngine(MODEL, EngineSettings(slots=1)).start(file)
    with pytest.raises(ModelFileError, match="cannot be read"):
        await LlamaCppEngine(MODEL, EngineSettings(slots=1)).start(tmp_path / "absent.gguf")


async def test_nothing_of_it_can_be_reached_from_outside() -> None:
    """The library's own HTTP listener is on no TCP port, and its socket's file is gone."""
    before = _listening()
    async with loaded() as engine:
        assert finish_of(await collect(engine, chat(max_tokens=1)))
        assert not _listening() - before
        rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        inodes = _sockets()
        paths = [row[7] for row in rows if len(row) > 7 and row[6] in inodes]
        mine = [path for path in paths if path.endswith("/.sock")]
        assert mine
        assert not any(Path(path).exists() for path in mine)


def _sockets() -> set[str]:
    """The inodes of this process's sockets."""
    targets = [_target(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
    return {target[8:-1] for target in targets if target.startswith("socket:[")}


def _listening() -> set[str]:
    """Those of them that listen on a TCP port."""
    listening, inodes = "0A", _sockets()
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    return {row[9] for row in rows if row[3] == listening} & inodes


def _target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except OSError:
        return ""


def test_cores_are_counted_as_allowed() -> None:
    """Neither more than there are nor none."""
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
