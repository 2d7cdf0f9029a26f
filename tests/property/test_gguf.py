"""core.gguf: no bytes whatever crash the parser or make it allocate beyond its bounds."""

from __future__ import annotations

import contextlib
import tracemalloc

from hypothesis import example, given
from hypothesis import strategies as st

from anser.core.errors import ModelFileError
from anser.core.gguf import HeaderIncomplete, parse_header
from tests.gguf_maker import Blueprint, array, string, text, u32, u64

plan = Blueprint()
plan.keys += [
    ("tokenizer.chat_template", string("{{ messages }}")),
    ("tokenizer.ggml.tokens", array(8, [text("a"), text("b")])),
    ("tokenizer.ggml.token_type", array(5, [u32(1), u32(3)])),
]
HONEST = plan.build()
NUMBERS = st.sampled_from([0, 1, 8, 9, 31, 32, 1 << 16, 1 << 31, 1 << 32, 1 << 60, (1 << 64) - 1])
CHANGES = st.lists(
    st.tuples(
        st.integers(0, len(HONEST) - 1), st.binary(min_size=1, max_size=8) | NUMBERS.map(u64)
    ),
    min_size=1,
    max_size=4,
)


def parse_within(data: bytes, file_bytes: int, most_bytes: int) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(ModelFileError, HeaderIncomplete):
            parse_header(data, file_bytes=file_bytes)
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


@given(CHANGES, st.integers(0, 1 << 62))
def test_changed_files_never_crash_it(changes: list[tuple[int, bytes]], more: int) -> None:
    """A changed header is read, refused or needs more bytes, within 256 KB, even if the file
    claims to be huge."""
    data = bytearray(HONEST)
    for place, change in changes:
        data[place : place + len(change)] = change
    parse_within(bytes(data), len(data), 256 * 1024)
    parse_within(bytes(data), len(data) + more, 256 * 1024)


@given(st.binary(max_size=512), st.sampled_from([b"", b"GGUF\x03\0\0\0"]))
@example(b"", b"")
def test_random_bytes_never_crash_it(data: bytes, head: bytes) -> None:
    """Nothing but the three outcomes, for any bytes."""
    parse_within(head + data, len(head + data), 256 * 1024)
