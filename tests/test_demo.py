"""The first picture: what stops it is told in one line."""

from types import SimpleNamespace

import numpy as np
import pytest

from minecraft_jepa.data.actions import NOOP
from minecraft_jepa.demo import find_walking_window, table_lines


class Store(dict):
    """Recordings of a hundred ticks."""

    def window_starts(self, name, history, ticks):
        return np.arange(history - 1, 100 - ticks)


def test_the_moment_is_the_walk_with_the_least_turn():
    actions = np.tile(NOOP, (100, 1))
    actions[20:90, 0] = 1  # forward
    actions[20:50, 22] = 3.0  # turning
    t = find_walking_window(Store(a=SimpleNamespace(actions=actions)), "a", 10, 20)
    assert 50 <= t <= 70


def test_a_recording_without_a_window_is_named():
    actions = np.tile(NOOP, (100, 1))
    message = "short: no window of 10 ticks of history and 95 to imagine without a gap"
    with pytest.raises(ValueError, match=message):
        find_walking_window(Store(short=SimpleNamespace(actions=actions)), "short", 10, 95)


def test_an_error_of_nothing_has_a_table_too():
    lines = table_lines(
        {
            1: {"model": 0.0, "copy_last": 0.0, "shuffled_actions": 0.0},
            15: {"model": 0.5, "copy_last": 1.0, "shuffled_actions": 0.9},
        }
    )
    assert len(lines) == 3
    assert lines[2].split() == ["15", "0.500", "1.000", "0.900", "0.50"]
    assert len({len(line) for line in lines}) == 1
