"""A replica's process: load the model, size its cache, serve it; or be one rank of a split one.

Does not know who started it (a supervisor, torchrun or a person), nor how ranks work together
(worker.rank_executor and its neighbours do).
"""

import gc
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rillgate_server.config.settings import Settings
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.quantization import Quantization, resolve_quantization
from rillgate_server.core.release import release_of
from rillgate_server.core.step import StepLimits
from rillgate_server.core.step_codec import STEP_FORMAT
from rillgate_server.errors import RankLost, RillgateError
from rillgate_server.replica.cache_size import CacheDemand, choose_cache_sizes
from rillgate_server.replica.doors import check_doors
from rillgate_server.replica.progress import loading_progress
from rillgate_server.replica.rank_place import Place, find_place
from rillgate_server.replica.serving import EXIT_ENGINE_FAILED, serve_engine
from rillgate_server.service.log_events import configure_logging
from rillgate_server.worker.compute_device import (
    Device,
    FindFreeMemory,
    describe,
    find_device,
    free_memory,
)
from rillgate_server.worker.draft_model import check_draft_model
from rillgate_server.worker.host_cores import usable_cores
from rillgate_server.worker.rank_executor import RankExecutor
from rillgate_server.worker.rank_group import RankGroup
from rillgate_server.worker.rank_loop import run_rank
from rillgate_server.worker.rendezvous import RankPlace
from rillgate_server.worker.weight_bytes import WeightBytes
from rillgate_server.worker.worker import Worker, WorkerOptions, check_ranks, resolve_dtype

_RELEASES = ("rillgate", "torch", "transformers")
"""What must be the same on all ranks: others may compute, or talk to one another, otherwise."""

_log = logging.getLogger(__name__)


def run_replica(settings: Settings, model_dir: Path) -> int:
    """Serve the checkpoint of `model_dir` until SIGTERM or SIGINT; return the exit code.

    A rank other than 0 serves nothing and ends with rank 0. Raises ConfigError, CheckpointError or
    OutOfMemory when it cannot start.
    """
    configure_logging(settings.log.level)
    place = find_place(settings.replica, os.environ)
    if settings.speculation.draft_model:
        draft = read_model_spec(Path(settings.speculation.draft_model))
        check_draft_model(draft, read_model_spec(model_dir))
    if place.is_door:
        check_doors(settings.replica, settings.link)
    if place.ranks == 1:
        return _serve(settings, model_dir)
    try:
        return _run_split(settings, model_dir, place)
    except RankLost as error:
        print(f"rillgate: {error}", file=sys.stderr, flush=True)
        return _end_lost()


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A model that is loaded, with its cache."""

    executor: Worker | RankExecutor
    """What carries out plans; to be closed."""
    spec: ModelSpec
    """As it is served: named, with the context of the settings."""
    sizes: CacheSizes
    weights: WeightBytes
    """Of this process: of a split model, rank 0's."""


def load_whole(settings: Settings, model_dir: Path, device: Device) -> ReadyModel:
    """Load a model that is not split, and give it a cache."""
    worker = _load_worker(settings, model_dir, device)
    spec = _serving_spec(settings, worker.spec)
    find_free_memory = partial(free_memory, device, settings.replica.max_memory_bytes, 1)
    sizes = _allocate_cache(settings, spec, worker, find_free_memory)
    return ReadyModel(worker, spec, sizes, worker.weights)


def load_leader(
    settings: Settings, model_dir: Path, device: Device, group: RankGroup
) -> ReadyModel:
    """Load rank 0's part of a split model, wait for the others', and give all of it a cache."""
    own = _find_free_memory(settings, device, group)
    worker = _load_worker(settings, model_dir, device, group)
    executor = RankExecutor(worker, group)
    spec = _serving_spec(settings, worker.spec)
    sizes = _allocate_cache(settings, spec, executor, own)
    # A block of the model has parts on all ranks.
    sizes = replace(sizes, block_bytes=sizes.block_bytes * group.place.ranks)
    return ReadyModel(executor, spec, sizes, worker.weights)


def join_ranks(settings: Settings, model_dir: Path, place: Place, device: Device) -> RankGroup:
    """Meet the other ranks of a split model, which must have the same settings."""
    check_ranks(model_dir, place.ranks)
    return RankGroup.join(
        RankPlace(place.rank, place.ranks, place.host, place.port, place.agent_attempt),
        _facts(settings, model_dir, place.ranks, device) | {"device type": device.type},
        device,
    )


def _serve(settings: Settings, model_dir: Path) -> int:
    """Serve a model that is whole."""
    with _loading() as loading:
        ready = loading.submit(load_whole, settings, model_dir, find_device()).result()
    _freeze()
    try:
        return serve_engine(settings, ready.spec, ready.sizes, ready.executor)
    finally:
        ready.executor.close()


def _run_split(settings: Settings, model_dir: Path, place: Place) -> int:
    """Serve a split model as rank 0, or carry out its plans as another."""
    device = find_device(place.local_rank)
    group = join_ranks(settings, model_dir, place, device)
    try:
        run = _lead if place.rank == 0 else _follow
        return run(settings, model_dir, device, group)
    except RillgateError as error:
        if not isinstance(error, RankLost):
            group.refuse(str(error))
        raise


def _lead(settings: Settings, model_dir: Path, device: Device, group: RankGroup) -> int:
    with _loading() as loading:
        ready = loading.submit(load_leader, settings, model_dir, device, group).result()
    _freeze()
    executor = ready.executor
    assert isinstance(executor, RankExecutor)
    replica = replace(settings.replica, tensor_parallel_size=group.place.ranks)
    settings = settings.model_copy(update={"replica": replica})
    code = serve_engine(settings, ready.spec, ready.sizes, executor, executor.call_on_loss)
    if code == EXIT_ENGINE_FAILED:
        return _end_lost()
    executor.close()
    return code


def _follow(settings: Settings, model_dir: Path, device: Device, group: RankGroup) -> int:
    # Rank 0 ends this one, once its streams are done: a signal to both must not end it first.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with _loading() as loading:
        worker = loading.submit(_load_worker, settings, model_dir, device, group).result()
    _freeze()
    rank, ranks = group.place.rank, group.place.ranks
    run_rank(
        worker,
        group,
        _find_free_memory(settings, device, group),
        lambda: print(f"READY rank {rank} of {ranks}", flush=True),
    )
    return 0


def _find_free_memory(settings: Settings, device: Device, group: RankGroup) -> FindFreeMemory:
    return partial(free_memory, device, settings.replica.max_memory_bytes, group.num_local)


def _end_lost() -> int:
    """End the process now: a thread may be in a collective that never returns, and an orderly end
    would wait for it."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_ENGINE_FAILED)


def _facts(settings: Settings, model_dir: Path, ranks: int, device: Device) -> dict[str, str]:
    """Return what all ranks must agree on before they load anything."""
    spec = read_model_spec(model_dir)
    return {
        "ranks": str(ranks),
        "release": ", ".join(f"{name} {release_of(name)}" for name in _RELEASES),
        "step format": str(STEP_FORMAT),
        "model digest": spec.version_digest,
        "model.dtype": resolve_dtype(settings.model.dtype, spec.dtype, device.type),
        "model.quantization": resolve_quantization(
            Quantization.of(settings.model), model_dir
        ).version,
        "cache.kv_dtype": settings.cache.kv_dtype,
        "cache.block_size_tokens": str(settings.cache.block_size_tokens),
    }


def _loading() -> ThreadPoolExecutor:
    """Return a thread to load on, which ends: torch's helper threads belong to the thread that
    computes, and with those of a second one alive the OpenMP runtime counts more threads than cores
    and lets them sleep at every barrier (a decode step then takes 33 instead of 20 ms on two
    cores)."""
    return ThreadPoolExecutor(max_workers=1)


def _freeze() -> None:
    """Keep what is loaded out of the collector's walks, in the middle of a step and at the end,
    where one took a second for torch's and transformers' objects."""
    gc.freeze()


def _serving_spec(settings: Settings, spec: ModelSpec) -> ModelSpec:
    named = replace(spec, name=settings.model.name or spec.name)
    return named.with_context_of(settings.model.max_context_tokens)


def _load_worker(
    settings: Settings, model_dir: Path, device: Device, group: RankGroup | None = None
) -> Worker:
    started_s = time.monotonic()
    options = WorkerOptions(
        dtype=settings.model.dtype,
        num_threads=settings.replica.num_threads
        or max(1, usable_cores() // (1 if group is None else group.num_local)),
        block_size_tokens=settings.cache.block_size_tokens,
        kv_dtype=settings.cache.kv_dtype,
        device=device,
        quantization=settings.model.quantization,
        quantization_exclude=settings.model.quantization_exclude,
        quantization_include=settings.model.quantization_include,
        bnb_int8_threshold=settings.model.bnb_int8_threshold,
    )
    with loading_progress(sys.stdout, sys.stderr) as on_progress:
        worker = Worker.load(model_dir, options, on_progress, group)
    if settings.speculation.draft_model and (group is None or group.place.rank == 0):
        draft_dir = Path(settings.speculation.draft_model)
        worker.use_draft_model(Worker.load(draft_dir, replace(options, kv_dtype="auto")))
    where = describe(device)
    _log.info(
        "loaded %s in %.1f s; computing on %s", model_dir, time.monotonic() - started_s, where
    )
    return worker


def _allocate_cache(
    settings: Settings,
    spec: ModelSpec,
    worker: Worker | RankExecutor,
    find_free_memory: FindFreeMemory,
) -> CacheSizes:
    limits = StepLimits(
        settings.batcher.max_running,
        settings.batcher.max_step_tokens,
        spec.max_context_tokens,
        settings.replica.cuda_graphs,
    )
    sizes = choose_cache_sizes(
        settings.cache,
        worker.spare_memory(find_free_memory, limits),
        CacheDemand(
            spec.max_context_tokens,
            settings.batcher.max_running,
            settings.cache.block_size_tokens,
            worker.layout.block_bytes,
            worker.layout.kv_dtype,
            worker.draft_block_bytes,
        ),
    )
    worker.allocate_cache(
        sizes.num_device_blocks, sizes.num_host_blocks, settings.cache.audit, limits
    )
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
