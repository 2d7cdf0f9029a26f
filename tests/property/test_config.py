"""Settings: whatever is written, the outcome is a checked Config or one clear refusal."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from anser.config import Config, Setting, load, settings
from anser.core.errors import ConfigError

ALL = [setting for setting in settings() if setting.path != "data_dir"]
VALUES = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.text(max_size=5), max_size=3),
)


def value_of(config: Config, path: str) -> object:
    """What the config holds at this key path."""
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)


def refusal(file: Path) -> str | None:
    """The message with which this file is refused, if it is."""
    try:
        load(file=file, environ={"ANSER_DATA_DIR": "/d"}, overrides={})
    except ConfigError as error:
        return error.message
    return None


@given(st.binary(max_size=300))
def test_no_file_crashes_the_loader(content: bytes) -> None:
    """Any bytes as a file give a Config or a ConfigError that names the file, nothing else."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        message = refusal(Path(file.name))
        assert message is None or message.startswith(file.name)
        assert message is None or message.isprintable()


@given(st.sampled_from(ALL), VALUES)
def test_a_value_is_kept_as_given_or_refused(setting: Setting, value: object) -> None:
    """No value is changed on the way: it arrives equal and of the right type, or is refused."""
    overrides = {"data_dir": "/d", setting.path: value}
    with contextlib.suppress(ConfigError):
        kept = value_of(load(file=None, environ={}, overrides=overrides).config, setting.path)
        assert kept == (tuple(value) if isinstance(value, list) else value)
        assert type(kept) is type(setting.default)


@given(st.sampled_from(ALL), VALUES)
def test_file_and_environment_agree(setting: Setting, value: object) -> None:
    """What a file may say, the environment may say too, with the same result."""
    if isinstance(value, float) or isinstance(setting.default, tuple) or isinstance(value, list):
        return  # these are written differently
    text = json.dumps(value, ensure_ascii=False)
    section, _, name = setting.path.partition(".")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write(f"[{section}]\n{name} = {text}\n")
        file.flush()
        try:
            loaded = load(file=Path(file.name), environ={"ANSER_DATA_DIR": "/d"}, overrides={})
        except ConfigError:
            return
    plain = value if isinstance(value, str) else text
    if isinstance(value, str) and value != value.strip():
        return  # surrounding blanks are trimmed from variables
    environ = {"ANSER_DATA_DIR": "/d", setting.environment: plain}
    again = load(file=None, environ=environ, overrides={})
    if plain:
        assert value_of(again.config, setting.path) == value_of(loaded.config, setting.path)
