"""What a replica says of its cached blocks survives the wire."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rillgate_proto.v1 import engine_pb2
from rillgate_server.core.block_events import BlockChange, BlockEvent, CacheTier
from rillgate_server.errors import EngineFailure
from rillgate_server.service.convert_blocks import blocks_event, blocks_from_wire

_hashes = st.lists(st.binary(min_size=16, max_size=16), max_size=5).map(tuple)
_sequences = st.integers(1, 2**64 - 1)
events = st.one_of(
    st.builds(BlockEvent, _sequences, st.just(BlockChange.CLEARED)),
    st.builds(
        BlockEvent,
        _sequences,
        st.just(BlockChange.SNAPSHOT),
        st.sampled_from(CacheTier),
        _hashes,
        st.booleans(),
    ),
    st.builds(
        BlockEvent,
        _sequences,
        st.sampled_from((BlockChange.STORED, BlockChange.EVICTED)),
        st.sampled_from(CacheTier),
        _hashes,
    ),
)


@settings(deadline=None)
@given(events)
def test_a_block_event_survives_the_wire(event: BlockEvent) -> None:
    """Each kind of change with its tier and hashes, in their order."""
    data = blocks_event(event).SerializeToString()
    arrived = engine_pb2.ReplicaEvent.FromString(data)
    assert blocks_from_wire(arrived.blocks) == event


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (engine_pb2.Blocks(sequence=3), "blocks 3 say no change"),
        (engine_pb2.Blocks(sequence=4, stored=engine_pb2.BlocksChanged()), "of tier 0"),
        (
            engine_pb2.Blocks(
                sequence=5,
                evicted=engine_pb2.BlocksChanged(tier=engine_pb2.CACHE_TIER_HOST, hashes=b"x" * 17),
            ),
            "17 bytes of hashes of 16",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(message: engine_pb2.Blocks, complaint: str) -> None:
    """An index built from half of a message would be wrong for ever."""
    with pytest.raises(EngineFailure, match=complaint):
        blocks_from_wire(message)
