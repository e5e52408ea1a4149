"""Memory policies: constant space, and the same answers as a memory that forgets nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enerverse.memory import POLICIES, MemoryState, make_memory, push_chunk, read_context, start_memory

SLOTS, CHUNK, CAPACITY = 4, 8, 32
LIMITS = {
    "none": 1,
    "dense": SLOTS,
    "sparse_uniform": CAPACITY + 2,
    "fifo": SLOTS * CHUNK,
}


def frames(start: int, count: int) -> torch.Tensor:
    """Latents [1, 1, count, 1, 1, 1] that hold their own time."""
    return torch.arange(start, start + count, dtype=torch.float32).view(1, 1, -1, 1, 1, 1)


def roll_out(name: str, seen: int, length: int, chunk: int = CHUNK) -> list[MemoryState]:
    """Memory states after every chunk of a rollout that reaches `length` frames."""
    policy = make_memory(name, slots=SLOTS)
    states = [start_memory(policy, frames(0, seen))]
    while states[-1].now + 1 < length:
        states.append(push_chunk(policy, states[-1], frames(states[-1].now + 1, chunk)))
    return states


def held(state: MemoryState) -> list[int]:
    return [int(value) for value in state.frames.flatten()]


rollouts = given(
    name=st.sampled_from(sorted(POLICIES)),
    seen=st.integers(1, 40),
    length=st.integers(1, 5000),
    chunk=st.sampled_from([1, 3, CHUNK, 11]),
)


@settings(max_examples=40, deadline=None)
@rollouts
def test_the_number_of_frames_held_is_bounded(name, seen, length, chunk):
    length = min(length, 700) if chunk == 1 else length
    for state in roll_out(name, seen, length, chunk):
        assert len(state.times) <= LIMITS[name]
        assert state.frames.shape[2] == len(state.times)


@settings(max_examples=40, deadline=None)
@rollouts
def test_the_context_is_k_ascending_frames_that_end_now(name, seen, length, chunk):
    length = min(length, 700) if chunk == 1 else length
    policy = make_memory(name, slots=SLOTS)
    state = roll_out(name, seen, length, chunk)[-1]
    context, offsets = read_context(policy, state)
    times = [int(value) for value in context.flatten()]
    assert len(times) == SLOTS
    assert times == sorted(times)
    assert times[-1] == state.now
    assert offsets.tolist() == [time - state.now for time in times]


@settings(max_examples=40, deadline=None)
@rollouts
def test_frames_keep_their_times(name, seen, length, chunk):
    state = roll_out(name, seen, min(length, 300), chunk)[-1]
    assert held(state) == list(state.times)


@settings(max_examples=15, deadline=None)
@rollouts
def test_streaming_answers_like_a_memory_that_forgets_nothing(name, seen, length, chunk):
    """Exactly, except for the sparse policy on long rollouts: there within half the stride of its grid."""
    length = min(length, 700) if chunk == 1 else length
    policy = make_memory(name, slots=SLOTS)
    for state in roll_out(name, seen, length, chunk):
        everything = policy.select(list(range(state.now + 1)), state.now)
        streamed = policy.select(list(state.times), state.now)
        stride = 1
        while state.now // stride >= CAPACITY:
            stride *= 2
        if name != "sparse_uniform" or state.now < CAPACITY:
            assert streamed == everything
        assert all(abs(a - b) <= (stride + 1) // 2 for a, b in zip(streamed, everything, strict=True))


@settings(max_examples=25, deadline=None)
@given(seen=st.integers(1, 40), length=st.integers(1, 5000))
def test_sparse_memory_never_loses_the_first_frame(seen, length):
    assert all(state.times[0] == 0 for state in roll_out("sparse_uniform", seen, length))


@settings(max_examples=50, deadline=None)
@given(slots=st.integers(1, 12), recent=st.integers(1, 12), now=st.integers(0, 60))
def test_sparse_memory_ascends_at_any_number_of_slots(slots, recent, now):
    policy = make_memory("sparse_uniform", slots=slots, recent=min(recent, slots))
    chosen = policy.select(list(range(now + 1)), now)
    assert chosen == sorted(chosen)
    assert len(chosen) == slots
    assert chosen[-1] == now


def test_sparse_memory_without_recent_frames_takes_thirds():
    policy = make_memory("sparse_uniform", recent=1)
    assert policy.select(list(range(31)), 30) == [0, 10, 20, 30]


def test_sparse_memory_spreads_over_the_past_and_adds_recent_frames():
    assert make_memory("sparse_uniform").select(list(range(31)), 30) == [0, 15, 29, 30]


def test_fifo_holds_the_last_frame_of_each_past_chunk():
    policy = make_memory("fifo", slots=4, chunk=8)
    state = roll_out("fifo", 1, 65)[-1]
    assert state.now == 64
    assert policy.select(list(state.times), state.now) == [40, 48, 56, 64]


def test_dense_memory_is_the_last_consecutive_frames():
    policy = make_memory("dense")
    assert policy.select(list(range(31)), 30) == [27, 28, 29, 30]
    assert policy.select([0, 1], 1) == [0, 0, 0, 1]


def test_no_memory_repeats_the_last_frame():
    assert make_memory("none").select(list(range(31)), 30) == [30] * 4


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_bytes_stay_constant_on_a_long_rollout(name):
    states = roll_out(name, 1, 3000)
    sizes = [state.bytes for state in states[len(states) // 2 :]]
    assert max(sizes) <= 4 * LIMITS[name]
    assert sizes[-1] == states[-1].frames.numel() * 4


def test_pushing_leaves_the_state_before_as_it_was():
    policy = make_memory("dense")
    before = start_memory(policy, frames(0, 3))
    push_chunk(policy, before, frames(3, 8))
    assert (held(before), before.times, before.now) == ([0, 1, 2], (0, 1, 2), 2)


@pytest.mark.parametrize(("slots", "recent"), [(2, 3), (4, 0), (1, 2)])
def test_recent_frames_must_fit_the_slots(slots, recent):
    with pytest.raises(
        ValueError, match=rf"recent: expected 1 to {slots} \(the memory slots\), got {recent}; choose"
    ):
        make_memory("sparse_uniform", slots=slots, recent=recent)


def test_an_unknown_policy_names_the_closest_one():
    with pytest.raises(
        ValueError, match="unknown memory policy 'sparse_uniforn': did you mean 'sparse_uniform'"
    ):
        make_memory("sparse_uniforn")
