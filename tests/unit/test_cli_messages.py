"""The catalogues of texts: every language has every text, and the user's choice is kept."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pytest

from anser.cli import messages
from anser.cli.messages import LANGUAGES, catalogue, language, tr

SOURCES = Path(messages.__file__).parent


def placeholders(text: str) -> set[str]:
    """The names that a text wants filled in."""
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_language_has_every_text(name: str) -> None:
    """All catalogues have the same keys, and each text the same placeholders."""
    english, other = catalogue("en"), catalogue(name)
    assert other.keys() == english.keys()
    wrong = [key for key in english if placeholders(english[key]) != placeholders(other[key])]
    assert wrong == []
    assert [key for key in other if not other[key].strip()] == []


def test_every_text_is_used_and_every_use_has_a_text() -> None:
    """No text is left over, and no command asks for one that there is not."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES.glob("*.py"))
    asked = set(re.findall(r"\btr\(\s*[\"']([a-z_.]+)[\"']", code))
    assert sorted(asked - catalogue("en").keys()) == []
    shaped = {re.sub(r"\{.*?\}", "*", one) for one in re.findall(r'\btr\(\s*f"([^"]+)"', code)}
    patterns = [re.compile(one.replace(".", r"\.").replace("*", ".+")) for one in shaped]
    quoted = set(re.findall(r"[\"']([a-z]+\.[a-z_]+)[\"']", code))
    unused = [
        key
        for key in catalogue("en")
        if key not in quoted and not any(pattern.fullmatch(key) for pattern in patterns)
    ]
    assert unused == []


@pytest.mark.parametrize(
    ("environ", "chosen"),
    [
        ({}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US"}, "en"),
        ({"LANG": "zh_TW", "LC_MESSAGES": "de_DE"}, "en"),
        ({"LC_ALL": "en_US", "ANSER_LANG": "zh"}, "zh"),
        ({"LANG": "zh-Hans", "ANSER_LANG": ""}, "zh"),
    ],
)
def test_the_language_follows_the_user(environ: dict[str, str], chosen: str) -> None:
    """$ANSER_LANG decides, else the locale's variables in their order, else it is English."""
    assert language(environ) == chosen


def test_values_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is given in the user's language with its values in place."""
    monkeypatch.setenv("ANSER_LANG", "zh")
    assert tr("node.added", node="a") == "已添加节点 a。"
    monkeypatch.setenv("ANSER_LANG", "en")
    assert tr("node.added", node="a{b}") == "Added the node a{b}."
