"""Writes small GGUF files, honest or not, for tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["F32", "Blueprint", "array", "string", "text", "u32", "u64"]

F32 = 0


def u32(value: int) -> bytes:
    """A little-endian 32-bit number."""
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    """A little-endian 64-bit number."""
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    """A GGUF string without its type."""
    data = value.encode()
    return u64(len(data)) + data


def string(value: str) -> bytes:
    """A typed GGUF string."""
    return u32(8) + text(value)


def array(kind: int, items: Sequence[bytes]) -> bytes:
    """A typed GGUF array."""
    return u32(9) + u32(kind) + u64(len(items)) + b"".join(items)


@dataclass
class Blueprint:
    """What a file shall hold; tests change one thing at a time."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: list[tuple[str, bytes]] = field(
        default_factory=lambda: [
            ("general.architecture", string("llama")),
            ("llama.context_length", u32(4) + u32(2048)),
        ]
    )
    # name, dimensions, type, offset
    tensors: list[tuple[str, list[int], int, int]] = field(
        default_factory=lambda: [("a", [8], F32, 0), ("b", [4, 2], F32, 32)]
    )
    key_count: int | None = None
    tensor_count: int | None = None
    data: bytes = bytes(64)
    alignment: int = 32

    def build(self) -> bytes:
        """The file's bytes."""
        head = self.magic + u32(self.version)
        head += u64(len(self.tensors) if self.tensor_count is None else self.tensor_count)
        head += u64(len(self.keys) if self.key_count is None else self.key_count)
        head += b"".join(text(key) + value for key, value in self.keys)
        for name, dimensions, kind, offset in self.tensors:
            sizes = b"".join(u64(size) for size in dimensions)
            head += text(name) + u32(len(dimensions)) + sizes + u32(kind) + u64(offset)
        return head + bytes(-len(head) % self.alignment) + self.data
