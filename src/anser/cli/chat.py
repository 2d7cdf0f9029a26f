"""`anser chat`: ask a model from the terminal.

Theory of operation. The reader's keyboard stays with the main thread, where line editing and
Ctrl-C live; the platform is spoken to from an event loop in a second thread. Ctrl-C while an answer
comes stops that answer, and the model with it; at the prompt it ends the chat.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from anser.cli.common import ANYWHERE, STANDARD_INPUT, Anywhere, unwrapped
from anser.cli.messages import tr
from anser.cli.output import print_error, print_json, print_line, safe
from anser.cli.progress import shown_progress
from anser.core.errors import AnserError, ContextTooLong, InvalidField, NoNode

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from anser.cli.control import Control

__all__ = ["chat"]

_QUESTION_BYTES_MAX = 1024 * 1024
_Message = dict[str, str]


def chat(
    *words: str,
    model: str | None = None,
    system: str | None = None,
    max_tokens: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    at: Anywhere = ANYWHERE,
) -> int:
    """Chat with a model, or ask one question. Ctrl-C stops an answer, a second one ends the chat.

    A first word that names a model chooses it. Without a platform on this machine the model is
    loaded for the length of the chat.

    Examples: `anser chat`, `anser chat smollm2-135m-instruct`, `anser chat "Why is the sky blue?"`,
    `anser chat "Sum this up:" - < report.txt`

    Parameters
    ----------
    words
        A model, a question, or both; - stands for what is piped in.
    model
        The model to ask; without it, the one that the platform would choose.
    system
        What to tell the model about its task.
    max_tokens
        Longest answer.
    """
    from anyio.from_thread import start_blocking_portal

    from anser.cli.control import connect

    question = list(words)
    with unwrapped(), ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal())
        place = connect(at, engine=True, progress=stack.enter_context(shown_progress()))
        control = stack.enter_context(portal.wrap_async_context_manager(place))
        known = portal.call(_models, control)
        if question and question[0] in known:
            model = question.pop(0)
        talk = Talk(control, model or known[0], max_tokens=max_tokens)
        if system:
            talk.messages.append({"role": "system", "content": system})
        return _converse(portal, talk, _question(question), as_json=at.json)


@dataclass(slots=True)
class Talk:
    """One conversation: what was said so far, and with whom."""

    control: Control
    model: str
    max_tokens: int | None = None
    messages: list[_Message] = field(default_factory=list[_Message])

    async def ask(self, question: str, show: Callable[[str], None]) -> dict[str, Any]:
        """Send `question`, `show` the answer as it comes, and keep both if it came to its end.

        What was said first is dropped, and that is said, when the model can take no more.
        """
        told = False
        while True:
            try:
                return await self._ask(question, show)
            except AnserError as error:
                if error.code != ContextTooLong.code or not self._forget():
                    raise
            if not told:
                show(tr("chat.forgotten"))
                told = True

    def _forget(self) -> bool:
        """Drop the oldest question and its answer; whether there was one."""
        first = int(bool(self.messages) and self.messages[0]["role"] == "system")
        there = len(self.messages) > first
        del self.messages[first : first + 2]
        return there

    async def _ask(self, question: str, show: Callable[[str], None]) -> dict[str, Any]:
        asked = [*self.messages, {"role": "user", "content": question}]
        body: dict[str, object] = {
            "model": self.model,
            "messages": asked,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        said: list[str] = []
        seen: dict[str, Any] = {"request": None, "model": self.model, "usage": None}
        events = self.control.stream("/v1/chat/completions", body)
        async with events as stream:
            async for event in stream:
                said.append(_take(event, seen))
                show(said[-1])
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
        return {**seen, "content": "".join(said)}


def _take(event: dict[str, Any], seen: dict[str, Any]) -> str:
    """The text that this event adds; its id, usage and reason of ending are noted in `seen`."""
    seen["request"] = event.get("id", seen["request"])
    seen["usage"] = event.get("usage") or seen["usage"]
    text = ""
    for choice in event.get("choices", []):
        text += choice.get("delta", {}).get("content") or ""
        seen["finish_reason"] = choice.get("finish_reason") or seen.get("finish_reason")
    return text


async def _models(control: Control) -> list[str]:
    found = await control.ask("GET", "/v1/models")
    rows = sorted(found["data"], key=lambda model: not model.get("default"))
    names = [str(model["id"]) for model in rows]
    if not names:
        raise NoNode(tr("chat.no_model"))
    return names


def _converse(portal: BlockingPortal, talk: Talk, question: str, *, as_json: bool) -> int:
    if question or as_json or not sys.stdin.isatty():
        return _once(portal, talk, question, as_json=as_json)
    print_line(tr("chat.hello", model=safe(talk.model)))
    _lines()
    while True:
        try:
            question = input(tr("chat.prompt")).strip()
        except EOFError:
            print_line()
            return 0
        if question:
            _turn(portal, talk, question)


def _once(portal: BlockingPortal, talk: Talk, question: str, *, as_json: bool) -> int:
    if not question:
        raise InvalidField(tr("chat.no_question"), param="words")
    if as_json:
        print_json(portal.call(talk.ask, question, _keep_quiet))
    else:
        portal.call(talk.ask, question, _show)
        print_line()
    return 0


def _turn(portal: BlockingPortal, talk: Talk, question: str) -> None:
    """One question and its answer; a failure or Ctrl-C ends the turn, not the chat."""
    answer = portal.start_task_soon(talk.ask, question, _show)
    try:
        answer.result()
    except KeyboardInterrupt:
        answer.cancel()
        print(tr("chat.stopped"), end="")
    except CancelledError:
        pass
    except AnserError as error:
        print_error(error, as_json=False)
    print_line("\n")


def _show(text: str) -> None:
    print(safe(text, lines=True), end="", flush=True)


def _keep_quiet(_: str) -> None:
    """For answers that are printed whole."""


def _question(words: list[str]) -> str:
    """The words as one question; a dash, or nothing without a terminal, is standard input."""
    if not words and not sys.stdin.isatty():
        words = [STANDARD_INPUT]
    return " ".join(_piped() if word == STANDARD_INPUT else word for word in words).strip()


def _piped() -> str:
    content = sys.stdin.buffer.read(_QUESTION_BYTES_MAX + 1)
    if len(content) > _QUESTION_BYTES_MAX:
        raise InvalidField(tr("chat.too_long", most=_QUESTION_BYTES_MAX), param="words")
    return content.decode(errors="replace")


def _lines() -> None:
    """Give the prompt line editing and a history, where this Python has them."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)
