"""A model of an inference engine: continuous batching, chunked prefill, a prefix cache.

Theory of operation. An engine works in steps. A step writes one token of each sequence that has
been read, which takes `step_s + sequence_s * sequences`, and reads at most 512 prompt tokens of
those that have not, the oldest first, at `prefill_tokens_s`. A prompt's first token comes with the
step that ends its reading. The prefix cache is a least-recently-used set of 64-token blocks, each
named by all text up to its end, so that what two prompts share is counted in blocks.

Nothing here has a clock: `begin` says how long the step takes, and `end` what it did.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from anser.core.prefix import Chain

__all__ = ["BLOCK_TOKENS", "FLEET", "Answer", "Engine", "NodeSpec", "Stepped"]

BLOCK_TOKENS = 64
_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """What a node can do."""

    id: str
    slots: int
    prefill_tokens_s: float
    step_s: float
    sequence_s: float
    cache_tokens: int
    round_trip_s: float


def _spec(
    id: str, slots: int, speed: tuple[float, float, float], cache: int, rtt: float
) -> NodeSpec:
    prefill, step_s, sequence_s = speed
    return NodeSpec(
        id=id,
        slots=slots,
        prefill_tokens_s=prefill,
        step_s=step_s,
        sequence_s=sequence_s,
        cache_tokens=cache,
        round_trip_s=rtt,
    )


FLEET = (
    _spec("a", 32, (8_000, 0.018, 0.0003), 200_000, 0.020),
    _spec("b", 16, (3_000, 0.032, 0.0006), 60_000, 0.030),
    _spec("c", 12, (2_000, 0.055, 0.0008), 40_000, 0.030),
    _spec("d", 6, (900, 0.060, 0.0015), 16_000, 0.080),
)
"""Four unlike nodes, from a server card to a desktop."""


@dataclass(slots=True, eq=False, kw_only=True)
class Answer:
    """One answer in the making."""

    lease: str
    prompt: Chain  # its whole blocks
    prompt_tokens: int
    output_tokens: int
    after: Chain  # the blocks of prompt and answer
    cached: int = -1  # prompt tokens found in the cache; not looked for yet
    left: int = 0  # prompt tokens to read
    written: int = 0
    reported: int = 0  # of those written
    aborted: bool = False


@dataclass(slots=True)
class Stepped:
    """What a step did."""

    began: list[Answer] = field(default_factory=list[Answer])  # wrote their first token
    ended: list[Answer] = field(default_factory=list[Answer])


class Engine:
    """One node's engine."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.speed = 1.0
        self.reading: deque[Answer] = deque()
        self.writing: dict[str, Answer] = {}
        self.busy = False  # within a step
        self._blocks_max = spec.cache_tokens // BLOCK_TOKENS
        self._cache: OrderedDict[bytes, None] = OrderedDict()
        self._read: list[Answer] = []

    @property
    def running(self) -> int:
        """Sequences that are read or written."""
        return len(self.reading) + len(self.writing)

    def admit(self, sequence: Answer) -> None:
        """Take one more sequence; there must be a slot."""
        self.reading.append(sequence)
        assert self.running <= self.spec.slots

    def hit(self, prompt: Chain, tokens: int) -> int:
        """How many of the prompt's tokens are in the cache; the last one is always read."""
        blocks = 0
        for name in prompt:
            if name not in self._cache:
                break
            blocks += 1
        return min(blocks * BLOCK_TOKENS, tokens - 1)

    def begin(self) -> float:
        """Begin a step; how long it takes."""
        self.busy = True
        room, self._read = _CHUNK_TOKENS, []
        for sequence in self.reading:
            if not room:
                break
            if sequence.cached < 0:
                sequence.cached = self.hit(sequence.prompt, sequence.prompt_tokens)
                sequence.left = sequence.prompt_tokens - sequence.cached
            part = min(room, sequence.left)
            sequence.left -= part
            room -= part
            self._read.append(sequence)
        spec = self.spec
        reading_s = (_CHUNK_TOKENS - room) / spec.prefill_tokens_s
        return (spec.step_s + spec.sequence_s * len(self.writing) + reading_s) / self.speed

    def end(self) -> Stepped:
        """End the step: what it did."""
        self.busy = False
        stepped = Stepped()
        for sequence in self.writing.values():
            sequence.written += 1
            if sequence.written >= sequence.output_tokens or sequence.aborted:
                stepped.ended.append(sequence)
        for sequence in self._read:
            if sequence.left and not sequence.aborted:
                continue
            self.reading.remove(sequence)
            sequence.written = 1
            self._keep(sequence.prompt)
            self.writing[sequence.lease] = sequence
            stepped.began.append(sequence)
            if sequence.output_tokens <= 1 or sequence.aborted:
                stepped.ended.append(sequence)
        for sequence in stepped.ended:
            del self.writing[sequence.lease]
            self._keep(sequence.after)
        return stepped

    def abort(self, lease: str) -> None:
        """Let a sequence end with the next step."""
        for sequence in (*self.reading, *self.writing.values()):
            if sequence.lease == lease:
                sequence.aborted = True

    def lose(self) -> list[Answer]:
        """The machine dies: what it was at, and its cache, are gone."""
        lost = [*self.reading, *self.writing.values()]
        self.reading.clear()
        self.writing.clear()
        self._cache.clear()
        self._read = []
        return lost

    def _keep(self, blocks: Chain) -> None:
        cache = self._cache
        for name in reversed(blocks[: self._blocks_max]):
            cache[name] = None
            cache.move_to_end(name)
        while len(cache) > self._blocks_max:
            cache.popitem(last=False)

    def __repr__(self) -> str:
        return f"<Engine {self.spec.id} {self.running}/{self.spec.slots}>"
