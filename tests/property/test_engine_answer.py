"""An engine's answer under any split into packets, and any pauses of its receiver."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from anser.adapters.engine_answer import Answer
from anser.core.errors import EngineBroken, EngineError
from anser.wire.connection import Head

_PAYLOADS = st.sampled_from(
    [
        b'{"choices":[{"delta":{"content":"a"}}]}',
        b'{"choices":[{"delta":{"content":"\xc3\xa9"}}]}',
        b'{"choices":[{"finish_reason":"stop"}]}',
        b'{"choices":[{"finish_reason":"stop"}],"usage":{"total_tokens":5}}',
        b'{"choices":[],"usage":{"total_tokens":5}}',
        b'{"error":{"message":"no","code":400}}',
        b"[DONE]",
        b"broken",
    ]
)
_STREAMS = st.lists(_PAYLOADS, max_size=12)
_CUTS = st.lists(st.integers(min_value=0, max_value=400), max_size=12)
_ACTS = st.lists(st.sampled_from(["", "pause", "resume", "both", "abort"]), max_size=12)


class _Told:
    """A receiver that does the next of its acts from within each call."""

    def __init__(self, acts: list[str]) -> None:
        self.told: list[object] = []
        self.aborted = False
        self.answer = Answer(self, None)
        self._acts = iter(acts)

    def chunk(self, data: bytes) -> None:
        self._tell(data)

    def ended(self) -> None:
        self._tell("ended")

    def failed(self, error: EngineError) -> None:
        self._tell(type(error))

    def _tell(self, what: object) -> None:
        assert not self.aborted
        self.told.append(what)
        self.act()

    def act(self) -> None:
        """The next act, if any is left."""
        act = next(self._acts, "")
        if act in ("pause", "both"):
            self.answer.pause()
        if act in ("resume", "both"):
            self.answer.resume()
        if act == "abort" and not self.aborted:
            self.aborted = True
            self.answer.abort(lambda: None)


def _run(payloads: list[bytes], cuts: list[int], acts: list[str], *, whole: bool) -> _Told:
    data = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    points = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    receiver = _Told(acts)
    answer = receiver.answer
    answer.head(Head(200, [(b"content-type", b"text/event-stream")], until_eof=False))
    for start, stop in pairwise(points):
        answer.data(data[start:stop])
        receiver.act()
    if whole:
        answer.complete()
    else:
        answer.failed(EngineBroken("gone"))
    for _ in range(len(payloads) + len(acts) + 2):
        answer.resume()
    return receiver


@given(payloads=_STREAMS, cuts=_CUTS, acts=_ACTS, whole=st.booleans())
def test_what_is_told_depends_on_the_bytes_alone(
    payloads: list[bytes], cuts: list[int], acts: list[str], *, whole: bool
) -> None:
    """Neither splits nor pauses change a thing that is told; an abort only cuts it short."""
    plain = _run(payloads, [], [], whole=whole).told
    split = _run(payloads, cuts, acts, whole=whole)
    assert split.told == (plain[: len(split.told)] if split.aborted else plain)
    ends = [told for told in plain if not isinstance(told, bytes)]
    assert ends == plain[-1:]
