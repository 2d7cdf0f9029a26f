"""Reading the settings from file, environment and command line, strictly.

An unknown key, a wrong type or a value out of range raises ConfigError, whose message names the
source, the key path and the cure. Nothing is guessed and nothing is passed over.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from anser.config.values import SECTIONS, Config, ServerSettings, Setting, Value, settings
from anser.core import limits
from anser.core.errors import ConfigError, RequestError
from anser.core.hub import read_spec
from anser.wire.cors import is_origin
from anser.wire.tls import Identity, identity

__all__ = ["Loaded", "check_forms", "load", "split_address"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checked Config and, per key path, where its value came from."""

    config: Config
    sources: Mapping[str, str]  # "default", a file's path, an environment name, "command line"
    file: Path | None  # the file that was read

    @classmethod
    def of(cls, config: Config) -> Loaded:
        """A Config that was made and not read: all of it counts as given on the command line."""
        sources = dict.fromkeys((setting.path for setting in settings()), "command line")
        return cls(config=config, sources=sources, file=None)

    def at(self, address: tuple[str, int] | None, source: str) -> Loaded:
        """The same, listening at this address, if any, which `source` decided. ConfigError."""
        if address is None:
            return self
        server = replace(self.config.server, host=address[0], port=address[1])
        config = replace(self.config, server=server)
        sources = {**self.sources, "server.host": source, "server.port": source}
        check_forms(config, sources)
        return replace(self, config=config, sources=sources)

    def identity(self) -> Identity | None:
        """The certificate and its key, read and checked; None without TLS. Raises ConfigError."""
        server = self.config.server
        if not server.tls_certificate:
            return None
        try:
            return identity(Path(server.tls_certificate), Path(server.tls_key))
        except ConfigError as error:
            source = self.sources[str(error.param)]
            raise ConfigError(f"{source}: {error.message}", param=error.param) from error

    def check_model(self) -> None:
        """The model's file is there, if it is one of this machine. Raises ConfigError."""
        path = read_spec(self.config.engine.model).file.path
        if self.config.engine.enabled and path and not Path(path).expanduser().is_file():
            source = self.sources["engine.model"]
            message = f"{source}: engine.model: there is no file {_shown(path)}."
            raise ConfigError(message, param="engine.model")


_TRUE = frozenset(("true", "on", "yes", "1"))
_FALSE = frozenset(("false", "off", "no", "0"))
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}\Z")
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?\Z")
_FILE_BYTES_MAX = 1024 * 1024
_PATHS = frozenset(("data_dir", "server.tls_certificate", "server.tls_key"))  # beside their file


def load(
    *, file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]
) -> Loaded:
    """Read defaults, file, environment and command line (`overrides` by key path), in this order.

    The file is `file`, else $ANSER_CONFIG, else `anser.toml` in the data folder if it is there.
    """
    known = {setting.path: setting for setting in settings()}
    typed = _from_environment(known, environ) | _from_overrides(known, overrides)
    found = file or (Path(environ["ANSER_CONFIG"]) if environ.get("ANSER_CONFIG") else None)
    written: dict[str, tuple[Value, str]] = {}
    if found is None:
        inside = _data_dir(typed, environ) / "anser.toml"
        if inside.exists():
            found, written = inside, _from_file(known, inside)
            _refuse_moving_itself(written)
    else:
        written = _from_file(known, found)
    given = written | typed
    config = _assemble(known, given, _data_dir(given, environ))
    check_forms(config, {path: source for path, (_, source) in given.items()})
    sources = {path: given[path][1] if path in given else "default" for path in known}
    return Loaded(config=config, sources=sources, file=found)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`; ValueError if it is neither."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        ip_address(host)
    elif not colon or ":" in host or not _HOST.match(host):
        raise ValueError(text)
    if not (_WHOLE.match(port) and 0 <= int(port) <= 65_535):
        raise ValueError(text)
    return host, int(port)


def _from_environment(
    known: Mapping[str, Setting], environ: Mapping[str, str]
) -> dict[str, tuple[Value, str]]:
    names = {setting.environment: setting for setting in known.values()}
    prefixes = tuple(f"ANSER_{section}_".upper() for section in SECTIONS)
    given: dict[str, tuple[Value, str]] = {}
    for name in sorted(environ):
        text = environ[name]
        if not text.strip() or not name.startswith("ANSER_"):
            continue  # an empty variable counts as unset
        if name in names:
            setting = names[name]
            given[setting.path] = (_parse(setting, text.strip(), f"{name} ({setting.path})"), name)
        elif name.startswith(prefixes):
            near = difflib.get_close_matches(name, names, n=1)
            way = f"Did you mean {near[0]}?" if near else "`anser config` lists them; unset it."
            raise ConfigError(f"{name} is not a setting. {way}", param=name)
    return given


def _from_overrides(
    known: Mapping[str, Setting], overrides: Mapping[str, object]
) -> dict[str, tuple[Value, str]]:
    given: dict[str, tuple[Value, str]] = {}
    for path, value in overrides.items():
        assert path in known, path
        setting = known[path]
        text = str(value) if isinstance(value, Path) else value
        given[path] = (_convert(setting, text, f"command line: {path}"), "command line")
    return given


def _from_file(known: Mapping[str, Setting], file: Path) -> dict[str, tuple[Value, str]]:
    given: dict[str, tuple[Value, str]] = {}
    for path, value in _flat(_read(file), known, file):
        setting = known[path]
        kept = _convert(setting, value, f"{file}: {path}")
        if path in _PATHS and kept:
            kept = _beside(file, str(kept), path)
        given[path] = (kept, str(file))
    return given


def _beside(file: Path, text: str, path: str) -> str:
    """A path that was written in this file, taken from the file's own folder."""
    try:
        return os.path.join(file.resolve().parent, Path(text).expanduser())
    except RuntimeError as error:
        message = f"{file}: {path}: no home folder is known for {_shown(text)}."
        raise ConfigError(message, param=path) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{file}: cannot be read ({reason}). Check --config.") from error
    if len(content) > _FILE_BYTES_MAX:
        raise ConfigError(f"{file}: longer than {_FILE_BYTES_MAX:,} bytes; is it the right file?")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        message = f"{file}, line {line}: not UTF-8. Save the file as UTF-8."
        raise ConfigError(message) from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError ends in "(at line 3, ...)"
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        message = f"{file}: not valid TOML: {_shown(reason)}. Correct that line."
        raise ConfigError(message) from error


def _flat(
    table: dict[str, Any], known: Mapping[str, Setting], file: Path
) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if key not in SECTIONS:
            if key not in known:
                raise _unknown(key, known, file)
            yield key, value
        elif not isinstance(value, dict):
            message = f"{file}: {key} is a section, not a value. Write [{key}] above its settings."
            raise ConfigError(message, param=key)
        else:
            for name, inner in cast("dict[str, object]", value).items():
                path = f"{key}.{name}"
                if path not in known:
                    raise _unknown(path, known, file)
                yield path, inner


def _unknown(path: str, known: Mapping[str, Setting], file: Path) -> ConfigError:
    near = _near(path, known)
    way = f"Did you mean {near[0]}?" if near else "`anser config` lists all settings."
    return ConfigError(f"{file}: {_shown(path)} is not a setting. {way}", param=_shown(path))


def _near(path: str, known: Mapping[str, Setting]) -> list[str]:
    """What may have been meant: the name in its right section, a section, a path, a name."""
    last = path.rpartition(".")[2]
    names = {name.rpartition(".")[2]: name for name in known}
    if last in names:
        return [names[last]]
    first = path.partition(".")[0]
    sections = [] if first in SECTIONS else difflib.get_close_matches(first, SECTIONS, n=1)
    close = difflib.get_close_matches(path, known, n=1)
    like = difflib.get_close_matches(last, names, n=1)
    return [f"[{section}]" for section in sections] or close or [names[name] for name in like]


def _parse(setting: Setting, text: str, where: str) -> Value:
    """The environment's text as the setting's type."""
    default = setting.default
    value: object = text
    if isinstance(default, bool):
        value = text.lower() in _TRUE if text.lower() in _TRUE | _FALSE else text
    elif isinstance(default, tuple):
        value = [part.strip() for part in text.split(",") if part.strip()]
    elif isinstance(default, int):
        value = int(text) if _WHOLE.match(text) else text
    elif isinstance(default, float):
        try:
            value = float(text)
        except ValueError:
            value = text
    return _convert(setting, value, where)


def _convert(setting: Setting, value: object, where: str) -> Value:
    """`value` if it has the setting's type and range; a whole number will do for a number."""
    kept = _typed(type(setting.default), value)
    if kept is not None and _in_range(setting, kept):
        return kept
    shown = f'"{_shown(value)}"' if isinstance(value, str) and value else _shown(value)
    message = f"{where} must be {setting.wanted}, not {shown}."
    raise ConfigError(message, param=setting.path)


def _typed(kind: type, value: object) -> Value | None:
    if kind is tuple:
        return _texts(value)
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**53 else math.inf
    return value if isinstance(value, (str, int, float)) and type(value) is kind else None


def _texts(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, (list, tuple)):
        return None
    parts = cast("list[object]", value)
    return tuple(str(part) for part in parts) if all(isinstance(p, str) for p in parts) else None


def _in_range(setting: Setting, value: Value) -> bool:
    if setting.choices:
        return value in setting.choices
    if setting.path == "data_dir":
        return value != ""  # or it would be the working folder
    if setting.low is None or setting.high is None or isinstance(value, (str, tuple)):
        return True
    return setting.low <= value <= setting.high  # false for NaN


def _shown(value: object) -> str:
    """The operator's own text or value, short and without control characters."""
    text = value if isinstance(value, str) else repr(value)
    kept = "".join(letter if letter.isprintable() else "?" for letter in text)
    short = kept[: limits.ECHO_CHARS_MAX] + ("..." if len(kept) > limits.ECHO_CHARS_MAX else "")
    return short or "empty"


def _data_dir(given: Mapping[str, tuple[Value, str]], environ: Mapping[str, str]) -> Path:
    if "data_dir" in given:
        chosen = Path(str(given["data_dir"][0]))
    elif os.path.isabs(environ.get("XDG_DATA_HOME", "")):
        chosen = Path(environ["XDG_DATA_HOME"], "anser")
    else:
        chosen = Path("~/.local/share/anser")
    try:
        return Path(os.path.abspath(chosen.expanduser()))
    except RuntimeError as error:
        message = f"data_dir: no home folder is known for {chosen}. Give --data-dir."
        raise ConfigError(message, param="data_dir") from error


def _refuse_moving_itself(written: Mapping[str, tuple[Value, str]]) -> None:
    if "data_dir" in written:
        message = (
            f"{written['data_dir'][1]}: data_dir cannot be set in the data folder's own file."
            " Name the file with --config or $ANSER_CONFIG, or the folder with --data-dir."
        )
        raise ConfigError(message, param="data_dir")


def _assemble(
    known: Mapping[str, Setting], given: Mapping[str, tuple[Value, str]], data_dir: Path
) -> Config:
    parts: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        names = [item.name for item in fields(kind) if f"{section}.{item.name}" in given]
        try:
            parts[section] = kind(**{name: given[f"{section}.{name}"][0] for name in names})
        except ConfigError as error:  # it says which setting, and not where that was given
            source = given[error.param or ""][1]
            raise ConfigError(f"{source}: {error.message}", param=error.param) from error
    assert all(path in known for path in given)
    return Config(data_dir=data_dir, **parts)


def check_forms(config: Config, sources: Mapping[str, str]) -> None:
    """Check what types and ranges do not say: addresses, and what excludes each other.

    `sources` says by key path where a value came from. Raises ConfigError.
    """
    for path, why in _wrong_forms(config):
        raise ConfigError(f"{sources.get(path, 'default')}: {path} {why}", param=path)


def _wrong_forms(config: Config) -> Iterator[tuple[str, str]]:
    server = config.server
    if not _is_host(server.host):
        why = f"must be a host name or an IP address without port, not {_shown(server.host)}."
        yield "server.host", why
    if server.admin_listen:
        yield from _wrong_admin(server.admin_listen, public=(server.host, server.port))
    yield from _wrong_proxies(server)
    yield from _wrong_origins(server.cors_origins)
    yield from _wrong_tls(server)
    if not config.engine.model.strip():
        yield "engine.model", "is empty. Name a model, or set engine.enabled = false."
    elif (wrong := _wrong_model(config.engine.model)) is not None:
        yield "engine.model", f"cannot be: {wrong}"
    for mirror in config.engine.mirrors:
        if not _is_url(mirror):
            yield "engine.mirrors", f"must be http(s) addresses, not {_shown(mirror)}."


def _wrong_admin(text: str, *, public: tuple[str, int]) -> Iterator[tuple[str, str]]:
    try:
        address = split_address(text)
    except ValueError:
        why = f"must be host:port, like 127.0.0.1:9000, not {_shown(text)}."
        yield "server.admin_listen", why
        return
    if address == public and address[1]:
        yield "server.admin_listen", "is the public address. Choose another port."


def _wrong_proxies(server: ServerSettings) -> Iterator[tuple[str, str]]:
    if server.proxy_protocol and not server.trusted_proxies:
        why = "needs the addresses of the proxies. Name them in server.trusted_proxies."
        yield "server.proxy_protocol", why
    for proxy in server.trusted_proxies:
        if not _is_network(proxy):
            why = f"must be addresses or blocks like 10.0.0.0/8, not {_shown(proxy)}."
            yield "server.trusted_proxies", why


def _wrong_origins(origins: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for origin in origins:
        if not is_origin(origin):
            why = f"must be origins like https://chat.example, or *, not {_shown(origin)}."
            yield "server.cors_origins", why


def _wrong_tls(server: ServerSettings) -> Iterator[tuple[str, str]]:
    if server.tls_certificate and not server.tls_key:
        yield "server.tls_certificate", "needs its key. Name that in server.tls_key."
    if server.tls_key and not server.tls_certificate:
        yield "server.tls_key", "needs its certificate. Name that in server.tls_certificate."


def _wrong_model(text: str) -> str | None:
    try:
        Path(read_spec(text).file.path or "").expanduser()
    except RequestError as error:
        return error.message
    except RuntimeError:
        return f"no home folder is known for {_shown(text)}."
    return None


def _is_host(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        looks_like_ip = text.replace(".", "").isdigit()
        return len(text) <= 253 and not looks_like_ip and _HOST.match(text) is not None
    return True


def _is_network(text: str) -> bool:
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
