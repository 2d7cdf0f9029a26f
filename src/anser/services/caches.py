"""Whose prompts may share an engine's cache, and what keeps the others' apart.

A prompt whose beginning is in a cache is read faster, and so tells that somebody sent the same
beginning before. Where organisations are not to learn that of each other, each has a salt of its
own: what the scheduler knows of caches is kept by it, and engines that can are given one, too.
Those who come without a key are strangers: there each network counts as an organisation.
"""

from __future__ import annotations

from hashlib import blake2b

from anser.core.members import ANONYMOUS, ancestry

__all__ = ["chain_salt", "engine_salt"]

_SALT_BYTES = 16


def chain_salt(model: str, member: str, *, shared: bool) -> bytes:
    """What goes before a prompt's text when its blocks are named: other salts, other names.

    >>> chain_salt("m", "a/b/c", shared=True), chain_salt("m", "a/b/c", shared=False)
    (b'm\\x00\\x00', b'm\\x00a\\x00')
    """
    group = "" if shared else _group(member)
    return f"{model}\0{group}\0".encode()


def engine_salt(member: str, *, pepper: bytes) -> str:
    """What an engine is given instead of the organisation's name, which is none of its business."""
    key = blake2b(pepper, digest_size=32).digest()
    salt = blake2b(_group(member).encode(), key=key, digest_size=_SALT_BYTES, person=b"cache salt")
    return salt.hexdigest()


def _group(member: str) -> str:
    organisation = ancestry(member)[0]
    return member if organisation == ANONYMOUS else organisation
