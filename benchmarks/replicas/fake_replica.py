"""A replica's process whose model is the fake one: steps of a fixed time that need no processor.

    python -m benchmarks.replicas.fake_replica SOCKET STEP_MS

It says that it has the bundled checkpoint, so that a gateway speaks for it.
"""

import sys

from rillgate_server.cli.model_source import resolve_model
from rillgate_server.config.settings import load_settings
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.engine.testing import FakeExecutor, FakeModel
from rillgate_server.replica.serving import serve_engine

NUM_BLOCKS, BLOCK_SIZE_TOKENS, BLOCK_BYTES = 1024, 16, 1024


def main(socket: str, step_ms: str) -> int:
    """Serve until a signal; return the exit code."""
    settings = load_settings(None, {"replica": {"socket": socket, "min_step_ms": step_ms}})
    spec = read_model_spec(*resolve_model(settings.model))
    executor = FakeExecutor(NUM_BLOCKS, BLOCK_SIZE_TOKENS, FakeModel(spec.vocab_size))
    return serve_engine(settings, spec, CacheSizes(NUM_BLOCKS, BLOCK_BYTES, "float32"), executor)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
