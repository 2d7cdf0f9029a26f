"""The header of a GGUF file, read without trusting a byte of it.

Theory of operation: a GGUF file is magic, version, counts, key-value pairs, tensor descriptions,
padding, tensor data (all little-endian). `parse_header` gets the first bytes of the file and its
length. It returns a Header, or raises HeaderIncomplete (the caller reads more and calls again)
or ModelFileError. What it keeps is bounded by core.limits, whatever the file claims: counts and
lengths are compared with the bytes that could hold them before anything is allocated.

Layout and type numbers: the GGUF specification in ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from anser.core import limits
from anser.core.errors import ModelFileError

__all__ = ["Header", "HeaderIncomplete", "Tensor", "parse_header"]


class HeaderIncomplete(Exception):  # noqa: N818 - a request for more bytes, not a failure
    """The header goes on beyond the bytes given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Where one tensor lies; `offset` counts bytes from the start of the data section."""

    name: str
    elements: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What is known of a model before it is loaded."""

    version: int
    architecture: str
    name: str | None
    licence: str | None
    context_tokens: int | None  # that the model was trained for
    parameters: int
    chat_template: str | None
    control_tokens: frozenset[int]  # ids that render as nothing
    tensors: tuple[Tensor, ...]


def parse_header(prefix: bytes, *, file_bytes: int) -> Header:
    """Read the header from the first bytes of a file of `file_bytes` bytes."""
    assert len(prefix) <= file_bytes
    cursor = _Cursor(prefix, file_bytes)
    version = _read_magic(cursor)
    tensor_count = cursor.count(limits.GGUF_TENSORS_MAX, "tensors", item_bytes=32)
    key_count = cursor.count(limits.GGUF_KEYS_MAX, "keys", item_bytes=13)
    facts = _read_facts(cursor, key_count)
    alignment = _alignment(facts)
    tensors = tuple(_read_tensor(cursor, alignment) for _ in range(tensor_count))
    start = -(-cursor.position // alignment) * alignment
    _check_tensors(tensors, data_bytes=file_bytes - start)
    return _describe(version, facts, tensors)


# ------------------------------------------------------------------------------- the bytes


class _Cursor:
    """Reads forward; never beyond the prefix, and never believes a length."""

    __slots__ = ("_data", "_file_bytes", "position")

    def __init__(self, data: bytes, file_bytes: int) -> None:
        self._data = data
        self._file_bytes = file_bytes
        self.position = 0

    def skip(self, length: int) -> int:
        """Go `length` bytes on and return where they begin."""
        begin, end = self.position, self.position + length
        if end > self._file_bytes:
            raise ModelFileError("The model file is truncated: its header goes on beyond its end.")
        if end > len(self._data):
            raise HeaderIncomplete
        self.position = end
        return begin

    def take(self, length: int) -> bytes:
        begin = self.skip(length)
        return self._data[begin : begin + length]

    def unpack(self, layout: struct.Struct) -> int | float | bool:
        value: int | float | bool = layout.unpack_from(self._data, self.skip(layout.size))[0]
        return value

    def u32(self) -> int:
        return int(self.unpack(_U32))

    def u64(self) -> int:
        return int(self.unpack(_U64))

    def count(self, most: int, what: str, *, item_bytes: int) -> int:
        """A number of things of at least `item_bytes` each that must fit into the file."""
        number = self.u64()
        if number > most or number * item_bytes > self._file_bytes:
            raise ModelFileError(f"The model file claims {number} {what}: more than can be.")
        return number

    def text(self, most: int, what: str) -> str:
        length = self.u64()
        if length > most:
            raise ModelFileError(f"The model file has {what} of {length} bytes; at most {most}.")
        return self.take(length).decode("utf-8", "replace")


_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING = 8
_ARRAY = 9

_FOREIGN: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: head.startswith(b"version https://git-lfs"), "a Git LFS pointer, not the file"),
    (lambda head: head.startswith(b"PK\x03\x04"), "a zip archive (PyTorch, or a wheel)"),
    (lambda head: head[:1] == b"\x80" and head[1:2] <= b"\x05", "a Python pickle"),
    (lambda head: head[8:9] == b"{" and head[2:8] == bytes(6), "a safetensors file"),
    (lambda head: head.lstrip()[:1] == b"<", "a web page"),
    (lambda head: head[:4] in {b"ggml", b"ggjt", b"lmgg", b"tjgg"}, "an outdated GGML file"),
    (lambda head: head[:4] == b"FUGG", "a GGUF file for big-endian machines"),
)


def _read_magic(cursor: _Cursor) -> int:
    if cursor.take(4) != b"GGUF":
        cursor.position = 0
        head = cursor.take(32)
        what = next((words for test, words in _FOREIGN if test(head)), "not a GGUF file")
        raise ModelFileError(f"This is {what}. Only GGUF models are loaded.")
    version = cursor.u32()
    if version not in {2, 3}:
        big = version & 0xFFFF == 0
        words = "is for big-endian machines" if big else f"has version {version}, not 2 or 3"
        raise ModelFileError(f"The model file {words}.")
    return version


# ------------------------------------------------------------------------------- the facts

_Fact = int | float | bool | str | frozenset[int]


def _read_facts(cursor: _Cursor, count: int) -> dict[str, _Fact]:
    """The key-value pairs; of arrays only the token types are kept, as the control tokens."""
    facts: dict[str, _Fact] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.text(256, "a key")
        if key in seen:
            raise ModelFileError("The model file has a key twice.")
        seen.add(key)
        fact = _read_value(cursor, key, cursor.u32())
        if fact is not None:
            facts[key] = fact
    return facts


def _read_value(cursor: _Cursor, key: str, kind: int) -> _Fact | None:
    if kind == _STRING:
        most = limits.GGUF_STRING_BYTES_MAX
        if key.startswith("tokenizer.chat_template"):
            most = limits.GGUF_TEMPLATE_BYTES_MAX
        return cursor.text(most, "a text")
    if kind == _ARRAY:
        return _read_array(cursor, key)
    layout = _SCALARS.get(kind)
    if layout is None:
        raise ModelFileError(f"The model file has a value of unknown type {kind}.")
    value = cursor.unpack(layout)
    if not math.isfinite(value):
        raise ModelFileError("The model file has a value that is no number.")
    return value


def _read_array(cursor: _Cursor, key: str) -> frozenset[int] | None:
    kind = cursor.u32()
    if kind == _STRING:
        for _ in range(cursor.count(limits.GGUF_HEADER_BYTES_MAX, "texts", item_bytes=8)):
            length = cursor.u64()
            if length > limits.GGUF_STRING_BYTES_MAX:
                raise ModelFileError(f"The model file has a text of {length} bytes in a list.")
            cursor.skip(length)
        return None
    layout = _SCALARS.get(kind)
    if layout is None:
        raise ModelFileError(f"The model file has a list of unknown type {kind}.")
    number = cursor.count(limits.GGUF_HEADER_BYTES_MAX, "values", item_bytes=layout.size)
    data = cursor.take(number * layout.size)
    if key != "tokenizer.ggml.token_type" or kind not in {4, 5}:
        return None
    control = 3  # of ggml's token types: normal, unknown, control, user, unused, byte
    kinds = struct.iter_unpack(layout.format, data)
    return frozenset(token for token, (value,) in enumerate(kinds) if value == control)


def _alignment(facts: dict[str, _Fact]) -> int:
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise ModelFileError("The model file's alignment is not a power of two from 8 to 65536.")
    return alignment


# ----------------------------------------------------------------------------- the tensors

# ggml's tensor types: elements in a block, bytes of a block.
_TYPES: dict[int, tuple[int, int]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 36),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
    42: (64, 18),  # Q2_0
}


def _read_tensor(cursor: _Cursor, alignment: int) -> Tensor:
    name = cursor.text(63, "a tensor name")
    dimensions = [cursor.u64() for _ in range(_dimension_count(cursor))]
    kind = cursor.u32()
    offset = cursor.u64()
    if kind not in _TYPES:
        raise ModelFileError(f"A tensor has type {kind}, which is not known.")
    block, block_bytes = _TYPES[kind]
    elements = 1
    for size in dimensions:
        elements *= size
        if not 0 < elements < 1 << 48:
            raise ModelFileError("A tensor's dimensions are zero or beyond all measure.")
    if dimensions[0] % block or offset % alignment:
        raise ModelFileError("A tensor's rows or its place do not fit its type.")
    size_bytes = elements // block * block_bytes
    return Tensor(name=name, elements=elements, offset=offset, size_bytes=size_bytes)


def _dimension_count(cursor: _Cursor) -> int:
    count = cursor.u32()
    if not 1 <= count <= 4:
        raise ModelFileError(f"A tensor has {count} dimensions; 1 to 4 are possible.")
    return count


def _check_tensors(tensors: tuple[Tensor, ...], *, data_bytes: int) -> None:
    """All names differ, all tensors lie inside the file, and no two share a byte."""
    if not tensors:
        raise ModelFileError("The model file has no tensors: perhaps only a vocabulary.")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ModelFileError("The model file has two tensors of one name.")
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise ModelFileError("Tensors of the model file overlap.")
        end = tensor.offset + tensor.size_bytes
    if end > data_bytes:
        raise ModelFileError("The model file is truncated: a tensor goes on beyond its end.")


def _describe(version: int, facts: dict[str, _Fact], tensors: tuple[Tensor, ...]) -> Header:
    parts = _whole(facts.get("split.count"))
    if parts is not None and parts > 1:
        raise ModelFileError(f"This is one of {parts} parts of a model; only whole files load.")
    architecture = _words(facts.get("general.architecture"))
    if not architecture:
        raise ModelFileError("The model file does not say which architecture it has.")
    _check_shape(facts, architecture)
    control = facts.get("tokenizer.ggml.token_type")
    return Header(
        version=version,
        architecture=architecture,
        name=_words(facts.get("general.name")),
        licence=_words(facts.get("general.license")),
        context_tokens=_whole(facts.get(f"{architecture}.context_length")),
        parameters=sum(tensor.elements for tensor in tensors),
        chat_template=_words(facts.get("tokenizer.chat_template")),
        control_tokens=control if isinstance(control, frozenset) else frozenset(),
        tensors=tensors,
    )


def _check_shape(facts: dict[str, _Fact], architecture: str) -> None:
    """Sizes that no model has, and on which an engine would end the process."""
    for key, most in (("block_count", 4_096), ("context_length", 1 << 28)):
        size = facts.get(f"{architecture}.{key}", most)
        if not isinstance(size, int) or not _SIZES_MIN[key] <= size <= most:
            raise ModelFileError(f"The model file has a {key} that no model can have.")


_SIZES_MIN = {"block_count": 1, "context_length": 16}


def _words(fact: _Fact | None) -> str | None:
    return fact if isinstance(fact, str) else None


def _whole(fact: _Fact | None) -> int | None:
    return fact if type(fact) is int and fact > 0 else None
