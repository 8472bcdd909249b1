"""Who is next: class, aging, preempted, tenant, deadline, arrival."""

import random
from dataclasses import replace

from rillgate_server.core.load import MAX_QUEUE_LOADS, QueueLoad
from rillgate_server.core.request import ChoiceStart, PriorityClass, Tenant
from rillgate_server.scheduler.fairness import W_INPUT, W_KV_SECOND, W_OUTPUT
from rillgate_server.scheduler.request_queue import RequestQueue
from rillgate_server.scheduler.sequence import RequestGroup, Sequence
from tests.support.engine import make_request

HIGH, NORMAL, LOW = PriorityClass
NUM_PROMPT_TOKENS = 10
"""Of `make_request`."""


def make(
    number: int,
    tenant: str = "",
    priority: PriorityClass = NORMAL,
    deadline_s: float | None = None,
    weight: float = 1.0,
    arrival_s: float = 0.0,
) -> Sequence:
    """Build a sequence that arrived as the `number`-th."""
    request = replace(
        make_request(number),
        tenant=Tenant(tenant, weight),
        priority=priority,
        deadline_s=deadline_s,
        arrival_s=arrival_s,
    )
    return Sequence(RequestGroup(request), ChoiceStart(0), (number, 0))


def preempted(sequence: Sequence) -> Sequence:
    """Say that a sequence has run already."""
    sequence.num_preemptions = 1
    sequence.is_charged = True
    return sequence


def filled(*sequences: Sequence, aging_s: float = 30.0) -> RequestQueue:
    """Build a queue with these, pushed at 0 s."""
    queue = RequestQueue(aging_s)
    for sequence in sequences:
        queue.push(sequence, 0.0)
        queue.check_integrity()
    return queue


def popped(queue: RequestQueue, now: float = 0.0) -> list[int]:
    """Take everything out without charging for it; return the numbers."""
    numbers = []
    while queue:
        head = queue.head(now)
        assert queue.pop(now) is head
        queue.check_integrity()
        numbers.append(head.order[0])
    assert (len(queue), queue.num_tokens) == (0, 0)
    return numbers


# -- the order ----------------------------------------------------------------------------------


def test_one_tenant_is_served_by_arrival_whatever_the_order_of_pushes() -> None:
    """A held-back choice takes the place of its request's arrival."""
    assert popped(filled(*(make(number) for number in (3, 4, 1, 5, 2)))) == [1, 2, 3, 4, 5]


def test_higher_classes_go_first() -> None:
    """Whoever came before."""
    assert popped(filled(make(1, priority=LOW), make(2), make(3, priority=HIGH))) == [3, 2, 1]


def test_preempted_choices_go_before_all_of_their_class_and_behind_higher_ones() -> None:
    """By order among themselves, whatever their tenants have had."""
    queue = filled(
        make(1, "a"), preempted(make(5, "a")), preempted(make(3, "b")), make(6, priority=HIGH)
    )
    assert popped(queue) == [6, 3, 5, 1]


def test_inside_a_tenant_the_earliest_deadline_goes_first_and_none_goes_last() -> None:
    """Equal deadlines go by arrival."""
    sequences = [
        make(1),
        make(2, deadline_s=9.0),
        make(3, deadline_s=5.0),
        make(4, deadline_s=9.0),
    ]
    assert popped(filled(*sequences)) == [3, 2, 4, 1]


def test_a_deadline_does_not_help_against_other_tenants() -> None:
    """Else everybody would claim one."""
    queue = filled(make(1, "a"), make(2, "b", deadline_s=1.0))
    assert popped(queue) == [1, 2]


def test_tenants_take_turns_by_what_they_have_been_charged() -> None:
    """The flood of one does not delay the other's second request."""
    queue = filled(*(make(number, "flood") for number in range(1, 6)), make(6, "b"), make(7, "b"))
    started = []
    while queue:
        sequence = queue.pop(0.0)
        queue.started(sequence, NUM_PROMPT_TOKENS)
        started.append(sequence.order[0])
    assert started == [1, 6, 2, 7, 3, 4, 5]


def test_any_one_can_be_taken_out() -> None:
    """An abort leaves the others in order."""
    first, second, third = make(1), make(2), preempted(make(3))
    queue = filled(first, second, third, make(4, "b"))
    for sequence in (second, third):
        queue.remove(sequence)
        queue.check_integrity()
    assert popped(queue) == [1, 4]


def test_the_order_agrees_with_a_plain_sort() -> None:
    """5,000 random pushes, pops and removals of one tenant and class."""
    draw = random.Random(3)
    queue = RequestQueue(30.0)
    waiting: list[Sequence] = []
    for number in range(5000):
        if draw.random() < 0.55:
            deadline_s = draw.choice((None, 1.0, 2.0, 3.0))
            sequence = make(number, deadline_s=deadline_s)
            queue.push(sequence, 0.0)
            waiting.append(sequence)
        elif waiting and draw.random() < 0.3:
            queue.remove(waiting.pop(draw.randrange(len(waiting))))
        elif waiting:
            expected = min(
                waiting, key=lambda s: (s.group.request.deadline_s or float("inf"), s.order)
            )
            waiting.remove(expected)
            assert queue.pop(0.0) is expected
    queue.check_integrity()
    assert len(queue) == len(waiting)


# -- aging --------------------------------------------------------------------------------------


def test_a_class_that_was_passed_over_for_so_long_goes_first() -> None:
    """After `aging_s` it goes before the class above, after twice that before both."""
    queue = filled(make(1, priority=LOW), make(2), aging_s=10.0)
    assert queue.head(8.0).order[0] == 2
    queue.pop(8.0)
    queue.push(make(3, arrival_s=8.0), 8.0)
    queue.push(make(4, priority=HIGH, arrival_s=17.0), 17.0)
    assert queue.head(17.0).order[0] == 4, "low counts as normal, normal as itself"
    assert queue.head(18.0).order[0] == 3, "normal counts as high, and has waited for longer"
    assert queue.head(20.0).order[0] == 1, "low counts as high, and has waited longest"


def test_a_turn_is_one_choice() -> None:
    """Then the class waits again."""
    queue = filled(make(1, priority=LOW), make(2, priority=LOW), make(3), make(4), aging_s=10.0)
    assert [queue.pop(5.0).order[0], queue.pop(10.0).order[0]] == [3, 1]
    assert [queue.pop(10.0).order[0], queue.pop(10.0).order[0]] == [4, 2]


def test_under_constant_high_work_each_class_has_its_turn_in_time() -> None:
    """Normal once in `aging_s`, low once in two of them, give or take the other's turn."""
    aging_s, step_s = 10.0, 0.1
    queue = RequestQueue(aging_s)
    for number in range(100):
        queue.push(make(number, priority=LOW), 0.0)
        queue.push(make(1000 + number), 0.0)
    turns: dict[PriorityClass, list[float]] = {HIGH: [], NORMAL: [], LOW: []}
    for step in range(2000):
        now = step * step_s
        queue.push(make(10_000 + step, priority=HIGH, arrival_s=now), now)
        sequence = queue.pop(now)
        turns[sequence.group.request.priority].append(now)
    for priority, longest_s in ((NORMAL, aging_s), (LOW, 2 * aging_s)):
        gaps = [b - a for a, b in zip([0.0, *turns[priority]], turns[priority], strict=False)]
        assert max(gaps) <= longest_s + 3 * step_s, priority
        assert min(gaps) >= longest_s - step_s, priority
    assert len(turns[HIGH]) >= 2000 - 200 / aging_s - 200 / (2 * aging_s) - 1


def test_what_a_request_waited_elsewhere_counts() -> None:
    """It arrives here with its age."""
    queue = filled(make(1, priority=HIGH), make(2, arrival_s=-30.0), aging_s=30.0)
    assert popped(queue) == [2, 1]


def test_a_preempted_choice_waits_since_its_preemption() -> None:
    """Not since its arrival: it has run since."""
    queue = filled(make(1, priority=HIGH, arrival_s=100.0), aging_s=30.0)
    queue.push(preempted(make(2, priority=LOW)), 100.0)
    assert queue.head(100.0).order[0] == 1


def test_a_flood_that_grows_old_does_not_go_before_its_own_class() -> None:
    """Aging chooses the class, never the tenant: a new tenant's turn comes as ever."""
    queue = filled(*(make(number, "flood") for number in range(1000)), aging_s=1.0)
    now = 100.0
    queue.pop(now)
    queue.started(make(0, "flood"), NUM_PROMPT_TOKENS)
    queue.push(make(2000, "new", arrival_s=now), now)
    queue.pop(now)
    queue.started(make(1, "flood"), NUM_PROMPT_TOKENS)
    assert queue.head(now).order[0] == 2000


# -- charges ------------------------------------------------------------------------------------


def test_input_is_charged_once_and_output_and_held_tokens_each_step() -> None:
    """All over the weight; what is computed again after a preemption is free."""
    expected = (6 * W_INPUT + W_OUTPUT + NUM_PROMPT_TOKENS * 0.5 * W_KV_SECOND) / 2.0
    for others, first in ((expected - 0.01, 3), (expected + 0.01, 2)):
        sequence = make(1, "a", weight=2.0)
        queue = filled(sequence, make(2, "a"), make(3, "b"))
        queue.pop(0.0)
        queue.started(sequence, 6)  # 4 of its 10 tokens were found in the cache
        queue.started(sequence, 9)
        queue.charge_step([(sequence, 1)], [sequence], 0.5)
        queue.started(make(4, "b", weight=1.0 / others), 1)
        assert queue.head(0.0).order[0] == first, others


def test_what_a_tenant_had_in_one_class_does_not_count_in_another() -> None:
    """Else high work could starve the tenant's own normal work among normal work of others."""
    queue = filled(make(1, "a"), make(2, "b"))
    queue.started(make(3, "a", HIGH), 1_000_000)
    assert queue.head(0.0).order[0] == 1


# -- what is told -------------------------------------------------------------------------------


def test_what_goes_before_a_new_request() -> None:
    """Higher classes, preempted ones, its own earlier deadlines, and others up to their shares."""
    queue = filled(
        make(1, "other", HIGH),
        make(2, "other", LOW),
        preempted(make(3, "other")),
        make(4, "own", deadline_s=5.0),
        make(5, "own"),
        make(6, "small"),
        *(make(number, "large", weight=3.0) for number in range(7, 107)),
    )
    request = make(200, "own", deadline_s=6.0, weight=1.0).group.request
    # high 10, preempted 10, own 10 before it; with its own 10 it is served 20, so others get up
    # to 20 and 60: the small one has 10
    assert queue.num_tokens_ahead(request, NUM_PROMPT_TOKENS) == 10 + 10 + 10 + 10 + 60
    late = replace(request, deadline_s=None)
    assert queue.num_tokens_ahead(late, NUM_PROMPT_TOKENS) == 10 + 10 + 20 + 10 + 90
    alone = make(201, "new", HIGH).group.request
    assert queue.num_tokens_ahead(alone, NUM_PROMPT_TOKENS) == 10


def test_loads_name_the_largest_queues() -> None:
    """Choices of one request count once; a preempted one counts."""
    queue = RequestQueue(30.0)
    for tenant in range(MAX_QUEUE_LOADS):
        queue.push(make(tenant, f"t{tenant}"), 0.0)
    group = RequestGroup(make(500, "big", LOW).group.request)
    for position in range(3):
        queue.push(Sequence(group, ChoiceStart(position), (500, position)), 0.0)
    queue.push(preempted(make(501, "big", LOW)), 0.0)
    loads = queue.loads()
    assert loads[0] == QueueLoad(LOW, "big", num_requests=2, num_tokens=40)
    assert len(loads) == MAX_QUEUE_LOADS
    assert {load.num_tokens for load in loads[1:]} == {10}
    popped(queue)
    assert queue.loads() == ()
