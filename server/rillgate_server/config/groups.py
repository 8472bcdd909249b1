"""The groups of settings: frozen, plain, each field with unit, range and what raising it does.

Standard library only, so that the pure packages can take a group as an argument. Where values
come from (TOML, environment, flags) is config.settings' business.
"""

from dataclasses import dataclass, field

from rillgate_server.config.checks import check, check_address, check_choice, check_secret
from rillgate_server.config.memory_size import parse_memory_size
from rillgate_server.errors import ConfigError

MAX_MODEL_NAME_BYTES = 256
"""Of a model's name, in settings and requests."""
MAX_SOCKET_PATH_BYTES = 100
"""Of a Unix socket's path."""
MAX_REPLICA_NAME_BYTES = 128
"""Of a replica's name."""
SPECULATION_METHODS = ("off", "prompt-lookup", "draft-model", "auto")
QUANTIZATIONS = ("none", "int8", "bnb-int8", "bnb-nf4")
AUTO_QUANTIZATION = "auto"
ALSO_QUANTIZED = ("embeddings", "head")
ROUTING_POLICIES = ("prefix", "least-load", "round-robin", "weighted-least-connections")


@dataclass(frozen=True, slots=True)
class BatcherConfig:
    """What a step may hold and how much may wait."""

    max_step_tokens: int = 2048
    """Tokens computed in one step, 1 to 1,048,576. Higher: faster prefill, longer gaps between the
    tokens of running streams."""
    max_prefill_chunk_tokens: int = 512
    """Prefill tokens in a step that also decodes, 1 to max_step_tokens. Higher: the same."""
    max_running: int = 64
    """Choices that run at once, 1 to 4096. Higher: more throughput, slower tokens for each."""
    max_waiting_requests: int = 1024
    """Requests in the queue. Higher: fewer refusals, longer waits."""
    max_waiting_tokens: int = 1_048_576
    """Prompt tokens in the queue. Higher: the same."""
    max_queue_delay_ms: float = 0.0
    """Wait of an idle replica for `preferred_batch_size` requests, 0 to 10,000 ms; 0: none. Higher:
    fuller first steps, later first tokens."""
    preferred_batch_size: int = 8
    """Waiting choices at which an idle replica begins at once, 1 to 4096; counts only with a
    `max_queue_delay_ms`. Higher: the same."""
    aging_s: float = 30.0
    """Time without a start after which a waiting priority class counts as one class higher, for one
    choice, 0.1 to 86,400 s. Higher: a stricter order of classes, longer waits for the lowest."""

    max_plans_in_flight: int = 2
    """Steps that the device may have at a time, 1 or 2. With 2 the next one is formed while it
    computes, so it does not idle between them. A CPU has one at a time, and so has a replica of
    several ranks. Higher: shorter gaps between tokens; who comes starts up to a step later, and a
    choice that ends on a stop token is computed for one step in vain."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        check("batcher.max_step_tokens", self.max_step_tokens, 1, 1 << 20)
        check("batcher.max_prefill_chunk_tokens", self.max_prefill_chunk_tokens, 1, 1 << 20)
        check("batcher.max_running", self.max_running, 1, 4096)
        check("batcher.max_waiting_requests", self.max_waiting_requests, 1, 1 << 20)
        check("batcher.max_waiting_tokens", self.max_waiting_tokens, 1, 1 << 40)
        check("batcher.max_queue_delay_ms", self.max_queue_delay_ms, 0, 10_000)
        check("batcher.preferred_batch_size", self.preferred_batch_size, 1, 4096)
        check("batcher.aging_s", self.aging_s, 0.1, 86_400)
        check("batcher.max_plans_in_flight", self.max_plans_in_flight, 1, 2)
        if self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"batcher.max_step_tokens is {self.max_step_tokens}; allowed: at least "
                f"batcher.max_running, {self.max_running} (each running choice takes one token)"
            )


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """Tokens that a step tries before they are drawn. They never change an answer."""

    method: str = "off"
    """Where drafts come from, unless a request says it: off, prompt-lookup (what followed the same
    tokens earlier in the prompt or the answer), draft-model, or auto (either, where it pays)."""
    max_draft_tokens: int = 5
    """Most drafts of a choice in one step, 1 to 32. Higher: longer leaps where text repeats itself,
    more work in vain where it does not."""
    draft_model: str = ""
    """A small checkpoint's directory, with the same vocabulary, that makes drafts; empty: none."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        check_choice("speculation.method", self.method, SPECULATION_METHODS)
        check("speculation.max_draft_tokens", self.max_draft_tokens, 1, 32)
        if self.method == "draft-model" and not self.draft_model:
            raise ConfigError(
                "speculation.method is 'draft-model' without speculation.draft_model; allowed: a "
                "checkpoint's directory there, or another method"
            )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The key/value cache's two tiers."""

    device_memory: str = "auto"
    """Of the device tier: bytes (`8589934592`, `8GiB`, `500MB`; 64 KiB to 1 PiB), a fraction of the
    free memory (`0.4`), or auto: half of what is free, but no more than the running batch can
    use."""
    host_memory: str = "auto"
    """Of the host tier, like the device tier's; 0: no host tier; auto: on GPU machines half of the
    free memory, elsewhere none (both tiers would be the same memory). None where nothing would be
    loaded from it (no prefix caching, or load_policy recompute)."""
    kv_dtype: str = "auto"
    """Of cached keys and values: auto (the model's) or int8 (with a scale per token and head: half
    the memory of bfloat16, slightly different answers)."""
    load_policy: str = "auto"
    """What is done with a hit in the host tier: auto (load the part that is predicted to be faster
    than computing it), load (always all of it) or recompute (never)."""
    audit: bool = False
    """Checksums every block on its way to the host tier and back, and computes anew what does not
    match. Costs about a tenth of a second per 100 MB copied."""
    block_size_tokens: int = 16
    """Tokens per block, 1 to 256. Higher: less bookkeeping, coarser prefix hits."""
    prefix_caching: bool = True
    """Keeps full blocks for later requests with the same beginning."""

    @property
    def uses_host_tier(self) -> bool:
        """Whether anything would ever be read from a host tier."""
        return self.prefix_caching and self.load_policy != "recompute"

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        parse_memory_size("cache.device_memory", self.device_memory, may_be_zero=False)
        parse_memory_size("cache.host_memory", self.host_memory, may_be_zero=True)
        check("cache.block_size_tokens", self.block_size_tokens, 1, 256)
        check_choice("cache.kv_dtype", self.kv_dtype, ("auto", "int8"))
        check_choice("cache.load_policy", self.load_policy, ("auto", "load", "recompute"))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which checkpoint is served, and how its weights are held."""

    path: str = ""
    """A checkpoint's directory, or a hub id (`owner/name`); empty: the bundled model."""
    name: str = ""
    """What callers ask for, at most 256 bytes; empty: the directory's name."""
    dtype: str = "auto"
    """Of weights and computation: auto (the checkpoint's own), bfloat16, float32, or, on GPUs,
    float16."""
    quantization: str = "none"
    """Of the layers' weights: none, int8 (half of bfloat16's memory), by bitsandbytes bnb-int8 (the
    same, slower) or bnb-nf4 (0.28 of it), or auto (none or int8, what is faster here, measured once
    for machine and model). All replicas and gateways of a model must have the same."""
    quantization_exclude: tuple[str, ...] = ()
    """Layers that stay as they are, by patterns of their names: `*.down_proj`, `model.layers.0.*`
    (in the environment and in flags a JSON list). Each must match a layer. All replicas and
    gateways of a model must have the same."""
    quantization_include: tuple[str, ...] = ()
    """What else is quantised: `embeddings`, `head` (in the environment and in flags a JSON list);
    where both are one tensor, either means both. All replicas and gateways of a model must have the
    same."""
    bnb_int8_threshold: float = 6.0
    """Of bnb-int8: activations beyond it, 0 to 1000, are computed in 16 bits; 0: none is. Lower:
    nearer to the exact weights, and slower. All replicas and gateways of a model must have the
    same."""
    max_context_tokens: int = 0
    """Prompt and answer together, 0 to 16,777,216; 0: the checkpoint's own, which is also the most.
    Higher: longer conversations, and a larger cache at least: each tier must hold one of them."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        check_choice("model.dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        check_choice("model.quantization", self.quantization, (*QUANTIZATIONS, AUTO_QUANTIZATION))
        for name in self.quantization_include:
            check_choice("model.quantization_include", name, ALSO_QUANTIZED)
        if self.quantization_include and self.quantization.startswith("bnb-"):
            raise ConfigError(
                f"model.quantization_include is {list(self.quantization_include)}, and "
                f"model.quantization is {self.quantization}; allowed: none of it, or "
                "model.quantization int8"
            )
        check("model.bnb_int8_threshold", self.bnb_int8_threshold, 0, 1000)
        for field_name in ("quantization_exclude", "quantization_include"):
            if getattr(self, field_name) and self.quantization in ("none", AUTO_QUANTIZATION):
                raise ConfigError(
                    f"model.{field_name} is {list(getattr(self, field_name))}, and "
                    f"model.quantization is {self.quantization}; allowed: none of it, or another "
                    f"model.quantization ({', '.join(QUANTIZATIONS[1:])})"
                )
        check("model.max_context_tokens", self.max_context_tokens, 0, 1 << 24)
        if len(self.name.encode()) > MAX_MODEL_NAME_BYTES or "@" in self.name:
            raise ConfigError(
                f"model.name is {self.name[:100]!r}; allowed: at most {MAX_MODEL_NAME_BYTES} "
                f"bytes, without '@'"
            )


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The public door."""

    listen: str = "127.0.0.1:50051"
    """HOST:PORT; port 0 takes a free one, host 0.0.0.0 or [::] takes calls from everywhere."""
    max_message_bytes: int = 4 << 20
    """Largest request, 1 KiB to 1 GiB. Higher: longer prompts, more memory per call."""
    keepalive_s: float = 10.0
    """Silence after which a caller is pinged, 0.1 to 7200 s. Higher: a caller that vanished
    without a word holds its blocks for longer."""
    keepalive_timeout_s: float = 5.0
    """Wait for the ping's answer, 0.1 to 600 s. Higher: the same."""
    drain_grace_s: float = 30.0
    """Time that running streams have to finish after SIGTERM, 0 to 86400 s."""
    cluster_secret: str = field(default="", repr=False)
    """Keys the salts that keep tenants' cached blocks apart: 16 to 1024 bytes, from the file or the
    environment rather than a flag, which others can read; empty: `rillgate serve` makes one at its
    start. Several gateways before the same replicas must share one."""
    shared_prefixes: tuple[str, ...] = ()
    """Paths of text files, each a system message whose cached blocks all tenants share; with a chat
    template that prints the date, until the next day (in the environment and in flags a JSON
    list)."""
    replica_addresses: tuple[str, ...] = ()
    """Where replicas listen: `host:port` (a name may have many addresses, which are looked up again
    and again), `unix:PATH`, or `file:PATH` with an address per line, read again when it changes
    (in the environment and in flags a JSON list); empty: those that `rillgate serve` starts."""
    routing_policy: str = "prefix"
    """Who gets a request: prefix (the longest cached beginning, then the least load), least-load,
    round-robin, or weighted-least-connections."""
    failover_wait_s: float = 30.0
    """Time that a stream whose replica was lost waits for another one, 0 to 86,400 s. Higher:
    longer pauses instead of errors."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        check_address("gateway.listen", self.listen)
        check("gateway.max_message_bytes", self.max_message_bytes, 1 << 10, 1 << 30)
        check("gateway.keepalive_s", self.keepalive_s, 0.1, 7200)
        check("gateway.keepalive_timeout_s", self.keepalive_timeout_s, 0.1, 600)
        check("gateway.drain_grace_s", self.drain_grace_s, 0, 86400)
        check_choice("gateway.routing_policy", self.routing_policy, ROUTING_POLICIES)
        check("gateway.failover_wait_s", self.failover_wait_s, 0, 86_400)
        check_secret("gateway.cluster_secret", self.cluster_secret)


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """A replica's process."""

    socket: str = ""
    """Path of the Unix socket between gateway and replica, at most 100 bytes; empty: a fresh one
    in a directory that only this user may enter (`rillgate serve`)."""
    num_threads: int = 0
    """Threads of the computation, 0 to 1024; 0: one per core that this process may use
    (`rillgate serve` gives each of several its share)."""
    max_memory_bytes: int = 0
    """Of the machine's memory, for all of this process: its cache takes no more than that leaves;
    0: whatever is free (`rillgate serve` gives each of several its share). Higher: a larger
    cache."""
    cuda_graphs: bool = True
    """Whether a GPU's decode steps are captured at the start and replayed: faster steps for some
    seconds and some hundred MB."""
    drain_grace_s: float = 30.0
    """Time that running requests have to finish after SIGTERM, 0 to 86400 s."""
    name: str = ""
    """What status and logs call it, at most 128 bytes; empty: host name and process id. Replicas of
    `rillgate serve` get a number each: NAME-0, NAME-1 (empty: replica-0, …)."""
    listen: str = ""
    """HOST:PORT of a door for gateways on other machines, beside or instead of the socket; port 0
    takes a free one. Needs link.tls_* or link.token, or link.insecure; empty: none."""
    tensor_parallel_size: int = 1
    """Ranks (processes) that the model is split over, 1 to 256. Higher: less memory and time for
    each rank, more talk between them."""
    rank: int = 0
    """Which of the ranks this process is, 0 to tensor_parallel_size - 1; rank 0 decides and
    serves."""
    rendezvous: str = ""
    """HOST:PORT of rank 0's machine, where the ranks meet; needed with more than one rank."""
    min_step_ms: float = 0.0
    """For debugging: the shortest time of a step that computes, 0 to 60,000 ms. Higher: streams
    last longer."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        if len(self.socket.encode()) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"replica.socket has {len(self.socket.encode())} bytes; allowed: at most "
                f"{MAX_SOCKET_PATH_BYTES} (the system's limit is 107)"
            )
        if len(self.name.encode()) > MAX_REPLICA_NAME_BYTES:
            raise ConfigError(
                f"replica.name has {len(self.name.encode())} bytes; allowed: at most "
                f"{MAX_REPLICA_NAME_BYTES}"
            )
        check("replica.num_threads", self.num_threads, 0, 1024)
        check("replica.max_memory_bytes", self.max_memory_bytes, 0, 1 << 50)
        check("replica.drain_grace_s", self.drain_grace_s, 0, 86400)
        check("replica.tensor_parallel_size", self.tensor_parallel_size, 1, 256)
        check("replica.rank", self.rank, 0, self.tensor_parallel_size - 1)
        check("replica.min_step_ms", self.min_step_ms, 0, 60_000)
        if self.listen:
            check_address("replica.listen", self.listen)
        if self.rendezvous:
            check_address("replica.rendezvous", self.rendezvous)


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """The connection between gateway and replicas over TCP; both ends read the same group."""

    tls_certificate: str = ""
    """Path of this end's certificate (PEM), which the other end must trust; both ends show one."""
    tls_key: str = ""
    """Path of its key (PEM)."""
    tls_authority: str = ""
    """Path of the authority's certificate (PEM) that the other end's must be signed by."""
    tls_server_name: str = ""
    """Name that a replica's certificate must have; empty: the host of its address."""
    token: str = field(default="", repr=False)
    """Shared by both ends: 16 to 1024 bytes; keeps strangers out, encrypts nothing by itself."""
    insecure: bool = False
    """Opens the door to whoever can connect, though it lies behind every quota."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        given = [bool(it) for it in (self.tls_certificate, self.tls_key, self.tls_authority)]
        if any(given) and not all(given):
            raise ConfigError(
                "link.tls_certificate, link.tls_key and link.tls_authority must be given together"
            )
        check_secret("link.token", self.token)

    @property
    def has_tls(self) -> bool:
        """Whether both ends show certificates."""
        return bool(self.tls_certificate)


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What `rillgate serve` starts."""

    num_replicas: int = 1
    """Replicas side by side, 0 to 256; each has its own copy of the model. 0: only those of
    gateway.replica_addresses."""
    devices: str = "auto"
    """Devices that replicas and ranks are put on, in order, by commas (`cuda:0,cuda:1`, `cpu`);
    auto: all CUDA devices, or the CPU."""
    cluster: str = "local"
    """Where replicas are started: local (this machine) or ray (any machine of a Ray cluster; needs
    the extra `ray` and the checkpoint at the same path everywhere)."""
    ray_address: str = "auto"
    """Of the Ray cluster: auto (the one that this machine is part of), HOST:PORT of its head, or
    local (a cluster of this machine alone, for trying out)."""
    ray_lease_s: float = 5.0
    """Time without a word from here after which a machine of the Ray cluster kills its replica, and
    a second more until another takes its place, 1 to 3600 s. Higher: longer cuts of the network are
    survived in place, and lost replicas come back later."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        check("serve.num_replicas", self.num_replicas, 0, 256)
        check_choice("serve.cluster", self.cluster, ("local", "ray"))
        check("serve.ray_lease_s", self.ray_lease_s, 1, 3600)


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What the processes write to stderr."""

    level: str = "warning"
    """The least that is written: debug, info (adds a line per call), warning or error."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        check_choice("log.level", self.level, ("debug", "info", "warning", "error"))
