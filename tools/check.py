"""Runs every check in turn and stops at the first that fails.

Without arguments: the style, types and floors of the code, all tests with their coverage on
Python 3.11, and the quick tests on every newer interpreter that is found. With arguments: only
pytest, with these arguments, on 3.11 or, where that is missing, the oldest newer one; what a
browser needs is installed if they name its tests. Each interpreter has an environment of its own in
.venv-test, installed from requirements/test.txt and made anew when that changes. Standard library
only, because it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-test"
MAIN = "3.11"  # compulsory, and the one that is measured

NO_MAIN = (
    f"Python {MAIN} is not here, and the checks are made for it. Install it with its venv "
    f"module (Debian 12: apt-get install python3 python3-venv; macOS: brew install "
    f"python@{MAIN}; pyenv install {MAIN}) or set PYTHON to its path. Single tests run on a newer "
    f"Python as well: ./test tests/unit"
)

QUICK = (
    *("unit", "property", "fuzz", "stories", "contract", "simulation"),
    *("test_tidy.py", "test_docs.py"),
)
LONGEST = "tests/integration"  # takes about as long as all others
QUICK_MARKS = "not slow and not browser and not engine"

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSERS_MACOS = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)

# Prints nothing for an interpreter that cannot be used: not CPython, no GIL, no final release.
PROBE = """
import sys, sysconfig, venv, ensurepip
fits = sys.implementation.name == "cpython" and sys.version_info.releaselevel == "final"
if fits and sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("%d.%d" % sys.version_info[:2], "%d.%d.%d" % sys.version_info[:3], sys._base_executable)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """One Python that can make environments."""

    short: str
    version: str
    path: str

    @property
    def environment(self) -> Path:
        """Where its tests' packages are."""
        return ENVIRONMENTS / self.short


class CheckError(Exception):
    """A check failed, or what it needs cannot be had. The message is for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Commands that run one after the other, each line of theirs under one label."""

    label: str
    commands: list[list[str]]
    env: dict[str, str]

    def run(self) -> str | None:
        """Run them until one fails; returns how to run that one again."""
        for command in self.commands:
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as program:
                for line in program.stdout or ():
                    print(f"{self.label}| {line}", end="", flush=True)
            if program.returncode:
                return f"{self.label} (exit {program.returncode}); again: {shlex.join(command)}"
        return None


@dataclass(slots=True)
class Run:
    """One run of checks: tells each by name and time."""

    passed: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def step(self, name: str, *commands: list[str], env: dict[str, str] | None = None) -> None:
        """Run `commands` as one check; raise CheckError when one fails."""
        print(f"\n== {name}", flush=True)
        begun = time.monotonic()
        for command in commands:
            code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
            if code:
                raise CheckError(f"{name} (exit {code}); again: {shlex.join(command)}")
        self.passed += 1
        print(f"-- {name}: {time.monotonic() - begun:.1f} s", flush=True)

    def together(self, name: str, *rows: Row) -> None:
        """Run rows side by side, as one check; raise CheckError when a command of one fails."""
        print(f"\n== {name}", flush=True)
        begun = time.monotonic()
        with ThreadPoolExecutor(len(rows)) as threads:
            failed = [failure for failure in threads.map(Row.run, rows) if failure]
        if failed:
            raise CheckError("; ".join(failed))
        self.passed += 1
        print(f"-- {name}: {time.monotonic() - begun:.1f} s", flush=True)


def main(arguments: list[str]) -> int:
    """Check, say how it went, return the exit status."""
    run = Run()
    try:
        interpreters = find_interpreters()
        if arguments:
            return only_pytest(run, next(iter(interpreters.values())), arguments)
        if MAIN not in interpreters:
            raise CheckError(NO_MAIN)
        check_all(run, interpreters)
    except CheckError as error:
        print(f"\nFAILED: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr, flush=True)
        return 130
    took_s = time.monotonic() - run.started_s
    versions = ", ".join(one.version for one in interpreters.values())
    print(f"\nAll {run.passed} checks passed on Python {versions} in {took_s:.0f} s.", flush=True)
    return 0


def only_pytest(run: Run, interpreter: Interpreter, arguments: list[str]) -> int:
    """What a developer runs all day."""
    if name_browser_tests(arguments):
        install_system_packages(run)
    prepare(run, interpreter)
    command = [python(interpreter), "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ(interpreter), check=False).returncode


def name_browser_tests(arguments: list[str]) -> bool:
    """Whether tests in a browser are at or below a place that these arguments of pytest name."""
    browser = ROOT / "tests" / "browser"
    places = [ROOT / argument.partition("::")[0] for argument in arguments]
    named = [place.resolve() for place in places if place != ROOT and place.exists()]
    return any(browser.is_relative_to(one) or one.is_relative_to(browser) for one in named)


def check_all(run: Run, interpreters: dict[str, Interpreter]) -> None:
    """What the README promises and CI runs."""
    found = ", ".join(f"{one.version} ({one.path})" for one in interpreters.values())
    print(f"Python: {found}", flush=True)
    install_system_packages(run)
    chief = interpreters[MAIN]
    prepare(run, chief)
    check_code(run, chief)
    check_tests(run, chief)
    others = [each for each in interpreters.values() if each is not chief]
    for other in others:
        prepare(run, other)
    if others:
        check_quickly(run, others)


def check_code(run: Run, chief: Interpreter) -> None:
    """Style, types, floors: what needs no running."""
    env = environ(chief)
    run.step("ruff check", [tool(chief, "ruff"), "check", "."], env=env)
    run.step("ruff format", [tool(chief, "ruff"), "format", "--check", "."], env=env)
    run.step("mypy", [tool(chief, "mypy")], env=env)
    pyright = [tool(chief, "pyright"), "--pythonpath", python(chief), "--warnings"]
    run.step("pyright", pyright, env=env)
    run.step("lint-imports", [tool(chief, "lint-imports")], env=env)


def check_tests(run: Run, chief: Interpreter) -> None:
    """Every test, and how much of the code they run: in this process and in those they start."""
    env = environ(chief)
    coverage = [python(chief), "-m", "coverage"]
    pytest = [*coverage, "run", "-m", "pytest"]
    run.step("no coverage yet", [*coverage, "erase"], env=env)
    run.together(
        f"tests on {chief.version}",
        Row(label="parts", commands=[[*pytest, *quick_trees(), *slow_trees()]], env=env),
        Row(label="whole", commands=[[*pytest, LONGEST]], env=env),
    )
    run.step(
        "coverage: 95 overall, 100 in core",
        [*coverage, "combine", "--quiet"],
        [*coverage, "report", "--fail-under=95"],
        [*coverage, "report", "--fail-under=100", "--include=src/anser/core/*"],
        env=env,
    )


def check_quickly(run: Run, others: list[Interpreter]) -> None:
    """The tests that take seconds, and the few end-to-end ones marked for every interpreter."""
    run.together("quick tests on newer interpreters", *map(quick_row, others))


def quick_row(other: Interpreter) -> Row:
    """These tests, on one interpreter."""
    pytest = [python(other), "-m", "pytest", "-q"]
    parts, smoke = [*pytest, "-m", QUICK_MARKS, *quick_trees()], [*pytest, "-m", "smoke", "tests"]
    return Row(label=other.short, commands=[parts, smoke], env=environ(other))


def quick_trees() -> list[str]:
    """The parts of tests/ that take seconds."""
    return [f"tests/{name}" for name in QUICK if (ROOT / "tests" / name).exists()]


def slow_trees() -> list[str]:
    """All other parts of tests/ but the longest."""
    parts = {path.relative_to(ROOT).parts for path in (ROOT / "tests").rglob("test_*.py")}
    return sorted({f"tests/{part[1]}" for part in parts} - {*quick_trees(), LONGEST})


# ------------------------------------------------------------------------------ interpreters


def find_interpreters() -> dict[str, Interpreter]:
    """The first usable interpreter of each version, oldest version first."""
    found: dict[str, Interpreter] = {}
    for candidate in candidates():
        interpreter = probe(candidate)
        if interpreter is not None:
            found.setdefault(interpreter.short, interpreter)
    if not found:
        raise CheckError(NO_MAIN)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(".")[1])))


def candidates() -> list[str]:
    """Paths worth a try: $PYTHON, then PATH, then pyenv's."""
    names = ("python3", *(f"python3.{minor}" for minor in range(11, 30)))
    folders = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    chosen = os.environ.get("PYTHON")
    paths = [Path(shutil.which(chosen) or chosen)] if chosen else []
    paths += [folder / name for folder in folders for name in names]
    paths += sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin/python3"))
    return list(dict.fromkeys(str(path) for path in paths if os.access(path, os.X_OK)))


def probe(path: str) -> Interpreter | None:
    """What `path` is, or None if it does not run or will not do."""
    asked = subprocess.run(
        [path, "-c", PROBE], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    words = asked.stdout.strip().split(" ", 2)
    if asked.returncode or len(words) != 3:
        return None
    return Interpreter(short=words[0], version=words[1], path=words[2])


# ------------------------------------------------------------------------------ environments


def prepare(run: Run, interpreter: Interpreter) -> None:
    """Make the interpreter's environment what requirements/test.txt and pyproject.toml say."""
    locked = ROOT / "requirements" / "test.txt"
    folder = interpreter.environment
    base = digest(str(ROOT), interpreter.path, interpreter.version, locked.read_text())
    package = digest(base, (ROOT / "pyproject.toml").read_text())
    pip = [python(interpreter), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "-qq", "--no-input"]
    env = environ(interpreter)
    if not stamped(folder / "installed", base):
        make = [interpreter.path, "-m", "venv", "--clear", str(folder)]
        fill = [*install, "--require-hashes", "--only-binary", ":all:", "-r", str(locked)]
        run.step(f"packages for {interpreter.version}", make, fill, env=env)
        (folder / "installed").write_text(base)
    if not stamped(folder / "package", package):
        add = [*install, "--no-deps", "--no-build-isolation", "--editable", "."]
        run.step(f"anser for {interpreter.version}", add, env=env)
        (folder / "package").write_text(package)


def stamped(path: Path, key: str) -> bool:
    """Whether the environment was made from what `key` stands for."""
    return path.is_file() and path.read_text() == key


def digest(*texts: str) -> str:
    """One short name for all of `texts`."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def tool(interpreter: Interpreter, name: str) -> str:
    """The program `name` of the interpreter's environment."""
    return str(interpreter.environment / "bin" / name)


def python(interpreter: Interpreter) -> str:
    """The interpreter inside its environment."""
    return tool(interpreter, "python")


def environ(interpreter: Interpreter) -> dict[str, str]:
    """The caller's variables, less those that would make a run here differ from one elsewhere."""
    foreign = ("COVERAGE_", "PYRIGHT_", "PYTEST_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        env.pop(name, None)
    env["PATH"] = os.pathsep.join((str(interpreter.environment / "bin"), env.get("PATH", "")))
    env["COVERAGE_FILE"] = str(ROOT / ".coverage")
    env["PYRIGHT_PYTHON_IGNORE_WARNINGS"] = "1"  # no look for a newer pyright
    return env


# --------------------------------------------------------------------------- system packages


def install_system_packages(run: Run) -> None:
    """See that there are curl and a browser that can show Chinese, by apt-get if need be."""
    here = {
        "chromium": has_browser(),
        "curl": shutil.which("curl") is not None,
        "fonts-noto-cjk": has_cjk_font(),
    }
    missing = [package for package, present in here.items() if not present]
    if not missing:
        return
    if shutil.which("apt-get") is None or (os.geteuid() != 0 and shutil.which("sudo") is None):
        raise CheckError(
            f"the tests need {' and '.join(missing)}, and apt-get cannot be used here. Fedora: "
            "dnf install chromium curl google-noto-sans-cjk-fonts; Arch: pacman -S chromium curl "
            "noto-fonts-cjk; macOS: brew install --cask chromium."
        )
    apt = [*([] if os.geteuid() == 0 else ["sudo"]), "apt-get"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = [*apt, "install", "-y", "-qq", "--no-install-recommends", *missing]
    run.step(f"system packages: {' '.join(missing)}", [*apt, "update", "-qq"], install, env=quiet)


def has_browser() -> bool:
    """Whether a Chromium is on PATH or where macOS keeps its programs."""
    return any(map(shutil.which, BROWSERS)) or any(map(os.path.exists, BROWSERS_MACOS))


def has_cjk_font() -> bool:
    """Whether Chinese would show as more than boxes. macOS brings such fonts along."""
    if sys.platform == "darwin":
        return True
    if shutil.which("fc-list") is None:
        return False
    listed = subprocess.run(["fc-list", ":lang=zh"], capture_output=True, text=True, check=False)
    return bool(listed.stdout.strip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
