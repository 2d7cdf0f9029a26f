"""The engine in this process: llama.cpp behind the Engine port.

Theory of operation: `start` examines the model's file and loads it, on a thread; until then answers
wait. Each answer has a turn (there are as many as the model has slots) and a thread, on which the
library blocks; its chunks reach the loop through an AnswerStream. Leaving an answer aborts it and
waits until its thread is out of the library, so that the slot is free when the caller goes on. A
thread that does not come out in time keeps its turn: the slot is not free, and nobody is told so.

Embeddings need the whole input in one step, answers need small steps, so a second server object
is loaded for embeddings when the first one is asked for. It shares the file's pages with the first.

Invariants: at most `slots` answers and one embedding are in the library; a turn is given back
exactly when its thread is out; after `aclose` no thread is in the library.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from anser.adapters.llamacpp_body import prepare, split_inputs
from anser.adapters.llamacpp_native import Native, Plan, library_version
from anser.adapters.llamacpp_stream import AnswerStream, error_from, refusal_from
from anser.adapters.model_file import examine
from anser.config import EngineSettings
from anser.core import limits
from anser.core.errors import AnserError, EngineBroken, EngineStalled, EngineUnreachable
from anser.core.fleet import EngineKind, EngineReport, ServedModel
from anser.core.gguf import Header
from anser.ports import Call, Route

__all__ = ["LlamaCppEngine"]

_T = TypeVar("_T")


class LlamaCppEngine:
    """One model in this process."""

    def __init__(self, model_id: str, settings: EngineSettings) -> None:
        self._model_id = model_id
        self._settings = settings
        self._context_tokens = settings.context_tokens
        self._turns = asyncio.Semaphore(settings.slots)
        self._embedding_turn = asyncio.Lock()
        self._threads = ThreadPoolExecutor(settings.slots + 1, thread_name_prefix="llama")
        self._streams: set[AnswerStream] = set()
        self._settled = asyncio.Event()  # loaded, failed or closed
        self._failure: AnserError | None = None
        self._closed = False
        self._path: Path | None = None
        self._header: Header | None = None
        self._native: Native | None = None
        self._embedder: Native | None = None

    def __repr__(self) -> str:
        if self._failure is not None:
            state = "failed"
        else:
            state = "loading" if self._native is None else f"{len(self._streams)} answers"
        return f"<LlamaCppEngine {self._model_id} {state}>"

    def validate(self) -> None:
        """Settled means loaded or failed, never both; answers do not exceed the slots."""
        assert self._settled.is_set() == (self._native is not None or self._failure is not None)
        assert len(self._streams) <= self._settings.slots

    # --------------------------------------------------------------------- its life

    async def start(self, path: Path) -> None:
        """Examine and load the model's file. Raises ModelFileError, EngineBroken.

        What it raises, answers that wait for it get as well. An earlier `fail` is forgotten.
        """
        assert self._native is None
        if not self._closed:
            self._failure = None
            self._settled.clear()
        try:
            self._header = await examine(path)
            trained = self._header.context_tokens or self._context_tokens
            self._context_tokens = min(self._context_tokens, trained)
            native = await self._in_thread(lambda: self._load(path))
        except AnserError as error:
            await self.fail(error)
            raise
        if self._closed:  # meanwhile
            native.close()
            return
        self._path, self._native = path, native
        self._settled.set()

    async def fail(self, error: AnserError) -> None:
        """Say that the model will not come: whoever waits, and whoever asks later, is told."""
        if self._native is None and not self._closed:
            self._failure = EngineBroken(f"{self._model_id} is not loaded: {error.message}")
        self._settled.set()

    async def aclose(self) -> None:
        """Abort what runs, wait for its threads and unload the model; idempotent."""
        self._closed = True
        self._failure = EngineUnreachable("The engine in this process has been closed.")
        self._settled.set()
        for stream in self._streams:
            stream.leave()
        loop = asyncio.get_running_loop()
        if not await _out(loop.run_in_executor(None, self._threads.shutdown), limits.ABORT_WAIT_S):
            return  # a thread is stuck in the library: the model cannot be unloaded under it
        for native in (self._native, self._embedder):
            if native is not None:
                await _out(loop.run_in_executor(None, native.close), limits.ABORT_WAIT_S)
        self._native = self._embedder = None

    def _load(self, path: Path, *, embeds: bool = False) -> Native:
        settings = self._settings
        longest = min(self._context_tokens, limits.EMBEDDING_TOKENS_MAX)
        plan = Plan(
            slots=1 if embeds else settings.slots,
            context_tokens=longest if embeds else self._context_tokens,
            batch_tokens=longest if embeds else settings.batch_tokens,
            threads=settings.threads,
            embeds=embeds,
        )
        return Native.load(path, self._model_id, plan)

    async def _ready(self) -> Native:
        """The loaded model, when it is there."""
        try:
            async with asyncio.timeout(limits.LOAD_TIMEOUT_S):
                await self._settled.wait()
        except TimeoutError:
            raise EngineUnreachable("The model is still being fetched or loaded.") from None
        if self._failure is not None:
            raise self._failure
        assert self._native is not None
        return self._native

    def _in_thread(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    # ---------------------------------------------------------------------- the port

    async def inspect(self) -> EngineReport:
        """What it serves. EngineUnreachable while it still loads, else what made it fail."""
        if self._failure is not None:
            raise self._failure
        if self._native is None:
            raise EngineUnreachable("The model is still being fetched or loaded.")
        model = ServedModel(name=self._model_id, context_tokens=self._context_tokens)
        return EngineReport(
            kind=EngineKind.LLAMACPP,
            version=library_version(),
            models=(model,),
            slots=self._settings.slots,
        )

    @asynccontextmanager
    async def generate(self, call: Call) -> AsyncGenerator[AsyncIterator[bytes]]:
        """Open one answer; see the port."""
        native = await self._ready()
        assert self._header is not None
        body, translator = prepare(call, self._model_id, self._header.control_tokens)
        await self._take_turn()
        asked = "messages" if call.route is Route.CHAT else "prompt"
        stream = AnswerStream(translator, asked=asked)
        self._streams.add(stream)
        future = self._begin(
            lambda: stream.run(lambda take: native.generate(call.route, body, take))
        )
        future.add_done_callback(lambda _: self._give_back(stream))
        try:
            yield stream
        finally:
            stream.leave()
            await _out(future, limits.ABORT_WAIT_S)

    def _begin(self, work: Callable[[], None]) -> asyncio.Future[None]:
        try:
            return self._in_thread(work)
        except RuntimeError:  # closed since
            self._turns.release()
            raise EngineUnreachable("The engine in this process has been closed.") from None

    async def _take_turn(self) -> None:
        """A turn comes at once unless more answers are asked for than there are slots."""
        try:
            async with asyncio.timeout(limits.FIRST_TOKEN_TIMEOUT_S):
                await self._turns.acquire()
        except TimeoutError:
            raise EngineStalled("No slot of the engine became free in time.") from None
        if self._failure is not None:
            self._turns.release()
            raise self._failure

    def _give_back(self, stream: AnswerStream) -> None:
        self._streams.discard(stream)
        self._turns.release()

    async def embed(self, call: Call) -> bytes:
        """Embeddings, one input at a time; leaving ends it after the present one."""
        await self._ready()
        inputs = split_inputs(call.body)
        form = call.body.get("encoding_format", "float")
        async with self._embedding_turn:
            embedder = await self._embedder_ready()
            answers: list[dict[str, Any]] = []
            for given in inputs:
                body = json.dumps({"input": given, "encoding_format": form}).encode()
                data = await _result(self._in_thread(partial(_embed, embedder, body)))
                answers.append(json.loads(data))
        return _joined(self._model_id, answers)

    async def _embedder_ready(self) -> Native:
        if self._failure is not None:
            raise self._failure
        path = self._path
        assert path is not None
        if self._embedder is None:
            work = self._in_thread(lambda: self._load(path, embeds=True))
            self._embedder = await _result(work)
        return self._embedder


def _embed(native: Native, body: bytes) -> bytes:
    try:
        data = native.embed(body)
    except (ValueError, RuntimeError) as error:
        raise refusal_from(str(error)) from error
    if data.startswith(b'{"error":'):
        raise error_from(data, asked="input")
    return data


def _joined(model_id: str, answers: list[dict[str, Any]]) -> bytes:
    """One answer of several, its items numbered and its usage summed."""
    items = [{**answer["data"][0], "index": index} for index, answer in enumerate(answers)]
    tokens = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    whole = {"object": "list", "model": model_id, "data": items, "usage": usage}
    return json.dumps(whole, separators=(",", ":")).encode()


async def _result(future: asyncio.Future[_T]) -> _T:
    """What a thread comes to, waited for also when cancelled: nobody else may go on before."""
    if not await _out(future, limits.LOAD_TIMEOUT_S):
        raise EngineStalled("llama.cpp took too long.")
    return future.result()


async def _out(future: asyncio.Future[_T], wait_s: float) -> bool:
    """Wait until a thread is out of the library, even when cancelled, but not for ever."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + wait_s
    cancelled: asyncio.CancelledError | None = None
    while not future.done() and clock() < deadline:
        try:
            await asyncio.wait([future], timeout=deadline - clock())
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return future.done()
