"""What keeps the house tidy: sizes, words, the error tree, and a reference that leaves nothing out.

Each test collects all offenders before it fails, so that one run shows them all.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
DECISIONS = ROOT / "docs" / "decisions"
CORPUS = ROOT / "tests" / "fuzz" / "corpus"  # bytes, not words

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
ARGUMENTS_MAX = 6
LINE_CHARACTERS_MAX = 100

CORE_MAY_IMPORT = frozenset(
    """
    __future__ abc array base64 binascii bisect collections contextlib dataclasses decimal enum
    fractions functools graphlib hashlib heapq hmac ipaddress itertools json math numbers operator
    re statistics string struct textwrap types typing unicodedata
    anser
    """.split()
)

FORBIDDEN = {
    "unfinished work": r"\b(?:TODO|FIXME|XXX|HACK|raise NotImplementedError)\b",
    "a path of one machine": r"(?<![\w.*-])/(?:root|work|home/\w+|Users/\w+)/",
    "a registry's host": r"\b(?:pypi\.org|pythonhosted|npmjs\.|deb\.debian)",
    "a file outside": r"\.\./shared\b",
    "a mock": r"\bunittest\.mock\b",
}
# Where a rule is stated, its words stand.
MAY_SAY = {
    "tests/test_tidy.py": set(FORBIDDEN),
    "pyproject.toml": {"a mock"},
    "docs/STYLE.md": {"a mock", "unfinished work"},
    "docs/ARCHITECTURE.md": {"a mock"},
}


# ---------------------------------------------------------------------------------- the files


@cache
def tracked() -> tuple[Path, ...]:
    """Every file that is tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return tuple(path for path in paths if path.is_file())


@cache
def python_files(*folders: str) -> tuple[Path, ...]:
    """The Python files below `folders`; an empty answer would make a check pass for nothing."""
    roots = [ROOT / folder for folder in folders or ("src", "tests", "tools", "bench")]
    found = [
        path
        for path in tracked()
        if path.suffix == ".py" and any(path.is_relative_to(root) for root in roots)
    ]
    assert found, f"no Python files below {folders}"
    return tuple(found)


@cache
def tree(path: Path) -> ast.Module:
    """The file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function in the file, methods and nested ones included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def at(path: Path, line: int = 0) -> str:
    """Where, in the form that editors and terminals link."""
    place = str(path.relative_to(ROOT))
    return f"{place}:{line}" if line else place


def none_of(offenders: list[str], rule: str) -> None:
    """Fail with every offender, or pass."""
    if offenders:
        pytest.fail(f"{len(offenders)} {rule}:\n  " + "\n  ".join(offenders), pytrace=False)


# ---------------------------------------------------------------------------------- sizes


def test_files_are_short() -> None:
    """A Python file has at most 500 lines: split it by noun."""
    sizes = [(path, len(path.read_text("utf-8").splitlines())) for path in python_files()]
    long = [f"{at(path)}: {lines} lines" for path, lines in sizes if lines > FILE_LINES_MAX]
    none_of(long, f"files over {FILE_LINES_MAX} lines")


def test_functions_are_short() -> None:
    """A function has at most 60 lines, its docstring included."""
    long = [
        f"{at(path, node.lineno)} {node.name}: {lines} lines"
        for path in python_files()
        for node in functions(path)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]
    none_of(long, f"functions over {FUNCTION_LINES_MAX} lines")


def test_functions_take_few_arguments() -> None:
    """A function takes at most 6 arguments besides self or cls."""
    many = []
    for path in python_files():
        for node in functions(path):
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [argument.arg for argument in given if argument.arg not in ("self", "cls")]
            if len(names) > ARGUMENTS_MAX:
                many.append(f"{at(path, node.lineno)} {node.name}: {len(names)} arguments")
    none_of(many, f"functions with more than {ARGUMENTS_MAX} arguments")


def test_lines_are_short() -> None:
    """A line of Python has at most 100 characters."""
    long = [
        f"{at(path, number)}: {len(line)} characters"
        for path in python_files()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if len(line) > LINE_CHARACTERS_MAX
    ]
    none_of(long, f"lines over {LINE_CHARACTERS_MAX} characters")


# ---------------------------------------------------------------------------------- words


def test_every_test_states_its_rule() -> None:
    """A test's docstring says the rule that it guards."""
    silent = [
        f"{at(path, node.lineno)} {node.name}"
        for path in python_files("tests")
        if path.name.startswith("test_")
        for node in functions(path)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    none_of(silent, "tests without a docstring")


def test_every_public_module_says_what_it_is_for() -> None:
    """A public module of the package begins with a docstring."""
    silent = [
        at(path)
        for path in python_files("src")
        if (not path.name.startswith("_") or path.name.startswith("__"))
        and not ast.get_docstring(tree(path))
    ]
    none_of(silent, "modules without a docstring")


def test_no_module_is_called_utils() -> None:
    """A module is named for its noun: `utils` is where nouns go to be forgotten."""
    vague = {"util", "utils", "helpers", "misc"}
    found = [at(path) for path in python_files("src") if vague & {path.stem, path.parent.name}]
    none_of(found, "modules without a noun")


def test_no_file_says_what_it_should_not() -> None:
    """No file leaves work open, names one machine or a registry, or reaches for mocks."""
    patterns = {reason: re.compile(pattern) for reason, pattern in FORBIDDEN.items()}
    found = []
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" in raw or path.is_relative_to(CORPUS):
            continue
        excused = MAY_SAY.get(str(path.relative_to(ROOT)), set())
        for number, line in enumerate(raw.decode("utf-8").splitlines(), start=1):
            for reason, pattern in patterns.items():
                if reason not in excused and (hit := pattern.search(line)):
                    found.append(f"{at(path, number)}: {reason}: {hit.group()}")
    none_of(found, "words that must not be here")


# ---------------------------------------------------------------------------------- floors


def test_core_imports_only_what_is_pure() -> None:
    """Core imports itself and the part of the standard library without clock, I/O or chance."""
    impure = []
    for path in python_files("src/anser/core"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            else:
                continue
            roots = {name.split(".")[0] for name in names}
            impure += [f"{at(path, node.lineno)}: {name}" for name in roots - CORE_MAY_IMPORT]
    none_of(impure, "imports that core may not have")


# ---------------------------------------------------------------------------------- errors


def drawn_errors(docstring: str) -> dict[str, tuple[str | None, str]]:
    """The tree as the docstring draws it: name to (parent, status)."""
    drawn: dict[str, tuple[str | None, str]] = {}
    line_of = re.compile(
        r"^(?P<indent>[\s│├└─]*)(?P<name>[A-Z]\w+)(?:\s+(?P<status>\d{3})\s\s.*)?$"
    )
    above: list[tuple[int, str]] = []
    for line in docstring.splitlines():
        match = line_of.match(line)
        if match is None:
            continue
        depth, name = len(match["indent"]), match["name"]
        while above and above[-1][0] >= depth:
            above.pop()
        drawn[name] = (above[-1][1] if above else None, match["status"] or "500")
        above.append((depth, name))
    return drawn


def test_the_error_tree_is_drawn_as_it_is() -> None:
    """The docstring of core.errors draws every error, under its parent, with its status."""
    from anser.core import errors

    classes = [
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, Exception) and value.__module__ == errors.__name__
    ]
    real = {
        one.__name__: (
            None if one.__base__ is Exception else one.__base__.__name__,
            str(one.status),
        )
        for one in classes
    }
    drawn = drawn_errors(errors.__doc__ or "")
    assert real
    assert drawn == real
    assert set(errors.__all__) == set(real)


def test_every_error_has_a_code_of_its_own() -> None:
    """No two errors share a code: a client can tell by it what went wrong."""
    from anser.core import errors

    codes = [getattr(errors, name).code for name in errors.__all__]
    twice = sorted({code for code in codes if codes.count(code) > 1})
    none_of(twice, "codes of more than one error")


# ---------------------------------------------------------------------------------- reference


def page(name: str) -> str:
    """A page of the reference."""
    path = REFERENCE / name
    if not path.is_file():
        pytest.fail(f"{at(path)} is missing", pytrace=False)
    return path.read_text(encoding="utf-8")


def in_code(text: str) -> set[str]:
    """What stands between backticks, and each line of fenced blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = {line.strip() for block in fenced for line in block.splitlines()}
    return lines | set(re.findall(r"`([^`\n]+)`", rest))


def test_every_setting_is_documented() -> None:
    """settings.md names each setting and its variable, and none that there is not."""
    from anser.config import settings

    said = in_code(page("settings.md"))
    real = {name for one in settings() for name in (one.path, one.environment)}
    sections = {name.split(".")[0] for name in real if "." in name}
    shaped = re.compile(rf"(?:{'|'.join(sections)})\.[a-z_]+|ANSER_[A-Z_]+")
    none_of(sorted(real - said), "settings that settings.md leaves out")
    none_of(sorted({one for one in said if shaped.fullmatch(one)} - real), "settings that are not")


def test_every_error_code_is_documented() -> None:
    """errors.md has a row for each error's code and status, and none for what there is not."""
    from anser.core import errors

    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \|", page("errors.md"), flags=re.MULTILINE)
    kinds = (getattr(errors, name) for name in errors.__all__)
    real = {f"{one.code} ({one.status})" for one in kinds}
    said = {f"{code} ({status})" for code, status in rows}
    none_of(sorted(real - said), "codes that errors.md leaves out")
    none_of(sorted(said - real), "codes in errors.md that are not")


def commands() -> set[str]:
    """Every command line that can be given, without its options: "anser member add"."""
    from anser.cli.app import app

    def below(one: object, words: str) -> Iterator[str]:
        for name in one:  # type: ignore[attr-defined]
            if not name.startswith("-") and one[name].show:  # type: ignore[index]
                yield f"{words} {name}"
                yield from below(one[name], f"{words} {name}")  # type: ignore[index]

    return set(below(app, "anser"))


def test_every_command_is_documented() -> None:
    """cli.md names each command, and none that there is not."""
    said = in_code(page("cli.md"))
    real = commands()
    assert real
    shown = {one for one in real if any(line == one or line.startswith(f"{one} ") for line in said)}
    none_of(sorted(real - shown), "commands that cli.md leaves out")
    firsts = {match[1] for line in said if (match := re.match(r"anser ([a-z][a-z-]*)", line))}
    none_of(sorted(firsts - {one.split()[1] for one in real}), "commands in cli.md that are not")


def test_every_route_is_documented() -> None:
    """http.md names each method and path, and none that there is not."""
    from anser.api.routes import ROUTES

    said = in_code(page("http.md"))
    real = {f"{method} {path}" for method, path in ROUTES}
    assert real
    shaped = re.compile(r"(?:GET|POST|PUT|PATCH|DELETE) /\S*")
    none_of(sorted(real - said), "routes that http.md leaves out")
    none_of(sorted({one for one in said if shaped.fullmatch(one)} - real), "routes that are not")


# ---------------------------------------------------------------------------------- documents


def test_every_decision_is_listed() -> None:
    """The index of decisions links every record, and each record has a number of its own."""
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    records = sorted(DECISIONS.glob("[0-9]*.md"))
    assert records
    misnamed = [at(one) for one in records if not re.match(r"\d{4}-[a-z0-9-]+\.md$", one.name)]
    none_of(misnamed, "records not named NNNN-title.md")
    none_of([at(one) for one in records if f"({one.name})" not in index], "records not listed")
    numbers = [one.name[:4] for one in records]
    none_of(sorted({one for one in numbers if numbers.count(one) > 1}), "numbers taken twice")


def test_links_between_documents_lead_somewhere() -> None:
    """A relative link in a Markdown file leads to a file or folder that is tracked."""
    broken = []
    for path in (one for one in tracked() if one.suffix == ".md"):
        text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            goal = target.split("#")[0]
            if goal and not re.match(r"[a-z]+:", goal) and not (path.parent / goal).exists():
                broken.append(f"{at(path)}: {target}")
    none_of(broken, "links that lead nowhere")
