"""First come, first served."""

from rillgate_server.core.request import ChoiceStart
from rillgate_server.scheduler.request_queue import RequestQueue
from rillgate_server.scheduler.sequence import RequestGroup, Sequence
from tests.support.engine import make_request


def make(number: int, position: int = 0) -> Sequence:
    """Build a sequence that arrived as the `number`-th."""
    group = RequestGroup(make_request(number))
    return Sequence(group, ChoiceStart(position), (number, position))


def test_whoever_comes_back_takes_the_place_of_its_arrival() -> None:
    """A preempted sequence goes before all that came after it, wherever that is."""
    queue = RequestQueue()
    sequences = {number: make(number) for number in range(1, 6)}
    for number in (3, 4, 1, 5, 2):
        queue.push(sequences[number])
        queue.check_integrity()
    assert [queue.pop().order[0] for _ in range(5)] == [1, 2, 3, 4, 5]
    assert (len(queue), queue.num_tokens, bool(queue)) == (0, 0, False)


def test_one_can_be_taken_out_of_the_middle() -> None:
    """An abort leaves the others in order."""
    queue = RequestQueue()
    first, second, third = make(1), make(2), make(2, position=1)
    for sequence in (first, second, third):
        queue.push(sequence)
    queue.remove(second)
    queue.check_integrity()
    assert (queue.pop(), queue.head) == (first, third)
