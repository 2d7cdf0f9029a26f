"""What the documents say can be typed: every command and option in them is one that there is.

Nothing is run: the lines are given to the parser of the real command line.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError, MissingArgumentError

from anser.cli.app import app
from anser.cli.common import STANDARD_INPUT
from tests.test_tidy import ROOT, at, commands, none_of, page, python_files, tracked, tree

NOUNS = 12  # of the first table of the glossary: STYLE.md, rule 9
OPERATORS = frozenset(("|", ">", ">>", "<", "&&", "||", ";", "&"))
SHOWN = re.compile(r"^(?:\$ )?(?:\.venv/bin/anser|anser|(?P<start>\./start))(?P<words>(?: .*)?)$")
COMMON = frozenset(("--json", "--data-dir", "--config", "--url", "--key"))


# ---------------------------------------------------------------------------------- commands


def shown_commands(text: str) -> Iterator[tuple[int, list[str], bool]]:
    """Each command line in a Markdown text: its line, its words, and whether it stands alone."""
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        block = fenced or line.startswith("    ")
        pieces = [line.strip()] if block else re.findall(r"`([^`\n]+)`", line)
        for piece in pieces:
            match = SHOWN.match(piece)
            if match is not None and "COMMAND" not in piece:
                first = ["serve"] if match["start"] else []
                yield number, [*first, *typed(match["words"])], block


def typed(words: str) -> list[str]:
    """The words up to where the shell takes over."""
    found: list[str] = []
    for word in shlex.split(words, comments=True):
        if word in OPERATORS:
            break
        found.append(STANDARD_INPUT if word == "-" else word)
    return found


def mistake(words: list[str], *, whole: bool) -> str | None:
    """What is wrong with a command line; one in a sentence may leave arguments out."""
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except MissingArgumentError as error:
        return str(error) if whole else None
    except CycloptsError as error:
        return str(error)
    return None


def test_every_command_line_in_the_documents_can_be_typed() -> None:
    """A line that begins with anser or ./start in any document is one that the program takes."""
    wrong, seen = [], 0
    for path in (one for one in tracked() if one.suffix == ".md"):
        for number, words, whole in shown_commands(path.read_text("utf-8")):
            seen += 1
            if (reason := mistake(words, whole=whole)) is not None:
                wrong.append(f"{at(path, number)}: {' '.join(words)}: {reason}")
    assert seen > 50
    none_of(wrong, "command lines that cannot be typed")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("    anser recipt get x", True),
        ("    anser receipt get x --out y", True),
        ("Use `anser usage --until 3d`.", True),
        ("    anser key create", True),
        ("Use `anser key create`.", False),
        ("```sh\nanser key list > keys # all\n```", False),
        ("    ./start --port 8001", False),
        ("    ./start --prot 8001", True),
    ],
)
def test_a_wrong_command_line_is_found(line: str, wrong: bool) -> None:
    """Blocks are taken by the word, sentences may leave arguments out."""
    found = [mistake(words, whole=whole) for _, words, whole in shown_commands(line)]
    assert [reason is not None for reason in found] == [wrong]


def options(command: str) -> set[str]:
    """The long options of one command, without those of every command."""
    part = app
    for word in command.split()[1:]:
        part = part[word]
    if part.default_command is None:
        return set()
    shown = (one for one in part.assemble_argument_collection() if one.show)
    names = {name for one in shown for name in (*one.names, *one.negatives)}
    return {name for name in names if name.startswith("--")} - COMMON


def sections(text: str) -> dict[str, str]:
    """The sections of cli.md by the command that each explains."""
    parts = re.split(r"^### `(anser [a-z ]+)`\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_option_is_documented() -> None:
    """Each command's section of cli.md names each of its options, and none that there is not."""
    explained = sections(page("cli.md"))
    missing, invented = [], []
    for command in sorted(commands() & explained.keys()):
        said = set(re.findall(r"--[a-z][a-z-]+", explained[command].split("\n## ")[0]))
        real = options(command)
        alike = {name for name in real if name.replace("--no-", "--") in said}
        alike |= {name for name in real if name.replace("--", "--no-", 1) in said}
        missing += [f"{command} {name}" for name in sorted(real - said - alike)]
        invented += [f"{command} {name}" for name in sorted(said - real - COMMON)]
    none_of(missing, "options that cli.md leaves out")
    none_of(invented, "options in cli.md that are not")


# ---------------------------------------------------------------------------------- words


def glossary() -> tuple[dict[str, str], dict[str, str]]:
    """The two tables of the glossary: word to meaning."""
    nouns, words = page("glossary.md").split("Smaller words")
    row = re.compile(r"^\| ([A-Z]\w+) \| (.+) \|$", flags=re.MULTILINE)
    return dict(row.findall(nouns)), dict(row.findall(words))


def classes(*folders: str) -> dict[Path, list[ast.ClassDef]]:
    """The classes of each Python file below `folders`."""
    return {
        path: [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
        for path in python_files(*folders)
    }


def test_the_glossary_is_the_vocabulary() -> None:
    """Twelve nouns, no word twice; each ends the name of a class below, or is marked as later."""
    nouns, words = glossary()
    assert len(nouns) == NOUNS
    assert not nouns.keys() & words.keys()
    floors = classes("src/anser/core", "src/anser/ports.py")
    built = {one.name for found in floors.values() for one in found}
    known = nouns | words
    later = {word for word, meaning in known.items() if meaning.endswith("*later*")}
    named = {word for word in known if any(name.endswith(word) for name in built)}
    none_of(sorted(known.keys() - named - later), "words of the glossary that name nothing")
    none_of(sorted(later & built), "words marked as later that are there")


def test_stateful_classes_show_and_check_their_state() -> None:
    """Who changes itself has a __repr__; in core and services, who states invariants, a check."""
    silent = []
    for path, found in classes("src/anser").items():
        silent += [
            f"{at(path, one.lineno)} {one.name}"
            for one in found
            if not one.name.startswith("_") and changes_itself(one) and not shows_itself(one)
        ]
    none_of(silent, "stateful classes without a __repr__")
    unchecked = [
        at(path)
        for path, found in classes("src/anser/core", "src/anser/services").items()
        if "Invariants:" in (ast.get_docstring(tree(path)) or "")
        and not any("validate" in methods(one) for one in found)
    ]
    none_of(unchecked, "modules that state invariants and check none")


def methods(one: ast.ClassDef) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """The methods of a class by name."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: node for node in one.body if isinstance(node, kinds)}


def changes_itself(one: ast.ClassDef) -> bool:
    """Whether a method other than the first sets an attribute of its own object."""
    later = [body for name, body in methods(one).items() if name not in ("__init__", "_reset")]
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        for body in later
        for node in ast.walk(body)
    )


def shows_itself(one: ast.ClassDef) -> bool:
    """Whether it has a __repr__, its own or a dataclass's."""
    made = any("dataclass" in ast.unparse(each) for each in one.decorator_list)
    return made or "__repr__" in methods(one)


def test_the_readme_leads_to_every_kind_of_document() -> None:
    """From the README every document of docs/ can be reached by links."""
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        path = waiting.pop().resolve()
        if path in reached or path.suffix != ".md" or not path.is_file():
            continue
        reached.add(path)
        targets = re.findall(r"\]\(([^)\s#]+)", path.read_text("utf-8"))
        waiting += [path.parent / target for target in targets if ":" not in target]
    documents = {one for one in tracked() if one.suffix == ".md" and (ROOT / "docs") in one.parents}
    none_of([at(one) for one in sorted(documents - reached)], "documents that nothing leads to")
