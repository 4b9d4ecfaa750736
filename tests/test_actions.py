"The action codec on every legal line, on the traps of the format, and on the bundled recordings."

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minecraft_jepa.data.actions import (
    ACTION_DIM,
    ACTION_NAMES,
    ATTACK,
    BINARY_ACTIONS,
    CURSOR,
    DEGREES_PER_PIXEL,
    KEYS,
    NOOP,
    decode_action,
    encode_action,
    encode_actions,
    read_actions,
)
from minecraft_jepa.data.checks import find_recordings
from minecraft_jepa.data.recordings import open_recording

DATA = Path(__file__).parent.parent / "data"
NAMES = {name: i for i, name in enumerate(ACTION_NAMES)}
SLOT_KEYS = slice(NAMES["1"], NAMES["9"] + 1)

numbers = st.floats(-999_999, 999_999, allow_nan=False) | st.integers(-999_999, 999_999)
keys = st.lists(
    st.sampled_from(KEYS) | st.sampled_from(["key.keyboard.f3", "key.keyboard.left.alt", "", "w"]),
    max_size=6,
)
buttons = st.lists(st.integers(-1, 7), max_size=4)
lines = st.fixed_dictionaries(
    {
        "mouse": st.fixed_dictionaries(
            {"dx": numbers, "dy": numbers, "buttons": buttons},
            optional={
                "x": numbers,
                "y": numbers,
                "dwheel": numbers,
                "newButtons": buttons,
                "scaledX": numbers,
            },
        ),
        "keyboard": st.fixed_dictionaries(
            {"keys": keys}, optional={"newKeys": keys, "chars": st.text(max_size=3)}
        ),
    },
    optional={
        "isGuiOpen": st.booleans(),
        "hotbar": st.integers(0, 8),
        "yaw": numbers,
        "inventory": st.just([{"type": "dirt", "quantity": 3}]),
    },
)


@given(lines)
def test_nothing_of_a_line_is_lost(line):
    action, mouse = encode_action(line), decode_action(encode_action(line))["mouse"]
    assert action.shape == (ACTION_DIM,)
    assert action.dtype == np.float32
    assert np.isfinite(action).all()
    assert {k for k, v in zip(KEYS, action) if v} == set(line["keyboard"]["keys"]) & set(KEYS)
    assert set(mouse["buttons"]) == set(line["mouse"]["buttons"]) & {0, 1, 2}
    for name in ("dx", "dy", "dwheel"):
        assert mouse[name] == pytest.approx(line["mouse"].get(name, 0), rel=1e-6)
    assert set(np.unique(action[BINARY_ACTIONS])) <= {0, 1}
    assert (action[CURSOR] >= 0).all() and (action[CURSOR] <= 1).all()


@given(lines)
def test_codec_has_a_fixed_point(line):
    action = encode_action(line)
    written = json.loads(json.dumps(decode_action(action)))
    assert np.array_equal(encode_action(written), action)
    assert decode_action(encode_action(written)) == decode_action(action)


@given(st.lists(lines, max_size=12))
def test_whole_recordings_have_a_fixed_point(recording):
    actions = encode_actions(recording)
    assert actions.shape == (len(recording), ACTION_DIM)
    assert np.array_equal(encode_actions([decode_action(a) for a in actions]), actions)
    single = [encode_action(line) for line in recording]
    changed = {i for a, b in zip(actions, single) for i in np.flatnonzero(a != b)}
    # nothing but attack and slots depends on the other lines
    assert changed <= {ATTACK, *range(SLOT_KEYS.start, SLOT_KEYS.stop)}


@given(st.lists(st.integers(0, 8), min_size=2, max_size=20))
def test_every_change_of_slot_has_its_key(slots):
    def line(slot):
        return {
            "mouse": {"dx": 0, "dy": 0, "buttons": []},
            "keyboard": {"keys": []},
            "hotbar": slot,
        }

    actions = encode_actions([line(s) for s in slots])
    for t, (slot, next_slot) in enumerate(itertools.pairwise(slots)):
        pressed = [float(slot != next_slot and key == next_slot) for key in range(9)]
        assert actions[t, SLOT_KEYS].tolist() == pressed
    assert not actions[-1].any() or np.array_equal(actions[-1], NOOP)


def held(buttons, new=None):
    mouse = {"dx": 0, "dy": 0, "buttons": buttons}
    return {
        "mouse": mouse if new is None else {**mouse, "newButtons": new},
        "keyboard": {"keys": []},
    }


@pytest.mark.parametrize(
    ("recording", "attack"),
    [
        (
            [held([0], [0]), held([0], []), held([], []), held([0], [0]), held([0], [])],
            [0, 0, 0, 1, 1],
        ),
        ([held([0, 1], [0, 1]), held([0], [])], [1, 1]),  # two buttons at once were really pressed
        ([held([0], []), held([0], [])], [1, 1]),
        ([held([0]), held([0])], [1, 1]),  # newButtons is optional
        ([held([], []), held([0], [0])], [0, 1]),
    ],
)
def test_attack_held_since_before_the_recording(recording, attack):
    assert encode_actions(recording)[:, ATTACK].tolist() == attack


@pytest.mark.parametrize(("button", "name"), [(0, "attack"), (1, "use"), (2, "pick")])
def test_buttons_count_from_zero(button, name):
    assert np.flatnonzero(encode_action(held([button])) != NOOP).tolist() == [NAMES[name]]


@given(st.floats(0.01, 6.6))
def test_slow_turns_are_not_cut_to_zero(pixels):
    line = held([])
    line["mouse"]["dx"] = pixels
    assert encode_action(line)[NAMES["dx"]] == pytest.approx(pixels * 360 / 2400)


GONE = object()


def change(path, value):
    "A legal line in which the field at `path` is something else, or is gone."
    line = {
        "mouse": {
            "x": 640.0,
            "y": 360.0,
            "dx": 0.0,
            "dy": 0.0,
            "dwheel": 0.0,
            "buttons": [],
            "newButtons": [],
        },
        "keyboard": {"keys": []},
        "isGuiOpen": False,
        "hotbar": 0,
    }
    *outer, name = path.split(".")
    parent = line
    for key in outer:
        parent = parent[key]
    if value is GONE:
        del parent[name]
    else:
        parent[name] = value
    return line


@pytest.mark.parametrize(
    "field", ["mouse", "mouse.dx", "mouse.dy", "mouse.buttons", "keyboard", "keyboard.keys"]
)
def test_missing_field_is_named(field):
    with pytest.raises(ValueError, match=rf"line 2: the field {field}.* is missing"):
        encode_actions([held([]), change(field, GONE)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mouse", []),
        ("mouse", None),
        ("keyboard", "w"),
        ("keyboard.keys", "w"),
        ("keyboard.keys", [1]),
        ("keyboard.keys", None),
        ("mouse.dx", "3"),
        ("mouse.dx", None),
        ("mouse.dx", True),
        ("mouse.dy", math.nan),
        ("mouse.dy", math.inf),
        ("mouse.dy", 10**400),
        ("mouse.dwheel", []),
        ("mouse.x", "left"),
        ("mouse.buttons", 0),
        ("mouse.buttons", [0.5]),
        ("mouse.newButtons", {}),
        ("isGuiOpen", "no"),
        ("hotbar", 9),
        ("hotbar", 1.0),
        ("hotbar", None),
    ],
)
def test_field_of_the_wrong_type_is_named(field, value):
    with pytest.raises(ValueError, match=rf"line 2: .*{field}") as refused:
        encode_actions([held([]), change(field, value)])
    assert "expected" in str(refused.value) and len(str(refused.value)) < 150


@pytest.mark.parametrize("path", find_recordings(DATA), ids=lambda p: p.stem)
def test_bundled_recordings_survive_both_ways(path):
    recording = open_recording(path)
    encoded_again = encode_actions([decode_action(a) for a in recording.actions])
    assert np.array_equal(encoded_again, recording.actions)
    degrees = np.array([line["mouse"]["dx"] for line in recording.lines]) * DEGREES_PER_PIXEL
    assert np.allclose(recording.actions[:, NAMES["dx"]], degrees, atol=1e-4)

    # a slot is selected by its key, which is counted once, or by the wheel, which changes it
    pressed_keys = [line["keyboard"]["keys"] for line in recording.lines]
    num_pressed = np.array([sum(key in KEYS[SLOT_KEYS] for key in keys) for keys in pressed_keys])
    num_selected = recording.actions[:, SLOT_KEYS].sum(1)
    slot = recording.state["hotbar"]
    scrolled = np.flatnonzero(num_selected != num_pressed)
    assert (num_selected >= num_pressed).all()
    assert (scrolled < len(slot) - 1).all()
    assert (slot[scrolled] != slot[scrolled + 1]).all()


def test_no_cursor_without_isGuiOpen():
    "The mouse may be captured, and then x and y are no place in the window."
    line = held([]) | {"mouse": {"x": 1270.0, "y": 10.0, "dx": 0, "dy": 0, "buttons": []}}

    def cursor(line):
        return encode_action(line)[CURSOR].tolist()

    assert cursor(line) == cursor(line | {"isGuiOpen": False}) == [0.5, 0.5]
    assert cursor(line | {"isGuiOpen": True}) == pytest.approx([1270 / 1280, 10 / 720])
    decoded = decode_action(encode_action(line | {"isGuiOpen": True}))
    assert decoded["isGuiOpen"] is True
    assert decode_action(NOOP)["isGuiOpen"] is False


@pytest.mark.parametrize(
    "broken",
    [
        {"mouse": None},
        {"keyboard": None},
        {"mouse": {}},
        {"keyboard": {"keys": None}},
        {"hotbar": 9},
        {"isGuiOpen": "no"},
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_line_without_an_action_is_told_apart_from_standing_still(broken, at):
    good = held([1])
    recording = [good | broken if t == at else good for t in range(3)]
    actions, faults = read_actions(recording)
    assert list(faults) == [at]
    assert "expected" in faults[at] or "missing" in faults[at]
    assert np.array_equal(actions[at], NOOP)
    assert actions[:, NAMES["use"]].tolist() == [float(t != at) for t in range(3)]
    with pytest.raises(ValueError, match=f"line {at + 1}: "):
        encode_actions(recording)


def test_slot_and_stuck_attack_are_found_across_a_line_without_an_action():
    slots = [
        held([]) | {"hotbar": 0},
        held([]) | {"hotbar": 4, "mouse": None},
        held([]) | {"hotbar": 4},
    ]
    assert read_actions(slots)[0][:, NAMES["5"]].tolist() == [1, 0, 0]
    stuck = [held([0], [0]), {"mouse": None, "keyboard": None}, held([0], []), held([0], [0])]
    assert read_actions(stuck)[0][:, ATTACK].tolist() == [0, 0, 0, 1]
    assert read_actions([])[0].shape == (0, 28)


def test_line_that_is_no_object_is_named():
    with pytest.raises(ValueError, match=r"the line is '\[\]', expected an object"):
        encode_action([])


@pytest.mark.parametrize(
    ("action", "message"),
    [(np.zeros(27), r"\(27,\), expected \(28,\)"), (np.full(28, np.nan), "w is not finite")],
)
def test_action_of_another_shape_or_not_finite_is_named(action, message):
    with pytest.raises(ValueError, match=message):
        decode_action(action)
