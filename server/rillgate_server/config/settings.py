"""Where settings come from: a TOML file, the environment and flags, the later ones winning.

    defaults < FILE ([group] field = value) < RILLGATE_GROUP__FIELD < flags

Owns the reading and its errors. The groups, their fields and limits are config.groups'; what a
setting does is the business of whoever takes the group as an argument.
"""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from rillgate_server.config.groups import (
    BatcherConfig,
    CacheConfig,
    GatewayConfig,
    LinkConfig,
    LogConfig,
    ModelConfig,
    ReplicaConfig,
    ServeConfig,
    SpeculationConfig,
)
from rillgate_server.errors import ConfigError

ENVIRONMENT_PREFIX = "RILLGATE_"
_DELIMITER = "__"
_SECRETS = frozenset({"gateway.cluster_secret", "link.token"})


class Settings(BaseSettings):
    """All settings of a server; frozen."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter=_DELIMITER,
        coerce_numbers_to_str=True,  # cache.device_memory = 0.4
    )

    model: ModelConfig = ModelConfig()
    """Which checkpoint."""
    batcher: BatcherConfig = BatcherConfig()
    """What a step may hold, what may wait."""
    cache: CacheConfig = CacheConfig()
    """The key/value cache."""
    speculation: SpeculationConfig = SpeculationConfig()
    """Tokens that are tried ahead."""
    gateway: GatewayConfig = GatewayConfig()
    """The public door."""
    replica: ReplicaConfig = ReplicaConfig()
    """The replica's process."""
    link: LinkConfig = LinkConfig()
    """Between gateway and replicas."""
    serve: ServeConfig = ServeConfig()
    """What `rillgate serve` starts."""
    log: LogConfig = LogConfig()
    """What is written to stderr."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_lists(cls, group: Any, info: ValidationInfo) -> Any:  # Any: what a source gave
        """Read the lists that environment and flags give as JSON."""
        default = cls.model_fields[str(info.field_name)].default
        if not (isinstance(group, dict) and is_dataclass(default)):
            return group
        lists = {it.name for it in fields(default) if isinstance(it.default, tuple)}
        return {
            name: _json_list(value) if name in lists and isinstance(value, str) else value
            for name, value in group.items()
        }

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take flags, environment and file; never a .env that happens to lie about."""
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))

    def to_environment(self) -> dict[str, str]:
        """Return every setting as environment variables, for a child process to read back."""
        return {
            f"{ENVIRONMENT_PREFIX}{group}{_DELIMITER}{field}".upper(): (
                json.dumps(value) if isinstance(value, tuple) else str(value)
            )
            for group in type(self).model_fields
            for field, value in asdict(getattr(self, group)).items()
            if value is not None
        }


def load_settings(
    config_file: Path | None = None, overrides: Mapping[str, Mapping[str, str]] | None = None
) -> Settings:
    """Read all sources; `overrides` are the flags: group -> field -> text.

    Raises ConfigError that names field, value and what is allowed.
    """
    _refuse_unknown_groups(os.environ)
    if config_file is not None:
        _check_toml(config_file)

    class FileSettings(Settings):
        """The settings with this call's file among their sources."""

        model_config = SettingsConfigDict(toml_file=config_file)

    # Any: pydantic takes the flags' texts and turns them into the fields' types.
    flags: dict[str, Any] = {group: dict(given) for group, given in (overrides or {}).items()}
    try:
        return FileSettings(**flags)
    except ValidationError as error:
        raise ConfigError("; ".join(map(_message, error.errors()))) from error
    except SettingsError as error:  # a group in one variable that is no JSON
        raise ConfigError(str(error)) from error


def bundled_model_dir() -> Path:
    """Return where the bundled model lies: inside an installed wheel, or in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "bundled_models" / "demo", package.parents[1] / "models" / "demo")
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise ConfigError(
        f"the bundled model is not there (looked in {' and '.join(map(str, candidates))}); "
        f"name one with --model"
    )


def _json_list(text: str) -> object:
    """Return the list that a text spells, or the text itself, which is then refused by name."""
    try:
        value: object = json.loads(text) if text else []
    except ValueError:
        return text
    return value if isinstance(value, list) else text


def _message(error: ErrorDetails) -> str:
    """Say field, value and what is allowed in one line; of a secret or a group, not the value."""
    field = ".".join(map(str, error["loc"]))
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{field} is no setting; allowed: {_names_beside(error['loc'])}"
    if error["type"] == "tuple_type":
        return f"{field} is {str(error['input'])[:200]!r}; allowed: a JSON list of texts"
    if field in _SECRETS or isinstance(error["input"], dict):  # a group may hold one
        return f"{field} cannot be used; allowed: {error['msg']}"
    return f"{field} is {str(error['input'])[:200]!r}; allowed: {error['msg']}"


def _names_beside(location: tuple[int | str, ...]) -> str:
    """List the names that stand where an unknown one was given."""
    groups = {name: info.default for name, info in Settings.model_fields.items()}
    group = groups.get(str(location[0])) if len(location) > 1 else None
    return ", ".join(asdict(group) if group is not None else groups)


def _refuse_unknown_groups(environment: Mapping[str, str]) -> None:
    """Refuse RILLGATE_<unknown group>__FIELD, which pydantic-settings passes over in silence."""
    for name in environment:
        group, delimiter, _ = name.removeprefix(ENVIRONMENT_PREFIX).partition(_DELIMITER)
        is_setting = name.startswith(ENVIRONMENT_PREFIX) and delimiter
        if is_setting and group.lower() not in Settings.model_fields:
            raise ConfigError(
                f"{name} is no setting; allowed: {ENVIRONMENT_PREFIX}GROUP{_DELIMITER}FIELD "
                f"with a group of {', '.join(Settings.model_fields)}"
            )


def _check_toml(path: Path) -> None:
    """Raise ConfigError for a file that is not there (pydantic-settings ignores it) or no TOML."""
    try:
        with path.open("rb") as file:
            tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
