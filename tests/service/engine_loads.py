"""Loads with a value of its own in every field, for tests of what carries them."""

from hypothesis import strategies as st

from rillgate_server.core.load import (
    CopyCounts,
    DeviceMemory,
    EngineLoad,
    FittedCosts,
    LoadDecisions,
    QueueLoad,
    TierLoad,
)
from rillgate_server.core.request import PriorityClass

_counts = st.integers(0, 2**32 - 1)
_numbers = st.floats(0, 1e300)
# The wire has milliseconds: these come back as the same double.
_seconds = st.integers(0, 2**20).map(lambda n: n / 4)
_tiers = st.builds(TierLoad, *[_counts] * 8)

queue_loads = st.builds(
    QueueLoad,
    st.sampled_from(PriorityClass),
    st.text(st.characters(codec="utf-8"), max_size=8),
    _counts,
    _counts,
)
engine_loads = st.builds(
    EngineLoad,
    step_id=_counts,
    step_age_s=_seconds,
    is_draining=st.booleans(),
    num_running=_counts,
    num_loading=_counts,
    num_waiting=_counts,
    num_running_tokens=_counts,
    num_waiting_tokens=_counts,
    device=_tiers,
    host=_tiers,
    copies=st.builds(CopyCounts, *[_counts] * 7),
    decisions=st.builds(LoadDecisions, *[_counts] * 4, *[_numbers] * 2, *[_counts] * 2),
    costs=st.builds(FittedCosts, *[_numbers] * 9),
    queues=st.lists(queue_loads, max_size=3).map(tuple),
    prefill_tokens_per_s=_numbers,
    decode_step_s=_seconds,
    num_preemptions=_counts,
    num_cached_tokens=_counts,
    num_prompt_tokens=_counts,
    num_drafted_tokens=_counts,
    num_accepted_tokens=_counts,
    free_cpu_fraction=_numbers,
    free_device_fraction=_numbers,
    longest_step_s=_seconds,
    device_idle_s_per_step=_seconds,
    num_following_steps=_counts,
    device_memory=st.one_of(
        st.just(DeviceMemory()),
        st.builds(DeviceMemory, st.integers(1, 1 << 40), _counts, _counts, _counts),
    ),
)
