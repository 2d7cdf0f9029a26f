"""Tells a story: runs its commands on a scheduler, and says in words what that decides.

A story is a text of paragraphs. A paragraph is commands, a line of four dashes, and what they give:

    submit r1 by=alice prompt=100
    ----
    start r1.1 on n1

Commands (one per line; `#` begins a comment):

    begin [queued_max=N] [retries_max=N]     an empty scheduler
    node NODE slots=N [models=A,B]           it joins, or serves other things from now on
    gone NODE                                it is lost
    weigh MEMBER THOUSANDTHS                 its weight among its siblings
    submit REQUEST by=MEMBER [model=M] [prompt=N] [factor=THOUSANDTHS]
    load MEMBER,MEMBER count=N [model=M] [prompt=N]   as many requests, in turns; tells the starts
    progress LEASE TOKENS
    finish LEASE [prompt=N] [cached=N] [output=N]
    fail LEASE [prompt=N] [output=N]         after it had delivered this much
    retry LEASE                              it failed before its first token
    cancel REQUEST
    serve COUNT [output=N] [prompt=N]        as many leases finish, oldest first; tells whose start
    keys [MEMBER...]                         keys and service in credits
    state                                    what waits, what runs, what was dropped
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from anser.core.events import (
    Abort,
    Cancelled,
    Decision,
    Event,
    Failed,
    Finished,
    NodeChanged,
    NodeGone,
    Progressed,
    Refused,
    Request,
    Start,
    Submitted,
    Weighed,
)
from anser.core.ledger import Usage
from anser.core.rules import STRICT
from anser.core.scheduler import Scheduler

__all__ = ["retell"]

_Options = dict[str, str]


def retell(text: str) -> str:
    """The same story with what it gives now."""
    teller = _Teller()
    paragraphs = []
    for paragraph in text.rstrip().split("\n\n"):
        commands, dashes, _ = paragraph.partition("\n----")
        told = teller.tell(commands) if dashes else ""
        paragraphs.append(f"{commands}\n----\n{told}" if dashes else paragraph)
    return "\n\n".join(paragraphs) + "\n"


class _Teller:
    def __init__(self) -> None:
        self._scheduler = Scheduler(1_000, 3, STRICT)
        self._now = 0.0
        self._running: dict[str, Start] = {}
        self._loads = 0

    def tell(self, commands: str) -> str:
        lines: list[str] = []
        for line in commands.splitlines():
            words = line.partition("#")[0].split()
            if words:
                lines += self._command(words)
                self._scheduler.validate()
        return "\n".join(lines or ["nothing"])

    def _command(self, words: list[str]) -> list[str]:
        verb, *rest = words
        names = [word for word in rest if "=" not in word]
        options = dict(word.split("=") for word in rest if "=" in word)
        command: Callable[[list[str], _Options], list[str]] = getattr(self, f"_{verb}")
        return command(names, options)

    def _handle(self, event: Event) -> list[Decision]:
        self._now += 1.0
        decisions = self._scheduler.handle(event, self._now)
        for decision in decisions:
            if isinstance(decision, Start):
                self._running[decision.lease.id] = decision
        return decisions

    def _say(self, event: Event) -> list[str]:
        return [_in_words(decision) for decision in self._handle(event)]

    def _begin(self, _: list[str], options: _Options) -> list[str]:
        limits = {"queued_max": 1_000, "retries_max": 3} | {k: int(v) for k, v in options.items()}
        self._scheduler = Scheduler(**limits, rules=STRICT)
        return []

    def _node(self, names: list[str], options: _Options) -> list[str]:
        models = frozenset(options.get("models", "m").split(","))
        event = NodeChanged(node=names[0], slots=int(options["slots"]), models=models)
        return self._say(event)

    def _gone(self, names: list[str], _: _Options) -> list[str]:
        return self._say(NodeGone(node=names[0]))

    def _weigh(self, names: list[str], _: _Options) -> list[str]:
        return self._say(Weighed(member=names[0], weight=int(names[1])))

    def _submit(self, names: list[str], options: _Options) -> list[str]:
        return self._say(Submitted(request=_request(names[0], options["by"], options)))

    def _load(self, names: list[str], options: _Options) -> list[str]:
        decisions: list[Decision] = []
        for _ in range(int(options["count"])):
            for member in names[0].split(","):
                self._loads += 1
                request = _request(f"load-{self._loads}", member, options)
                decisions += self._handle(Submitted(request=request))
        return _by_member(decisions)

    def _progress(self, names: list[str], _: _Options) -> list[str]:
        return self._say(Progressed(lease=names[0], tokens=int(names[1])))

    def _finish(self, names: list[str], options: _Options) -> list[str]:
        self._running.pop(names[0], None)
        return self._say(Finished(lease=names[0], usage=_usage(options, prompt=100)))

    def _fail(self, names: list[str], options: _Options) -> list[str]:
        self._running.pop(names[0], None)
        return self._say(Failed(lease=names[0], delivered=_usage(options), retry=False))

    def _retry(self, names: list[str], _: _Options) -> list[str]:
        self._running.pop(names[0], None)
        return self._say(Failed(lease=names[0], delivered=Usage(), retry=True))

    def _cancel(self, names: list[str], _: _Options) -> list[str]:
        return self._say(Cancelled(request=names[0]))

    def _serve(self, names: list[str], options: _Options) -> list[str]:
        decisions: list[Decision] = []
        for _ in range(int(names[0])):
            lease = next(iter(self._running))
            prompt = self._running.pop(lease).request.prompt_tokens
            usage = _usage(options, prompt=prompt)
            decisions += self._handle(Finished(lease=lease, usage=usage))
        return _by_member(decisions)

    def _keys(self, names: list[str], _: _Options) -> list[str]:
        rows = self._scheduler.standings()
        return [
            f"{row.member}: key {_credits(row.key)}, weight {row.weight},"
            f" service {_credits(row.service)}, {row.queued} queued, {row.running} running"
            for row in sorted(rows, key=lambda row: row.member)
            if not names or row.member in names
        ]

    def _state(self, _names: list[str], _options: _Options) -> list[str]:
        scheduler = self._scheduler
        counts = f"{scheduler.queued} queued, {scheduler.running} running"
        return [f"{counts}, {scheduler.dropped} dropped"]


def _request(id: str, member: str, options: _Options) -> Request:
    return Request(
        id=id,
        member=member,
        model=options.get("model", "m"),
        prompt_tokens=int(options.get("prompt", 100)),
        output_tokens_max=1_000,
        factor_milli=int(options.get("factor", 1_000)),
    )


def _usage(options: _Options, *, prompt: int = 0) -> Usage:
    return Usage(
        prompt_tokens=int(options.get("prompt", prompt)),
        cached_tokens=int(options.get("cached", 0)),
        completion_tokens=int(options.get("output", 0)),
    )


def _in_words(decision: Decision) -> str:
    match decision:
        case Start(lease=lease):
            return f"start {lease.id} on {lease.node}"
        case Refused(request=request, code=code):
            return f"refuse {request}: {code}"
        case Abort(lease=lease):
            return f"abort {lease}"


def _by_member(decisions: list[Decision]) -> list[str]:
    starts = Counter(d.request.member for d in decisions if isinstance(d, Start))
    return [f"{member}: {count} started" for member, count in sorted(starts.items())]


def _credits(micro_credits: int) -> str:
    return f"{float(Fraction(micro_credits, 1_000_000)):g}"
