"""How fast a node is and how much it really does at once: learnt from its own answers.

Theory of operation
-------------------
Nothing about speed is configured. From each lease three things are measured: how long the node took
to read the prompt, how fast it then wrote, and how long the slot was held. Each is smoothed
(exponentially weighted, a fifth of each new sample), and a sample that is more than four times or
less than a quarter of what is known counts as exactly that much: one stall or one cached prompt
cannot move it far, while a real change is followed within a few samples.

*Slots that are not there.* An engine that claims more slots than it has queues inside, where no
order of ours holds. It shows: the first token takes far longer than the prompts under way can
explain. So a node is given a window of leases, as TCP is given one of segments (AIMD): each first
token in time widens it by one until the claim is reached, each one far too late narrows it by a
third, at most once for each window of leases. It never falls below one, so that a node
can show that it has recovered. Short prompts say nothing of how fast it reads; what their first
tokens took at best, which is forgotten slowly, explains as much for all.

Times are seconds, rates tokens a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Pace", "Smooth", "smoothed"]

_WEIGHT = 0.2
_OUTLIER = 4.0

_PREFILL_TOKENS_S = 1_000.0  # until something is known
_DECODE_TOKENS_S = 20.0
_HOLD_S = 10.0
_SAMPLE_TOKENS_MIN = 64  # fewer measure the way there, not the reading

_FORGOTTEN = 1.02  # by this, with each sample, the best one is no longer known to be so good

_LATE = 4.0  # times what the prompts under way explain
_LATE_MIN_S = 2.0  # and never less than this
_NARROW = 2 / 3


def smoothed(value: float | None, sample: float) -> float:
    """What is known after one more sample, which must be positive; None is nothing so far."""
    assert sample > 0
    if value is None:
        return float(sample)
    return value + _WEIGHT * (min(max(sample, value / _OUTLIER), value * _OUTLIER) - value)


@dataclass(slots=True)
class Smooth:
    """One quantity, smoothed; `value` is a guess until the first sample."""

    value: float
    samples: int = 0

    def observe(self, sample: float) -> None:
        """Take one more sample of it; it must be positive."""
        self.value = smoothed(self.value if self.samples else None, sample)
        self.samples += 1


@dataclass(slots=True)
class Pace:
    """What is known of one node's speed."""

    prefill_tokens_s: Smooth = field(default_factory=lambda: Smooth(_PREFILL_TOKENS_S))
    decode_tokens_s: Smooth = field(default_factory=lambda: Smooth(_DECODE_TOKENS_S))
    hold_s: Smooth = field(default_factory=lambda: Smooth(_HOLD_S))
    window: int | None = None  # leases at once, once it was late; None: as many as it claims
    way_s: float | None = None  # to the first token of a short prompt, at best
    _since: int = 0  # first tokens in time or late since the window was last changed

    def began(self, *, tokens: int, ahead: int, took_s: float) -> None:
        """A first token came `took_s` after its lease began.

        `tokens` of its prompt were fresh, and `ahead` more were being read for others.
        """
        if tokens >= _SAMPLE_TOKENS_MIN and took_s > 0:
            self.prefill_tokens_s.observe((tokens + ahead) / took_s)
        elif tokens < _SAMPLE_TOKENS_MIN:
            self.way_s = took_s if self.way_s is None else min(took_s, self.way_s * _FORGOTTEN)

    def judge(self, *, whole: int, took_s: float, running: int) -> None:
        """Whether that was in time, with `running` leases on the node.

        `whole` are all tokens of its prompt and of those that were being read, were nothing of them
        cached: a beginning that the node has lost is not held against it.
        """
        self._since += 1
        way_s = self.way_s or 0.0
        late = took_s > max(_LATE_MIN_S, _LATE * max(way_s, self.read_s(whole)))
        if not late:
            if self.window is not None and running >= self.window:
                self.window += 1
        elif self._known and (self.window is None or self._since >= self.window):
            self.window, self._since = max(1, int(running * _NARROW)), 0

    @property
    def _known(self) -> bool:
        """Whether anything says how long a first token takes."""
        return self.prefill_tokens_s.samples > 0 or self.way_s is not None

    def ended(self, *, tokens: int, wrote_s: float, held_s: float) -> None:
        """A lease ended that wrote `tokens` after its first one in `wrote_s` seconds."""
        if tokens > 0 and wrote_s > 0:
            self.decode_tokens_s.observe(tokens / wrote_s)
        if held_s > 0:
            self.hold_s.observe(held_s)

    def slots(self, claimed: int) -> int:
        """How many leases the node may have at once, of those that it claims."""
        return claimed if self.window is None else min(claimed, self.window)

    def read_s(self, tokens: int) -> float:
        """How long it takes to read so many fresh tokens."""
        return tokens / self.prefill_tokens_s.value

    def free_s(self, slots: int) -> float:
        """How long it takes until one of so many busy slots is free, on average."""
        return self.hold_s.value / max(1, slots)
