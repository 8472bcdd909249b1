"""The settings that one evaluation compares: a row of its table each.

    --compare none,float32,int8,int8+int8-cache      rows by commas, words of a row by `+`

Owns the words. What is not said of a row is as the other flags and settings say.
"""

from dataclasses import replace

from rillgate_server.config.groups import QUANTIZATIONS
from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError

_WORDS: dict[str, tuple[str, str, str]] = {
    # word -> (group, field, value)
    **{name: ("model", "quantization", name) for name in QUANTIZATIONS},
    **{name: ("model", "dtype", name) for name in ("bfloat16", "float32")},
    "int8-cache": ("cache", "kv_dtype", "int8"),
}


def read_variants(settings: Settings, text: str | None) -> list[Settings]:
    """Return the settings of each row; without a text, those alone that are given."""
    if text is None:
        return [settings]
    return [_variant(settings, row.strip()) for row in text.split(",")]


def _variant(settings: Settings, row: str) -> Settings:
    said: dict[tuple[str, str], str] = {}  # (group, field) -> word
    for word in row.split("+"):
        if word not in _WORDS:
            raise ConfigError(
                f"--compare has {word!r}; allowed: rows by commas, each of words joined by +, of "
                + ", ".join(_WORDS)
            )
        group, field, value = _WORDS[word]
        if (group, field) in said:
            raise ConfigError(
                f"--compare has {said[group, field]!r} and {word!r} in the row {row!r}; allowed: "
                "one of them"
            )
        said[group, field] = word
        changed = replace(getattr(settings, group), **{field: value})
        settings = settings.model_copy(update={group: changed})
    return settings
