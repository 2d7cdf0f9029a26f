"""`/v1/chat/completions` and `/v1/completions`: OpenAI's dialect, whole and streamed.

The way of a request: its body becomes demands (demands.py), the gateway carries them (merge.py
where there are several), and what comes back is passed on (rewrite.py) or put together. Whoever
hangs up ends the work at once: everything from the queue on runs inside `Exchange.watched`.

A request for one answer takes a shorter way with the same words (lane.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from anser.api import sse
from anser.api.assemble import ChatChoice, Choice, TextChoice, usage_object
from anser.api.demands import Asked, Asker, ask_chat, ask_completion, asker_of
from anser.api.errors import Headers
from anser.api.exchange import Exchange
from anser.api.merge import Answers, answer_all
from anser.api.rewrite import Rewriter
from anser.api.why import why_headers
from anser.core.ledger import Usage
from anser.services.members import Principal

__all__ = ["CHAT", "TEXT", "Dialect", "Identity", "chat", "completion", "node_headers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What differs between the two routes."""

    ask: Callable[[Asker, dict[str, object]], Asked]
    prefix: str
    whole: str
    chunk: str
    choice: Callable[[], Choice]


CHAT = Dialect(
    ask=ask_chat,
    prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    choice=ChatChoice,
)
TEXT = Dialect(
    ask=ask_completion,
    prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    choice=TextChoice,
)


async def chat(exchange: Exchange, principal: Principal) -> None:
    """POST /v1/chat/completions."""
    await _serve(exchange, principal, CHAT)


async def completion(exchange: Exchange, principal: Principal) -> None:
    """POST /v1/completions."""
    await _serve(exchange, principal, TEXT)


def node_headers(node: str, limits: dict[str, str]) -> Headers:
    """Which node answered, and what is left of the member's limits."""
    named = {"x-anser-node": node, **limits}
    return [(name.encode(), value.encode("ascii", "replace")) for name, value in named.items()]


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What every object of an answer says of it; `request` is its identifier, `created` Unix s."""

    dialect: Dialect
    request: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, object]:
        """The fields that an object of this kind begins with."""
        return {
            "id": self.dialect.prefix + self.request.removeprefix("req_"),
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The whole answer."""
        body = self.fields(self.dialect.whole) | {
            "choices": [choice.finished(index) for index, choice in enumerate(choices)],
            "usage": usage_object(usage),
        }
        return msgspec.json.encode(body)

    def usage_chunk(self, node: str, usage: Usage) -> bytes:
        """The last chunk of a stream, for who asks for it: the platform's own count."""
        none: list[object] = []
        chunk = self.fields(self.dialect.chunk) | {
            "choices": none,
            "usage": usage_object(usage),
            "anser": {"node": node},
        }
        return msgspec.json.encode(chunk)


async def _serve(exchange: Exchange, principal: Principal, dialect: Dialect) -> None:
    services = exchange.services
    asker = asker_of(services, exchange.id, principal.member, exchange.header)
    asked = dialect.ask(asker, await exchange.read())
    identity = Identity(
        dialect=dialect,
        request=exchange.id,
        created=int(services.clock.wall()),
        model=asked.demands[0].model,
    )
    answering = _Answering(exchange, asked, identity)
    async with exchange.watched(), answer_all(services.gateway, asked) as answers:
        await (answering.stream(answers) if asked.stream else answering.whole(answers))


@dataclass(frozen=True, slots=True)
class _Answering:
    """One request's answers on their way back."""

    exchange: Exchange
    asked: Asked
    identity: Identity

    async def whole(self, answers: Answers) -> None:
        """Put everything together, then answer."""
        choices = [self.identity.dialect.choice() for _ in self.asked.demands]
        async for part in answers:
            choices[part.index].take(part.piece)
        body = self.identity.whole(choices, answers.usage)
        await self.exchange.reply(200, body, self._headers(answers))

    async def stream(self, answers: Answers) -> None:
        """Pass each chunk on when it comes; usage, if asked for, is the platform's own count."""
        await self.exchange.open(200, [*sse.HEADERS, *self._headers(answers)])
        rewriter = Rewriter(self.asked, self.identity.fields(self.identity.dialect.chunk))
        for chunk in rewriter.opening():
            await self.exchange.write(sse.event(chunk))
        async for part in answers:
            data = rewriter.chunk(part.piece.data, part.index)
            if data is not None:
                await self.exchange.write(sse.event(data))
        if self.asked.include_usage:
            usage = self.identity.usage_chunk(answers.node, answers.usage)
            await self.exchange.write(sse.event(usage))
        await self.exchange.close(sse.DONE)

    def _headers(self, answers: Answers) -> Headers:
        request = answers.lease.rpartition(".")[0]
        told = why_headers(self.exchange.services, request, self.exchange.header)
        return [*node_headers(answers.node, answers.limits), *told]
