"""The worker's seats."""

from rillgate_server.scheduler.slots import Slots


def test_the_smallest_free_slot_is_taken() -> None:
    """Slots stay dense, whatever the order in which they come back."""
    slots = Slots(3)
    assert [slots.take() for _ in range(3)] == [0, 1, 2]
    slots.give_back(2)
    slots.give_back(0)
    assert (slots.take(), slots.num_taken) == (0, 2)
    slots.check_integrity([0, 1])


def test_an_ended_slot_is_announced_once() -> None:
    """The next plan names it, later ones do not."""
    slots = Slots(2)
    slots.give_back(slots.take())
    assert slots.announce() == (0,)
    assert slots.announce() == ()


def test_after_a_failed_plan_its_ended_slots_are_announced_again() -> None:
    """The worker may have raised before it read them."""
    slots = Slots(2)
    slots.give_back(slots.take())
    announced = slots.announce()
    slots.take()
    slots.give_back(0)
    slots.give_back(slots.take())
    slots.plan_failed(announced)
    assert slots.announce() == (0,)
    assert slots.announce() == ()


def test_a_slot_that_is_given_back_twice_between_plans_is_announced_once() -> None:
    """Who loads has a slot and is in no plan: it may come and go before the worker hears of it."""
    slots = Slots(2)
    slots.give_back(slots.take())
    slots.give_back(slots.take())
    slots.check_integrity([])
    assert slots.announce() == (0,)
