"""api.auth: who asks, and guessing made slow."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from anser.adapters.memory import MemoryClock, MemoryStore
from anser.api.auth import FAILURES_MAX, WINDOW_S, Doorkeeper, bearer_of, check_site, network_of
from anser.config import MemberSettings
from anser.core.errors import Forbidden, LimitReached, Unauthenticated
from anser.services.members import OWNER, Members

pytestmark = pytest.mark.anyio

HOME, NEIGHBOUR, ELSEWHERE = "192.0.2.1", "192.0.2.200", "198.51.100.1"


@pytest.fixture
def clock() -> MemoryClock:
    return MemoryClock()


@pytest.fixture
async def members(clock: MemoryClock) -> Members:
    """A new platform's members, anonymous use allowed."""
    members = Members(MemoryStore(), clock, b"pepper", MemberSettings(), anonymous=True)
    await members.load()
    return members


@pytest.fixture
def door(members: Members, clock: MemoryClock) -> Doorkeeper:
    return Doorkeeper(members, clock)


def guess(door: Doorkeeper, peer: str, times: int = FAILURES_MAX) -> None:
    """Try `times` wrong keys from `peer`, each refused as unknown."""
    for number in range(times):
        with pytest.raises(Unauthenticated):
            door.authenticate(f"hf_wrong{number}", peer=peer)


async def test_a_key_opens_its_member(door: Doorkeeper, members: Members) -> None:
    """A right key is its member's, wherever it comes from."""
    text, key = await members.create_key(OWNER)
    principal = door.authenticate(text, peer=HOME)
    assert (principal.member, principal.key) == (OWNER, key.id)


async def test_guessing_is_slowed(door: Doorkeeper, members: Members) -> None:
    """After FAILURES_MAX wrong keys a network's next ones must wait; no right key ever must."""
    text, _ = await members.create_key(OWNER)
    guess(door, HOME)
    for _ in range(2):
        with pytest.raises(LimitReached) as caught:
            door.authenticate("hf_wrong", peer=NEIGHBOUR)
        assert 0 < (caught.value.retry_after_s or 0) <= WINDOW_S
        assert door.authenticate(text, peer=HOME).member == OWNER
    with pytest.raises(Unauthenticated):
        door.authenticate("hf_wrong", peer=ELSEWHERE)
    door.validate()


@pytest.mark.parametrize("text", ["EMPTY", "sk-no-key-required", "anonymous", "hf_", "hf_a-b", ""])
async def test_a_placeholder_is_no_guess(clock: MemoryClock, text: str) -> None:
    """What is not shaped like a key is refused as often as it comes, and slows nobody."""
    members = Members(MemoryStore(), clock, b"pepper", MemberSettings(), anonymous=False)
    await members.load()
    door = Doorkeeper(members, clock)
    for _ in range(3 * FAILURES_MAX):
        with pytest.raises(Unauthenticated):
            door.authenticate(text, peer=HOME)
    with pytest.raises(Unauthenticated):
        door.authenticate("hf_wrong", peer=HOME)


async def test_slowing_ends(door: Doorkeeper, clock: MemoryClock) -> None:
    """A window after the first wrong key, the network may try again as often."""
    guess(door, HOME)
    with pytest.raises(LimitReached):
        door.authenticate("hf_wrong", peer=HOME)
    clock.advance(WINDOW_S)
    guess(door, HOME)


async def test_slowing_spares_anonymous_use(door: Doorkeeper) -> None:
    """A request without a key is no guess, and is not refused for others' guesses."""
    guess(door, HOME)
    assert door.authenticate(None, peer=HOME).anonymous


async def test_a_revoked_key_counts_as_wrong(door: Doorkeeper, members: Members) -> None:
    """A key that was right once is wrong once it is revoked, wherever it was used."""
    text, key = await members.create_key(OWNER)
    door.authenticate(text, peer=HOME)
    await members.revoke_key(key.id)
    with pytest.raises(Unauthenticated):
        door.authenticate(text, peer=HOME)


async def test_a_unix_socket_is_no_network(door: Doorkeeper) -> None:
    """Whoever may open the socket file cannot be slowed by address, having none."""
    guess(door, "", 3 * FAILURES_MAX)


async def test_many_networks_are_remembered_within_bounds(door: Doorkeeper) -> None:
    """Guesses from 10,000 networks take bounded memory."""
    for number in range(10_000):
        with pytest.raises(Unauthenticated):
            door.authenticate("hf_wrong", peer=f"2001:db8:{number:x}::1")
    door.validate()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.254", True),
        ("192.0.2.1", "192.0.3.1", False),
        ("192.0.2.1", "::ffff:192.0.2.9", True),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::1%eth1", True),
    ],
)
def test_guesses_are_counted_by_network(one: str, other: str, *, same: bool) -> None:
    """IPv4 by /24 and IPv6 by /64, so that a new address is no new guesser."""
    assert (network_of(one) == network_of(other)) is same


def header(**headers: str) -> Callable[[bytes], str | None]:
    return lambda name: headers.get(name.decode().replace("-", "_"))


def test_a_key_is_read_from_either_header() -> None:
    """`authorization: Bearer` and `x-api-key` are both read; none is no key."""
    assert bearer_of(header(authorization="Bearer hf_a")) == "hf_a"
    assert bearer_of(header(authorization="bearer  hf_a ")) == "hf_a"
    assert bearer_of(header(x_api_key="hf_b")) == "hf_b"
    assert bearer_of(header()) is None


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Basic aGk6aGk=", "hf_a", "Token hf_a"])
def test_another_scheme_is_refused(value: str) -> None:
    """A head that holds something other than a bearer key is refused, not taken as anonymous."""
    with pytest.raises(Unauthenticated):
        bearer_of(header(authorization=value))


SAME_SITE = [
    {"host": "127.0.0.1:8000"},
    {"host": "localhost:8000", "origin": "http://localhost:8000"},
    {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"},
    {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
    {"host": "box.localhost", "origin": "http://box.localhost"},
]
OTHER_SITE = [
    {"host": "127.0.0.1:8000", "origin": "https://evil.example"},
    {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9000"},
    {"host": "127.0.0.1:8000", "origin": "null"},
    {"host": "127.0.0.1:8000", "origin": "http://[::"},
    {"host": "127.0.0.1:8000", "sec_fetch_site": "cross-site"},
    {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
]


@pytest.mark.parametrize("headers", SAME_SITE)
def test_the_platforms_own_page_may_ask(headers: dict[str, str]) -> None:
    """Without a key, programs and the platform's own page are served."""
    check_site(header(**headers), on_loopback=True)


@pytest.mark.parametrize("headers", OTHER_SITE)
def test_another_sites_page_may_not(headers: dict[str, str]) -> None:
    """Without a key, another site's page cannot spend a visitor's machine, nor a rebound name."""
    with pytest.raises(Forbidden):
        check_site(header(**headers), on_loopback=True)
