"""Frames and actions agree to the tick, in the bundled recordings and where nothing moves."""

from pathlib import Path

import numpy as np
import pytest
from soak import repeats

from minecraft_jepa.config import preset
from minecraft_jepa.data.alignment import estimate_image_shift, lag_correlation
from minecraft_jepa.data.clip_store import ClipStore

DATA = Path(__file__).parent.parent / "data"
LAGS = list(range(-5, 6))
# In these something far away is seen.
CLEAR = ["world-301_0680", "world-310_0340", "world-316_1220", "world-331_1040", "world-345_1080"]


@pytest.fixture(scope="module")
def store():
    return ClipStore.build(DATA, preset("tiny").frame, progress=False)


@pytest.fixture(scope="module")
def shifts(store):
    names = {*store.names[:: repeats(6, 1)], *CLEAR}
    return {name: estimate_image_shift(store[name].frames) for name in names}


def test_picture_follows_the_camera_at_its_own_tick(store, shifts):
    """The shift between frames t and t+1 belongs to the turn of tick t.

    Over the bundled recordings no other tick explains it as well.
    """
    correlations = [
        lag_correlation(*shift, store[name].actions[:, 22], LAGS) for name, shift in shifts.items()
    ]
    by_lag = np.mean(correlations, 0)
    assert LAGS[int(by_lag.argmax())] == 0
    assert by_lag[5] > 0.8
    assert by_lag[5] > np.delete(by_lag, 5).max() + 0.05


@pytest.mark.parametrize("name", CLEAR)
@pytest.mark.parametrize("delay", [-1, 0, 2])
def test_actions_out_of_step_would_show(store, shifts, name, delay):
    """Where something far away is seen, each recording alone shows a single tick's delay."""
    turn = np.roll(store[name].actions[:, 22], delay)
    correlation = lag_correlation(*shifts[name], turn, LAGS)
    assert LAGS[int(np.argmax(correlation))] == delay


NOISE = np.random.default_rng(0).integers(0, 255, (1, 3, 48, 80), dtype=np.uint8)
STILL = {
    "black": np.zeros((9, 3, 48, 80), np.uint8),
    "still": NOISE.repeat(9, 0),
    "one frame": np.zeros((1, 3, 48, 80), np.uint8),
    "two frames": np.zeros((2, 3, 48, 80), np.uint8),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("frames", STILL.values(), ids=STILL)
@pytest.mark.parametrize("turn", [0.0, 0.1])
def test_recordings_without_movement_can_be_looked_at(frames, turn):
    shift, agreement = estimate_image_shift(frames)
    turns, certain = np.full(len(frames), turn), np.ones(len(shift))
    assert len(shift) == len(agreement) == len(frames) - 1
    assert np.isfinite(agreement).all()
    assert (np.abs(shift) < 0.5).all()
    assert lag_correlation(shift, agreement, turns, [-1, 0, 1]) == [0.0] * 3
    assert lag_correlation(shift, certain, turns, [np.int8(0)], sure=0) == [0.0]
