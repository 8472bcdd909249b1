"""A replica's process as `rillgate replica` starts one, with a fake executor in the model's place.

    python -m tests.gateway.fake_replica SETTINGS        SETTINGS: groups of fields as JSON

Its tokens are those that tests.gateway.stack's gateway expects of the bundled model.
"""

import json
import sys

from rillgate_server.config.settings import bundled_model_dir, load_settings
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.engine.testing import FakeExecutor, FakeModel
from rillgate_server.replica.serving import serve_engine

_NUM_BLOCKS = 512


def main() -> int:
    """Serve until a signal; return the exit code."""
    settings = load_settings(None, json.loads(sys.argv[1]))
    spec = read_model_spec(bundled_model_dir(), needs_tokenizer=True)
    executor = FakeExecutor(
        _NUM_BLOCKS, settings.cache.block_size_tokens, FakeModel(spec.vocab_size)
    )
    return serve_engine(settings, spec, CacheSizes(_NUM_BLOCKS, 1024, spec.dtype), executor)


if __name__ == "__main__":
    sys.exit(main())
