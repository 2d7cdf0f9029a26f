"""`/v1/chat/completions` and `/v1/completions`: OpenAI's dialect, whole and streamed.

The way of a request: its body becomes demands (demands.py), the gateway carries them (merge.py
where there are several), and what comes back is passed on (rewrite.py) or put together. Whoever
hangs up ends the work at once: everything from the queue on runs inside `Exchange.watched`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from anser.api import sse
from anser.api.assemble import ChatChoice, TextChoice, usage_object
from anser.api.demands import Asked, Asker, ask_chat, ask_completion, asker_of
from anser.api.errors import Headers
from anser.api.exchange import Exchange
from anser.api.merge import Answers, answer_all
from anser.api.rewrite import Rewriter
from anser.api.why import why_headers
from anser.services.members import Principal

__all__ = ["chat", "completion", "node_headers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dialect:
    """What differs between the two routes."""

    ask: Callable[[Asker, dict[str, object]], Asked]
    prefix: str
    whole: str
    chunk: str
    choice: type[ChatChoice] | type[TextChoice]


_CHAT = _Dialect(
    ask=ask_chat,
    prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    choice=ChatChoice,
)
_TEXT = _Dialect(
    ask=ask_completion,
    prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    choice=TextChoice,
)


async def chat(exchange: Exchange, principal: Principal) -> None:
    """POST /v1/chat/completions."""
    await _serve(exchange, principal, _CHAT)


async def completion(exchange: Exchange, principal: Principal) -> None:
    """POST /v1/completions."""
    await _serve(exchange, principal, _TEXT)


def node_headers(node: str, limits: dict[str, str]) -> Headers:
    """Which node answered, and what is left of the member's limits."""
    named = {"x-anser-node": node, **limits}
    return [(name.encode(), value.encode("ascii", "replace")) for name, value in named.items()]


async def _serve(exchange: Exchange, principal: Principal, dialect: _Dialect) -> None:
    asker, services = asker_of(exchange, principal), exchange.services
    asked = dialect.ask(asker, await exchange.read())
    answering = _Answering(exchange, dialect, asked, int(services.clock.wall()))
    async with exchange.watched(), answer_all(services.gateway, asked) as answers:
        await (answering.stream(answers) if asked.stream else answering.whole(answers))


@dataclass(frozen=True, slots=True)
class _Answering:
    """One request's answers on their way back."""

    exchange: Exchange
    dialect: _Dialect
    asked: Asked
    created: int

    async def whole(self, answers: Answers) -> None:
        """Put everything together, then answer."""
        choices = [self.dialect.choice() for _ in self.asked.demands]
        async for part in answers:
            choices[part.index].add(part.piece.data)
        body = self._head(self.dialect.whole) | {
            "choices": [choice.finished(index) for index, choice in enumerate(choices)],
            "usage": usage_object(answers.usage),
        }
        headers = self._headers(answers)
        await self.exchange.reply(200, msgspec.json.encode(body), headers)

    async def stream(self, answers: Answers) -> None:
        """Pass each chunk on when it comes; usage, if asked for, is the platform's own count."""
        await self.exchange.open(200, [*sse.HEADERS, *self._headers(answers)])
        rewriter = Rewriter(self.asked, self._head(self.dialect.chunk))
        for chunk in rewriter.opening():
            await self.exchange.write(sse.event(chunk))
        async for part in answers:
            data = rewriter.chunk(part)
            if data is not None:
                await self.exchange.write(sse.event(data))
        if self.asked.include_usage:
            await self.exchange.write(sse.event(self._usage_chunk(answers)))
        await self.exchange.close(sse.DONE)

    def _usage_chunk(self, answers: Answers) -> bytes:
        none: list[object] = []
        chunk = self._head(self.dialect.chunk) | {
            "choices": none,
            "usage": usage_object(answers.usage),
            "anser": {"node": answers.node},
        }
        return msgspec.json.encode(chunk)

    def _headers(self, answers: Answers) -> Headers:
        request = answers.lease.rpartition(".")[0]
        told = why_headers(self.exchange, request)
        return [*node_headers(answers.node, answers.limits), *told]

    def _head(self, kind: str) -> dict[str, object]:
        """The fields that every object of an answer begins with."""
        return {
            "id": self.dialect.prefix + self.exchange.id.removeprefix("req_"),
            "object": kind,
            "created": self.created,
            "model": self.asked.demands[0].model,
        }
