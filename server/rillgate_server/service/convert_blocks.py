"""What a replica says of the blocks in its cache, in engine.proto's Blocks and core's BlockEvent.

Owns that mapping alone, both ways. Hashes travel joined: 16 bytes each.
"""

from rillgate_proto.v1 import engine_pb2
from rillgate_server.core.block_events import BlockChange, BlockEvent, CacheTier
from rillgate_server.errors import EngineFailure

HASH_BYTES = 16
"""Of a block's hash (contracts, section 4)."""

_TIER_TO_WIRE = {
    CacheTier.DEVICE: engine_pb2.CACHE_TIER_DEVICE,
    CacheTier.HOST: engine_pb2.CACHE_TIER_HOST,
}
_TIER_FROM_WIRE = {int(wire): tier for tier, wire in _TIER_TO_WIRE.items()}
_CHANGE_FROM_WIRE = {
    "snapshot_chunk": BlockChange.SNAPSHOT,
    "stored": BlockChange.STORED,
    "evicted": BlockChange.EVICTED,
    "cleared": BlockChange.CLEARED,
}


def blocks_event(event: BlockEvent) -> engine_pb2.ReplicaEvent:
    """Build the event that tells a change of the cache."""
    blocks = engine_pb2.Blocks(sequence=event.sequence)
    tier, hashes = _TIER_TO_WIRE[event.tier], b"".join(event.hashes)
    match event.change:
        case BlockChange.SNAPSHOT:
            chunk = engine_pb2.BlocksSnapshotChunk(tier=tier, hashes=hashes, last=event.is_last)
            blocks.snapshot_chunk.CopyFrom(chunk)
        case BlockChange.STORED:
            blocks.stored.CopyFrom(engine_pb2.BlocksChanged(tier=tier, hashes=hashes))
        case BlockChange.EVICTED:
            blocks.evicted.CopyFrom(engine_pb2.BlocksChanged(tier=tier, hashes=hashes))
        case BlockChange.CLEARED:
            blocks.cleared.SetInParent()
    return engine_pb2.ReplicaEvent(blocks=blocks)


def blocks_from_wire(message: engine_pb2.Blocks) -> BlockEvent:
    """Read a change of the cache.

    Raises EngineFailure for a message that says no change, no tier, or parts of hashes: its
    receiver cannot know any more what the cache holds.
    """
    name = message.WhichOneof("change")
    if name is None:
        raise EngineFailure(f"blocks {message.sequence} say no change that is known here")
    change = _CHANGE_FROM_WIRE[name]
    if change is BlockChange.CLEARED:
        return BlockEvent(message.sequence, change)
    if change is BlockChange.SNAPSHOT:
        chunk = message.snapshot_chunk
        tier, hashes = _tier(message.sequence, chunk.tier), _split(message.sequence, chunk.hashes)
        return BlockEvent(message.sequence, change, tier, hashes, chunk.last)
    body = message.stored if change is BlockChange.STORED else message.evicted
    tier, hashes = _tier(message.sequence, body.tier), _split(message.sequence, body.hashes)
    return BlockEvent(message.sequence, change, tier, hashes)


def _tier(sequence: int, wire: int) -> CacheTier:
    tier = _TIER_FROM_WIRE.get(int(wire))
    if tier is None:
        raise EngineFailure(f"blocks {sequence} are of tier {wire}; known: 1 and 2")
    return tier


def _split(sequence: int, joined: bytes) -> tuple[bytes, ...]:
    if len(joined) % HASH_BYTES:
        raise EngineFailure(f"blocks {sequence} have {len(joined)} bytes of hashes of {HASH_BYTES}")
    return tuple(joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES))
