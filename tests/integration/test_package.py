"""The package as others get it: all its files, and its command."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    """What is tracked below src is in the wheel: SQL, templates, static files and locales too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "src"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    tracked = {name.removeprefix("src/") for name in listed.stdout.split("\0") if name}
    present = {name for name in tracked if (ROOT / "src" / name).is_file()}
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*build, "--directory", str(tmp_path)], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("anser-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as opened:
        packed = set(opened.namelist())
    assert present
    assert present - packed == set()
    assert any(name.endswith("licenses/LICENSE") for name in packed)


@pytest.mark.smoke
def test_the_command_tells_its_version() -> None:
    """`anser --version` is the version that pyproject.toml states, on every interpreter."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    command = Path(sys.executable).with_name("anser")
    told = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == stated
    assert told.stderr == ""
