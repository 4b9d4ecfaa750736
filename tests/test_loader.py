"""Training batches: random windows by seed and step, from a store or from shards."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numbered_clips import NumberedClips
from training_runs import HELD_OUT, TRAIN, shards_fixture, store_fixture  # noqa: F401

from minecraft_jepa.data import loader
from minecraft_jepa.data.loader import sample_windows
from minecraft_jepa.data.shard_reader import ShardWindows
from minecraft_jepa.data.shards import ShardError


@given(st.integers(0, 10**6), st.integers(0, 20))
def test_sampling_depends_on_seed_and_step_only(seed, num_skipped):
    clips, options = NumberedClips(30), (["a", "b"], 5, 2, 4, seed)
    batches = sample_windows(clips, *options)
    for _ in range(num_skipped):
        next(batches)
    resumed = sample_windows(clips, *options, start_step=num_skipped)
    for tensor, resumed_tensor in zip(next(batches), next(resumed)):
        assert torch.equal(tensor, resumed_tensor)


def test_samples_are_whole_windows_of_one_clip():
    clips = NumberedClips(30)
    frames, actions = next(sample_windows(clips, ["a", "b"], 5, 2, 2000, seed=0))
    assert frames.shape == (2000, 3, 3, 8, 8)
    assert frames.dtype == torch.uint8
    assert actions.shape == (2000, 6, 28)
    assert actions.dtype == torch.float32
    t = frames[:, 0, 0, 0, 0].float()
    assert torch.equal(actions[:, :, 0], t[:, None] + torch.arange(-4, 2))
    assert torch.equal(frames[:, :, 0, 0, 0], (t[:, None] + torch.arange(3)).byte())

    # All windows are drawn and nothing else, each clip as often as it has windows.
    starts_a, starts_b = clips.window_starts("a", 5, 2), clips.window_starts("b", 5, 2) + 100
    assert set(t.int().tolist()) == {*starts_a.tolist(), *starts_b.tolist()}
    fraction_b = len(starts_b) / (len(starts_a) + len(starts_b))
    assert (t >= 100).float().mean().item() == pytest.approx(fraction_b, abs=0.04)


def test_no_window_at_all_is_refused():
    for names, ticks in ((["a"], 100), ([], 25)):
        with pytest.raises(ValueError, match="use longer recordings"):
            next(sample_windows(NumberedClips(), names, ticks, 1, 4, seed=0))


KINDS = np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint64, np.array, torch.tensor


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whole_numbers_of_any_type_give_the_same_batches(kind, store):
    def draw(kind):
        ticks, rollout, batch, seed, start_step, rank, world, far = map(
            kind, (5, 2, 4, 0, 3, 0, 2, 6)
        )
        process = start_step, rank, world
        return next(sample_windows(store, TRAIN, ticks, rollout, batch, seed, *process, far))

    assert all(torch.equal(a, b) for a, b in zip(draw(kind), draw(int)))


def test_few_windows_to_validate_on_serve_from_shards_as_from_a_store(shards):
    """Fewer than are evaluated: from a store some are drawn twice."""
    windows = ShardWindows(shards, 25, 16, 128, 0, HELD_OUT, even=False, rank=0, world=1)
    frames, actions = loader.fixed_windows(shards, HELD_OUT, 25, 8, 5000, 0)
    assert len(frames) == len(actions) == 5000
    assert sum(map(len, windows.window_starts)) < 5000


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_position_in_shards_is_carried_through_epochs(shards, world):
    """At any step the reader gives what it gives without a stop."""

    def batches_from(step):
        batch, rank = 40 * world, world - 1
        return loader.window_batches(shards, TRAIN, 25, 2, batch, 0, step, rank, world)

    all_actions = [actions for _, actions in itertools.islice(batches_from(0), 14)]
    for step in (1, 3, 6, 9, 13):
        _, actions = next(batches_from(step))
        assert torch.equal(actions, all_actions[step])


def test_an_epoch_without_a_batch_is_an_error(shards):
    message = "no batch of 5000 for each of 2 readers; take a smaller batch"
    with pytest.raises(ShardError, match=message):
        next(loader.window_batches(shards, TRAIN, 25, 2, 10_000, 0, 0, 0, 2))


def next_in_time(batches):
    """What the next call gives, or raises, in five seconds; None where it hangs."""
    answers = []

    def ask():
        try:
            answers.append(batches.__next__())
        except (StopIteration, RuntimeError) as error:
            answers.append(type(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(5)
    return answers[0] if answers else None


def failing():
    yield 1
    raise RuntimeError


@pytest.mark.parametrize(("batches", "end"), [([1], StopIteration), (failing(), RuntimeError)])
def test_batches_read_ahead_end_at_every_call_after_the_last(batches, end):
    batches = loader.Prefetcher(batches)
    assert [next_in_time(batches) for _ in range(3)] == [1, end, end]
    batches.close()
    assert next_in_time(batches) is StopIteration
