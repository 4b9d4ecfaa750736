"Recordings: which are read, which are refused and with what message, and how they are split."

import errno
import json
import math
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pairs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soak import repeats

from minecraft_jepa.data import checks
from minecraft_jepa.data.actions import ACTION_NAMES, CURSOR, NOOP
from minecraft_jepa.data.checks import check_folder, check_recording, find_recordings, read_checks
from minecraft_jepa.data.lines import STATE_FIELDS
from minecraft_jepa.data.recording_files import RecordingError, find_pair, parse_name, session_of
from minecraft_jepa.data.recordings import open_recording
from minecraft_jepa.data.splits import SPLITS, assign_splits, load_split
from minecraft_jepa.data.video import draw_cursor
from minecraft_jepa.folders import cache_root

DATA = Path(__file__).parent.parent / "data"
NAMES = [p.stem for p in find_recordings(DATA)]
FRAMES = 40
DX = ACTION_NAMES.index("dx")
LINE = {
    "mouse": {
        "x": 640.0,
        "y": 360.0,
        "dx": 1.0,
        "dy": 0.0,
        "dwheel": 0.0,
        "buttons": [],
        "newButtons": [],
    },
    "keyboard": {"keys": [], "newKeys": [], "chars": ""},
    "isGuiOpen": False,
    "hotbar": 0,
}


@pytest.fixture
def toy(tmp_path):
    "A good recording; its video's index comes first, so that a cut leaves it readable."
    random = np.random.default_rng(0)
    with av.open(str(tmp_path / "toy.mp4"), "w", options={"movflags": "faststart"}) as video:
        stream = video.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(FRAMES):
            noise = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        video.mux(stream.encode())
    write_lines(tmp_path / "toy.jsonl", [LINE] * FRAMES)
    return tmp_path / "toy.mp4"


def write_lines(path, lines, end=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def read(path):
    return list(open_recording(path).frames())


def without(name):
    return [{k: v for k, v in LINE.items() if k != name}]


def mouse(**fields):
    return [{**LINE, "mouse": {**LINE["mouse"], **fields}}]


# each gives a function that spoils the recording at a path


def cut(fraction):
    return lambda path: path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])


def damage(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(bytes(data))


def lines(rows):
    return lambda path: write_lines(path.with_suffix(".jsonl"), rows)


def text(data):
    return lambda path: path.with_suffix(".jsonl").write_bytes(data)


GOOD = [LINE] * 9
BAD = {  # fault -> what is done, the half that is named, its line, and what the message says
    "no jsonl": (
        lambda p: p.with_suffix(".jsonl").unlink(),
        "jsonl",
        None,
        "no such file, its other half toy.mp4 is there",
    ),
    "no mp4": (
        lambda p: p.unlink(),
        "mp4",
        None,
        "no such file, its other half toy.jsonl is there",
    ),
    "neither": (
        lambda p: (p.unlink(), p.with_suffix(".jsonl").unlink()),
        "mp4",
        None,
        "no such file",
    ),
    "line broken off": (
        text((json.dumps(LINE) + "\n").encode() * 9 + b'{"mouse": {"x": 64'),
        "jsonl",
        10,
        "not JSON",
    ),
    "no text": (text(bytes(range(256)) * 4), "jsonl", 1, "not JSON"),
    "empty jsonl": (text(b""), "jsonl", 1, "not JSON"),
    "a list": (lines([*GOOD, []]), "jsonl", 10, "expected an object"),
    "a number": (lines([*GOOD, 3]), "jsonl", 10, "expected an object"),
    "no mouse": (lines([*GOOD, *without("mouse")]), "jsonl", 10, "mouse.buttons is missing"),
    "no keyboard": (lines([*GOOD, *without("keyboard")]), "jsonl", 10, "keyboard.keys is missing"),
    "dx as text": (
        lines([*GOOD, *mouse(dx="1")]),
        "jsonl",
        10,
        "mouse.dx is '1', expected a number",
    ),
    "dx not a number": (
        lines([*GOOD, *mouse(dx=float("nan"))]),
        "jsonl",
        10,
        "mouse.dx is 'nan', expected a number",
    ),
    "buttons as number": (
        lines([*GOOD, *mouse(buttons=0)]),
        "jsonl",
        10,
        "mouse.buttons is '0', expected a list",
    ),
    "hotbar too large": (lines([*GOOD, {**LINE, "hotbar": 9}]), "jsonl", 10, "hotbar is '9'"),
    "too few lines": (
        lines(GOOD),
        "jsonl",
        9,
        f"the file ends here, but toy.mp4 has {FRAMES} frames",
    ),
    "two lines too few": (lines([LINE] * (FRAMES - 2)), "jsonl", FRAMES - 2, "the file ends here"),
    "last line broken off, and one lacks": (
        lambda p: write_lines(p.with_suffix(".jsonl"), [LINE] * (FRAMES - 2), '{"mouse": {'),
        "jsonl",
        FRAMES - 1,
        "not JSON",
    ),
    "mp4 is text": (lambda p: p.write_text("404 Not Found"), "mp4", None, "not a readable video"),
    "mp4 is empty": (lambda p: p.write_bytes(b""), "mp4", None, "not a readable video"),
    "mp4 cut in the index": (
        lambda p: p.write_bytes(p.read_bytes()[:300]),
        "mp4",
        None,
        "not a readable video",
    ),
    "mp4 cut in the middle": (cut(0.6), "mp4", None, r"cut short, \d+ of 40 frames"),
    "mp4 cut at the end": (cut(0.999), "mp4", None, "cut short, 39 of 40 frames"),
    "mp4 damaged": (damage, "mp4", None, r"breaks at frame \d+|frame \d+ of 40 is damaged"),
}


@pytest.mark.parametrize(("spoil", "half", "line", "problem"), BAD.values(), ids=BAD)
def test_fault_is_refused_with_file_line_and_remedy(toy, spoil, half, line, problem):
    spoil(toy)
    with pytest.raises(RecordingError) as refused:
        read(toy)
    message = str(refused.value)
    place = f", line {line}: " if line else ": "
    assert message.startswith(f"{toy.with_suffix('.' + half)}{place}")
    assert re.search(problem, message)
    assert re.search(r"download|leave the recording out|give the path", message)


def test_faults_of_a_folder_are_listed_and_left_out(toy):
    for name in ("short", "lone"):
        shutil.copy(toy, toy.with_name(f"{name}.mp4"))
    write_lines(toy.with_name("short.jsonl"), GOOD)
    with pytest.raises(RecordingError, match=r"lone\.jsonl: no such file.*check_folder"):
        find_recordings(toy.parent)
    rows = {r["name"]: r for r in check_folder(toy.parent, progress=False)}
    assert {n: r["used"] for n, r in rows.items()} == {"lone": False, "short": False, "toy": True}
    assert "lone.jsonl: no such file" in rows["lone"]["why"]
    assert "line 9" in rows["short"]["why"]
    assert (rows["toy"]["frames"], rows["toy"]["gaps"]) == (FRAMES, 0)
    assert find_recordings(toy.parent) == [toy]
    toy.unlink()
    check_folder(toy.parent, progress=False)
    with pytest.raises(RecordingError, match="none of the 3 recordings can be used"):
        find_recordings(toy.parent)
    (toy.parent / "checked.json").write_text("{")
    with pytest.raises(RecordingError, match="delete it"):
        find_recordings(toy.parent)


def test_damage_within_a_frame_is_found_by_decoding(toy):
    damage(toy)
    assert check_recording(toy)["used"]
    assert not check_recording(toy, decode=True)["used"]
    assert check_folder(toy.parent, progress=False)[0]["used"]
    assert not check_folder(toy.parent, decode=True, progress=False)[0]["used"]
    assert not check_folder(toy.parent, progress=False)[0]["used"]  # what decoding found is kept


@pytest.mark.parametrize(
    ("field", "values", "remark"),
    [
        ("tick", [*range(20), *range(10, 30)], "tick goes back after line 20"),
        ("milli", [50 * t - 900 * (t > 8) for t in range(FRAMES)], "milli goes back after line 9"),
        ("yaw", [None] * FRAMES, "lines without yaw, pitch, xpos, ypos, zpos, tick"),
    ],
)
def test_oddities_are_remarked(toy, field, values, remark):
    write_lines(toy.with_suffix(".jsonl"), [{**LINE, field: v} for v in values])
    row = check_recording(toy)
    assert row["used"]
    assert any(remark in r for r in row["remarks"])
    assert row["gaps"] == (field != "yaw")


@given(st.integers(0, 2**32))
@settings(
    max_examples=repeats(25, 150),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_mutated_lines_open_or_are_refused_by_name(toy, seed):
    "Bytes overwritten, cut or repeated: the lines can be read, or the error names file and line."
    random, path = np.random.default_rng(seed), toy.with_suffix(".jsonl")
    path.write_bytes(pairs.mutated(LINES, random))
    try:
        recording = open_recording(toy)
    except RecordingError as e:
        message = str(e)
        assert re.match(rf"{re.escape(str(path))}, line \d+: .*(download|leave)", message)
        return
    assert len(recording) == FRAMES
    assert np.isfinite(recording.actions).all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(
        [
            "mouse",
            "keyboard",
            "isGuiOpen",
            "hotbar",
            "yaw",
            "tick",
            "milli",
            "teleported",
            "mouse.x",
            "mouse.dx",
            "mouse.dwheel",
            "mouse.buttons",
            "mouse.newButtons",
            "keyboard.keys",
            "keyboard.newKeys",
        ]
    ),
    JSON,
    st.integers(0, FRAMES - 1),
)
@settings(
    max_examples=repeats(50, 300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_value_in_a_field_opens_or_is_refused_by_name(toy, field, value, at):
    rows = [json.loads(json.dumps(LINE)) for _ in range(FRAMES)]
    *outer, name = field.split(".")
    parent = rows[at][outer[0]] if outer else rows[at]
    parent[name] = value
    path = toy.with_suffix(".jsonl")
    write_lines(path, rows)
    try:
        recording = open_recording(toy)
    except RecordingError as e:
        message = str(e)
        assert re.match(rf"{re.escape(str(path))}, line \d+: ", message)
        return
    assert np.isfinite(recording.actions).all()
    check_recording(toy)
    list(recording.frames(16, 16))


LINES = "".join(json.dumps(LINE) + "\n" for _ in range(FRAMES)).encode()


MUTATE = """
import faulthandler
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, sys.argv[1])
faulthandler.enable()
from minecraft_jepa.data.recordings import RecordingError, open_recording
from pairs import mutated

path, random = Path(sys.argv[2]), np.random.default_rng(int(sys.argv[3]))
original, num_refused, num_tried = path.read_bytes(), 0, int(sys.argv[4])
for i in range(num_tried):
    head = original[:64] if i % 3 else b""  # some keep the first box
    path.write_bytes(head + mutated(original[len(head):], random))
    try:
        for _ in open_recording(path).frames(16, 16):
            pass
    except RecordingError as e:
        assert str(path.with_suffix("")) in str(e), e
        num_refused += 1
print(num_refused, num_tried)
"""


@pytest.mark.parametrize(("name", "many"), [("toy", repeats(30, 150)), (NAMES[0], repeats(10, 40))])
def test_mutated_video_is_refused_by_name(toy, name, many):
    """In a process of its own, with a time limit: a crash or a hang would show.

    Damage that changes no packet's length may also decode.
    """
    if name != "toy":
        for suffix in (".mp4", ".jsonl"):
            shutil.copy(DATA / f"{name}{suffix}", toy.parent)
    video = toy.with_name(f"{name}.mp4")
    process = subprocess.run(
        [sys.executable, "-c", MUTATE, str(Path(__file__).parent), str(video), "0", str(many)],
        cwd=DATA.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    num_refused, num_tried = map(int, process.stdout.split())
    assert num_tried == many
    assert num_refused > many / 4


def test_good_recording_opens_by_either_half_or_neither(toy):
    for path in (toy, toy.with_suffix(".jsonl"), toy.with_suffix(""), str(toy)):
        recording = open_recording(path)
        assert (recording.name, recording.path, len(recording)) == ("toy", toy, FRAMES)
    assert [f.shape for f in recording.frames()] == [(48, 64, 3)] * FRAMES
    assert [f.shape for f in recording.frames(12, 20)] == [(12, 20, 3)] * FRAMES


@pytest.mark.parametrize("spare", [1, 5, 20])
def test_lines_beyond_the_last_frame_are_dropped(toy, spare):
    write_lines(toy.with_suffix(".jsonl"), [*mouse(dx=2.0) * FRAMES, *mouse(dx=9.0) * spare])
    recording = open_recording(toy)
    assert len(recording) == len(read(toy)) == FRAMES
    assert len(recording.actions) == len(recording.teleported) == FRAMES
    assert np.allclose(recording.actions[:, DX], 0.3)


CONVERTED = {  # ticks that the video shows, seconds between them -> what the message says
    "each second frame at 10 Hz": (range(0, 100, 2), 0.1, "50 frames, 0.1 s apart for 100 lines"),
    "start cut off": (range(50, 100), 0.05, "50 frames for 100 lines: the video was cut"),
    "some frames left out": (
        [*range(30), *range(42, 100)],
        None,
        "out, after frame 29 first",
    ),
    "one frame left out": (
        [*range(30), *range(31, 100)],
        None,
        "out, after frame 29 first",
    ),
    "19 frames a second": (range(95), 1 / 19, "95 frames, 0.053 s apart for 100 lines"),
    "40 frames a second": ([t // 2 for t in range(200)], 0.025, "200 frames, 0.025 s apart; take"),
}


@pytest.mark.parametrize(("ticks", "step", "message"), CONVERTED.values(), ids=CONVERTED)
def test_converted_video_is_refused_as_its_lines_belong_to_other_frames(
    tmp_path, ticks, step, message
):
    ticks = list(ticks)
    seconds = [tick / 20 if step is None else step * i for i, tick in enumerate(ticks)]
    pairs.write_video(tmp_path / "a.mp4", len(ticks), seconds=seconds)
    pairs.write_lines(tmp_path / "a.jsonl", [pairs.line(t) for t in range(100)])
    row = check_recording(tmp_path / "a")
    assert not row["used"]
    assert message in row["why"]
    assert "as it was recorded" in row["why"]


TIMES = {  # seconds of the frames -> lines, what is remarked
    "no jump in spite of spare lines": ([t / 20 for t in range(60)], 65, "5 lines beyond"),
    "a clock that trembles": ([t / 20 + 0.004 * (t % 3) for t in range(60)], 61, "1 lines beyond"),
    "a jump, but a line for each frame": ([t / 20 + (t > 30) for t in range(60)], 60, None),
    "a jump that no line tells of": ([t / 20 + 9 * (t > 30) for t in range(60)], 62, "2 lines"),
    "another rate, but a line for each frame": ([t / 25 for t in range(60)], 60, "0.04 s apart"),
    "another rate, one line fewer": ([t / 10 for t in range(60)], 59, "0.1 s apart"),
}


@pytest.mark.parametrize(("seconds", "num_lines", "remark"), TIMES.values(), ids=TIMES)
def test_odd_timestamps_cost_no_recording_whose_counts_agree(tmp_path, seconds, num_lines, remark):
    pairs.write_video(tmp_path / "a.mp4", 60, seconds=seconds)
    pairs.write_lines(tmp_path / "a.jsonl", [pairs.line(t) for t in range(num_lines)])
    row = check_recording(tmp_path / "a", decode=True)
    assert row["used"], row["why"]
    assert row["frames"] == 60
    assert any(remark in r for r in row["remarks"]) if remark else not row["remarks"]


def test_basalt_lines_open(toy):
    "BASALT recordings hold mouse, keyboard, hotbar and isGuiOpen, no state."
    write_lines(toy.with_suffix(".jsonl"), [LINE] * FRAMES)
    recording = open_recording(toy)
    assert set(recording.state) == {"hotbar", "isGuiOpen"} and not recording.teleported.any()


def test_state_is_read_where_all_lines_have_it(toy):
    rows = [{**LINE, "yaw": t, "pitch": 1.5, "xpos": 1.0, "zpos": None} for t in range(FRAMES)]
    del rows[0]["xpos"]
    write_lines(toy.with_suffix(".jsonl"), rows)
    state = open_recording(toy).state
    assert list(state) == ["yaw", "pitch", "hotbar", "isGuiOpen"]
    assert state["yaw"].tolist() == list(range(FRAMES))


def test_typed_characters_split_no_line(toy):
    """U+2028 and U+0085 end a line for Python, but may stand in a JSON string.

    A byte that is not UTF-8 came in where a player's chat was cut.
    """
    keyboard = {**LINE["keyboard"], "chars": "a\u2028b\u0085c"}
    line = json.dumps({**LINE, "keyboard": keyboard}, ensure_ascii=False).encode()
    line = line.replace(b"\xc2\x85c", b"\xc2\x85\xe2")
    toy.with_suffix(".jsonl").write_bytes(b"\r\n".join([line] * FRAMES) + b"\r\n")
    assert len(open_recording(toy)) == FRAMES


def test_teleports_and_missing_ticks_are_marked(toy):
    ticks = [t + 3 * (t > 20) for t in range(FRAMES)]
    write_lines(
        toy.with_suffix(".jsonl"),
        [{**LINE, "tick": t, "teleported": i == 7} for i, t in enumerate(ticks)],
    )
    assert np.flatnonzero(open_recording(toy).teleported).tolist() == [7, 20]


def test_cursor_is_painted_where_a_screen_is_open(toy):
    without_screen = read(toy)
    cursor = {**LINE["mouse"], "x": 320.0, "y": 540.0}  # a quarter and three quarters in
    rows = [{**LINE, "isGuiOpen": t >= 20, "mouse": cursor} for t in range(FRAMES)]
    write_lines(toy.with_suffix(".jsonl"), rows)
    changed = [np.argwhere((a != b).any(2)) for a, b in zip(without_screen, read(toy))]
    assert not any(len(pixels) for pixels in changed[:20])
    for pixels in changed[20:]:
        assert pixels.min(0) == pytest.approx([36, 16], abs=1)
        assert (pixels.max(0) - pixels.min(0) < 8).all()


def test_frames_are_rgb_and_area_averaged():
    recording = open_recording(DATA / f"{NAMES[0]}.mp4")
    full = next(recording.frames()).astype(float)
    small = next(recording.frames(30, 40)).astype(float)
    assert full.shape == (90, 160, 3)
    sky = full[:12].mean((0, 1))
    assert sky[2] > sky[0] + 20  # blue last
    averaged = full.reshape(30, 3, 40, 4, 3).mean((1, 3))
    assert np.abs(small - averaged).mean() < 2 < np.abs(small - full[1::3, 2::4]).mean()


@pytest.mark.parametrize("name", NAMES)
def test_bundled_recordings_are_whole(name):
    recording = open_recording(DATA / name)
    assert len(recording) == (600 if int(name[6:9]) <= 348 else 240)
    assert set(recording.state) == set(STATE_FIELDS)
    assert (DATA / f"{name}.jsonl").read_bytes().count(b"\n") == len(recording)
    yaw_change = (np.diff(recording.state["yaw"]) + 180) % 360 - 180
    gui_open = recording.state["isGuiOpen"].astype(bool)  # then the mouse moves the cursor
    turns_camera = ~recording.teleported[:-1] & ~gui_open[:-1] & ~gui_open[1:]
    assert turns_camera.mean() > 0.5
    # the line holds the state before its action
    dx = recording.actions[:-1, DX]
    assert np.allclose(yaw_change[turns_camera], dx[turns_camera], atol=0.02)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (
            "cheeky-cornflower-setter-02e496ce4abb-20220421-092639",
            "cheeky-cornflower-setter-02e496ce4abb",
        ),
        ("Player123-f153ac423f61-20210916-150500", "Player123-f153ac423f61"),
        ("a_b-f153ac423f61-20210916-150500", "a_b-f153ac423f61"),
        ("world-201_0837", "world-201"),
        ("world-209", "world-209"),
        ("my_long_name_3", "my_long_name"),
        ("_3", "_3"),
    ],
)
def test_group_of_a_name(name, group):
    assert session_of(name) == group


def test_no_group_of_the_sample_is_in_two_splits():
    splits = load_split(DATA)
    assert sorted(chain(*splits.values())) == NAMES
    groups = {split: {session_of(name) for name in names} for split, names in splits.items()}
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
    test_worlds = (*range(321, 325), *range(345, 349), *range(701, 709))
    assert groups["test"] == {f"world-{world}" for world in test_worlds}


@settings(max_examples=repeats(30, 100))
@given(
    st.sets(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=25),
    st.integers(0, 2**32),
)
def test_no_group_is_assigned_to_two_splits(tmp_path_factory, pieces, seed):
    folder = tmp_path_factory.mktemp("folder")
    names = sorted(f"w{w}_{piece}" for w, piece in pieces)
    for n in names:
        for suffix in (".mp4", ".jsonl"):
            (folder / f"{n}{suffix}").touch()
    if len({session_of(n) for n in names}) < 3:
        with pytest.raises(RecordingError, match="at least 3"):
            load_split(folder, seed)
        return
    splits = load_split(folder, seed)
    assert list(splits) == list(SPLITS)
    assert all(splits.values())
    assert sorted(chain(*splits.values())) == names
    groups = [{session_of(name) for name in split_names} for split_names in splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert splits == load_split(folder, seed)


def remarks(path):
    return check_recording(path)["remarks"]


@pytest.mark.parametrize(("lines", "spare"), [(FRAMES, 0), (FRAMES - 1, 1)])
def test_last_frame_needs_no_line(tmp_path, lines, spare):
    """A contractor's recording has as many lines as frames, or one fewer.

    Its last frame is the target of its last action.
    """
    recording = open_recording(pairs.make_pair(tmp_path, "toy", FRAMES, lines))
    assert len(recording) == len(list(recording.frames())) == len(recording.lines) == FRAMES
    assert recording.actions.shape == (FRAMES, 28) and recording.teleported.shape == (FRAMES,)
    assert pairs.ticks_of(recording.actions[: FRAMES - 1]) == list(range(FRAMES - 1))
    assert not recording.teleported[:-1].any() and recording.spare_frames == spare
    assert {len(v) for v in recording.state.values()} == {FRAMES} and "yaw" in recording.state
    row = check_recording(tmp_path / "toy")
    assert (row["used"], row["frames"], row["lines"], row["gaps"]) == (True, FRAMES, lines, 0)
    assert any("last frame has no line" in r for r in row["remarks"]) == bool(spare)
    if spare:
        assert np.array_equal(recording.actions[-1], NOOP) and recording.teleported[-1]
        assert recording.state["yaw"][-1] == recording.state["yaw"][-2]


def test_a_line_of_zeros_keeps_its_place(tmp_path):
    path = pairs.make_pair(tmp_path, "toy", FRAMES).with_suffix(".jsonl")
    lines = path.read_bytes().split(b"\n")
    lines[7] = bytes(len(lines[7]))  # as a crash leaves a block that was not written
    path.write_bytes(b"\n".join(lines) + bytes(99))  # what pads the end is no line
    recording = open_recording(path)
    assert [*recording.faults] == [7] and recording.spare_frames == 0
    assert pairs.ticks_of(recording.actions[8:]) == [*range(8, FRAMES)]
    assert recording.teleported[7]


@pytest.mark.parametrize("num_lines", [FRAMES, FRAMES - 1])
def test_zeros_that_pad_between_lines_move_no_action(tmp_path, num_lines):
    path = pairs.make_pair(tmp_path, "toy", FRAMES, num_lines).with_suffix(".jsonl")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:7], bytes(99), *lines[7:]]))  # two parts, one padded
    recording = open_recording(path)
    assert not recording.faults and recording.spare_frames == FRAMES - num_lines
    assert pairs.ticks_of(recording.actions[:num_lines]) == [*range(num_lines)]


def test_a_line_that_may_be_missing_is_told(tmp_path):
    path = pairs.make_pair(tmp_path, "toy", FRAMES).with_suffix(".jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7] + lines[8:]))
    assert any("by two after line 7: if a line is missing" in text for text in remarks(path))
    path.write_text("".join(lines[:-1]))
    assert not any("missing" in text for text in remarks(path))


def test_a_file_that_cannot_be_read_is_told_and_the_others_are_used(tmp_path, monkeypatch):
    for name in ("r0", "r1"):
        pairs.make_pair(tmp_path, name, FRAMES)
    read_bytes = Path.read_bytes

    def refuse_one(path):
        if path.name == "r0.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse_one)
    refused_one, used = check_folder(tmp_path, progress=False, workers=1)
    assert used["used"] and not refused_one["used"]
    assert "r0.jsonl: can't be read (Permission denied)" in refused_one["why"]


def test_a_long_name_of_separators_and_words_is_read_at_once():
    for name in ("a" + "---cut" * 33 + "x", "a" + "-cut.123" * 24 + "x"):
        assert session_of(name) == name
    assert session_of("world-7_clip - 3 (1).002 part-") == session_of("world-7")


def test_check_folder_uses_what_has_one_line_fewer(tmp_path):
    for i, lines in enumerate((FRAMES, FRAMES - 1, FRAMES - 2)):
        pairs.make_pair(tmp_path, f"r{i}", FRAMES, lines)
    assert [r["used"] for r in check_folder(tmp_path, decode=True, progress=False)] == [
        True,
        True,
        False,
    ]
    assert [p.stem for p in find_recordings(tmp_path)] == ["r0", "r1"]


def test_rows_of_older_rules_hold_no_more(tmp_path):
    "What was left out before a spare frame was kept is not left out for ever."
    pairs.make_pair(tmp_path, "toy", FRAMES, FRAMES - 1)
    check_folder(tmp_path, progress=False)
    path = tmp_path / "checked.json"
    checks_file = json.loads(path.read_text())
    checks_file["recordings"]["toy"]["used"] = False
    path.write_text(json.dumps(checks_file))
    assert not read_checks(tmp_path)["toy"]["used"]
    path.write_text(json.dumps(checks_file | {"version": checks_file["version"] - 1}))
    assert read_checks(tmp_path) == {}
    assert check_folder(tmp_path, progress=False)[0]["used"]


def gone(field):
    return {k: v for k, v in pairs.line(7).items() if k != field}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({**pairs.line(7), "mouse": None}, "mouse is 'None'"),
        ({**pairs.line(7), "keyboard": None}, "keyboard is 'None'"),
        (gone("mouse"), "mouse.buttons is missing"),
        (gone("keyboard"), "keyboard.keys is missing"),
        ({}, "is missing"),
        (None, "the line is 'None'"),
        (
            {**pairs.line(7), "mouse": {**pairs.line()["mouse"], "dx": math.nan}},
            "mouse.dx is 'nan'",
        ),
        ({**pairs.line(7), "keyboard": {"keys": None}}, "keyboard.keys is 'None'"),
        ({**pairs.line(7), "hotbar": 9}, "hotbar is '9'"),
    ],
)
@pytest.mark.parametrize("at", [0, 7, FRAMES - 1])
def test_tick_without_its_action_is_a_gap(tmp_path, broken, message, at):
    if broken is not None:
        state = {k: v for k, v in pairs.line(at).items() if k in broken}
        broken = state | {k: v for k, v in broken.items() if k in ("mouse", "keyboard", "hotbar")}
    rows = [broken if t == at else pairs.line(t) for t in range(FRAMES)]
    path = pairs.make_pair(tmp_path, "toy", FRAMES, rows=rows)
    recording = open_recording(path)
    assert any(message in r and f"line {at + 1}" in r for r in remarks(path))
    assert recording.teleported[at]
    assert np.array_equal(recording.actions[at], NOOP)
    # a line without state or time, or with a wrong slot, is a frame that no window holds
    no_state = broken is None or "tick" not in broken or "hotbar is" in message
    gaps = {at - 1, at} if no_state else {at}
    assert set(np.flatnonzero(recording.teleported)) <= gaps
    assert list(pairs.ticks_of(recording.actions)) == [0 if t == at else t for t in range(FRAMES)]


def test_ticks_without_action_are_counted(tmp_path):
    rows = [pairs.line(t) for t in range(FRAMES)]
    for t in (3, 9, 30):
        rows[t]["mouse"] = None
    path = pairs.make_pair(tmp_path, "toy", FRAMES, rows=rows)
    assert any("3 lines (line 4 first)" in r for r in remarks(path))
    assert check_recording(path)["gaps"] == 3


@pytest.mark.parametrize("good", [0, 1])
def test_recording_without_actions_is_refused_plainly(tmp_path, good):
    rows = [pairs.line(t) for t in range(good)]
    rows += [pairs.line(t, mouse=None) for t in range(good, FRAMES)]
    row = check_recording(pairs.make_pair(tmp_path, "toy", FRAMES, rows=rows))
    assert not row["used"]
    assert f"line {good + 1}: mouse is 'None'" in row["why"]
    assert f"({FRAMES - good} of {FRAMES} lines" in row["why"]
    assert "leave the recording out" in row["why"]
    assert "download it again" not in row["why"]


@pytest.mark.parametrize("field", ["tick", "milli", "yaw", "zpos", "isGuiOpen"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1e999", "null", '"NaN"'])
def test_number_that_is_none_is_a_gap(tmp_path, field, value):
    "In clock or state: no window holds that frame, the others stay, and the state is finite."
    rows = [json.dumps(pairs.line(t)) for t in range(FRAMES)]
    rows[20] = json.dumps(pairs.line(20, **{field: "HERE"})).replace('"HERE"', value)
    path = pairs.make_pair(tmp_path, "toy", FRAMES, rows=rows)
    recording = open_recording(path)
    assert np.flatnonzero(recording.teleported).tolist() == [19, 20]
    assert set(recording.state) == set(STATE_FIELDS)
    assert all(np.isfinite(v).all() for v in recording.state.values())
    assert any("line 21" in r for r in remarks(path))
    assert check_recording(path)["gaps"] == 2


def test_clock_that_most_lines_lack_is_none(tmp_path):
    rows = [pairs.line(0), *(pairs.line(t, tick=...) for t in range(1, FRAMES))]
    path = pairs.make_pair(tmp_path, "toy", FRAMES, rows=rows)
    assert not open_recording(path).teleported.any()
    assert any("lines without tick" in r for r in remarks(path))


ONE = json.dumps(LINE).encode()
ODD_BYTES = {
    "BOM": b"\xef\xbb\xbf" + (ONE + b"\n") * FRAMES,
    "BOM and CRLF": b"\xef\xbb\xbf" + (ONE + b"\r\n") * FRAMES,
    "a BOM in each line": (b"\xef\xbb\xbf" + ONE + b"\n") * FRAMES,
    "UTF-16": ((ONE + b"\r\n") * FRAMES).decode().encode("utf-16"),
    "blank lines": b"\n \r\n" + (ONE + b"\n\n\t\n") * FRAMES,
    "no last newline": (ONE + b"\n") * (FRAMES - 1) + ONE,
    "control characters": (ONE.replace(b'"chars": ""', b'"chars": "\x16\t\x00"') + b"\n") * FRAMES,
    "zeros at the end": (ONE + b"\n") * FRAMES + bytes(100),
    "last line broken off": (ONE + b"\n") * (FRAMES - 1) + ONE[:40],
    "broken beyond the last frame": (ONE + b"\n") * FRAMES + ONE[:40],
}


@pytest.mark.parametrize("raw", ODD_BYTES.values(), ids=ODD_BYTES)
def test_odd_bytes_cost_no_recording(toy, raw):
    toy.with_suffix(".jsonl").write_bytes(raw)
    recording = open_recording(toy)
    assert len(recording) == FRAMES
    assert recording.spare_frames == (raw == ODD_BYTES["last line broken off"])
    assert np.allclose(recording.actions[:-1, DX], 0.15)


def test_numbers_of_lines_count_blank_ones(toy):
    toy.with_suffix(".jsonl").write_bytes(
        (ONE + b"\n\n") * 9 + b'{"mouse": \n' + (ONE + b"\n") * FRAMES
    )
    with pytest.raises(RecordingError, match="jsonl, line 19: not JSON"):
        open_recording(toy)


def test_without_isGuiOpen_there_is_no_cursor(tmp_path):
    mouse = pairs.line()["mouse"] | {"x": 1270.0, "y": 10.0}
    rows = [pairs.line(t, isGuiOpen=..., mouse=mouse) for t in range(5)]
    recording = open_recording(pairs.make_pair(tmp_path, "toy", 5, rows=rows))
    assert (recording.actions[:, CURSOR] == 0.5).all()
    assert np.ptp(next(recording.frames())) == 0


def cursor_pixels(path):
    "Rows and columns of the cursor's pixels in each frame, which is grey otherwise."
    pixels = []
    for frame in open_recording(path).frames():
        difference = abs(frame.astype(int) - int(np.median(frame))).max(2)
        pixels.append(np.argwhere(np.ptp(frame, 2) + difference > 20))
    return pixels


def test_cursor_of_a_frame_without_a_line(tmp_path):
    "It is where the last action leaves it; with no action nobody knows: no window holds the frame."
    mouse = pairs.line()["mouse"] | {"x": 320.0, "y": 360.0, "dx": 320.0}
    rows = [pairs.line(t, isGuiOpen=True, mouse=mouse) for t in range(4)]
    path = pairs.make_pair(tmp_path, "toy", 5, rows=rows)
    first, *others = [pixels.min(0) for pixels in cursor_pixels(path)]
    assert first == pytest.approx([24, 20], abs=3)
    # a quarter of 80 pixels to the right in the last frame
    assert [(corner - first).tolist() for corner in others] == [[0, 0]] * 3 + [[0, 20]]

    rows[3] = pairs.line(3, isGuiOpen=True, mouse=mouse, keyboard={"keys": ["key.keyboard.e"]})
    pairs.write_lines(path.with_suffix(".jsonl"), rows)  # the last action closes the screen
    assert [len(pixels) > 0 for pixels in cursor_pixels(path)] == [True] * 4 + [False]

    rows = [pairs.line(t, isGuiOpen=True, mouse=None if t == 2 else mouse) for t in range(5)]
    pairs.write_lines(path.with_suffix(".jsonl"), rows)
    assert np.flatnonzero(open_recording(path).teleported).tolist() == [1, 2]
    assert len(cursor_pixels(path)[2]) == 0


@pytest.mark.parametrize("lines", [20, 19])
def test_frames_that_an_edit_list_hides_are_not_missed(tmp_path, lines):
    "As `ffmpeg -ss ... -c copy` cuts: the packets before the cut stay in the file."
    pairs.write_video(tmp_path / "long.mp4", 60, "libx264", g="60", bf="0")
    with (
        av.open(str(tmp_path / "long.mp4")) as long,
        av.open(str(tmp_path / "cut.mp4"), "w", format="mp4") as cut,
    ):
        source = long.streams.video[0]
        target = cut.add_stream_from_template(source)
        packets = [packet for packet in long.demux(source) if packet.size]
        step = packets[1].pts - packets[0].pts
        for packet in packets:
            packet.pts -= 40 * step
            packet.dts -= 40 * step
            packet.stream = target
            cut.mux(packet)
    pairs.write_lines(tmp_path / "cut.jsonl", [pairs.line(t) for t in range(lines)])
    row = check_recording(tmp_path / "cut.mp4", decode=True)
    assert row["used"] and row["frames"] == 20
    shades = [int(f.mean()) for f in open_recording(tmp_path / "cut.mp4").frames()]
    assert shades == pytest.approx([4 * t for t in range(40, 60)], abs=6)


def test_hidden_files_are_no_recordings(toy):
    for name in ("._toy.mp4", "._toy.jsonl", ".x.mp4", ".DS_Store", ".part"):
        toy.with_name(name).write_bytes(b"\0\5\26\7")
    toy.with_name("folder.mp4").mkdir()
    assert find_recordings(toy.parent) == [toy]
    assert [row["name"] for row in check_folder(toy.parent, progress=False)] == ["toy"]


def test_endings_in_capitals_are_taken(toy):
    video_path = toy.rename(toy.with_suffix(".MP4"))
    lines_path = toy.with_suffix(".jsonl").rename(toy.with_suffix(".JSONL"))
    assert find_recordings(toy.parent) == [video_path]
    for path in (video_path, lines_path, toy, toy.with_suffix("")):
        assert open_recording(path).name == "toy"
    assert check_folder(toy.parent, progress=False)[0]["used"]
    assert read_checks(toy.parent)["toy"]["files"][1]


def test_missing_folder_is_named(tmp_path):
    for call in (find_recordings, check_folder, load_split):
        with pytest.raises(RecordingError, match="none: no such folder"):
            call(tmp_path / "none")


WHOLE = "cheeky-cornflower-setter-02e496ce4abb-20220421-092639"


@pytest.mark.parametrize(
    "end",
    [
        "",
        "_0740",
        ".chunk_000",
        "-part2",
        "_part_2",
        " (1)",
        ".000",
        "-clip-3",
        "_0740.chunk_001",
        ".seg12",
        "_copy",
        "b",
        "-trimmed",
        ".cut_1.part2",
    ],
)
def test_pieces_stay_with_their_session(end):
    assert session_of(WHOLE + end) == "cheeky-cornflower-setter-02e496ce4abb"
    if end not in ("b", "-trimmed"):
        assert session_of("match 7" + end) == "match 7"


@pytest.mark.parametrize("name", ["world-209", "part2", "2022-01-05", "clip", "copy", "_3"])
def test_names_that_only_look_like_pieces(name):
    assert session_of(name) == name


@pytest.mark.parametrize("file", ["split.json", "manifest.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_splits_are_read_with_a_byte_order_mark(tmp_path, file, encoding):
    for name in "abc":
        pairs.make_pair(tmp_path, name, 2)
    splits = dict(zip(SPLITS, (["a"], ["b"], ["c"])))
    rows = {name: {"side": split, "url": ""} for split, (name,) in splits.items()}
    content = splits if file == "split.json" else {"recordings": rows}
    path = tmp_path / file
    path.write_bytes(json.dumps(content).encode(encoding))
    assert load_split(tmp_path) == splits
    path.write_text("{")
    with pytest.raises(RecordingError, match=f"{file}, line 1: not JSON"):
        load_split(tmp_path)
    path.write_text("[]")
    with pytest.raises(RecordingError, match=f"{file}: "):
        load_split(tmp_path)


@pytest.mark.parametrize(
    ("version", "factor"),
    [("5.7", "0.5"), ("6.9", "2"), ("6.13", None), ("7.6", None), ("16.9", None), ("10.0", None)],
)
@pytest.mark.parametrize("screen", [True, False])
def test_mouse_on_a_screen_of_old_recorders_is_remarked(tmp_path, version, factor, screen):
    rows = [pairs.line(t, isGuiOpen=screen) for t in range(4)]
    path = pairs.make_pair(tmp_path, "toy", 4, rows=rows)
    row = {"url": f"https://example.org/x/data/{version}/toy.mp4", "side": "train"}
    (tmp_path / "manifest.json").write_text(json.dumps({"recordings": {"toy": row}}))
    version_remarks = [r for r in remarks(path) if "recorder version" in r]
    assert len(version_remarks) == (factor is not None and screen)
    for remark in version_remarks:
        assert f"version {version}" in remark
        assert f"x {factor};" in remark
        assert "not scaled (4 ticks)" in remark


def test_folder_that_may_only_be_read_keeps_its_checks_in_the_cache(
    toy, tmp_path_factory, monkeypatch
):
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
    toy.with_name("lone.mp4").write_bytes(b"")
    real = checks.write_json

    def refuse(path, value):
        if path.parent == toy.parent:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, value)

    monkeypatch.setattr(checks, "write_json", refuse)
    for _ in range(2):
        assert [r["used"] for r in check_folder(toy.parent, progress=False)] == [False, True]
    assert find_recordings(toy.parent) == [toy] and not (toy.parent / "checked.json").exists()
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", str(toy))  # no cache either
    with pytest.warns(UserWarning, match="can't be written.*MINECRAFT_JEPA_CACHE"):
        assert len(check_folder(toy.parent, progress=False)) == 2


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("~/x", "HOME/x"),
        ("$HOME/x", "HOME/x"),
        ("${HOME}/x", "HOME/x"),
        ("here/x", "CWD/here/x"),
        ("", "HOME/.cache/minecraft_jepa"),
        (" ", "HOME/.cache/minecraft_jepa"),
        (None, "HOME/.cache/minecraft_jepa"),
    ],
)
def test_cache_is_where_a_shell_would_say(tmp_path, monkeypatch, setting, expected):
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if setting is None:
        monkeypatch.delenv("MINECRAFT_JEPA_CACHE")
    else:
        monkeypatch.setenv("MINECRAFT_JEPA_CACHE", setting)
    expected = expected.replace("HOME", str(tmp_path / "home"))
    assert str(cache_root()) == expected.replace("CWD", str(tmp_path / "cwd"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("FILE", "is a file"),
        ("FILE/x", "is a file"),
        ("$UNSET_VARIABLE/x", "is not set"),
        ("s3://bucket/x", "is a URL"),
    ],
)
def test_cache_that_cannot_be_is_told(toy, monkeypatch, setting, message):
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", setting.replace("FILE", str(toy)))
    with pytest.raises(ValueError, match=message + ".*MINECRAFT_JEPA_CACHE"):
        cache_root()


def test_without_a_home_the_cache_is_asked_for(monkeypatch):
    monkeypatch.delenv("MINECRAFT_JEPA_CACHE")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ValueError, match="set MINECRAFT_JEPA_CACHE"):
        cache_root()
    assert find_recordings(DATA)  # needs no cache


def test_a_folder_without_a_split_keeps_each_player_in_one_split(tmp_path):
    names = [
        f"made-up-player{p}-{12 * p + s:012x}-20220101-000000" for p in range(5) for s in range(4)
    ]
    (tmp_path / "v").mkdir()
    for n in names:
        for suffix in (".mp4", ".jsonl"):
            (tmp_path / "v" / f"{n}{suffix}").touch()
    for seed in range(3):
        splits = load_split(tmp_path / "v", seed)
        players = [{name.rsplit("-", 3)[0] for name in names} for names in splits.values()]
        assert all(players)
        assert sum(map(len, players)) == 5
    for n in names[8:]:  # two players are left
        for suffix in (".mp4", ".jsonl"):
            (tmp_path / "v" / f"{n}{suffix}").unlink()
    with pytest.warns(UserWarning, match="2 player.* split by session"):
        assert all(load_split(tmp_path / "v").values())


def test_cursor_is_sixteen_pixels_high_in_360_and_cut_off_at_the_border():
    frame = np.full((360, 640, 3), 130, np.uint8)
    draw_cursor(frame, 0.25, 0.5)
    rows, columns = np.nonzero((frame != 130).any(2))
    assert (rows.min(), columns.min(), rows.max()) == (180, 160, 195)
    assert (frame == 255).any() and (frame == 0).any()
    for x, y in ((0, 0), (1, 1), (0.999, 0.5)):
        draw_cursor(frame, x, y)


def test_recording_that_is_nowhere_asks_for_its_path(tmp_path):
    with pytest.raises(RecordingError, match=r"none\.mp4: no such file; give the path of NAME"):
        find_pair(tmp_path / "none")


def test_count_of_ticks_that_starts_anew_is_a_gap(tmp_path):
    "Two halves of a recording, each without ticks 3 and 4."
    rows = [pairs.line(t) for t in (*range(3), *range(5, 9))] * 2
    recording = open_recording(pairs.make_pair(tmp_path, "toy", len(rows), rows=rows))
    assert np.flatnonzero(recording.teleported).tolist() == [2, 6, 9]


def test_size_that_is_no_whole_number_is_named(toy):
    with pytest.raises(ValueError, match=r"height=1\.5 must be a whole number"):
        next(open_recording(toy).frames(1.5, 8))
    with pytest.raises(ValueError, match="width=0 must be at least 1"):
        next(open_recording(toy).frames(8, 0))


PLAYERS = [f"p{p}-{s:012x}-20220101-00000{i}" for p in range(9) for s in range(5) for i in range(3)]


@pytest.mark.parametrize("by", ["session", "player"])
def test_shares_of_the_splits_are_about_those_asked_for(by):
    splits = assign_splits(PLAYERS, seed=3, by=by)
    groups = [{getattr(parse_name(name), by) for name in names} for names in splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    for split in ("validation", "test"):
        assert 0.05 < len(splits[split]) / len(PLAYERS) < 0.2


def test_groups_that_were_assigned_before_stay_where_they_are():
    before = assign_splits(PLAYERS[:60], seed=3)
    fixed = {name: split for split, names in before.items() for name in names}
    splits = assign_splits(PLAYERS, seed=3, fixed=fixed)
    assert all(name in splits[split] for name, split in fixed.items())


def test_a_split_without_a_movable_group_is_named():
    names = ["a_0", "b_0", "c_0"]
    with pytest.raises(RecordingError, match="no session is left for"):
        assign_splits(names, fixed=dict.fromkeys(names, "train"))


def test_wrong_arguments_of_a_split_are_named():
    with pytest.raises(ValueError, match="choose 'session'"):
        assign_splits(PLAYERS, by="day")
    with pytest.raises(ValueError, match=r"between 0 and 0\.5"):
        assign_splits(PLAYERS, share=0.6)
    with pytest.raises(RecordingError, match=r"2 session\(s\), at least 3"):
        assign_splits(["a_0", "a_1", "b_0"])


@pytest.fixture
def folder(tmp_path):
    "Six recordings of five sessions."
    for name in ("a_0", "a_1", "b_0", "c_0", "d_0", "e_0"):
        pairs.make_pair(tmp_path, name, 2)
    return tmp_path


GOOD_SPLIT = {"train": ["a_0", "a_1", "b_0"], "validation": ["c_0"], "test": ["d_0", "e_0"]}


def write_split(folder, splits):
    (folder / "split.json").write_text(json.dumps(splits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ["a_0", "b_0"], "validation": ["a_1", "c_0"]}, "would leak"),
        ({"train": ["a_0", "a_1"]}, "b_0 is in the folder, but not listed"),
        ({"train": [*GOOD_SPLIT["train"], "f_0"]}, "f_0 is listed, but not in the folder"),
        ({"test": ["d_0", "e_0", "c_0"]}, "c_0 is listed twice"),
        ({"train": "a_0"}, "expected an object"),
        ({"train": [1]}, "expected an object"),
        ({"holdout": []}, "expected an object"),
    ],
)
def test_split_that_does_not_fit_the_folder_is_named(folder, change, message):
    write_split(folder, GOOD_SPLIT | change)
    with pytest.raises(RecordingError, match=f"split.json: .*{message}"):
        load_split(folder)


@pytest.mark.parametrize("by", ["session", "player"])
def test_manifest_that_leaks_is_refused(tmp_path, by):
    names = [f"a-{i:012x}-20220101-00000{k}" for i in range(2) for k in range(2)]
    names += ["b-00000000000b-20220101-000000", "c-00000000000c-20220101-000000"]
    sides = ["train", "train", "train", "test", "validation", "test"]
    if by == "player":
        sides = ["train", "train", "test", "test", "validation", "test"]
    for name in names:
        pairs.make_pair(tmp_path, name, 4)
    rows = {name: {"url": "x", "side": side} for name, side in zip(names, sides)}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"split_by": by, "recordings": rows}))
    group = "a" if by == "player" else "a-000000000001"
    with pytest.raises(RecordingError, match=f"manifest.json: {group} is in both train and test"):
        load_split(tmp_path)
    rows[names[2]]["side"] = rows[names[3]]["side"] = "train"
    path.write_text(json.dumps({"split_by": by, "recordings": rows}))
    assert len(load_split(tmp_path)["train"]) == 4


@pytest.mark.parametrize("side", ["tset", None, ["test"]])
def test_side_of_a_manifest_that_is_none_is_named(tmp_path, side):
    rows = {}
    for name, row_side in zip("abcd", [*SPLITS, side]):
        pairs.make_pair(tmp_path, name, 4)
        rows[name] = {"url": "x", "side": row_side}
    (tmp_path / "manifest.json").write_text(json.dumps({"recordings": rows}))
    message = f"manifest.json: the side of d is {side!r}, none of train, validation, test; mend it"
    with pytest.raises(RecordingError, match=re.escape(message)):
        load_split(tmp_path)


def test_numbered_names_that_count_as_one_recording_are_explained(tmp_path):
    names = [f"rec_{i:03d}" for i in range(6)]
    for name in names:
        pairs.make_pair(tmp_path, name, 4)
    hint = (
        r"agree up to the last _ count as one recording, rec: .* rename them \(rec_00\d to rec-00"
    )
    with pytest.raises(RecordingError, match=hint):
        load_split(tmp_path)
    split = {"train": names[:4], "validation": names[4:5], "test": names[5:]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(RecordingError, match=hint):
        load_split(tmp_path)
    (tmp_path / "split.json").unlink()
    for path in list(tmp_path.glob("rec_*")):
        path.rename(path.with_name(path.name.replace("_", "-")))
    assert all(load_split(tmp_path).values())
    with pytest.raises(RecordingError) as few:
        assign_splits(["a-1", "b-1"])
    assert "last _" not in str(few.value)


def test_interrupted_check_keeps_what_is_checked(tmp_path, monkeypatch):
    for name in "abcd":
        pairs.make_pair(tmp_path, name, 4)
    check_folder(tmp_path, progress=False)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("")
    real = checks.check_recording

    def check(path, decode=False):
        if path.stem == "b":
            raise KeyboardInterrupt
        return real(path, decode)

    monkeypatch.setattr(checks, "check_recording", check)
    with pytest.raises(KeyboardInterrupt):
        check_folder(tmp_path, workers=1, progress=False)
    rows = read_checks(tmp_path)
    assert {name: row["used"] for name, row in rows.items()} == {"a": False, "c": True, "d": True}


def test_split_of_a_file_leaves_out_what_cannot_be_used(folder):
    write_split(folder, GOOD_SPLIT)
    assert load_split(folder) == GOOD_SPLIT
    (folder / "d_0.mp4").write_bytes(b"broken")
    check_folder(folder, progress=False)
    assert load_split(folder) == GOOD_SPLIT | {"test": ["e_0"]}


def test_another_seed_gives_another_split_of_whole_sessions(folder):
    splits = [load_split(folder, seed) for seed in range(10)]
    assert len(set(map(str, splits))) > 1
    for assigned in splits:
        assert all(assigned.values())
        assert [("a_0" in names) for names in assigned.values()] == [
            ("a_1" in names) for names in assigned.values()
        ]


def test_remarks_of_a_recording_are_in_order(tmp_path):
    rows = [pairs.line(t, milli=50 * t - 200 * (t > 3)) for t in range(11)]
    path = pairs.make_pair(tmp_path, "toy", 9, rows=rows)
    assert check_recording(path, decode=True)["remarks"][:2] == [
        "2 lines beyond the last frame are dropped",
        "milli goes back after line 4; no window crosses it",
    ]
    assert np.flatnonzero(open_recording(path).teleported).tolist() == [3]


def test_row_of_a_changed_file_holds_no_more(folder):
    (folder / "a_0.mp4").write_bytes(b"broken")
    check_folder(folder, progress=False)
    assert len(find_recordings(folder)) == 5
    pairs.write_video(folder / "a_0.mp4", 2)
    assert len(find_recordings(folder)) == 6
