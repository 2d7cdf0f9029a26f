"""Odd requests for the addresses of the fast lane: the same verdict on it and beside it.

Both doors lead to the same platform, whose engine hears of none of these requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from anser.core.errors import AnserError, BodyTimeout, HeadTimeout, HeadTooLarge
from anser.wire.server import GuardSettings
from tests.odd import UNCLEAR, aimed
from tests.stage import stage
from tests.unit.test_decode import NOT_JSON
from tests.ways import CHAT, LAST, Ways, request, two_ways

pytestmark = pytest.mark.anyio

HELLO: dict[str, Any] = {
    "model": "memory",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 3,
}
QUICK = GuardSettings(head_bytes_max=1_024, head_timeout_s=0.3, body_timeout_s=0.3)
BODY_BYTES_MAX = 10_000  # of the stage
LINES = ("Content-Type: application/json",)


@asynccontextmanager
async def unharmed(folder: Path, answered: int = 0) -> AsyncGenerator[Ways]:
    """Two doors; so many answers have been given in the end, and others are still answered."""
    async with stage(folder) as scene, two_ways(scene, QUICK) as ways:
        yield ways
        receipts = await scene.pool.receipts()
        assert len(receipts) == answered
        assert b" 200 OK" in (await ways.both(request(HELLO) + LAST))[0]
        await scene.pool.gateway.empty.wait()


async def same(ways: Ways, *parts: bytes, pause_s: float = 0.01) -> list[int]:
    """The statuses of all answers, which must be the same on both ways to the last byte."""
    fast, plain = await ways.both(*parts, pause_s=pause_s)
    assert fast == plain
    return [int(part[:3]) for part in fast.split(b"HTTP/1.1 ")[1:]]


def start(*lines: str, path: str = CHAT) -> bytes:
    """A head with these lines."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *LINES, *lines, "", ""]).encode()


# Framing


@pytest.mark.parametrize("bytes_", UNCLEAR)
async def test_unclear_framing_is_refused_alike(tmp_path: Path, bytes_: bytes) -> None:
    """400 and close, whether it comes alone or after a sound request, which is answered first;
    what else comes with it is not read as a request.
    """
    odd = aimed(bytes_, CHAT.encode())
    async with unharmed(tmp_path, answered=4) as ways:
        assert await same(ways, odd) == [400]
        assert await same(ways, request(HELLO) + odd + request(HELLO)) == [200, 400]
        assert await same(ways, request({**HELLO, "stream": True}) + odd) == [200, 400]


async def test_a_refusal_waits_for_a_stream_under_way(tmp_path: Path) -> None:
    """What is malformed behind a stream spoils nothing of it: its end comes, then the refusal."""
    stream = request({**HELLO, "stream": True, "max_tokens": 40})
    async with unharmed(tmp_path, answered=2) as ways:
        fast, plain = await ways.both(stream, b"nonsense\r\n\r\n")
    assert fast == plain
    answer, _, refusal = fast.rpartition(b"0\r\n\r\n")
    assert answer.count(b"data: [DONE]") == 1
    assert refusal.startswith(b"HTTP/1.1 400 ")


SLOW: list[Any] = [
    pytest.param([start("X: " + "y" * 1_024)], HeadTooLarge, id="head above the limit"),
    pytest.param([start()[:-2], b"X: " + b"y" * 1_024], HeadTooLarge, id="grown above it"),
    pytest.param([start("Content-Length: 9")[:-4]], HeadTimeout, id="half a head"),
    pytest.param([b"P", b"O", b"S", b"T"], HeadTimeout, id="head byte by byte"),
    pytest.param([start("Content-Length: 9"), b"{"], BodyTimeout, id="half a body"),
    pytest.param([start("Content-Length: 9"), *[b"{"] * 8], BodyTimeout, id="byte by byte"),
    pytest.param([start("Transfer-Encoding: chunked"), b"5\r\n{"], BodyTimeout, id="half a chunk"),
]


@pytest.mark.parametrize(("parts", "error"), SLOW)
async def test_the_slow_and_the_large_are_refused_alike(
    tmp_path: Path, parts: list[bytes], error: type[AnserError]
) -> None:
    """A head or a body that does not come in time, and a head too large, whoever would answer."""
    async with unharmed(tmp_path) as ways:
        assert await same(ways, *parts, pause_s=0.06) == [error.status]


async def test_bodies_at_the_limit_and_above_it(tmp_path: Path) -> None:
    """By length 413 comes before the body; in chunks at the limit; `Expect` is honoured."""
    body = json.dumps({**HELLO, "model": ""}).encode()
    fits, above = body.ljust(BODY_BYTES_MAX), f"Content-Length: {BODY_BYTES_MAX + 1}"
    length = f"Content-Length: {BODY_BYTES_MAX}"
    close, expect = "Connection: close", "Expect: 100-continue"
    coded, chunk = "Transfer-Encoding: chunked", b"%x\r\n%b\r\n" % (len(fits), fits)
    async with unharmed(tmp_path) as ways:
        assert await same(ways, start(length, close) + fits) == [400]
        assert await same(ways, start(above, close)) == [413]
        assert await same(ways, start(above, close, expect)) == [413]
        assert await same(ways, start(length, close, expect), fits) == [100, 400]
        assert await same(ways, start(coded, close), chunk, b"0\r\n\r\n") == [400]
        assert await same(ways, start(coded, close), chunk + b"1\r\n \r\n0\r\n\r\n") == [413]


# Bodies and fields


async def test_what_is_not_json_is_refused_alike(tmp_path: Path) -> None:
    """Every hostile body gets the same envelope, and the connection goes on."""
    bodies = [body for body in NOT_JSON.values() if 0 < len(body) < BODY_BYTES_MAX]
    async with unharmed(tmp_path) as ways:
        for body in bodies:
            assert (await same(ways, request(body) + LAST))[0] == 400, body
        assert len(ways.met) == len(bodies)


def doubling(times: int) -> dict[str, Any]:
    """A schema that is as small as `times`, and 2**times large when each $ref is written out."""
    twice = {f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(times)}
    return {"$ref": "#/$defs/d0", "$defs": {**twice, f"d{times}": {"type": "null"}}}


WRONG: list[tuple[dict[str, Any], str]] = [
    *[({"max_tokens": value}, "max_tokens") for value in (0, -1, 2**63, 10**40, 1.5, "5", True)],
    *[({"n": value}, "n") for value in (0, -1, 10**6, [])],
    *[({"temperature": value}, "temperature") for value in ("hot", -0.1, 10**300, [1], {})],
    ({"stop": ["x"] * 1_000}, "stop"),
    ({"stop": [["x"]]}, "stop[0]"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 150}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f\r\nx: y"}}]}, "tools[0]"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content"),
    ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0]"),
    ({"messages": {"role": "user"}}, "messages"),
    ({"model": ["memory"]}, "model"),
    ({"model": "m" * 9_000}, "model"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": doubling(40)},
            }
        },
        "response_format",
    ),
]


async def test_wrong_fields_are_refused_alike(tmp_path: Path) -> None:
    """A wrong type, range, name or shape is 400 in bounded time, and names the field; a schema
    that grows with each $ref is not written out.
    """
    async with unharmed(tmp_path) as ways:
        for fields, param in WRONG:
            fast, plain = await ways.both(request({**HELLO, **fields}) + LAST)
            assert fast == plain
            assert fast.startswith(b"HTTP/1.1 400 "), (fields, fast)
            assert f'"param":"{param}'.encode() in fast, (fields, fast)
            assert len(fast) < 2_000
        assert len(ways.met) == len(WRONG)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
async def test_numbers_that_are_none(tmp_path: Path, number: float) -> None:
    """NaN and infinities are not JSON, whatever writes them."""
    async with unharmed(tmp_path) as ways:
        assert await same(ways, request({**HELLO, "temperature": number}) + LAST) == [400, 404]
