"""Which replicas a gateway uses, and which it sets aside; and who gets a request."""

from dataclasses import replace
from pathlib import Path

from rillgate_proto.v1 import control_pb2
from tests.gateway.fleet_stack import begin, check_whole, running_fleet, running_gateway
from tests.gateway.stack import read, request, running_replica
from tests.replica.engine_server import WELCOME, make_service, serving, socket_directory


async def test_a_replica_of_another_checkpoint_is_set_aside() -> None:
    """The others serve; status says what differs, and what to do."""
    service = make_service(welcome=replace(WELCOME, incarnation=2, model_version_digest="ee" * 32))
    with socket_directory() as folder:
        async with (
            serving(service, folder / "replica.sock"),
            running_replica() as able,
            running_gateway([able], more=[f"unix:{folder / 'replica.sock'}"]) as stack,
        ):
            status = await stack.until(lambda it: bool(it.replicas[1].set_aside))
            assert "its model's version is eeee" in status.replicas[1].set_aside
            assert "same checkpoint" in status.replicas[1].set_aside
            assert status.replicas[1].address == f"unix:{folder / 'replica.sock'}"
            await check_whole(stack, [begin(stack, 0)])


async def test_a_replica_that_is_listed_twice_is_used_once(tmp_path: Path) -> None:
    """The second address is set aside, and names the first."""
    async with running_replica() as replica:
        other = tmp_path / "other.sock"
        other.symlink_to(replica.socket)
        async with running_gateway([replica], more=[f"unix:{other}"]) as stack:
            status = await stack.until(lambda it: any(r.set_aside for r in it.replicas))
            (said,) = (it.set_aside for it in status.replicas if it.set_aside)
            assert "list each replica once" in said
            await check_whole(stack, [begin(stack, 0)])


async def test_an_address_that_nobody_answers_at_is_said_and_does_no_harm(tmp_path: Path) -> None:
    """The others serve; status shows the address as not connected."""
    nobody = f"unix:{tmp_path / 'nobody.sock'}"
    async with running_replica() as able, running_gateway([able], more=[nobody]) as stack:
        await check_whole(stack, [begin(stack, number) for number in range(3)])
        status = await stack.status()
        assert status.replicas[1].address == nobody
        assert status.replicas[1].state == control_pb2.REPLICA_STATE_UNSPECIFIED


async def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    """Once one replica has announced it, the same prompt comes back to it, with a hit."""
    long_prompt = list(range(1, 200))
    async with running_fleet(3) as stack:
        message = request(tokens=long_prompt, stopping__max_tokens=4)
        await read(stack.inference.Generate(message))
        status = await stack.until(
            lambda it: any(r.num_announced_blocks and not r.num_running for r in it.replicas)
        )
        (holder,) = (at for at, it in enumerate(status.replicas) if it.num_announced_blocks)
        for _ in range(5):
            step_id = status.replicas[holder].step_id
            answer = await read(stack.inference.Generate(message))
            assert answer.started.num_cached_tokens >= len(long_prompt) - 8
            # A Load from the middle of a request may come after its end; the next one corrects it.
            status = await stack.until(
                lambda it, last=step_id: (
                    it.replicas[holder].step_id > last  # type: ignore[misc]
                    and not it.replicas[holder].num_running
                )
            )
        assert [bool(it.engine.requests) for it in stack.replicas].count(True) == 1
