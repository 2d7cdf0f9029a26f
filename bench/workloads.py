"""Who asks what, and when: sources of requests, each a generator.

A source yields its next request. One whose request `waits` is resumed with the time at which that
was answered, so a chat goes on when its person has read; others come at their time, whatever has
become of those before. All lengths are in tokens; a text's blocks are of 64 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from anser.core.prefix import Chain
from bench.engine_model import BLOCK_TOKENS

__all__ = [
    "Ask",
    "Rate",
    "Source",
    "Text",
    "agent",
    "chat",
    "chats",
    "leaving",
    "lengths",
    "openly",
    "saturating",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request as its client knows it, and the answer that it will get."""

    at: float
    member: str
    prompt: Chain
    prompt_tokens: int
    output_tokens: int
    after: Chain = ()  # the blocks of prompt and answer
    waits: bool = True
    leaves_after: int | None = None  # the client goes away after so many tokens


Source = Generator[Ask, float, None]
_numbers = count(1)


@dataclass(slots=True)
class Text:
    """A conversation that grows; its blocks are named by its number, so nobody else has them."""

    number: int = field(default_factory=lambda: next(_numbers))
    tokens: int = 0
    names: list[bytes] = field(default_factory=list[bytes])

    def grow(self, tokens: int) -> Chain:
        """Append so many tokens; the names of all whole blocks."""
        self.tokens += tokens
        for place in range(len(self.names), self.tokens // BLOCK_TOKENS):
            self.names.append((self.number << 20 | place).to_bytes(8, "big"))
        return tuple(self.names)


def lengths(draw: random.Random, mean: int, *, spread: float = 0.3) -> int:
    """A length around `mean`."""
    return max(1, round(draw.uniform(mean * (1 - spread), mean * (1 + spread))))


def _turn(text: Text, *, at: float, member: str, more: int, output: int) -> Ask:
    prompt = text.grow(more)
    tokens = text.tokens
    return Ask(
        at=at,
        member=member,
        prompt=prompt,
        prompt_tokens=tokens,
        output_tokens=output,
        after=text.grow(output),
    )


def chat(member: str, draw: random.Random, *, think_s: float = 8.0) -> Source:
    """A person who chats: reads, thinks, goes on; after up to ten turns begins anew."""
    now = draw.uniform(0, think_s)
    while True:
        text = Text()
        text.grow(100)  # what the model is told about its task
        for _ in range(draw.randint(3, 10)):
            ask = _turn(
                text,
                at=now,
                member=member,
                more=draw.randint(20, 100),
                output=draw.randint(50, 250),
            )
            now = (yield ask) + 1 + draw.expovariate(1 / think_s)


def chats(seed: int, number: int = 20) -> list[Source]:
    """So many people who chat, `light0` and so on; the same in every run with this seed."""
    return [chat(f"light{n}", random.Random(f"{seed} light {n}")) for n in range(number)]


def agent(member: str, draw: random.Random, *, begins_at: float = 0.0) -> Source:
    """A program that works with tools: long contexts, short answers, no thinking in between."""
    now = begins_at
    while True:
        text = Text()
        text.grow(lengths(draw, 2_000))
        for _ in range(draw.randint(8, 16)):
            more, output = lengths(draw, 200), lengths(draw, 60)
            now = yield _turn(text, at=now, member=member, more=more, output=output)
            now += 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Requests of about these lengths, so many a second, between two moments."""

    per_s: float
    prompt: int
    output: int
    begins: float = 0.0
    ends: float = float("inf")
    spread: float = 0.3
    regular: bool = False  # evenly spaced, else as a Poisson process


def openly(member: str, draw: random.Random, *rates: Rate) -> Source:
    """Requests without anything in common, that come whatever becomes of those before."""
    for rate in rates:
        for at in _moments(draw, rate):
            yield _alone(member, draw, rate, at=at)


def saturating(member: str, draw: random.Random, rate: Rate, *, at_once: int) -> Iterator[Source]:
    """Always `at_once` requests under way: each is followed by the next."""
    for _ in range(at_once):
        yield _chain(member, draw, rate)


def _chain(member: str, draw: random.Random, rate: Rate) -> Source:
    now = rate.begins + draw.random()
    while now < rate.ends:
        now = yield replace(_alone(member, draw, rate, at=now), waits=True)


def _moments(draw: random.Random, rate: Rate) -> Iterator[float]:
    at = rate.begins
    while True:
        at += 1 / rate.per_s if rate.regular else draw.expovariate(rate.per_s)
        if at >= rate.ends:
            return
        yield at


def _alone(member: str, draw: random.Random, rate: Rate, *, at: float) -> Ask:
    text = Text()
    prompt_tokens = lengths(draw, rate.prompt, spread=rate.spread)
    return Ask(
        at=at,
        member=member,
        prompt=text.grow(prompt_tokens),
        prompt_tokens=prompt_tokens,
        output_tokens=lengths(draw, rate.output, spread=rate.spread),
        waits=False,
    )


def leaving(source: Source, draw: random.Random, part: float) -> Source:
    """The same, but in this part of its requests the client goes away in the middle."""
    answered: float | None = None
    while True:
        try:
            ask = next(source) if answered is None else source.send(answered)
        except StopIteration:
            return
        gone = draw.random() < part
        leaves = draw.randint(1, ask.output_tokens) if gone else None
        answered = yield replace(ask, leaves_after=leaves)
