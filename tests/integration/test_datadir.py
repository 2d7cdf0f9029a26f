"""The data folder: one platform at a time, secrets kept secret, every refusal with its cure."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from anser.adapters.datadir import DataDir
from anser.core.errors import ConfigError

HOLDER = """
import sys
from pathlib import Path
from anser.adapters.datadir import DataDir
with DataDir.open(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "deep" / "data"


def mode(path: Path) -> int:
    """The permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_is_made_for_its_owner_only(folder: Path) -> None:
    """The folder is made when needed; nobody else may look into it or read its files."""
    with DataDir.open(folder) as data:
        data.pepper()
        assert repr(data) == f"<DataDir {folder}>"
    assert mode(folder) == 0o700
    assert {entry.name: mode(entry) for entry in folder.iterdir()} == {
        "lock": 0o600,
        "pepper": 0o600,
    }


def test_second_platform_is_refused_by_name(folder: Path) -> None:
    """A folder that another process holds is refused, naming folder, process and cure."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        message = rf"{re.escape(str(folder))} is in use .*process {holder.pid}\).*--data-dir"
        with pytest.raises(ConfigError, match=message), DataDir.open(folder):
            pass
        holder.kill()  # a lock does not outlive its holder, whatever ended it
    with DataDir.open(folder):
        assert (folder / "lock").read_text() == f"{os.getpid()}\n"


def test_folder_is_free_again_after_use(folder: Path) -> None:
    """The lock is let go at the end, also within one process."""
    for _ in range(2):
        with (
            DataDir.open(folder),
            pytest.raises(ConfigError, match="in use"),
            DataDir.open(folder),
        ):
            pass


def test_places_lie_in_the_folder(folder: Path) -> None:
    """Everything that lasts lies in the data folder, also when it was named relatively."""
    with DataDir.open(Path(os.path.relpath(folder))) as data:
        for place in (data.store, data.signing_key, data.socket):
            assert place.is_absolute()
            assert ".." not in place.parts
            assert place.parent.samefile(folder)


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    """A path that cannot be a folder is refused by name."""
    (tmp_path / "file").touch()
    refused = pytest.raises(ConfigError, match=r"data folder .*/file cannot be used")
    with refused, DataDir.open(tmp_path / "file"):
        pass


def test_long_path_cannot_hold_a_socket(tmp_path: Path) -> None:
    """Sockets have short names: a longer path is refused with the cure."""
    refused = pytest.raises(ConfigError, match="too long for a socket")
    with DataDir.open(tmp_path / ("x" * 120)) as data, refused:
        _ = data.socket


def test_pepper_is_made_once(folder: Path) -> None:
    """The pepper is random, and the same ever after."""
    with DataDir.open(folder) as data:
        pepper = data.pepper()
        assert len(pepper) == 32
    with DataDir.open(folder) as data:
        assert data.pepper() == pepper
    with DataDir.open(folder.parent / "other") as data:
        assert data.pepper() != pepper


def test_pepper_that_others_can_read_is_refused(folder: Path) -> None:
    """A secret that others can read stops the start, with the command that cures it."""
    with DataDir.open(folder) as data:
        data.pepper()
        (folder / "pepper").chmod(0o644)
        with pytest.raises(ConfigError, match=rf"mode 644\): chmod 600 {folder}/pepper"):
            data.pepper()


def test_short_pepper_is_refused(folder: Path) -> None:
    """A pepper that was cut short is not used: every key would be refused without a reason."""
    with DataDir.open(folder) as data:
        data.pepper()
        (folder / "pepper").write_bytes(b"short")
        with pytest.raises(ConfigError, match="must hold 32 bytes, not 5"):
            data.pepper()
