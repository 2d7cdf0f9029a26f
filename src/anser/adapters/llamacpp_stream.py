"""One answer on its way from a blocking thread to the event loop.

Theory of operation: `run` sits in the library's call on a thread of its own; the library hands each
chunk to `_take` there. Room for STREAM_BUFFER_MAX chunks is a semaphore: the thread takes a place
for each chunk, the reader gives it back, and a thread without a place waits (the model does not:
its other answers go on). `leave` makes the next callback abort, and wakes a thread that waits.

Prefill makes no chunks, so progress reports are asked for, one per batch: they never get further
than `_take`, but they are where an answer that is still in prefill can be aborted.

Invariants: exactly one end follows the last chunk, whatever happens; nothing is put after it.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from anser.adapters.llamacpp_native import Callback
from anser.core import limits
from anser.core.errors import (
    AnserError,
    ContextTooLong,
    EngineBroken,
    EngineRefused,
    EngineStalled,
    EngineUnreachable,
)

__all__ = ["AnswerStream", "Translator", "error_from", "refusal_from"]

_PROGRESS = b'"prompt_progress":{'  # inside a string the quotes would be escaped
_ERROR = b'{"error":'
_USAGE = b'"usage":{'


class Translator(Protocol):
    """Makes OpenAI chunks of the library's."""

    def feed(self, chunk: bytes) -> Iterable[bytes]:
        """The chunks to deliver for this one: one, none or several."""
        ...


class AnswerStream:
    """The chunks of one answer; iterate on the loop that made it."""

    def __init__(self, translator: Translator, *, asked: str = "messages") -> None:
        """`asked` is the field that holds the prompt, for errors to name."""
        self._loop = asyncio.get_running_loop()
        self._translator = translator
        self._asked = asked
        self._taken: deque[bytes] = deque()
        self._ready: deque[bytes] = deque()
        self._woken = asyncio.Event()
        self._ended = False
        self._error: AnserError | None = None
        # Shared with the thread:
        self._room = threading.Semaphore(limits.STREAM_BUFFER_MAX)
        self._left = threading.Event()
        self._failure: AnserError | None = None
        self._complete = False

    def __repr__(self) -> str:
        state = "ended" if self._ended else "left" if self._left.is_set() else "open"
        return f"<AnswerStream {state}, {len(self._taken)} waiting>"

    def validate(self) -> None:
        """What waits for its reader is bounded."""
        assert len(self._taken) <= limits.STREAM_BUFFER_MAX

    # ------------------------------------------------------------------ on the loop

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> bytes:
        while not self._ready:
            if self._taken:
                self._translate(self._taken.popleft())
            elif not self._ended:
                self._woken.clear()
                await self._woken.wait()
            elif self._error is not None:
                raise self._error
            else:
                raise StopAsyncIteration
        return self._ready.popleft()

    def leave(self) -> None:
        """Abort the answer: at the next token, or at the end of this batch of the prompt."""
        self._left.set()
        self._room.release()

    def _translate(self, chunk: bytes) -> None:
        self._room.release()
        try:
            self._ready.extend(self._translator.feed(chunk))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            self.leave()
            raise EngineBroken("llama.cpp sent a chunk that is not an OpenAI chunk.") from error

    def _put(self, chunk: bytes) -> None:
        self._taken.append(chunk)
        self._woken.set()

    def _end(self, error: AnserError | None) -> None:
        self._ended, self._error = True, error
        self._woken.set()

    # ---------------------------------------------------------------- on the thread

    def run(self, call: Callable[[Callback], None]) -> None:
        """Make the blocking call and pass on what it yields. Never raises."""
        error: AnserError | None = None
        try:
            if not self._left.is_set():
                call(self._take)
            error = self._outcome()
        except (ValueError, RuntimeError) as reason:
            error = refusal_from(str(reason))
        except MemoryError:
            error = EngineBroken("There was too little memory for this answer.")
        finally:
            self._tell(self._end, error)

    def _outcome(self) -> AnserError | None:
        if self._failure is not None or self._complete or self._left.is_set():
            return self._failure
        return EngineBroken("llama.cpp ended an answer without its end.")

    def _take(self, chunk: bytes) -> bool:
        """The library's callback; what it raised would be lost, so it raises nothing."""
        if self._left.is_set():
            return True
        if _PROGRESS in chunk or chunk == b"null":
            return False
        if chunk.startswith(_ERROR):
            self._failure = error_from(chunk, asked=self._asked)
            return True
        self._complete = self._complete or _USAGE in chunk
        if not self._room.acquire(timeout=limits.WRITE_TIMEOUT_S):
            self._failure = EngineStalled("The answer was not read for too long.")
            return True
        return self._left.is_set() or not self._tell(self._put, chunk)

    def _tell(self, verb: Callable[[Any], None], fact: object) -> bool:
        """Have the loop do it; False if the loop is gone."""
        try:
            self._loop.call_soon_threadsafe(verb, fact)
        except RuntimeError:
            return False
        return True


# ------------------------------------------------------------------------------- its errors

_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large")
_DETAIL = re.compile(r".*(JSON schema error at .*)", re.DOTALL)


def error_from(data: bytes, *, asked: str) -> AnserError:
    """What an error object of llama.cpp means; `asked` is the field that holds the prompt."""
    try:
        error: Any = json.loads(data)["error"]
        code, message = int(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return EngineBroken("llama.cpp sent an error that cannot be read.")
    if error.get("type") == "exceed_context_size_error":
        prompt, most = error.get("n_prompt_tokens"), error.get("n_ctx")
        return _too_long(prompt, most, asked)
    too_large = _TOO_LARGE.search(message)
    if too_large is not None:
        return _too_long(too_large[1], limits.EMBEDDING_TOKENS_MAX, asked)
    if 400 <= code < 500:
        return EngineRefused(message[: 4 * limits.ECHO_CHARS_MAX], status=code)
    if code == 503:
        return EngineUnreachable("llama.cpp still loads the model.")
    return EngineBroken.quoting("llama.cpp failed", message[: limits.ECHO_CHARS_MAX])


def refusal_from(message: str) -> EngineRefused:
    """The library raises for a body that it cannot use; the cause comes last in its words."""
    detail = _DETAIL.match(message)
    words = detail[1] if detail is not None else message
    return EngineRefused(words[: 4 * limits.ECHO_CHARS_MAX])


def _too_long(prompt: object, most: object, asked: str) -> ContextTooLong:
    return ContextTooLong(
        f"This model takes at most {most} tokens; the prompt has {prompt}. Shorten it.",
        param=asked,
    )
