"""Which settings the rows of one evaluation have."""

import pytest

from rillgate_server.cli.evaluate.variants import read_variants
from rillgate_server.config.groups import QUANTIZATIONS
from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError


def test_a_row_says_what_differs_from_the_other_settings() -> None:
    """Words are joined by +, and what no word speaks of stays as it is."""
    given = Settings().model_copy(update={})
    rows = read_variants(given, "none, float32,int8+int8-cache")
    found = [(it.model.quantization, it.model.dtype, it.cache.kv_dtype) for it in rows]
    assert found == [
        ("none", "auto", "auto"),
        ("none", "float32", "auto"),
        ("int8", "auto", "int8"),
    ]
    assert all(it.batcher == given.batcher for it in rows)
    assert read_variants(given, None) == [given]


def test_every_quantisation_can_be_a_row() -> None:
    """Those that are still to come, too."""
    rows = read_variants(Settings(), ",".join(QUANTIZATIONS))
    assert [row.model.quantization for row in rows] == list(QUANTIZATIONS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int9", "--compare has 'int9'; allowed: rows by commas, each of words joined by +, of "),
        ("none,", "--compare has ''; allowed: rows by commas"),
        ("none+int8", "--compare has 'none' and 'int8' in the row 'none+int8'; allowed: one of"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    """The word and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        read_variants(Settings(), text)
    assert str(caught.value).startswith(says)
