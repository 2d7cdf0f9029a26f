"""Tries a model's chat template where it can do no harm: a process of its own, with little of all.

A chat template is a program in the model's file. llama.cpp runs it while it loads the model, and
again for each request, without a limit of time. So it is run here before that: by Jinja's sandbox,
on conversations short and long, under limits of processor time, memory and output. A template that
loops, explodes or reaches for attributes fails here, and the model is refused.

Run as a program it reads the template from its input and answers by its exit status.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anser.core import limits
from anser.core.errors import ModelFileError

__all__ = ["check_template"]

_MEMORY_BYTES = 1024 * 1024 * 1024
_OUTPUT_CHARS_MAX = 8 * 1024 * 1024
_TURNS = (1, 3, 64)

_FINE, _UNREADABLE, _REACHES, _EXPLODES = 0, 3, 4, 5
_WORDS = {
    _UNREADABLE: "is not a Jinja template that can be examined",
    _REACHES: "reaches for what a template has no business with",
    _EXPLODES: "takes far too much memory or time",
}


async def check_template(template: str) -> None:
    """Raise ModelFileError unless the template renders in bounded time, memory and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    status = _EXPLODES
    try:
        async with asyncio.timeout(limits.TEMPLATE_CHECK_TIMEOUT_S):
            await process.communicate(template.encode())
            status = process.returncode or 0
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if status != _FINE:
        words = _WORDS.get(status, _WORDS[_EXPLODES])
        raise ModelFileError(f"The model's chat template {words}.")


# ------------------------------------------------------------------- inside the process


class _Generation(Extension):
    """`{% generation %}`: marks the model's own turns for training; here its content counts."""

    tags = {"generation"}  # noqa: RUF012 - that is how Jinja wants it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _examine(template: str) -> int:
    """Render it on every sample; what it says does not matter, only what it takes."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    names: dict[str, Any] = environment.globals
    names.update(raise_exception=_raise, strftime_now=_date)
    try:
        program = environment.from_string(template)
    except (TemplateSyntaxError, RecursionError):
        return _UNREADABLE
    for turns in _TURNS:
        for tools in (None, _TOOLS):
            status = _render(program.generate, turns, tools)
            if status != _FINE:
                return status
    return _FINE


def _render(generate: Callable[..., Iterator[str]], turns: int, tools: object) -> int:
    messages = [*_CONVERSATION[:1], *(_CONVERSATION[1:] * turns)]
    facts = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    written = 0
    try:
        for piece in generate(messages=messages, tools=tools, **facts):
            written += len(piece)
            if written > _OUTPUT_CHARS_MAX:
                return _EXPLODES
    except SecurityError:
        return _REACHES
    except (MemoryError, OverflowError, RecursionError):
        return _EXPLODES
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
        return _FINE  # it may want other messages than these; it stopped by itself
    return _FINE


def _raise(message: str) -> None:
    raise TemplateError(message)


def _date(_form: str) -> str:
    return "1 January 2026"


_CALL = {"name": "weather", "arguments": {"city": "Bern"}}
_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather in Bern?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _CALL}]},
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def _limit() -> None:
    """Of this process, before the template is touched."""
    seconds = int(limits.TEMPLATE_CHECK_TIMEOUT_S / 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with suppress(ValueError, OSError):  # macOS knows the name but keeps no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    _limit()
    sys.exit(_examine(sys.stdin.buffer.read().decode("utf-8", "replace")))
