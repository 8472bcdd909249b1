"""Settings: three sources in order, and errors that name field, value and limit."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from rillgate_server.config.groups import GatewayConfig
from rillgate_server.config.settings import Settings, bundled_model_dir, load_settings
from rillgate_server.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide whatever RILLGATE_ variables the machine has."""
    for name in ("RILLGATE_GATEWAY__LISTEN", "RILLGATE_MODEL__PATH"):
        monkeypatch.delenv(name, raising=False)


def test_flags_win_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source overrides single fields of the ones below it and leaves the rest."""
    file = tmp_path / "rillgate.toml"
    file.write_text("[batcher]\nmax_running = 3\nmax_step_tokens = 100\nmax_waiting_requests = 5\n")
    monkeypatch.setenv("RILLGATE_BATCHER__MAX_STEP_TOKENS", "200")
    monkeypatch.setenv("RILLGATE_BATCHER__MAX_WAITING_REQUESTS", "6")
    settings = load_settings(file, {"batcher": {"max_waiting_requests": "7"}})
    assert settings.batcher.max_running == 3
    assert settings.batcher.max_step_tokens == 200
    assert settings.batcher.max_waiting_requests == 7
    assert settings.batcher.max_prefill_chunk_tokens == 512


@pytest.mark.parametrize(
    ("group", "field", "value", "says"),
    [
        ("batcher", "max_running", "0", "batcher.max_running is 0; allowed: 1 to 4096"),
        ("batcher", "max_running", "many", "batcher.max_running is 'many'; allowed: "),
        ("cache", "block_size_tokens", "1000", "cache.block_size_tokens is 1000; allowed: 1 to"),
        ("gateway", "listen", "nowhere", "gateway.listen is 'nowhere'; allowed: HOST:PORT"),
        ("gateway", "listen", "host:99999", "gateway.listen is 'host:99999'; allowed: HOST:PORT"),
        ("gateway", "keepalive_s", "nan", "gateway.keepalive_s is nan; allowed: 0.1 to 7200"),
        (
            "model",
            "dtype",
            "int3",
            "model.dtype is 'int3'; allowed: auto, bfloat16, float16, float32",
        ),
        ("speculation", "method", "wild", "speculation.method is 'wild'; allowed: off, prompt-"),
        ("speculation", "method", "draft-model", "without speculation.draft_model; allowed: a"),
        ("speculation", "max_draft_tokens", "0", "speculation.max_draft_tokens is 0; allowed: 1"),
        ("gateway", "listn", "a:1", "gateway.listn is no setting; allowed: listen, max_message"),
        ("gatway", "listen", "a:1", "gatway is no setting; allowed: model, batcher, cache, spec"),
    ],
)
def test_a_bad_value_is_refused_by_name(group: str, field: str, value: str, says: str) -> None:
    """The error names the field, the value and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides={group: {field: value}})
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["RILLGATE_GATWAY__LISTEN", "RILLGATE_GATEWAY__LISTN"])
def test_an_unknown_variable_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable is an error, not silence."""
    monkeypatch.setenv(name, "127.0.0.1:1")
    with pytest.raises(ConfigError, match="no setting; allowed: "):
        load_settings()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[gateway]\nlisten = ", "is not TOML"),
        ("[gateway]\nlistn = 'a:1'", "gateway.listn is no setting"),
        ("[batcher]\nmax_running = 1.5", "batcher.max_running is '1.5'; allowed: "),
        ("listen = 'a:1'", "listen is no setting; allowed: model, batcher"),
    ],
)
def test_a_bad_file_is_refused(content: str, says: str, tmp_path: Path) -> None:
    """Syntax, unknown names and wrong types in the file each give a precise error."""
    file = tmp_path / "rillgate.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_settings(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A file that was named must be there."""
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path / "nothing.toml")


def test_settings_pass_through_the_environment_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process that reads `to_environment` has the same settings."""
    settings = load_settings(
        overrides={
            "model": {"path": "/somewhere/a model", "dtype": "float32"},
            "cache": {"prefix_caching": "false", "device_memory": "1MiB"},
            "gateway": {"keepalive_s": "0.25", "shared_prefixes": '["a b.txt", "c,d.txt"]'},
        }
    )
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings().model_dump() == settings.model_dump()


def test_a_list_is_toml_in_the_file_and_json_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three sources give the same tuple of texts."""
    file = tmp_path / "rillgate.toml"
    file.write_text('[gateway]\nshared_prefixes = ["a.txt", "b.txt"]\n')
    assert load_settings(file).gateway.shared_prefixes == ("a.txt", "b.txt")
    monkeypatch.setenv("RILLGATE_GATEWAY__SHARED_PREFIXES", '["c.txt"]')
    assert load_settings(file).gateway.shared_prefixes == ("c.txt",)
    flags = {"gateway": {"shared_prefixes": "[]"}}
    assert load_settings(file, flags).gateway.shared_prefixes == ()


@pytest.mark.parametrize("value", ["a.txt", "{}", '{"a": 1}', "[[]]", "3"])
def test_what_is_no_list_of_texts_is_refused(value: str) -> None:
    """A path alone is not taken for a list of one."""
    with pytest.raises(ConfigError, match=r"gateway\.shared_prefixes"):
        load_settings(overrides={"gateway": {"shared_prefixes": value}})


@pytest.mark.parametrize("secret", ["a short secret", "long" * 300])
def test_a_secret_out_of_its_limits_is_refused_and_not_shown(secret: str) -> None:
    """The error tells its length alone."""
    with pytest.raises(ConfigError, match="allowed: none, or 16 to 1024") as caught:
        load_settings(overrides={"gateway": {"cluster_secret": secret}})
    assert secret not in str(caught.value)


def test_a_group_in_one_variable_that_is_no_json_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one line like every other mistake, and without its text."""
    monkeypatch.setenv("RILLGATE_GATEWAY", '{"cluster_secret": "0123456789abcdef')
    with pytest.raises(ConfigError, match="gateway") as caught:
        load_settings()
    assert "0123456789abcdef" not in str(caught.value)


def test_a_secret_that_is_no_text_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes in the environment are an easy mistake."""
    monkeypatch.setenv("RILLGATE_GATEWAY__CLUSTER_SECRET", "0123456789abcdef\udcff")
    with pytest.raises(ConfigError, match=r"gateway\.cluster_secret is no UTF-8 text") as caught:
        load_settings()
    assert "0123456789abcdef" not in str(caught.value)
    assert "udcff" not in str(caught.value)


def test_the_error_of_a_whole_group_does_not_show_its_values() -> None:
    """Another of its fields may be a secret."""
    with pytest.raises(ConfigError, match="model cannot be used; allowed: ") as caught:
        load_settings(overrides={"model": {"name": "\udcff", "path": "beside it"}})
    assert "beside it" not in str(caught.value)


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    """Nor is one in what settings show of themselves."""
    file = tmp_path / "rillgate.toml"
    file.write_text("[gateway]\ncluster_secret = ['0123456789abcdef']\n")
    with pytest.raises(ConfigError, match=r"gateway\.cluster_secret cannot be used") as caught:
        load_settings(file)
    assert "0123456789abcdef" not in str(caught.value)
    settings = load_settings(overrides={"gateway": {"cluster_secret": "0123456789abcdef"}})
    assert "0123456789abcdef" not in repr(settings)


def test_there_are_at_most_sixty_fields() -> None:
    """Options are kept few: adding one needs the reason a default cannot do."""
    assert 0 < len(Settings().to_environment()) <= 60


def test_settings_are_frozen() -> None:
    """Nothing changes settings after they are read."""
    settings = load_settings()
    with pytest.raises(Exception, match="frozen"):
        settings.gateway = GatewayConfig()


def test_the_bundled_model_is_found_in_a_checkout() -> None:
    """Without --model, the model that ships with Rillgate is served."""
    assert (bundled_model_dir() / "tokenizer.json").is_file()


def test_every_setting_is_documented_with_its_default() -> None:
    """docs/configuration.md has a row per field, and no row for a field that is gone."""
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \| (\S+) \|", text, re.MULTILINE))
    defaults = {
        f"{group}.{field}": value
        for group, info in Settings.model_fields.items()
        for field, value in asdict(info.default).items()
    }
    assert rows.keys() == defaults.keys()
    for name, value in defaults.items():
        written = str(value).lower() if isinstance(value, bool) else str(value)
        assert rows[name] == ("unset" if value in ("", None, ()) else f"`{written}`"), name
