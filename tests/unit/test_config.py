"""Settings: where they come from, what they take, and how a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from anser.adapters.blobs import DiskBlobs
from anser.config import Config, Loaded, load, settings, split_address
from anser.core.errors import ConfigError
from anser.services.hub import Hub


def read(tmp_path: Path, text: str | bytes, **environ: str) -> Loaded:
    """Load a file of this content, with this environment."""
    file = tmp_path / "anser.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(file=file, environ={"HOME": str(tmp_path), **environ}, overrides={})


def refusal(tmp_path: Path, text: str | bytes, **environ: str) -> str:
    """The message with which this file and environment are refused."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, **environ)
    return caught.value.message


def test_each_source_overrides_the_one_below(tmp_path: Path) -> None:
    """Defaults give way to the file, the file to the environment, that to the command line."""
    file = tmp_path / "a.toml"
    file.write_text('[server]\nhost = "0.0.0.0"\nport = 1\ndrain_s = 5\n[engine]\nslots = 2\n')
    loaded = load(
        file=file,
        environ={"ANSER_SERVER_PORT": "2", "ANSER_SERVER_DRAIN_S": "6.5"},
        overrides={"server.port": 3, "data_dir": tmp_path / "data"},
    )
    server = loaded.config.server
    assert (server.host, server.port, server.drain_s) == ("0.0.0.0", 3, 6.5)
    assert loaded.config.engine.slots == 2
    assert loaded.config.members == Config(data_dir=tmp_path).members
    assert loaded.sources["server.host"] == str(file)
    assert loaded.sources["server.port"] == "command line"
    assert loaded.sources["server.drain_s"] == "ANSER_SERVER_DRAIN_S"
    assert loaded.sources["gateway.queued_max"] == "default"
    assert set(loaded.sources) == {setting.path for setting in settings()}


def test_a_model_file_that_is_not_there_is_told_with_its_source(tmp_path: Path) -> None:
    """The file's owner may be an old setting in a file or a variable: it is named."""
    loaded = read(tmp_path, '[engine]\nmodel = "/no/such.gguf"\n')
    with pytest.raises(ConfigError, match=r"anser\.toml: engine\.model: there is no file /no/such"):
        loaded.check_model()
    read(tmp_path, '[engine]\nmodel = "/no/such.gguf"\nenabled = false\n').check_model()
    read(tmp_path, "").check_model()
    assert "no home folder" in refusal(tmp_path, '[engine]\nmodel = "~nobody-here/a.gguf"\n')


def test_a_model_file_may_be_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file or a variable has no shell that would write ~ out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.gguf").write_text("x")
    loaded = read(tmp_path, '[engine]\nmodel = "~/a.gguf"\n')
    loaded.check_model()
    hub = Hub([], DiskBlobs(tmp_path / "blobs"))
    assert hub.find(hub.resolve(loaded.config.engine.model)) == tmp_path / "a.gguf"


def test_an_empty_data_folder_is_refused(tmp_path: Path) -> None:
    """It would be the working folder."""
    assert "data_dir must be" in refusal(tmp_path, 'data_dir = ""\n')


def test_a_text_in_the_place_of_a_number_is_shown_as_text(tmp_path: Path) -> None:
    """Without its quotes the message would contradict itself."""
    assert 'not "8000".' in refusal(tmp_path, '[server]\nport = "8000"\n')


def test_the_file_is_found_by_option_then_variable_then_data_folder(tmp_path: Path) -> None:
    """The file is --config, else $ANSER_CONFIG, else <data_dir>/anser.toml if there."""
    ports = {"option.toml": 1, "variable.toml": 2, "anser.toml": 3}
    for name, port in ports.items():
        (tmp_path / name).write_text(f"[server]\nport = {port}\n")
    option, variable = tmp_path / "option.toml", tmp_path / "variable.toml"
    environ = {"ANSER_CONFIG": str(variable), "ANSER_DATA_DIR": str(tmp_path)}
    assert load(file=option, environ=environ, overrides={}).config.server.port == 1
    assert load(file=None, environ=environ, overrides={}).config.server.port == 2
    del environ["ANSER_CONFIG"]
    assert load(file=None, environ=environ, overrides={}).config.server.port == 3
    assert load(file=None, environ=environ, overrides={}).file == tmp_path / "anser.toml"
    elsewhere = {"data_dir": tmp_path / "other"}
    assert load(file=None, environ=environ, overrides=elsewhere).file is None


def test_the_data_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data folder is $XDG_DATA_HOME/anser if that is absolute, else ~/.local/share/anser."""
    monkeypatch.setenv("HOME", str(tmp_path))
    there = load(file=None, environ={"XDG_DATA_HOME": "/var/x"}, overrides={})
    assert there.config.data_dir == Path("/var/x/anser")
    home = load(file=None, environ={"XDG_DATA_HOME": "relative"}, overrides={})
    assert home.config.data_dir == tmp_path / ".local/share/anser"
    tilde = load(file=None, environ={"ANSER_DATA_DIR": "~/d"}, overrides={})
    assert tilde.config.data_dir == tmp_path / "d"


def test_a_data_folder_in_a_file_is_relative_to_that_file(tmp_path: Path) -> None:
    """A relative data_dir in a file means beside the file, wherever the command is started."""
    assert read(tmp_path, 'data_dir = "data"').config.data_dir == tmp_path / "data"


def test_the_data_folders_own_file_cannot_move_the_data_folder(tmp_path: Path) -> None:
    """A data_dir inside the file that was found through data_dir is refused with the way out."""
    (tmp_path / "anser.toml").write_text('data_dir = "/elsewhere"')
    with pytest.raises(ConfigError, match="--config"):
        load(file=None, environ={"ANSER_DATA_DIR": str(tmp_path)}, overrides={})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[server]\nprot = 1", ["server.prot is not a setting", "server.port?"]),
        ("prot = 1", ["prot is not a setting", "server.port?"]),
        ("port = 1", ["port is not a setting", "server.port?"]),
        ("[sever]\nport = 1", ["sever is not a setting", "[server]?"]),
        ("[zzzz]\nqqqq = 1", ["zzzz", "`anser config`"]),
        ("server = 1", ["server is a section", "[server]"]),
        ('[server]\nport = "80"', ["server.port must be a whole number from 0 to 65,535", "80"]),
        ("[server]\nport = true", ["server.port", "not True"]),
        ("[server]\nport = 80.0", ["server.port", "not 80.0"]),
        ("[server]\nport = 65536", ["server.port", "65,535", "not 65536"]),
        ("[server]\nport = -1", ["server.port", "not -1"]),
        ("[server]\ndrain_s = nan", ["server.drain_s", "not nan"]),
        ("[server]\ndrain_s = inf", ["server.drain_s", "not inf"]),
        (f"[server]\ndrain_s = {10**400}", ["server.drain_s"]),
        ('[server]\nhost = "http://x"', ["server.host", "without port"]),
        ('[server]\nhost = "1.2.3"', ["server.host"]),
        ('[server]\nhost = ""', ["server.host", "empty"]),
        ('[server]\nhost = "a\\u001b[31m"', ["server.host", "a?[31m"]),
        ('[server]\nadmin_listen = "9000"', ["server.admin_listen", "127.0.0.1:9000"]),
        ('[server]\nadmin_listen = ":9000"', ["server.admin_listen"]),
        ('[server]\nadmin_listen = "::1:9000"', ["server.admin_listen"]),
        ('[server]\nadmin_listen = "[::g]:9000"', ["server.admin_listen"]),
        ('[server]\nadmin_listen = "x:99999"', ["server.admin_listen"]),
        ('[server]\nadmin_listen = "127.0.0.1:8000"', ["server.admin_listen", "another port"]),
        ("[engine]\nslots = 0", ["engine.slots", "from 1"]),
        ("[engine]\nenabled = 1", ["engine.enabled must be true or false"]),
        ('[engine]\nmodel = " "', ["engine.model", "engine.enabled = false"]),
        ('[engine]\nmirrors = "http://a"', ["engine.mirrors must be a list of texts"]),
        ("[engine]\nmirrors = [1]", ["engine.mirrors must be a list of texts"]),
        ('[engine]\nmirrors = ["ftp://a"]', ["engine.mirrors", "ftp://a"]),
        ('[engine]\nmirrors = ["http://a:99999"]', ["engine.mirrors"]),
        ('[server]\ncors_origins = ["https://a.b/"]', ["server.cors_origins", "https://a.b/"]),
        ('[server]\ncors_origins = ["null"]', ["server.cors_origins"]),
        ('[server]\ntrusted_proxies = ["proxy"]', ["server.trusted_proxies", "proxy"]),
        ('[server]\ntrusted_proxies = ["10.0.0.1/8"]', ["server.trusted_proxies", "10.0.0.0/8"]),
        ('[members]\nanonymous = "maybe"', ["members.anonymous", "one of on, off, auto", "maybe"]),
        ("[members]\nanonymous = true", ["members.anonymous", "not True"]),
        ('[gateway]\nunknown_fields = "keep"', ["gateway.unknown_fields", "refuse, drop"]),
        ("data_dir = 3", ["data_dir must be a text"]),
    ],
)
def test_a_wrong_setting_is_refused_by_file_key_and_cure(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    """A wrong setting in the file: the message names the file, the key path and what to do."""
    message = refusal(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'anser.toml'}: ")
    assert [part for part in parts if part not in message] == []
    assert len(message) < 600


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"[server]\nport = = 1\n", ["not valid TOML", "line 2"]),
        (b"[server]\nport = 1\nport = 2\n", ["not valid TOML", "line 3"]),
        (b"[server]\n\nhost = '\xff'\n", ["line 3", "not UTF-8"]),
        (b"x = " + b"[" * 5_000, ["not valid TOML"]),
        (b"x = " + b"9" * 5_000, ["not valid TOML"]),
        (b"#" * (1024 * 1024 + 1), ["longer than 1,048,576 bytes"]),
    ],
)
def test_a_file_that_is_no_toml_is_refused_by_line(
    tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    """A syntax error, another encoding, or no end: refused with file and, where known, line."""
    message = refusal(tmp_path, content)
    assert message.startswith(str(tmp_path / "anser.toml"))
    assert [part for part in parts if part not in message] == []
    assert len(message) < 600


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    """Editors that write a UTF-8 byte order mark do no harm."""
    assert read(tmp_path, b"\xef\xbb\xbf[server]\nport = 7").config.server.port == 7


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A file that is named must be there and be a file."""
    for wrong in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read .*--config"):
            load(file=wrong, environ={}, overrides={})


def test_the_environment_is_parsed_by_type() -> None:
    """A variable's text becomes the setting's own type."""
    environ = {
        "ANSER_DATA_DIR": "/d",
        "ANSER_SERVER_PORT": " 9 ",
        "ANSER_SERVER_DRAIN_S": "1e1",
        "ANSER_ENGINE_ENABLED": "Off",
        "ANSER_ENGINE_MIRRORS": "http://a, https://b:1,",
        "ANSER_MEMBERS_ANONYMOUS": "off",
    }
    config = load(file=None, environ=environ, overrides={}).config
    assert (config.data_dir, config.server.port, config.server.drain_s) == (Path("/d"), 9, 10.0)
    assert not config.engine.enabled
    assert config.engine.mirrors == ("http://a", "https://b:1")
    assert config.members.anonymous == "off"


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("ANSER_SERVER_PORT", "tcp://10.0.0.1:80", ["server.port", "whole number"]),
        ("ANSER_SERVER_PORT", "9" * 30, ["server.port"]),
        ("ANSER_SERVER_PORT", "1_000", ["server.port"]),
        ("ANSER_SERVER_DRAIN_S", "soon", ["server.drain_s", "a number"]),
        ("ANSER_ENGINE_ENABLED", "perhaps", ["engine.enabled", "true or false"]),
        ("ANSER_SERVER_PROT", "1", ["not a setting", "ANSER_SERVER_PORT?"]),
        ("ANSER_GATEWAY_XYZ", "1", ["not a setting"]),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(name: str, text: str, parts: list[str]) -> None:
    """A wrong or unknown variable of ours is refused, and the message starts with its name."""
    with pytest.raises(ConfigError) as caught:
        load(file=None, environ={"ANSER_DATA_DIR": "/d", name: text}, overrides={})
    assert caught.value.message.startswith(name)
    assert [part for part in parts if part not in caught.value.message] == []


def test_an_empty_variable_counts_as_unset() -> None:
    """Compose files pass empty variables for what was not given: they change nothing."""
    environ = {"ANSER_DATA_DIR": "/d", "ANSER_SERVER_PORT": "", "ANSER_CONFIG": ""}
    loaded = load(file=None, environ=environ, overrides={})
    assert loaded.config.server.port == 8000
    assert loaded.sources["server.port"] == "default"


def test_variables_of_others_are_left_alone() -> None:
    """A variable outside our sections (a service's own, a client's) is not ours to refuse."""
    environ = {"ANSER_DATA_DIR": "/d", "ANSER_SERVICE_HOST": "x", "ANSER_API_KEY": "k"}
    assert load(file=None, environ=environ, overrides={}).file is None


def test_a_wrong_option_is_refused_as_such() -> None:
    """A value from the command line is checked like any other."""
    with pytest.raises(ConfigError, match=r"command line: server\.port must be .* not 70000"):
        load(file=None, environ={"ANSER_DATA_DIR": "/d"}, overrides={"server.port": 70_000})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "localhost", "a-b.example.org."])
def test_hosts_of_every_form_are_taken(host: str) -> None:
    """IPv4, IPv6 and names are taken as the address to listen on."""
    given = {"server.host": host, "data_dir": "/d"}
    assert load(file=None, environ={}, overrides=given).config.server.host == host


def test_an_address_is_split_into_host_and_port() -> None:
    """Addresses are host:port; IPv6 stands in brackets."""
    assert split_address("localhost:1") == ("localhost", 1)
    assert split_address("[::1]:0") == ("::1", 0)


def test_a_model_may_have_times_of_its_own(tmp_path: Path) -> None:
    """What its entry says holds for that model alone; the rest is as for all, however given."""
    text = """
    [gateway]
    queue_timeout_s = 7
    model_timeouts = ["org/big:7b first_token=900 answer=0.5"]
    """
    settings = read(tmp_path, text, ANSER_GATEWAY_TOKEN_GAP_TIMEOUT_S="3").config.gateway
    big, other = settings.timeouts("org/big:7b"), settings.timeouts("org/big")
    assert (big.queue_s, big.first_token_s, big.token_gap_s, big.answer_s) == (7, 900, 3, 0.5)
    assert (other.queue_s, other.first_token_s, other.token_gap_s) == (7, 120, 3)
    assert other.answer_s == 3_600
    environ = {"ANSER_GATEWAY_MODEL_TIMEOUTS": "a gap=1, b gap=2"}
    found = load(file=None, environ=environ, overrides={}).config.gateway
    assert [found.timeouts(model).token_gap_s for model in "abc"] == [1, 2, 30]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("big qeue=9", '"big qeue=9" has no stage "qeue"; the stages are queue, first_token, gap,'),
        ("big gap=soon", '"big gap=soon": gap must be seconds from 0.1 to 86,400, like gap=60.'),
        ("big gap", '"big gap": gap must be seconds'),
        ("big gap=nan", "gap must be seconds"),
        ("big gap=0", "gap must be seconds"),
        ("big answer=86401", "answer must be seconds"),
        ("big gap=1 gap=2", "has gap twice; leave one out."),
        ("one answer=9", '"one answer=9" names one again; write one entry for it.'),
        ("big", '"big" must be a model and its stages, like "big queue=600 gap=90".'),
        ("gap=60 queue=9", "must be a model and its stages"),
        ("", '"" must be a model and its stages'),
        ("big " + "x" * 300, "has no stage"),
    ],
)
def test_wrong_times_of_a_model_are_refused_by_entry_and_cure(
    tmp_path: Path, entry: str, why: str
) -> None:
    """A wrong entry in the file is named, shortly, with what is wrong with it and what to do."""
    message = refusal(tmp_path, f'[gateway]\nmodel_timeouts = ["one gap=1", "{entry}"]')
    assert message.startswith(f"{tmp_path / 'anser.toml'}: gateway.model_timeouts: ")
    assert why in message
    assert len(message) < 600


def test_times_of_a_model_are_refused_by_variable_and_entry() -> None:
    """A wrong entry in the environment is named with the variable that it came from."""
    environ = {"ANSER_GATEWAY_MODEL_TIMEOUTS": "a gap=1, b gip=2"}
    with pytest.raises(ConfigError) as refused:
        load(file=None, environ=environ, overrides={})
    assert refused.value.message.startswith("ANSER_GATEWAY_MODEL_TIMEOUTS: gateway.model_timeouts")
    assert '"b gip=2"' in refused.value.message


def test_every_setting_says_what_it_takes() -> None:
    """Each setting has a unique path and variable, a sentence, and a range if it is a number."""
    all_of_them = list(settings())
    assert len({setting.path for setting in all_of_them}) == len(all_of_them)
    assert len({setting.environment for setting in all_of_them}) == len(all_of_them)
    for setting in all_of_them:
        assert setting.doc.endswith("."), setting.path
        assert setting.wanted, setting.path
        if type(setting.default) in (int, float):
            assert setting.low is not None, setting.path
            assert setting.high is not None, setting.path
            assert setting.low <= float(setting.default) <= setting.high, setting.path


def test_the_reference_states_defaults_and_meanings() -> None:
    """settings.md gives each setting's default, range or choices, and meaning, as the code has."""
    page = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"
    rows = {row.split("`")[1]: row for row in page.read_text("utf-8").splitlines() if "| `" in row}
    wrong: list[str] = []
    for setting in settings():
        row = rows[setting.path]
        said = [setting.doc, *setting.choices]
        if isinstance(setting.default, bool):
            said.append(f"`{str(setting.default).lower()}`")
        elif isinstance(setting.default, (int, float)):
            said.append(f"`{setting.default:.12g}`")
        elif isinstance(setting.default, str) and setting.default:
            said.append(f"`{setting.default}`")
        if setting.low is not None:
            said.append(f"{setting.low:,.12g} to {setting.high:,.12g}")
        said.append(f"| {'yes' if setting.live else 'no'} | {setting.doc} |")
        wrong += [f"{setting.path}: {part}" for part in said if part not in row]
    assert wrong == []
