"""What people read at the terminal, in their language: catalogues in `locales`, one per language.

The language is $ANSER_LANG, else that of the locale ($LC_ALL, $LC_MESSAGES, $LANG), else English.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

__all__ = ["LANGUAGES", "catalogue", "language", "program", "tr"]

LANGUAGES = ("en", "zh")
_VARIABLES = ("ANSER_LANG", "LC_ALL", "LC_MESSAGES", "LANG")


def tr(key: str, /, **values: object) -> str:
    """The text of `key` in the user's language, with {name} filled in from `values`.

    {anser} is this program, as it can be started.
    """
    return catalogue(language(os.environ))[key].format(anser=program(), **values)


def program() -> str:
    """What a person types to start this program again: its name, or its place if off the PATH."""
    started, named = Path(sys.argv[0]), shutil.which("anser")
    if started.name != "anser":
        return f"{shlex.quote(sys.executable)} -m anser"
    if named is not None and Path(named).resolve() == started.resolve():
        return "anser"
    return shlex.quote(str(started.absolute()))


def language(environ: Mapping[str, str]) -> str:
    """The first catalogue that one of the variables asks for; the first variable set decides."""
    wanted = next((environ[name] for name in _VARIABLES if environ.get(name)), "")
    short = wanted.partition(".")[0].partition("_")[0].partition("-")[0].lower()
    return short if short in LANGUAGES else LANGUAGES[0]


@cache
def catalogue(name: str) -> dict[str, str]:
    """All texts of one language by key: `section.name`."""
    text = files("anser.cli").joinpath("locales", f"{name}.toml").read_text(encoding="utf-8")
    sections = tomllib.loads(text)
    return {
        f"{section}.{key}": value
        for section, texts in sections.items()
        for key, value in texts.items()
    }
