"""Where a checkpoint comes from: a directory, the hub, or the package itself.

Owns the finding and the fetching. Whether what was found can be served is core.checkpoint's.
"""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from rillgate_server.config.groups import ModelConfig
from rillgate_server.config.settings import bundled_model_dir
from rillgate_server.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NEEDED_FILES = ("*.safetensors", "*.json", "*.jinja")


def resolve_model(config: ModelConfig) -> tuple[Path, str]:
    """Return the checkpoint's directory and the name that callers ask for.

    Fetches a hub id that is no directory here; raises CheckpointError when that fails.
    """
    if not config.path:
        model_dir = bundled_model_dir()
        return model_dir, config.name or model_dir.name
    model_dir = Path(config.path).expanduser()
    if model_dir.is_dir():
        return model_dir.resolve(), config.name or model_dir.resolve().name
    if _HUB_ID.fullmatch(config.path):
        return _fetch(config.path), config.name or config.path.rpartition("/")[2]
    raise CheckpointError(
        f"model.path is {config.path!r}; allowed: a checkpoint's directory, or a hub id owner/name"
    )


def _fetch(hub_id: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_NEEDED_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id!r} is no directory here, and the hub did not give it "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
