"""Clients of a real platform, over HTTP and with keys of their own: people who chat, and a flood.

Times are those of the client: a first token is the first chunk with text in it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.workloads import lengths

__all__ = ["Answer", "Client"]

_WORDS = (
    "water light stone river house green tree night summer road paper music hand door garden "
    "bread window morning ship letter field story winter friend table cloud bridge horse fire snow"
).split()
_TIMEOUT = httpx.Timeout(30, read=None)  # the platform says when somebody has waited too long


@dataclass(slots=True, kw_only=True)
class Answer:
    """One request, as its client saw it; times are seconds of the run."""

    member: str
    at: float
    first_at: float | None = None
    ended_at: float | None = None
    times: list[float] = field(default_factory=list[float])  # of chunks with text
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""

    def tokens_in(self, since: float, until: float) -> float:
        """Tokens that were computed for it between two moments: its fresh prompt, its output.

        The prompt counts with the first token, output as its chunks came. How long a prompt was is
        known at the end: of an answer that had none, the prompt is not counted.
        """
        if self.first_at is None:
            return 0.0
        part = sum(since <= at < until for at in self.times) / len(self.times)
        fresh = self.prompt_tokens - self.cached_tokens
        prompt = fresh if since <= self.first_at < until else 0
        return prompt + part * (self.output_tokens or len(self.times))


@dataclass(slots=True, kw_only=True)
class Client:
    """One member's program."""

    member: str
    key: str
    url: str
    model: str
    clock: Callable[[], float]
    draw: random.Random
    answers: list[Answer] = field(default_factory=list[Answer])

    async def chat(self, think_s: float) -> None:
        """A person who chats: reads, thinks, goes on; after some turns begins anew."""
        async with self._http() as http:
            await asyncio.sleep(self.draw.uniform(0, think_s))
            while True:
                said = [{"role": "system", "content": f"You help {self.member}. {self._text(40)}"}]
                for _ in range(self.draw.randint(3, 6)):
                    said.append({"role": "user", "content": self._text(self.draw.randint(10, 40))})
                    answer = await self._ask(http, said, self.draw.randint(20, 60))
                    said.append({"role": "assistant", "content": answer.text})
                    await asyncio.sleep(0.5 + self.draw.expovariate(1 / think_s))

    async def flood(self, at_once: int, *, prompt: int, output: int) -> None:
        """A program that always has so many requests under way, of about so many tokens each."""
        async with self._http() as http, asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(self._again_and_again(http, prompt, output))

    async def _again_and_again(self, http: httpx.AsyncClient, prompt: int, output: int) -> None:
        while True:
            text = self._text(lengths(self.draw, prompt))
            said = [{"role": "user", "content": f"Write a long story with these words: {text}"}]
            await self._ask(http, said, lengths(self.draw, output))

    def _text(self, words: int) -> str:
        return " ".join(self.draw.choices(_WORDS, k=words))

    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {self.key}"},
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def _ask(
        self, http: httpx.AsyncClient, said: list[dict[str, str]], output: int
    ) -> Answer:
        """One streamed answer. What goes wrong is kept, too; the client then waits a little."""
        answer = Answer(member=self.member, at=self.clock())
        self.answers.append(answer)
        body = {
            "model": self.model,
            "messages": said,
            "max_tokens": output,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_success:
                    await self._read(response, answer)
                else:
                    answer.error = f"{response.status_code} {(await response.aread()).decode()}"
        except httpx.HTTPError as error:
            answer.error = repr(error)
        answer.ended_at = self.clock()
        if answer.error:
            await asyncio.sleep(1)
        return answer

    async def _read(self, response: httpx.Response, answer: Answer) -> None:
        last = ""
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                self._take(json.loads(last), answer)
        if last != "[DONE]" and not answer.error:
            answer.error = "the stream ended early"

    def _take(self, chunk: dict[str, Any], answer: Answer) -> None:
        if "error" in chunk:
            answer.error = str(chunk["error"])
            return
        usage = chunk.get("usage")
        if usage:
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.output_tokens = usage["completion_tokens"]
            answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        if text:
            now = self.clock()
            answer.text += text
            answer.times.append(now)
            answer.first_at = now if answer.first_at is None else answer.first_at
