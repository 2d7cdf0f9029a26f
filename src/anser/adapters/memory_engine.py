"""An engine without a model, for simulation: its answers are words, its time is the loop's.

Theory of operation: it follows the step model of the scheduler's design. A decode step takes
`step_s + step_each_s x running answers` and gives each one word; prompts are computed at
`prefill_tokens_s`, one batch after the other whoever's they are; the prefix cache holds blocks of
64 tokens, the least recently used goes first. A token is a word. What it says depends on the prompt
and the seed alone, so that a run repeats exactly. It sleeps on the loop's clock and on nothing
else, so that virtual time works.

Faults are asked for per answer; `go_down` takes the whole engine away, with all that runs.

Invariants: at most `slots` answers hold a slot; a slot is given back when its answer is left.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import zlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from anser.core.errors import (
    ContextTooLong,
    EngineBroken,
    EngineRefused,
    EngineStalled,
    EngineUnreachable,
)
from anser.core.fleet import EngineKind, EngineReport, ServedModel
from anser.ports import Call, Route

__all__ = ["Fault", "FaultKind", "MemoryEngine", "Pace"]

_BLOCK_TOKENS = 64
_BATCH_TOKENS = 512
_STALL_S = 86_400.0
_WORDS = "ash birch cedar elm fir hazel larch lime maple oak pine plane rowan spruce yew".split()
_ANY_WORD = re.compile("|".join(_WORDS))


class FaultKind(Enum):
    """What can go wrong with one answer."""

    REFUSE = "refuse"  # the request is at fault
    BREAK = "break"  # the engine fails
    STALL = "stall"  # it goes silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Goes wrong after so many tokens; 0 is before the first chunk."""

    kind: FaultKind
    after_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast it is; times in seconds."""

    step_s: float = 0.02
    step_each_s: float = 0.001
    prefill_tokens_s: float = 4_000.0
    cache_tokens: int = 40_000


def _no_fault(_call: Call) -> Fault | None:
    return None


class MemoryEngine:
    """See the module."""

    def __init__(
        self,
        model: str = "memory",
        *,
        slots: int = 4,
        context_tokens: int = 4_096,
        pace: Pace | None = None,
        fault_of: Callable[[Call], Fault | None] = _no_fault,
    ) -> None:
        self._model = model
        self._slots = slots
        self._context_tokens = context_tokens
        self._pace = pace or Pace()
        self._fault_of = fault_of
        self._free = asyncio.Semaphore(slots)
        self._prefill = asyncio.Lock()
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._running = 0
        self._down = False
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "down" if self._down else "up"
        return f"<MemoryEngine {self._model} {state} {self._running}/{self._slots}>"

    def validate(self) -> None:
        """Slots and cache keep within their bounds."""
        assert 0 <= self._running <= self._slots
        assert len(self._cache) * _BLOCK_TOKENS <= self._pace.cache_tokens

    def go_down(self) -> None:
        """Fail what runs and whatever is asked from now on."""
        self._down = True

    def come_up(self) -> None:
        """Serve again, with an empty cache."""
        self._down = False
        self._cache.clear()

    # ---------------------------------------------------------------------- the port

    async def inspect(self) -> EngineReport:
        """What it serves."""
        self._check_up()
        model = ServedModel(name=self._model, context_tokens=self._context_tokens)
        return EngineReport(
            kind=EngineKind.LLAMACPP, version="memory", models=(model,), slots=self._slots
        )

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """Open one answer; see the port."""
        self._check_up()
        async with self._free:
            self._running += 1
            answer = self._answer(call)
            try:
                yield answer
            finally:
                self._running -= 1
                await answer.aclose()

    async def embed(self, call: Call) -> bytes:
        """Eight numbers for each input, of length one."""
        self._check_up()
        given: Any = call.body.get("input")
        texts = [given] if isinstance(given, str) else [str(each) for each in given]
        tokens = sum(len(text.split()) for text in texts)
        await self._compute(tokens)
        data = [
            {"object": "embedding", "index": index, "embedding": _vector(text)}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _dump({"object": "list", "model": self._model, "data": data, "usage": usage})

    async def aclose(self) -> None:
        """Release everything; idempotent."""
        self._closed = True

    # --------------------------------------------------------------------- one answer

    async def _answer(self, call: Call) -> AsyncGenerator[bytes]:
        prompt, begun = _begun(call)
        words = [*prompt.split(), *begun]
        fault = self._fault_of(call)
        if fault is not None and fault.after_tokens == 0:
            await _go_wrong(fault)
        if len(words) >= self._context_tokens:
            raise ContextTooLong(
                f"This model takes at most {self._context_tokens} tokens; "
                f"the prompt has {len(words)}. Shorten it."
            )
        cached = await self._read_prompt(words)
        chunks = _Chunks(call, self._model)
        wish, whole = _length(call, prompt), _natural_length(call, prompt) - len(begun)
        most = min(wish, whole, self._context_tokens - len(words))
        if call.route is Route.CHAT:
            yield chunks.piece(role=True)
        for index in range(most):
            if fault is not None and fault.after_tokens == index and index:
                await _go_wrong(fault)
            await self._step()
            yield chunks.piece(_word(call, prompt, len(begun) + index))
        yield chunks.piece(finish="length" if most < whole else "stop")
        yield chunks.usage(prompt=len(words), cached=cached, completion=most)

    async def _step(self) -> None:
        await asyncio.sleep(self._pace.step_s + self._pace.step_each_s * self._running)
        self._check_up()

    async def _read_prompt(self, words: list[str]) -> int:
        """Compute the prompt but for its cached beginning, whose tokens are returned."""
        blocks = _blocks(words)
        hits = 0
        while hits < len(blocks) and blocks[hits] in self._cache:
            hits += 1
        await self._compute(len(words) - hits * _BLOCK_TOKENS)
        for block in blocks:
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) * _BLOCK_TOKENS > self._pace.cache_tokens:
            self._cache.popitem(last=False)
        return hits * _BLOCK_TOKENS

    async def _compute(self, tokens: int) -> None:
        """Prompt tokens, in batches, one at a time on the whole engine."""
        for begin in range(0, tokens, _BATCH_TOKENS):
            async with self._prefill:
                batch = min(_BATCH_TOKENS, tokens - begin)
                await asyncio.sleep(batch / self._pace.prefill_tokens_s)
            self._check_up()

    def _check_up(self) -> None:
        if self._down or self._closed:
            raise EngineUnreachable("The engine is down.")


async def _go_wrong(fault: Fault) -> None:
    if fault.kind is FaultKind.REFUSE:
        raise EngineRefused("The engine does not take this request.")
    if fault.kind is FaultKind.BREAK:
        raise EngineBroken("The engine broke.")
    await asyncio.sleep(_STALL_S)
    raise EngineStalled("The engine was silent for a day.")


# ------------------------------------------------------------------------- what it says


def _hash(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def _blocks(words: list[str]) -> list[int]:
    """The chained hashes of the full blocks."""
    chain: list[int] = []
    for end in range(_BLOCK_TOKENS, len(words) + 1, _BLOCK_TOKENS):
        chain.append(_hash(chain[-1] if chain else 0, words[end - _BLOCK_TOKENS : end]))
    return chain


def _begun(call: Call) -> tuple[str, list[str]]:
    """The prompt, and the words of its answer that are there already, to be gone on from.

    A chat's are the assistant's last turn; a text's are what it would have said to its beginning.
    """
    messages: Any = call.body.get("messages")
    if call.route is Route.CHAT and messages and messages[-1].get("role") == "assistant":
        return json.dumps([messages[:-1], None], sort_keys=True), messages[-1]["content"].split()
    text: Any = call.body.get("prompt")
    for match in _ANY_WORD.finditer(text, 1) if isinstance(text, str) else ():
        prompt, rest = json.dumps([None, text[: match.start()]]), text[match.start() :]
        if rest.startswith(_word(call, prompt, 0)):
            words = rest.split()
            if rest == "".join(_word(call, prompt, index) for index in range(len(words))):
                return prompt, words
    return json.dumps([messages, text], sort_keys=True), []


def _word(call: Call, prompt: str, index: int) -> str:
    word = _WORDS[_hash(call.body.get("seed"), prompt, index) % len(_WORDS)]
    return f" {word}" if index else word


def _natural_length(call: Call, prompt: str) -> int:
    """Where the answer would end by itself."""
    return 8 + _hash(call.body.get("seed"), prompt, "length") % 120


def _length(call: Call, prompt: str) -> int:
    """The most tokens that were asked for."""
    for field in ("max_completion_tokens", "max_tokens"):
        wish = call.body.get(field)
        if isinstance(wish, int):
            return wish
    return _natural_length(call, prompt)


def _vector(text: str) -> list[float]:
    raw = [_hash(text, index) / 0xFFFFFFFF - 0.5 for index in range(8)]
    length = math.sqrt(sum(value * value for value in raw))
    return [value / length for value in raw]


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class _Chunks:
    """Makes the chunks of one answer in its route's form."""

    def __init__(self, call: Call, model: str) -> None:
        chat = call.route is Route.CHAT
        self._chat = chat
        self._frame: dict[str, object] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{call.lease}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 0,
            "model": model,
        }

    def piece(self, text: str = "", *, role: bool = False, finish: str | None = None) -> bytes:
        """A chunk with text, the role or the end."""
        choice: dict[str, object] = {"index": 0, "finish_reason": finish}
        if not self._chat:
            choice.update(text=text, logprobs=None)
        elif role:
            choice["delta"] = {"role": "assistant", "content": ""}
        else:
            choice["delta"] = {"content": text} if text else {}
        return _dump({**self._frame, "choices": [choice]})

    def usage(self, *, prompt: int, cached: int, completion: int) -> bytes:
        """The last chunk."""
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return _dump({**self._frame, "choices": (), "usage": usage})
