"""core.members: names, keys and buckets."""

from __future__ import annotations

import re

import pytest

from anser.core import members
from anser.core.errors import InvalidField

PEPPER = b"p" * 32


def test_key_text_has_the_shape_that_hugging_face_clients_accept() -> None:
    """`hf_` and alphanumerics, 37 to 256 characters in all, for any entropy."""
    for entropy in (bytes(32), bytes([255] * 32), bytes(range(32))):
        text = members.key_text(entropy)
        assert re.fullmatch(r"hf_[A-Za-z0-9]+", text)
        assert 37 <= len(text) <= 256


def test_key_text_carries_all_of_its_entropy() -> None:
    """Keys of different entropy differ, also in the highest bit."""
    highest = members.key_text(bytes([128]) + bytes(31))
    assert len({members.key_text(bytes(32)), highest, members.key_text(bytes(31) + b"\1")}) == 3


def test_key_hash_depends_on_the_pepper_and_every_letter() -> None:
    """Without the pepper nothing can be checked; one wrong letter opens nothing."""
    right = members.hash_key("hf_a", pepper=PEPPER)
    assert len(right) == 32
    assert right != members.hash_key("hf_a", pepper=b"q" * 32)
    assert right != members.hash_key("hf_b", pepper=PEPPER)
    assert members.hash_key("hf_\udc80", pepper=PEPPER) != right


@pytest.mark.parametrize("name", ["a", "a/b", "a/b/c", "org-1/my.project/x_y", "0" * 63])
def test_member_names_of_one_to_three_parts_are_taken(name: str) -> None:
    """An organisation, a project, a person."""
    assert members.check_member_id(name) == name


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", "a//b", "a/b/c/d", "A", "ä", "-a", "a b", "a\n", "a" * 64, "../a"]
)
def test_other_member_names_are_refused(name: str) -> None:
    """Nothing that could be a path trick, an escape or a look-alike becomes a name."""
    with pytest.raises(InvalidField):
        members.check_member_id(name)


def test_ancestry_leads_from_the_organisation_down() -> None:
    """The path of a person is organisation, project, person."""
    assert members.ancestry("a/b/c") == ("a", "a/b", "a/b/c")
    assert members.ancestry("a") == ("a",)


def test_a_bucket_follows_from_the_network_and_nothing_else() -> None:
    """One /24 (IPv4) or /48 (IPv6) is one bucket, however it is written."""

    def bucket(address: str) -> str:
        return members.bucket_of(address, pepper=PEPPER)

    assert bucket("192.0.2.1") == bucket("192.0.2.254") == bucket("::ffff:192.0.2.7")
    assert bucket("2001:db8:1:2::1") == bucket("2001:db8:1:ffff::9%eth0")
    assert bucket("192.0.2.1") != bucket("198.51.100.1") or bucket("203.0.113.1") != bucket(
        "192.0.2.1"
    )
    assert bucket("not an address") == "anonymous/bucket-local"
    assert members.bucket_of("192.0.2.1", pepper=b"q" * 32).startswith("anonymous/bucket-")


def test_buckets_are_bounded() -> None:
    """Any number of networks shares 1,024 buckets."""
    seen = {members.bucket_of(f"10.{i}.{j}.1", pepper=PEPPER) for i in range(64) for j in range(64)}
    assert 900 < len(seen) <= members.BUCKETS


def _key(*, expires_at: float | None = None, revoked_at: float | None = None) -> members.Key:
    return members.Key(
        id="key_1",
        hash=b"h",
        member="a",
        label="",
        created_at=0.0,
        expires_at=expires_at,
        revoked_at=revoked_at,
    )


def test_a_key_is_valid_until_it_expires_or_is_revoked() -> None:
    """The last moment belongs to expiry; revocation is at once."""
    assert _key().valid(1e12)
    assert _key(expires_at=10.0).valid(9.99)
    assert not _key(expires_at=10.0).valid(10.0)
    assert not _key(revoked_at=5.0).valid(1.0)
