"""Who asks behind proxies: the rightmost address that is no trusted proxy's, whatever is forged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.wire.proxies import HOPS_MAX, Asked, Proxies

PROXY = "10.0.0.1"
TRUSTED = Proxies(["10.0.0.0/8", "2001:db8:1::/48"])
FOR, RFC, PROTO = b"x-forwarded-for", b"forwarded", b"x-forwarded-proto"


def client(*headers: tuple[bytes, bytes]) -> str:
    """The client that these headers name."""
    return TRUSTED.asked(PROXY, list(headers)).address


def test_nobody_is_trusted_unless_named() -> None:
    """Without networks nobody is trusted, and a text that is no address never is."""
    assert not Proxies().trusts("127.0.0.1")
    assert TRUSTED.trusts("10.9.9.9")
    assert TRUSTED.trusts("::ffff:10.9.9.9")
    assert TRUSTED.trusts("2001:db8:1::5%eth0")
    assert not TRUSTED.trusts("11.0.0.1")
    assert not TRUSTED.trusts("")
    assert repr(TRUSTED) == "<Proxies 10.0.0.0/8, 2001:db8:1::/48>"
    assert repr(Proxies()) == "<Proxies none>"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"192.0.2.7", "192.0.2.7"),
        (b"192.0.2.7:4711", "192.0.2.7"),
        (b"[2001:db8::7]:4711", "2001:db8::7"),
        (b"2001:db8::7", "2001:db8::7"),
        (b"::ffff:192.0.2.7", "192.0.2.7"),
        (b"6.6.6.6, 192.0.2.7", "192.0.2.7"),
        (b"6.6.6.6, 192.0.2.7 ,10.1.1.1,\t2001:db8:1::9", "192.0.2.7"),
        (b"10.3.3.3, 10.2.2.2", "10.3.3.3"),
        (b"6.6.6.6, unknown", PROXY),
        (b"6.6.6.6, , 10.2.2.2", "10.2.2.2"),
        (b"6.6.6.6, 999.1.1.1", PROXY),
        (b"\xff\xfe, \x00", PROXY),
        (b"1" * 5_000, PROXY),
        (b"", PROXY),
    ],
)
def test_the_rightmost_address_that_is_no_proxys_is_the_client(value: bytes, found: str) -> None:
    """What a client has written stands left of it; what is no address ends the reading."""
    assert client((FOR, value)) == found


def test_a_list_may_be_spread_over_headers() -> None:
    """Headers of the same name are one list, in their order."""
    assert client((FOR, b"6.6.6.6"), (FOR, b"192.0.2.7"), (FOR, b"10.1.1.1")) == "192.0.2.7"
    assert client() == PROXY


@pytest.mark.parametrize("spread", [True, False])
def test_only_so_many_hops_are_read(spread: bool) -> None:
    """A longer list ends at the last one read, be it in one header or in many."""
    hops = [b"192.0.2.7", b"10.7.7.7", *[b"10.2.2.2"] * (HOPS_MAX - 1)]
    headers = [(FOR, hop) for hop in hops] if spread else [(FOR, b",".join(hops))]
    assert client(*headers) == "10.7.7.7"
    assert client(*headers[1:]) == ("10.7.7.7" if spread else PROXY)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"for=192.0.2.7", "192.0.2.7"),
        (b'For="[2001:db8::7]:4711";proto=https; by=10.0.0.1', "2001:db8::7"),
        (b'for=6.6.6.6, for="192.0.2.7:80", for=10.2.2.2', "192.0.2.7"),
        (b'for="6.6.6.6, for=192.0.2.7', "192.0.2.7"),
        (b"for=6.6.6.6;for=7.7.7.7", PROXY),
        (b"for=_hidden", PROXY),
        (b"by=6.6.6.6", PROXY),
        (b"for", PROXY),
        (b"for=192.0.2.7;" + b"x" * 300 + b"=1", PROXY),
    ],
)
def test_forwarded_is_read_by_its_grammar(value: bytes, found: str) -> None:
    """An element that is not well formed names nobody, and no quote swallows what follows."""
    assert client((RFC, value)) == found


def test_two_headers_that_disagree_are_not_believed() -> None:
    """A proxy that writes one of them passes a client's own through in the other."""
    assert client((FOR, b"192.0.2.7"), (RFC, b"for=6.6.6.6")) == PROXY
    assert client((FOR, b"192.0.2.7"), (RFC, b"for=192.0.2.7")) == "192.0.2.7"


def test_the_scheme_is_the_proxys() -> None:
    """The last X-Forwarded-Proto, or Forwarded's proto, if it is http or https."""

    def scheme(*headers: tuple[bytes, bytes]) -> str | None:
        return TRUSTED.asked(PROXY, list(headers)).scheme

    assert scheme((PROTO, b"https")) == "https"
    assert scheme((PROTO, b"http, HTTPS")) == "https"
    assert scheme((PROTO, b"javascript")) is None
    assert scheme((RFC, b"for=192.0.2.7;proto=https")) == "https"
    assert scheme((RFC, b"for=192.0.2.7"), (PROTO, b"https")) == "https"
    assert scheme() is None


@given(st.lists(st.tuples(st.sampled_from([FOR, RFC, PROTO]), st.binary(max_size=300))))
def test_no_bytes_do_harm(headers: list[tuple[bytes, bytes]]) -> None:
    """Whatever the headers are, the answer is an address and a known scheme or none."""
    asked = TRUSTED.asked(PROXY, headers)
    assert Proxies(["0.0.0.0/0", "::/0"]).trusts(asked.address)
    assert asked.scheme in (None, "http", "https")


@given(st.binary(max_size=300))
def test_a_client_cannot_choose_its_address(forged: bytes) -> None:
    """Whatever a client writes itself, the address that its proxy appends is found."""
    appended = [(FOR, forged + b", 192.0.2.7")]
    assert TRUSTED.asked(PROXY, appended) == Asked("192.0.2.7", None)
