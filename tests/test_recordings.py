"Opening recordings: what must be read, what must be refused and how it is said, and that no group stands on two sides of a split."

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pairs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soak import repeats

from minecraft_jepa.data import checks, recordings
from minecraft_jepa.data.actions import NOOP
from minecraft_jepa.data.checks import check_folder, check_recording, find_recordings, read_checks
from minecraft_jepa.data.recordings import RecordingError, group_of, open_recording
from minecraft_jepa.data.splits import SIDES, split_recordings
from minecraft_jepa.utils import cache_root

DATA = Path(__file__).parent.parent / "data"
NAMES = [p.stem for p in find_recordings(DATA)]
FRAMES = 40
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
    "A good recording; the index of its video stands at the front, so that a cut leaves it readable."
    random = np.random.default_rng(0)
    with av.open(str(tmp_path / "toy.mp4"), "w", options={"movflags": "faststart"}) as video:
        stream = video.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(FRAMES):
            video.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        random.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24"
                    )
                )
            )
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


def cut(share):
    return lambda p: p.write_bytes(p.read_bytes()[: int(share * p.stat().st_size)])


def damage(p):
    whole = bytearray(p.read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 2000] = bytes(2000)
    p.write_bytes(bytes(whole))


def lines(found):
    return lambda p: write_lines(p.with_suffix(".jsonl"), found)


def text(found):
    return lambda p: p.with_suffix(".jsonl").write_bytes(found)


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


@pytest.mark.parametrize("spoil, half, line, what", BAD.values(), ids=BAD)
def test_fault_is_refused_with_file_line_and_remedy(toy, spoil, half, line, what):
    spoil(toy)
    with pytest.raises(RecordingError) as refused:
        read(toy)
    said = str(refused.value)
    assert said.startswith(
        f"{toy.with_suffix('.' + half)}" + (f", line {line}: " if line else ": ")
    ) and re.search(what, said)
    assert re.search(r"download|leave the recording out|give the path", said)


def test_faults_of_a_folder_are_listed_and_left_out(toy):
    for name in ("short", "lone"):
        shutil.copy(toy, toy.with_name(f"{name}.mp4"))
    write_lines(toy.with_name("short.jsonl"), GOOD)
    with pytest.raises(RecordingError, match="lone.jsonl: no such file.*check_folder"):
        find_recordings(toy.parent)
    rows = {r["name"]: r for r in check_folder(toy.parent, progress=False)}
    assert {n: r["used"] for n, r in rows.items()} == {"lone": False, "short": False, "toy": True}
    assert (
        "lone.jsonl: no such file" in rows["lone"]["why"]
        and "line 9" in rows["short"]["why"]
        and (rows["toy"]["frames"], rows["toy"]["gaps"]) == (FRAMES, 0)
    )
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
    assert check_recording(toy)["used"] and not check_recording(toy, decode=True)["used"]
    assert (
        check_folder(toy.parent, progress=False)[0]["used"]
        and not check_folder(toy.parent, decode=True, progress=False)[0]["used"]
    )
    assert not check_folder(toy.parent, progress=False)[0]["used"]  # what decoding found is kept


@pytest.mark.parametrize(
    "field, values, remark",
    [
        ("tick", [*range(20), *range(10, 30)], "tick goes back after line 20"),
        ("milli", [50 * t - 900 * (t > 8) for t in range(FRAMES)], "milli goes back after line 9"),
        ("yaw", [None] * FRAMES, "lines without yaw, pitch, xpos, ypos, zpos, tick"),
    ],
)
def test_oddities_are_remarked(toy, field, values, remark):
    write_lines(toy.with_suffix(".jsonl"), [{**LINE, field: v} for v in values])
    row = check_recording(toy)
    assert (
        row["used"] and any(remark in r for r in row["remarks"]) and row["gaps"] == (field != "yaw")
    )


@given(st.integers(0, 2**32))
@settings(
    max_examples=repeats(25, 150),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_mutated_lines_open_or_are_refused_by_name(toy, seed):
    "Bytes flipped, cut, repeated and moved: either the lines can be read, or the error names file and line."
    random, path = np.random.default_rng(seed), toy.with_suffix(".jsonl")
    path.write_bytes(pairs.mutated(LINES, random))
    try:
        recording = open_recording(toy)
    except RecordingError as e:
        assert re.match(rf"{re.escape(str(path))}, line \d+: .*(download|leave)", str(e)), e
    else:
        assert len(recording) == FRAMES and np.isfinite(recording.actions).all()


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
    *outer, last = field.split(".")
    (rows[at][outer[0]] if outer else rows[at])[last] = value
    write_lines(toy.with_suffix(".jsonl"), rows)
    try:
        recording = open_recording(toy)
    except RecordingError as e:
        assert re.match(rf"{re.escape(str(toy.with_suffix('.jsonl')))}, line \d+: ", str(e)), e
    else:
        assert np.isfinite(recording.actions).all()
        check_recording(toy)
        list(recording.frames(16, 16))


LINES = "".join(json.dumps(LINE) + "\n" for _ in range(FRAMES)).encode()


MUTATE = """
import faulthandler, sys; from pathlib import Path
sys.path[:0] = [sys.argv[1]]; faulthandler.enable()
import numpy as np
from pairs import mutated
from minecraft_jepa.data.recordings import RecordingError, open_recording
path, random = Path(sys.argv[2]), np.random.default_rng(int(sys.argv[3]))
whole, told = path.read_bytes(), 0
for i in range(int(sys.argv[4])):
    head = whole[:64] if i % 3 else b""  # some keep the first box
    path.write_bytes(head + mutated(whole[len(head):], random))
    try: n = sum(1 for _ in open_recording(path).frames(16, 16))
    except RecordingError as e:
        assert str(path.with_suffix("")) in str(e), e
        told += 1
print(told, i + 1)
"""


@pytest.mark.parametrize("name, many", [("toy", repeats(30, 150)), (NAMES[0], repeats(10, 40))])
def test_mutated_video_is_refused_by_name(toy, name, many):
    "In a process of its own, with a limit: a crash or a hang would show. Damage that changes no packet's length may also decode."
    if name != "toy":
        for suffix in (".mp4", ".jsonl"):
            shutil.copy(DATA / f"{name}{suffix}", toy.parent)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MUTATE,
            str(Path(__file__).parent),
            str(toy.with_name(f"{name}.mp4")),
            "0",
            str(many),
        ],
        cwd=DATA.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told, tried = map(int, done.stdout.split())
    assert tried == many and told > many / 4


def test_good_recording_opens_by_either_half_or_neither(toy):
    for path in (toy, toy.with_suffix(".jsonl"), toy.with_suffix(""), str(toy)):
        recording = open_recording(path)
        assert (recording.name, recording.path, len(recording)) == ("toy", toy, FRAMES)
    assert [f.shape for f in recording.frames()] == [(48, 64, 3)] * FRAMES
    assert [f.shape for f in recording.frames(12, 20)] == [(12, 20, 3)] * FRAMES


@pytest.mark.parametrize("spare", [1, 5, FRAMES])
def test_lines_beyond_the_last_frame_are_dropped(toy, spare):
    write_lines(toy.with_suffix(".jsonl"), [*mouse(dx=2.0) * FRAMES, *mouse(dx=9.0) * spare])
    recording = open_recording(toy)
    assert (
        len(recording)
        == len(read(toy))
        == len(recording.actions)
        == len(recording.teleported)
        == FRAMES
    )
    assert np.allclose(recording.actions[:, 22], 0.3)


def test_basalt_lines_open(toy):
    "BASALT recordings hold mouse, keyboard, hotbar and isGuiOpen, no state."
    write_lines(toy.with_suffix(".jsonl"), [LINE] * FRAMES)
    recording = open_recording(toy)
    assert set(recording.state) == {"hotbar", "isGuiOpen"} and not recording.teleported.any()


def test_state_is_read_where_all_lines_have_it(toy):
    write_lines(
        toy.with_suffix(".jsonl"),
        [
            {**LINE, "yaw": t, "pitch": 1.5, **({"xpos": 1.0} if t else {}), "zpos": None}
            for t in range(FRAMES)
        ],
    )
    state = open_recording(toy).state
    assert list(state) == ["yaw", "pitch", "hotbar", "isGuiOpen"] and state["yaw"].tolist() == list(
        range(FRAMES)
    )


def test_typed_characters_split_no_line(toy):
    "U+2028 and U+0085 end a line for Python, but may stand in a JSON string; a byte that is no UTF-8 came in where a player's chat was cut."
    odd = (
        json.dumps(
            {**LINE, "keyboard": {**LINE["keyboard"], "chars": "a\u2028b\u0085c"}},
            ensure_ascii=False,
        )
        .encode()
        .replace(b"\xc2\x85c", b"\xc2\x85\xe2")
    )
    toy.with_suffix(".jsonl").write_bytes(b"\r\n".join([odd] * FRAMES) + b"\r\n")
    assert len(open_recording(toy)) == FRAMES


def test_teleports_and_missing_ticks_are_marked(toy):
    ticks = [t + 3 * (t > 20) for t in range(FRAMES)]
    write_lines(
        toy.with_suffix(".jsonl"),
        [{**LINE, "tick": t, "teleported": i == 7} for i, t in enumerate(ticks)],
    )
    assert np.flatnonzero(open_recording(toy).teleported).tolist() == [7, 20]


def test_cursor_is_painted_where_a_screen_is_open(toy):
    plain = read(toy)
    write_lines(
        toy.with_suffix(".jsonl"),
        [
            {**LINE, "isGuiOpen": t >= 20, "mouse": {**LINE["mouse"], "x": 320.0, "y": 540.0}}
            for t in range(FRAMES)
        ],
    )
    changed = [np.argwhere((a != b).any(2)) for a, b in zip(plain, read(toy))]
    assert not any(len(c) for c in changed[:20]) and all(len(c) for c in changed[20:])
    for c in changed[20:]:
        assert (
            c.min(0) == pytest.approx([36, 16], abs=1) and (c.max(0) - c.min(0) < 8).all()
        )  # x, y a quarter and three quarters in


def test_frames_are_rgb_and_area_averaged():
    recording = open_recording(DATA / f"{NAMES[0]}.mp4")
    full, small = (
        next(recording.frames()).astype(float),
        next(recording.frames(30, 40)).astype(float),
    )
    assert full.shape == (90, 160, 3)
    sky = full[:12].mean((0, 1))
    assert sky[2] > sky[0] + 20  # blue last
    averaged = full.reshape(30, 3, 40, 4, 3).mean((1, 3))
    assert np.abs(small - averaged).mean() < 2 < np.abs(small - full[1::3, 2::4]).mean()


@pytest.mark.parametrize("name", NAMES)
def test_bundled_recordings_are_whole(name):
    recording = open_recording(DATA / name)
    assert len(recording) == (600 if int(name[6:9]) <= 348 else 240) and set(recording.state) == {
        "yaw",
        "pitch",
        "xpos",
        "ypos",
        "zpos",
        "hotbar",
        "isGuiOpen",
    }
    assert (DATA / f"{name}.jsonl").read_bytes().count(b"\n") == len(recording)
    turned = (np.diff(recording.state["yaw"]) + 180) % 360 - 180
    plain = (
        ~recording.teleported[:-1]
        & ~recording.state["isGuiOpen"].astype(bool)[:-1]
        & ~recording.state["isGuiOpen"].astype(bool)[1:]
    )  # on a screen the mouse moves the cursor
    assert (
        np.allclose(turned[plain], recording.actions[:-1, 22][plain], atol=0.02)
        and plain.mean() > 0.5
    )  # the line holds the state before its action


@pytest.mark.parametrize(
    "name, group",
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
    assert group_of(name) == group


def test_no_group_of_the_sample_stands_on_two_sides():
    split = split_recordings(DATA)
    assert sorted(sum(split.values(), [])) == NAMES
    groups = {side: {group_of(n) for n in names} for side, names in split.items()}
    assert all(groups.values()) and sum(map(len, groups.values())) == len(
        set().union(*groups.values())
    )
    assert groups["test"] == {f"world-{w}" for w in (321, 322, 323, 324, 345, 346, 347, 348)}


@settings(max_examples=repeats(30, 100))
@given(
    st.sets(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=25),
    st.integers(0, 2**32),
)
def test_no_group_is_dealt_to_two_sides(tmp_path_factory, pieces, seed):
    folder = tmp_path_factory.mktemp("folder")
    names = sorted(f"w{w}_{piece}" for w, piece in pieces)
    for n in names:
        for suffix in (".mp4", ".jsonl"):
            (folder / f"{n}{suffix}").touch()
    if len({group_of(n) for n in names}) < 3:
        with pytest.raises(RecordingError, match="at least 3"):
            split_recordings(folder, seed)
        return
    split = split_recordings(folder, seed)
    assert (
        sorted(sum(split.values(), [])) == names
        and all(split.values())
        and list(split) == list(SIDES)
    )
    groups = [group_of(n) for ns in split.values() for n in {group_of(n): n for n in ns}.values()]
    assert len(groups) == len(set(groups))
    assert split == split_recordings(folder, seed)


def remarks(path):
    return check_recording(path)["remarks"]


@pytest.mark.parametrize("lines, spare", [(FRAMES, 0), (FRAMES - 1, 1)])
def test_last_frame_needs_no_line(tmp_path, lines, spare):
    "A contractor's recording has as many lines as frames, or one fewer; its last frame is the target of its last action."
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
    told = json.loads(path.read_text())
    told["recordings"]["toy"]["used"] = False
    path.write_text(json.dumps(told))
    assert not read_checks(tmp_path)["toy"]["used"]
    path.write_text(json.dumps(told | {"version": told["version"] - 1}))
    assert read_checks(tmp_path) == {} and check_folder(tmp_path, progress=False)[0]["used"]


def gone(field):
    return {k: v for k, v in pairs.line(7).items() if k != field}


@pytest.mark.parametrize(
    "odd, said",
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
def test_tick_without_its_action_is_a_gap(tmp_path, odd, said, at):
    odd = (
        odd
        if odd is None
        else {
            **odd,
            **{
                k: v
                for k, v in pairs.line(at).items()
                if k in odd and k not in ("mouse", "keyboard", "hotbar")
            },
        }
    )
    path = pairs.make_pair(
        tmp_path, "toy", FRAMES, rows=[odd if t == at else pairs.line(t) for t in range(FRAMES)]
    )
    recording, found = open_recording(path), remarks(path)
    assert len(found) >= 1 and any(said in r and f"line {at + 1}" in r for r in found)
    assert recording.teleported[at] and np.array_equal(recording.actions[at], NOOP)
    near = (
        {at - 1, at} if odd is None or "tick" not in odd else {at}
    )  # a line that tells nothing at all tells no state either
    if "hotbar is" in said:
        near = {at - 1, at} if at else {at}
    assert set(np.flatnonzero(recording.teleported)) <= near | {at}
    assert [t for t in pairs.ticks_of(recording.actions)] == [
        0 if t == at else t for t in range(FRAMES)
    ]


def test_ticks_without_action_are_counted(tmp_path):
    path = pairs.make_pair(
        tmp_path,
        "toy",
        FRAMES,
        rows=[pairs.line(t, **({"mouse": None} if t in (3, 9, 30) else {})) for t in range(FRAMES)],
    )
    assert (
        any("3 lines (line 4 first)" in r for r in remarks(path))
        and check_recording(path)["gaps"] == 3
    )


@pytest.mark.parametrize("good", [0, 1])
def test_recording_without_actions_is_refused_plainly(tmp_path, good):
    path = pairs.make_pair(
        tmp_path,
        "toy",
        FRAMES,
        rows=[pairs.line(t, **({} if t < good else {"mouse": None})) for t in range(FRAMES)],
    )
    row = check_recording(path)
    assert (
        not row["used"]
        and f"line {good + 1}: mouse is 'None'" in row["why"]
        and f"({FRAMES - good} of {FRAMES} lines" in row["why"]
    )
    assert "leave the recording out" in row["why"] and "download it again" not in row["why"]


@pytest.mark.parametrize("field", ["tick", "milli", "yaw", "zpos", "isGuiOpen"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1e999", "null", '"NaN"'])
def test_number_that_is_none_is_a_gap(tmp_path, field, value):
    "In clock or state: no window holds that frame, the others stay, and the state is finite."
    rows = [
        json.dumps(pairs.line(t, **({field: "HERE"} if t == 20 else {}))).replace('"HERE"', value)
        for t in range(FRAMES)
    ]
    path = pairs.make_pair(tmp_path, "toy", FRAMES, rows=rows)
    recording = open_recording(path)
    assert np.flatnonzero(recording.teleported).tolist() == [19, 20]
    assert all(np.isfinite(v).all() for v in recording.state.values()) and set(
        recording.state
    ) == set(recordings.STATE)
    assert any("line 21" in r for r in remarks(path)) and check_recording(path)["gaps"] == 2


def test_clock_that_most_lines_lack_is_none(tmp_path):
    path = pairs.make_pair(
        tmp_path,
        "toy",
        FRAMES,
        rows=[pairs.line(t, **({"tick": ...} if t else {})) for t in range(FRAMES)],
    )
    assert not open_recording(path).teleported.any() and any(
        "lines without tick" in r for r in remarks(path)
    )


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
    assert len(recording) == FRAMES and recording.spare_frames == (
        raw == ODD_BYTES["last line broken off"]
    )
    assert np.allclose(recording.actions[:-1, 22], 0.15)


def test_numbers_of_lines_count_blank_ones(toy):
    toy.with_suffix(".jsonl").write_bytes(
        (ONE + b"\n\n") * 9 + b'{"mouse": \n' + (ONE + b"\n") * FRAMES
    )
    with pytest.raises(RecordingError, match="jsonl, line 19: not JSON"):
        open_recording(toy)


def test_without_isGuiOpen_there_is_no_cursor(tmp_path):
    mouse = pairs.line()["mouse"] | {"x": 1270.0, "y": 10.0}
    path = pairs.make_pair(
        tmp_path, "toy", 5, rows=[pairs.line(t, isGuiOpen=..., mouse=mouse) for t in range(5)]
    )
    assert (open_recording(path).actions[:, 20:22] == 0.5).all() and np.ptp(
        next(open_recording(path).frames())
    ) == 0


def painted(path):
    return [
        np.argwhere(np.ptp(f, 2) + abs(f.astype(int) - int(np.median(f))).max(2) > 20)
        for f in open_recording(path).frames()
    ]


def test_cursor_of_a_frame_without_a_line(tmp_path):
    "It stands where the last action leaves it; with no action nobody knows, so no window holds the frame."
    mouse = pairs.line()["mouse"] | {"x": 320.0, "y": 360.0, "dx": 320.0}
    path = pairs.make_pair(
        tmp_path, "toy", 5, rows=[pairs.line(t, isGuiOpen=True, mouse=mouse) for t in range(4)]
    )
    first, *others = [at.min(0) for at in painted(path)]
    assert first == pytest.approx([24, 20], abs=3) and [(at - first).tolist() for at in others] == [
        [0, 0]
    ] * 3 + [[0, 20]]  # a quarter of 80
    closed = pairs.line(3, isGuiOpen=True, mouse=mouse, keyboard={"keys": ["key.keyboard.e"]})
    pairs.write_lines(
        path.with_suffix(".jsonl"),
        [pairs.line(t, isGuiOpen=True, mouse=mouse) for t in range(3)] + [closed],
    )
    assert [len(at) > 0 for at in painted(path)] == [True] * 4 + [False]
    pairs.write_lines(
        path.with_suffix(".jsonl"),
        [pairs.line(t, isGuiOpen=True, mouse=None if t == 2 else mouse) for t in range(5)],
    )
    assert (
        np.flatnonzero(open_recording(path).teleported).tolist() == [1, 2]
        and len(painted(path)[2]) == 0
    )


@pytest.mark.parametrize("lines", [20, 19])
def test_frames_that_an_edit_list_hides_are_not_missed(tmp_path, lines):
    "As `ffmpeg -ss ... -c copy` cuts: the packets before the cut stay in the file."
    pairs.write_video(tmp_path / "long.mp4", 60, "libx264", g="60", bf="0")
    with (
        av.open(str(tmp_path / "long.mp4")) as whole,
        av.open(str(tmp_path / "cut.mp4"), "w", format="mp4") as part,
    ):
        source = whole.streams.video[0]
        target = part.add_stream_from_template(source)
        packets = [p for p in whole.demux(source) if p.size]
        step = packets[1].pts - packets[0].pts
        for p in packets:
            p.pts, p.dts, p.stream = p.pts - 40 * step, p.dts - 40 * step, target
            part.mux(p)
    pairs.write_lines(tmp_path / "cut.jsonl", [pairs.line(t) for t in range(lines)])
    row = check_recording(tmp_path / "cut.mp4", decode=True)
    assert row["used"] and row["frames"] == 20
    shades = [int(f.mean()) for f in open_recording(tmp_path / "cut.mp4").frames()]
    assert shades == pytest.approx([4 * t for t in range(40, 60)], abs=6)


def test_hidden_files_are_no_recordings(toy):
    for name in ("._toy.mp4", "._toy.jsonl", ".x.mp4", ".DS_Store", ".part"):
        toy.with_name(name).write_bytes(b"\0\5\26\7")
    toy.with_name("folder.mp4").mkdir()
    assert find_recordings(toy.parent) == [toy] and [
        r["name"] for r in check_folder(toy.parent, progress=False)
    ] == ["toy"]


def test_endings_in_capitals_are_taken(toy):
    video, lines = (
        toy.rename(toy.with_suffix(".MP4")),
        toy.with_suffix(".jsonl").rename(toy.with_suffix(".JSONL")),
    )
    assert find_recordings(toy.parent) == [video]
    for path in (video, lines, toy, toy.with_suffix("")):
        assert open_recording(path).name == "toy"
    assert (
        check_folder(toy.parent, progress=False)[0]["used"]
        and read_checks(toy.parent)["toy"]["files"][1]
    )


def test_missing_folder_is_named(tmp_path):
    for call in (find_recordings, check_folder, split_recordings):
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
    assert group_of(WHOLE + end) == "cheeky-cornflower-setter-02e496ce4abb"
    if end not in ("b", "-trimmed"):
        assert group_of("match 7" + end) == "match 7"


@pytest.mark.parametrize("name", ["world-209", "part2", "2022-01-05", "clip", "copy", "_3"])
def test_names_that_only_look_like_pieces(name):
    assert group_of(name) == name


@pytest.mark.parametrize("about", ["split.json", "manifest.json"])
@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16"])
def test_sides_are_read_with_a_byte_order_mark(tmp_path, about, code):
    for n in "abc":
        pairs.make_pair(tmp_path, n, 2)
    sides = dict(zip(SIDES, (["a"], ["b"], ["c"])))
    told = (
        sides
        if about == "split.json"
        else {"recordings": {n: {"side": side, "url": ""} for side, (n,) in sides.items()}}
    )
    (tmp_path / about).write_bytes(json.dumps(told).encode(code))
    assert split_recordings(tmp_path) == sides
    (tmp_path / about).write_text("{")
    with pytest.raises(RecordingError, match=f"{about}, line 1: not JSON"):
        split_recordings(tmp_path)
    (tmp_path / about).write_text("[]")
    with pytest.raises(RecordingError, match=f"{about}: "):
        split_recordings(tmp_path)


@pytest.mark.parametrize(
    "version, factor",
    [("5.7", "0.5"), ("6.9", "2"), ("6.13", None), ("7.6", None), ("16.9", None), ("10.0", None)],
)
@pytest.mark.parametrize("screen", [True, False])
def test_mouse_on_a_screen_of_old_recorders_is_remarked(tmp_path, version, factor, screen):
    path = pairs.make_pair(
        tmp_path, "toy", 4, rows=[pairs.line(t, isGuiOpen=screen) for t in range(4)]
    )
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "recordings": {
                    "toy": {"url": f"https://example.org/x/data/{version}/toy.mp4", "side": "train"}
                }
            }
        )
    )
    told = [r for r in remarks(path) if "recorder version" in r]
    assert [
        f"version {version}" in r and f"x {factor};" in r and "not scaled (4 ticks)" in r
        for r in told
    ] == [True] * (factor is not None and screen)


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
    "given, place",
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
def test_cache_is_where_a_shell_would_say(tmp_path, monkeypatch, given, place):
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MINECRAFT_JEPA_CACHE") if given is None else monkeypatch.setenv(
        "MINECRAFT_JEPA_CACHE", given
    )
    assert str(cache_root()) == place.replace("HOME", str(tmp_path / "home")).replace(
        "CWD", str(tmp_path / "cwd")
    )


@pytest.mark.parametrize(
    "given, said",
    [
        ("FILE", "is a file"),
        ("FILE/x", "is a file"),
        ("$UNSET_VARIABLE/x", "is not set"),
        ("s3://bucket/x", "is a URL"),
    ],
)
def test_cache_that_cannot_be_is_told(toy, monkeypatch, given, said):
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", given.replace("FILE", str(toy)))
    with pytest.raises(ValueError, match=said + ".*MINECRAFT_JEPA_CACHE"):
        cache_root()


def test_without_a_home_the_cache_is_asked_for(monkeypatch):
    monkeypatch.delenv("MINECRAFT_JEPA_CACHE")
    monkeypatch.setattr(
        Path,
        "home",
        lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")),
    )
    with pytest.raises(ValueError, match="set MINECRAFT_JEPA_CACHE"):
        cache_root()
    assert find_recordings(DATA)  # needs no cache


def test_a_folder_without_a_split_keeps_each_player_on_one_side(tmp_path):
    names = [
        f"made-up-player{p}-{12 * p + s:012x}-20220101-000000" for p in range(5) for s in range(4)
    ]
    (tmp_path / "v").mkdir()
    for n in names:
        for suffix in (".mp4", ".jsonl"):
            (tmp_path / "v" / f"{n}{suffix}").touch()
    for seed in range(3):
        sides = split_recordings(tmp_path / "v", seed)
        players = [{n.rsplit("-", 3)[0] for n in side} for side in sides.values()]
        assert all(players) and sum(map(len, players)) == 5
    for n in names[8:]:  # two players are left
        for suffix in (".mp4", ".jsonl"):
            (tmp_path / "v" / f"{n}{suffix}").unlink()
    with pytest.warns(UserWarning, match="2 player.* split by session"):
        assert all(split_recordings(tmp_path / "v").values())
