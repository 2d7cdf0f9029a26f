"""Weight for what an organisation contributes: a part of all, never a balance.

Theory of operation
-------------------
What a node serves to others than its owner is priced as all service is, and fades with a half-life
of seven days, so that it cannot be saved up. The platform's own nodes contribute as well, to nobody
in particular. With `b` the public share, `W` the weights that the operator gave to all
organisations that are awake, `c` what one of them contributed and `C` what everybody did, its own
weight `w` becomes

    w + (1 - b) / b * W * c / C

*Guarantee.* The weights of all that are awake add up to at most W + (1 - b) / b * W = W / b, since
all c together are at most C. So a contributor has at least b * w / W + (1 - b) * c / C of them,
whoever else is there, and those without any contribution have together at least b of what they
would have if nobody had contributed: contributing buys speed, and never everything.

Work for oneself, or for anything below, earns nothing. The credit counts what was delivered, and
follows from the receipt alone, so that anybody who has the receipts can compute it again.

Amounts are kept as of one moment: what comes later counts for more by 2^(time / half-life) instead
of all others for less, so adding costs O(1). Now and then all are faded to a later moment.

Invariants: no amount is negative; all are of members that gave something that still matters.
"""

from __future__ import annotations

from dataclasses import dataclass

from anser.core.fairness import price
from anser.core.ledger import INTEGER_MAX, Outcome, Receipt
from anser.core.members import ancestry

__all__ = [
    "CREDIT_SPAN_MS",
    "HALF_LIFE_S",
    "PLATFORM",
    "Contributions",
    "Credit",
    "added_weight",
    "credit_of",
]

HALF_LIFE_S = 7 * 86_400.0
CREDIT_SPAN_MS = 6 * 3_600_000  # stores may sum so much time: its mean is exact to 1 in 10,000
PLATFORM = ""  # in the place of a member: the nodes that nobody owns
_FADED_AFTER = 10.0  # half-lives from one fading of all to the next
_SET_BACK = 20.0  # half-lives: nothing that still matters is so old, so the clock was wrong
_NOTHING = 1.0  # micro-credits: less is forgotten
_WEIGHT_MAX = 2**50  # leaves room to sum a thousand of them exactly in a JSON number's 53 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What an owner of nodes has earned, in micro-credits, at a Unix time in milliseconds."""

    owner: str  # an organisation, or PLATFORM
    micro_credits: int
    at_ms: int

    def __post_init__(self) -> None:
        assert self.micro_credits >= 0


def credit_of(receipt: Receipt) -> Credit | None:
    """Who has earned how much by what reached a client; None if nobody anything.

    At most 2^53-1 micro-credits. A node that broke off its answer earns nothing, whoever went on
    with it, nor do receipts of before there were owners.
    """
    if receipt.owner is None or receipt.owner == ancestry(receipt.member)[0]:
        return None
    if receipt.outcome is Outcome.FAILED:
        return None
    usage = receipt.usage
    before = sum(lease.completion_tokens for lease in receipt.leases[:-1])  # by other nodes
    earned = price(
        fresh=usage.prompt_tokens - usage.cached_tokens,
        cached=usage.cached_tokens,
        output=max(0, usage.completion_tokens - before),
        factor_milli=receipt.factor_milli,
    )
    if not earned:
        return None
    micro_credits = min(earned, INTEGER_MAX)
    return Credit(owner=receipt.owner, micro_credits=micro_credits, at_ms=receipt.ended_ms)


def added_weight(part: float, *, awake: int, public_share: float) -> int:
    """What its part of all contribution adds to an organisation's weight, in thousandths.

    `awake` are the operator's weights of all organisations that are awake, this one among them.
    """
    assert 0.0 <= part <= 1.0
    assert awake > 0
    assert 0.0 < public_share <= 1.0
    return min(_WEIGHT_MAX, round((1.0 - public_share) / public_share * awake * part))


class Contributions:
    """What each organisation, and the platform, has contributed lately. Times are Unix seconds."""

    def __init__(self) -> None:
        self._amounts: dict[str, float] = {}  # as of `_since`
        self._since: float | None = None

    def add(self, credit: Credit) -> None:
        """An owner has earned this; in any order."""
        at = credit.at_ms / 1_000
        if self._since is None:
            self._since = at
        ahead = (at - self._since) / HALF_LIFE_S
        if not -_SET_BACK <= ahead <= _FADED_AFTER:
            self._fade(at)
        grown: float = credit.micro_credits * 2.0 ** ((at - self._since) / HALF_LIFE_S)
        self._amounts[credit.owner] = self._amounts.get(credit.owner, 0.0) + grown

    def amount(self, owner: str, at: float) -> float:
        """What of its contribution still counts at `at`, in micro-credits."""
        return self._amounts.get(owner, 0.0) * self._faded(at)

    def parts(self) -> dict[str, float]:
        """The part that each member has of all contribution; what is missing is the platform's."""
        total = sum(self._amounts.values())
        parts = {owner: amount / total for owner, amount in self._amounts.items() if amount}
        parts.pop(PLATFORM, None)
        return parts

    def __len__(self) -> int:
        return len(self._amounts)

    def __repr__(self) -> str:
        return f"<Contributions of {len(self._amounts)}>"

    def validate(self) -> None:
        """Assert the invariants of the module's docstring."""
        assert all(amount >= 0.0 for amount in self._amounts.values())
        assert self._since is not None or not self._amounts

    def _fade(self, at: float) -> None:
        faded = self._faded(at)
        amounts = {owner: amount * faded for owner, amount in self._amounts.items()}
        self._amounts = {owner: amount for owner, amount in amounts.items() if amount >= _NOTHING}
        self._since = at

    def _faded(self, at: float) -> float:
        """What is left of an amount at `at`; nothing grows, whatever the clock does."""
        age_s = 0.0 if self._since is None else max(0.0, at - self._since)
        result: float = 2.0 ** -(age_s / HALF_LIFE_S)
        return result
