"""core.gguf: a model's header is read, or refused in clear words, before the engine sees it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest

from anser.core import limits
from anser.core.errors import ModelFileError
from anser.core.gguf import Header, HeaderIncomplete, parse_header
from tests.gguf_maker import F32, Blueprint, array, string, text, u32, u64


def parse(data: bytes) -> Header:
    return parse_header(data, file_bytes=len(data))


def test_an_honest_file_is_described() -> None:
    """Name, licence, context, parameters, template and control tokens come from the header."""
    plan = Blueprint()
    plan.keys += [
        ("general.name", string("Tiny")),
        ("general.license", string("apache-2.0")),
        ("general.file_type", u32(4) + u32(3)),
        ("tokenizer.chat_template", string("{{ messages }}")),
        ("tokenizer.ggml.token_type", array(5, [u32(1), u32(3), u32(1), u32(3)])),
        ("tokenizer.ggml.tokens", array(8, [text("a"), text("b")])),
        ("tokenizer.ggml.scores", array(6, [struct.pack("<f", 1.5)])),
    ]
    header = parse(plan.build())
    assert (header.version, header.architecture, header.name) == (3, "llama", "Tiny")
    assert (header.licence, header.context_tokens, header.parameters) == ("apache-2.0", 2048, 16)
    assert header.chat_template == "{{ messages }}"
    assert header.control_tokens == {1, 3}
    assert [(t.name, t.offset, t.size_bytes) for t in header.tensors] == [
        ("a", 0, 32),
        ("b", 32, 32),
    ]


def test_every_scalar_type_is_skipped() -> None:
    """Values that are not needed are stepped over, whatever their type."""
    plan = Blueprint()
    for kind, size in {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}.items():
        plan.keys.append((f"other.{kind}", u32(kind) + bytes(size)))
    assert parse(plan.build()).parameters == 16


def test_what_is_not_said_is_none() -> None:
    """A header without name, licence, context or template is legal; facts of a wrong type are
    as good as absent."""
    plan = Blueprint(
        keys=[("general.architecture", string("llama")), ("general.name", u32(4) + u32(1))]
    )
    header = parse(plan.build())
    assert (header.name, header.licence, header.context_tokens) == (None, None, None)
    assert (header.chat_template, header.control_tokens) == (None, frozenset())


@pytest.mark.parametrize("length", [0, 3, 7, 30, 60, 120])
def test_more_bytes_are_asked_for(length: int) -> None:
    """A prefix that ends inside the header is not an error but a wish for more."""
    data = Blueprint().build()
    with pytest.raises(HeaderIncomplete):
        parse_header(data[:length], file_bytes=len(data))


def test_every_truncation_is_refused() -> None:
    """Cut anywhere, the file is refused, in the header or in its data."""
    data = Blueprint().build()
    for length in range(len(data)):
        with pytest.raises(ModelFileError):
            parse(data[:length])


def change(**changes: object) -> Callable[[], bytes]:
    return lambda: Blueprint(**changes).build()  # type: ignore[arg-type]


def add(key: str, value: bytes) -> Callable[[], bytes]:
    def build() -> bytes:
        plan = Blueprint()
        plan.keys.append((key, value))
        return plan.build()

    return build


def context_of(tokens: int) -> Callable[[], bytes]:
    facts = [("general.architecture", string("llama"))]
    return change(keys=[*facts, ("llama.context_length", u32(4) + u32(tokens))])


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "2^60 tensors": (change(tensor_count=1 << 60), "tensors: more than can be"),
    "more tensors than bytes": (change(tensor_count=1_000), "tensors: more than can be"),
    "2^60 keys": (change(key_count=1 << 60), "keys: more than can be"),
    "version 1": (change(version=1), "version 1"),
    "big-endian": (change(version=3 << 24), "big-endian"),
    "no tensors": (change(tensors=[]), "no tensors"),
    "no architecture": (change(keys=[]), "architecture"),
    "an empty architecture": (change(keys=[("general.architecture", string(""))]), "architecture"),
    "a number for architecture": (
        change(keys=[("general.architecture", u32(4) + u32(7))]),
        "architecture",
    ),
    "overlap": (change(tensors=[("a", [8], F32, 0), ("b", [8], F32, 0)]), "overlap"),
    "beyond the end": (change(tensors=[("a", [8], F32, 64)]), "truncated"),
    "far beyond": (change(tensors=[("a", [8], F32, 1 << 63)]), "truncated"),
    "one name twice": (change(tensors=[("a", [8], F32, 0), ("a", [8], F32, 32)]), "one name"),
    "a long name": (change(tensors=[("a" * 64, [8], F32, 0)]), "tensor name of 64 bytes"),
    "no dimensions": (change(tensors=[("a", [], F32, 0)]), "0 dimensions"),
    "five dimensions": (change(tensors=[("a", [1] * 5, F32, 0)]), "5 dimensions"),
    "a zero": (change(tensors=[("a", [8, 0], F32, 0)]), "zero or beyond"),
    "an overflow": (change(tensors=[("a", [1 << 40, 1 << 40], F32, 0)]), "zero or beyond"),
    "an unknown type": (change(tensors=[("a", [8], 99, 0)]), "type 99"),
    "half a block": (change(tensors=[("a", [31], 2, 0)]), "do not fit its type"),
    "a crooked place": (change(tensors=[("a", [8], F32, 4)]), "do not fit its type"),
    "a key twice": (add("general.architecture", string("llama")), "key twice"),
    "a long key": (add("k" * 257, u32(4) + u32(1)), "a key of 257 bytes"),
    "an unknown value": (add("k", u32(13)), "unknown type 13"),
    "a list of lists": (add("k", array(9, [])), "list of unknown type 9"),
    "a huge text": (add("k", u32(8) + u64(1 << 62)), "a text of"),
    "a huge list": (add("k", u32(9) + u32(4) + u64(1 << 62)), "values: more than can be"),
    "a huge list of texts": (add("k", u32(9) + u32(8) + u64(1 << 62)), "texts: more than can be"),
    "a huge text in a list": (
        add("k", u32(9) + u32(8) + u64(1) + u64(1 << 62)),
        "bytes in a list",
    ),
    "a huge template": (
        add("tokenizer.chat_template", string("x" * (limits.GGUF_TEMPLATE_BYTES_MAX + 1))),
        "a text of",
    ),
    "a huge named template": (
        add("tokenizer.chat_template.rag", u32(8) + u64(limits.GGUF_TEMPLATE_BYTES_MAX + 1)),
        "a text of",
    ),
    "a crooked alignment": (add("general.alignment", u32(4) + u32(33)), "alignment"),
    "a huge alignment": (add("general.alignment", u32(4) + u32(1 << 20)), "alignment"),
    "an alignment of text": (add("general.alignment", string("32")), "alignment"),
    "no blocks": (add("llama.block_count", u32(4) + u32(0)), "block_count"),
    "endless blocks": (add("llama.block_count", u32(4) + u32(1 << 31)), "block_count"),
    "blocks in words": (add("llama.block_count", string("many")), "block_count"),
    "hardly a context": (context_of(1), "context_length"),
    "an endless context": (context_of((1 << 32) - 1), "context_length"),
    "no number": (add("k", u32(6) + struct.pack("<f", math.nan)), "no number"),
    "an endless number": (add("k", u32(12) + struct.pack("<d", -math.inf)), "no number"),
    "one part of three": (add("split.count", u32(2) + struct.pack("<H", 3)), "one of 3 parts"),
}


@pytest.mark.parametrize(("build", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(build: Callable[[], bytes], words: str) -> None:
    """Each lie is found before anything is allocated for it, and the words say which."""
    with pytest.raises(ModelFileError, match=words):
        parse(build())


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\x80\x04\x95" + bytes(40), "pickle"),
        (u64(1000) + b'{"__metadata__":{}}' + bytes(40), "safetensors"),
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"<!DOCTYPE html><html>" + bytes(40), "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git LFS"),
        (b"lmgg" + bytes(40), "outdated GGML"),
        (b"FUGG" + bytes(40), "big-endian"),
        (b"something else altogether, of some length", "not a GGUF file"),
    ],
)
def test_other_files_are_named(head: bytes, words: str) -> None:
    """Somebody who names the wrong file is told what it is."""
    with pytest.raises(ModelFileError, match=words):
        parse(head)


def test_an_empty_file_is_refused() -> None:
    """Nothing is not a model."""
    with pytest.raises(ModelFileError, match="truncated"):
        parse(b"")


def test_one_part_of_one_is_whole() -> None:
    """A split of one part is a whole model."""
    assert parse(add("split.count", u32(2) + struct.pack("<H", 1))()).parameters == 16


def test_token_types_of_a_strange_width_are_ignored() -> None:
    """Only 32-bit token types have a meaning."""
    assert parse(add("tokenizer.ggml.token_type", array(0, [b"\x03"]))()).control_tokens == set()
