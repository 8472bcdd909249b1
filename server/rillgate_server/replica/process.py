"""A replica's process: load the model, size its cache, serve it.

Does not know who started it (a supervisor or a person).
"""

import gc
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rillgate_server.config.settings import Settings
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.replica.cache_size import CacheDemand, FreeMemory, choose_cache_sizes
from rillgate_server.replica.doors import check_doors
from rillgate_server.replica.progress import loading_progress
from rillgate_server.replica.serving import serve_engine
from rillgate_server.service.log_events import configure_logging
from rillgate_server.worker.host_memory import spare_bytes
from rillgate_server.worker.worker import Worker, WorkerOptions

_log = logging.getLogger(__name__)


def run_replica(settings: Settings, model_dir: Path) -> int:
    """Serve the checkpoint of `model_dir` until SIGTERM or SIGINT; return the exit code.

    Raises ConfigError, CheckpointError or OutOfMemory when it cannot start.
    """
    configure_logging(settings.log.level)
    check_doors(settings.replica, settings.link)
    # On a thread that ends: torch's helper threads belong to the thread that computes, and with
    # those of a second one alive the OpenMP runtime counts more threads than cores and lets them
    # sleep at every barrier (a decode step then takes 33 instead of 20 ms on two cores).
    with ThreadPoolExecutor(max_workers=1) as loading:
        worker = loading.submit(_load_worker, settings, model_dir).result()
        spec = replace(worker.spec, name=settings.model.name or worker.spec.name).with_context_of(
            settings.model.max_context_tokens
        )
        sizes = loading.submit(_allocate_cache, settings, spec, worker).result()
    # What is loaded stays: the collector need not walk it in the middle of a step, nor at the end,
    # where it took a second for torch's and transformers' objects.
    gc.freeze()
    try:
        return serve_engine(settings, spec, sizes, worker)
    finally:
        worker.close()


def _load_worker(settings: Settings, model_dir: Path) -> Worker:
    started_s = time.monotonic()
    options = WorkerOptions(
        dtype=settings.model.dtype,
        num_threads=settings.replica.num_threads or len(os.sched_getaffinity(0)),
        block_size_tokens=settings.cache.block_size_tokens,
        kv_dtype=settings.cache.kv_dtype,
    )
    with loading_progress(sys.stdout, sys.stderr) as on_progress:
        worker = Worker.load(model_dir, options, on_progress)
    _log.info("loaded %s in %.1f s", model_dir, time.monotonic() - started_s)
    return worker


def _allocate_cache(settings: Settings, spec: ModelSpec, worker: Worker) -> CacheSizes:
    free_bytes = spare_bytes(settings.replica.max_memory_bytes)
    sizes = choose_cache_sizes(
        settings.cache,
        FreeMemory(free_bytes, free_bytes, is_shared=True),  # the worker computes on CPUs
        CacheDemand(
            spec.max_context_tokens,
            settings.batcher.max_running,
            settings.cache.block_size_tokens,
            worker.layout.block_bytes,
            worker.layout.kv_dtype,
        ),
    )
    worker.allocate_cache(sizes.num_device_blocks, sizes.num_host_blocks, settings.cache.audit)
    for tier, num_blocks in (("device", sizes.num_device_blocks), ("host", sizes.num_host_blocks)):
        _log.info(
            "the cache's %s tier has %d blocks of %d tokens, %.1f MiB in %s",
            tier,
            num_blocks,
            settings.cache.block_size_tokens,
            num_blocks * sizes.block_bytes / 2**20,
            sizes.kv_dtype,
        )
    return replace(sizes, num_pageable_host_blocks=worker.num_pageable_host_blocks)
