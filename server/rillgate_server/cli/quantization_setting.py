"""Settles `model.quantization = auto` before anything starts, so that all that is started agrees.

Owns the process that measures (torch stays out of this one) and what the operator reads.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from rillgate_server.config.groups import AUTO_QUANTIZATION
from rillgate_server.config.settings import Settings
from rillgate_server.core.checkpoint import read_config
from rillgate_server.core.model_spec import NO_QUANTIZATION
from rillgate_server.core.quantization_choice import Choice, describe_machine, recall_or_choose
from rillgate_server.errors import ConfigError
from rillgate_server.worker.host_cores import usable_cores

_MEASURE = (sys.executable, "-m", "rillgate_server.worker.quantization.auto")


def settle_quantization(settings: Settings, model_dir: Path) -> Settings:
    """Return the settings with a method in place of auto; raises ConfigError."""
    if settings.model.quantization != AUTO_QUANTIZATION:
        return settings
    if read_config(model_dir).get("quantization_config"):
        return _with_method(settings, NO_QUANTIZATION)  # as it is stored
    num_processes = settings.serve.num_replicas * settings.replica.tensor_parallel_size
    num_threads = max(1, usable_cores() // max(1, num_processes))

    def measure() -> Choice:
        _say("model.quantization is auto: measuring none and int8 (once for model and machine)")
        command = (*_MEASURE, str(model_dir), settings.model.dtype, str(num_threads))
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError(
                "model.quantization is auto, and measuring failed (above); allowed: another "
                "model.quantization"
            )
        return Choice(**json.loads(done.stdout.splitlines()[-1]))

    machine = describe_machine(num_cores=num_threads)
    choice, path, _ = recall_or_choose(model_dir, f"{machine}; {settings.model.dtype}", measure)
    _say(f"model.quantization is auto: {choice.quantization}, for {choice.why} (kept in {path})")
    return _with_method(settings, choice.quantization)


def _with_method(settings: Settings, method: str) -> Settings:
    model = replace(settings.model, quantization=method)
    return settings.model_copy(update={"model": model})


def _say(message: str) -> None:
    print(f"rillgate: {message}", file=sys.stderr, flush=True)
