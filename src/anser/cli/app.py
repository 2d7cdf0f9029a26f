"""The command `anser`: which commands there are, and how each ends.

Exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted. A failure is one line on standard
error, or with `--json` one JSON document on standard output.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError

from anser import __version__
from anser.cli import bench, chat, doctor, fleet, hub, ledger, members, serve, settings, top, why
from anser.cli.common import OPTIONS, STANDARD_INPUT
from anser.cli.messages import tr
from anser.cli.output import print_error, safe
from anser.core.errors import AnserError, RequestError

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_USAGE", "app", "main"]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_HELP = """Share machines and models, ask them, and check the receipt of each answer.

Start with `anser serve`; then `anser chat`, from another terminal.
"""
_EPILOGUE = """Exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted.
Every command takes `--json` and explains itself with `--help`."""

app = App(
    name="anser",
    help=_HELP,
    help_epilogue=_EPILOGUE,
    version=__version__,
    help_format="plaintext",
    group_parameters=OPTIONS,
)
_FIRST: tuple[Callable[..., object], ...] = (serve.serve, chat.chat, hub.models, top.top)
_LAST: tuple[Callable[..., object], ...] = (
    ledger.usage,
    why.why,
    settings.config,
    doctor.doctor,
    bench.bench,
)
for _place, _command in enumerate(_FIRST):
    app.command(_command, sort_key=_place)
for _command in _LAST:
    app.command(_command, sort_key=20)
for _group in (fleet.app, members.member_app, members.key_app, ledger.receipt_app):
    app.command(_group)


def main(words: Sequence[str]) -> int:
    """Run the command that `words` are, and return its exit code."""
    _mend_streams()
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(tr("error.interrupted"), file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _mend_streams() -> None:
    """Stand in for what whoever started this has closed; show escapes where letters lack."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(words: Sequence[str]) -> int:
    as_json = "--json" in words
    try:
        code = app(
            [STANDARD_INPUT if word == "-" else word for word in words],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        _print_usage(error, as_json=as_json)
        return EXIT_USAGE
    except AnserError as error:
        print_error(error, as_json=as_json)
        return EXIT_FAILED
    except BrokenPipeError:
        raise
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = f"{place}{error.strerror or error}"
        print_error(AnserError(tr("error.system", reason=reason)), as_json=as_json)
        return EXIT_FAILED
    return code if isinstance(code, int) else 0


def _print_usage(error: CycloptsError, *, as_json: bool) -> None:
    command = " ".join(("anser", *(error.command_chain or ())))
    message = " ".join(str(error).split())
    if as_json:
        print_error(RequestError(message), as_json=True)
    else:
        print(tr("error.usage", message=safe(message), command=command), file=sys.stderr)
