"""What a replica says of itself survives the wire."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rillgate_proto.v1 import engine_pb2
from rillgate_server.core.load import EngineLoad, FlushedBlocks
from rillgate_server.core.welcome import Welcome
from rillgate_server.service import convert_replica
from tests.service.engine_loads import engine_loads

# No example has a deadline: the machine may be busy.
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
text = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(deadline=None)
@given(u64, u32, text)
def test_a_welcome_survives_the_wire(incarnation: int, number: int, name: str) -> None:
    """What a replica is arrives whole: each field with a value of its own."""
    welcome = Welcome(
        replica_id=name + "a",
        incarnation=incarnation,
        model=name + "b",
        model_version_digest=name + "c",
        tokenizer_digest=name + "d",
        vocab_size=number // 2,
        max_context_tokens=number // 3,
        block_size_tokens=number // 4,
        hash_scheme=name + "e",
        kv_dtype=name + "f",
        max_running=number // 5,
        tensor_parallel_size=number // 6,
        protocol_version=number // 7,
    )
    data = convert_replica.welcome_event(welcome).SerializeToString()
    event = engine_pb2.ReplicaEvent.FromString(data)
    assert convert_replica.welcome_from_wire(event.welcome) == welcome


@settings(deadline=None)
@given(engine_loads)
def test_a_load_survives_the_wire(load: EngineLoad) -> None:
    """What a replica does arrives whole: tiers, copies, decisions, costs, queues and the rest."""
    data = convert_replica.load_event(load).SerializeToString()
    event = engine_pb2.ReplicaEvent.FromString(data)
    assert convert_replica.load_from_wire(event.load) == load


def test_what_a_flush_dropped_survives_the_wire() -> None:
    """Both tiers' numbers, not each other's."""
    flushed = FlushedBlocks(3, 4)
    data = convert_replica.flushed_to_wire(flushed).SerializeToString()
    arrived = engine_pb2.EngineFlushCacheResponse.FromString(data)
    assert convert_replica.flushed_from_wire(arrived) == flushed
