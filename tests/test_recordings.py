"Opening recordings: what must be read, what must be refused and how it is said, and that no group stands on two sides of a split."
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from minecraft_jepa.recordings import RecordingError, SIDES, check_folder, check_recording, find_recordings, group_of, open_recording, split_recordings

DATA = Path(__file__).parent.parent / "data"
NAMES = [p.stem for p in find_recordings(DATA)]
FRAMES = 40
LINE = {"mouse": {"x": 640.0, "y": 360.0, "dx": 1.0, "dy": 0.0, "dwheel": 0.0, "buttons": [], "newButtons": []}, "keyboard": {"keys": [], "newKeys": [], "chars": ""}, "isGuiOpen": False, "hotbar": 0}


@pytest.fixture
def toy(tmp_path):
    "A good recording; the index of its video stands at the front, so that a cut leaves it readable."
    random = np.random.default_rng(0)
    with av.open(str(tmp_path / "toy.mp4"), "w", options={"movflags": "faststart"}) as video:
        stream = video.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(FRAMES): video.mux(stream.encode(av.VideoFrame.from_ndarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")))
        video.mux(stream.encode())
    write_lines(tmp_path / "toy.jsonl", [LINE] * FRAMES)
    return tmp_path / "toy.mp4"


def write_lines(path, lines): path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path): return list(open_recording(path).frames())


def without(name): return [{k: v for k, v in LINE.items() if k != name}]


def mouse(**fields): return [{**LINE, "mouse": {**LINE["mouse"], **fields}}]


def cut(share): return lambda p: p.write_bytes(p.read_bytes()[:int(share * p.stat().st_size)])


def damage(p):
    whole = bytearray(p.read_bytes())
    whole[len(whole) // 2:len(whole) // 2 + 2000] = bytes(2000)
    p.write_bytes(bytes(whole))


def lines(found): return lambda p: write_lines(p.with_suffix(".jsonl"), found)


def text(found): return lambda p: p.with_suffix(".jsonl").write_bytes(found)


GOOD = [LINE] * 9
BAD = {  # fault -> what is done, the half that is named, its line, and what the message says
    "no jsonl": (lambda p: p.with_suffix(".jsonl").unlink(), "jsonl", None, "no such file, its other half toy.mp4 is there"),
    "no mp4": (lambda p: p.unlink(), "mp4", None, "no such file, its other half toy.jsonl is there"),
    "neither": (lambda p: (p.unlink(), p.with_suffix(".jsonl").unlink()), "mp4", None, "no such file"),
    "line broken off": (text((json.dumps(LINE) + "\n").encode() * 9 + b'{"mouse": {"x": 64'), "jsonl", 10, "not JSON"),
    "blank line": (text((json.dumps(LINE) + "\n\n").encode() * 20), "jsonl", 2, "not JSON"),
    "no text": (text(bytes(range(256)) * 4), "jsonl", 1, "not JSON"),
    "empty jsonl": (text(b""), "jsonl", 1, "not JSON"),
    "a list": (lines([*GOOD, []]), "jsonl", 10, "expected an object"),
    "a number": (lines([*GOOD, 3]), "jsonl", 10, "expected an object"),
    "no mouse": (lines([*GOOD, *without("mouse")]), "jsonl", 10, "mouse.buttons is missing"),
    "no keyboard": (lines([*GOOD, *without("keyboard")]), "jsonl", 10, "keyboard.keys is missing"),
    "dx as text": (lines([*GOOD, *mouse(dx="1")]), "jsonl", 10, "mouse.dx is '1', expected a number"),
    "dx not a number": (lines([*GOOD, *mouse(dx=float("nan"))]), "jsonl", 10, "mouse.dx is 'nan', expected a number"),
    "buttons as number": (lines([*GOOD, *mouse(buttons=0)]), "jsonl", 10, "mouse.buttons is '0', expected a list"),
    "hotbar too large": (lines([*GOOD, {**LINE, "hotbar": 9}]), "jsonl", 10, "hotbar is '9'"),
    "too few lines": (lines(GOOD), "jsonl", 9, f"the file ends here, but toy.mp4 has {FRAMES} frames"),
    "one line too few": (lines([LINE] * (FRAMES - 1)), "jsonl", FRAMES - 1, "the file ends here"),
    "mp4 is text": (lambda p: p.write_text("404 Not Found"), "mp4", None, "not a readable video"),
    "mp4 is empty": (lambda p: p.write_bytes(b""), "mp4", None, "not a readable video"),
    "mp4 cut in the index": (lambda p: p.write_bytes(p.read_bytes()[:300]), "mp4", None, "not a readable video"),
    "mp4 cut in the middle": (cut(0.6), "mp4", None, r"cut short, \d+ of 40 frames"),
    "mp4 cut at the end": (cut(0.999), "mp4", None, "cut short, 39 of 40 frames"),
    "mp4 damaged": (damage, "mp4", None, r"breaks at frame \d+|frame \d+ of 40 is damaged"),
}


@pytest.mark.parametrize("spoil, half, line, what", BAD.values(), ids=BAD)
def test_fault_is_refused_with_file_line_and_remedy(toy, spoil, half, line, what):
    spoil(toy)
    with pytest.raises(RecordingError) as refused: read(toy)
    said = str(refused.value)
    assert said.startswith(f"{toy.with_suffix('.' + half)}" + (f", line {line}: " if line else ": ")) and re.search(what, said)
    assert re.search(r"download|leave the recording out|give the path", said)


def test_faults_of_a_folder_are_listed_and_left_out(toy):
    for name in ("short", "lone"): shutil.copy(toy, toy.with_name(f"{name}.mp4"))
    write_lines(toy.with_name("short.jsonl"), GOOD)
    with pytest.raises(RecordingError, match="lone.jsonl: no such file.*check_folder"): find_recordings(toy.parent)
    rows = {r["name"]: r for r in check_folder(toy.parent, progress=False)}
    assert {n: r["used"] for n, r in rows.items()} == {"lone": False, "short": False, "toy": True}
    assert "lone.jsonl: no such file" in rows["lone"]["why"] and "line 9" in rows["short"]["why"] and (rows["toy"]["frames"], rows["toy"]["gaps"]) == (FRAMES, 0)
    assert find_recordings(toy.parent) == [toy]
    toy.unlink(); check_folder(toy.parent, progress=False)
    with pytest.raises(RecordingError, match="none of the 3 recordings can be used"): find_recordings(toy.parent)
    (toy.parent / "checked.json").write_text("{")
    with pytest.raises(RecordingError, match="delete it"): find_recordings(toy.parent)


def test_damage_within_a_frame_is_found_by_decoding(toy):
    damage(toy)
    assert check_recording(toy)["used"] and not check_recording(toy, decode=True)["used"]
    assert check_folder(toy.parent, progress=False)[0]["used"] and not check_folder(toy.parent, decode=True, progress=False)[0]["used"]
    assert not check_folder(toy.parent, progress=False)[0]["used"]  # what decoding found is kept


@pytest.mark.parametrize("field, values, remark", [
    ("tick", [*range(20), *range(10, 30)], "tick goes back after line 20"), ("milli", [50 * t - 900 * (t > 8) for t in range(FRAMES)], "milli goes back after line 9"),
    ("yaw", [None] * FRAMES, "lines without yaw, pitch, xpos, ypos, zpos, tick")])
def test_oddities_are_remarked(toy, field, values, remark):
    write_lines(toy.with_suffix(".jsonl"), [{**LINE, field: v} for v in values])
    row = check_recording(toy)
    assert row["used"] and any(remark in r for r in row["remarks"]) and row["gaps"] == (field != "yaw")


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_lines_open_or_are_refused_by_name(toy, seed):
    "Bytes flipped, cut, repeated and moved: either the lines can be read, or the error names file and line."
    random, path = np.random.default_rng(seed), toy.with_suffix(".jsonl")
    path.write_bytes(mutated(LINES, random))
    try: recording = open_recording(toy)
    except RecordingError as e: assert re.match(rf"{re.escape(str(path))}, line \d+: .*(download|leave)", str(e)), e
    else: assert len(recording) == FRAMES and np.isfinite(recording.actions).all()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5)


@given(st.sampled_from(["mouse", "keyboard", "isGuiOpen", "hotbar", "yaw", "tick", "milli", "teleported", "mouse.x", "mouse.dx", "mouse.dwheel", "mouse.buttons", "mouse.newButtons", "keyboard.keys", "keyboard.newKeys"]), JSON, st.integers(0, FRAMES - 1))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_field_opens_or_is_refused_by_name(toy, field, value, at):
    rows = [json.loads(json.dumps(LINE)) for _ in range(FRAMES)]
    *outer, last = field.split(".")
    (rows[at][outer[0]] if outer else rows[at])[last] = value
    write_lines(toy.with_suffix(".jsonl"), rows)
    try: recording = open_recording(toy)
    except RecordingError as e: assert re.match(rf"{re.escape(str(toy.with_suffix('.jsonl')))}, line \d+: ", str(e)), e
    else:
        assert np.isfinite(recording.actions).all()
        check_recording(toy); list(recording.frames(16, 16))


LINES = "".join(json.dumps(LINE) + "\n" for _ in range(FRAMES)).encode()


def mutated(whole, random):
    "One to four changes at random places."
    changed = bytearray(whole)
    for _ in range(random.integers(1, 5)):
        at, many = int(random.integers(0, max(len(changed), 1))), int(random.integers(1, 40))
        what = random.integers(0, 4)
        if what == 0: changed[at:at + many] = random.bytes(min(many, len(changed) - at))
        elif what == 1: del changed[at:at + many]
        elif what == 2: changed[at:at] = changed[at:at + many]
        else: del changed[at:]
    return bytes(changed)


MUTATE = """
import faulthandler, sys; from pathlib import Path
sys.path[:0] = [sys.argv[1]]; faulthandler.enable()
import numpy as np
from test_recordings import mutated
from minecraft_jepa.recordings import RecordingError, open_recording
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


@pytest.mark.parametrize("name, many", [("toy", 150), (NAMES[0], 40)])
def test_mutated_video_is_refused_by_name(toy, name, many):
    "In a process of its own, with a limit: a crash or a hang would show. Damage that changes no packet's length may also decode."
    if name != "toy":
        for suffix in (".mp4", ".jsonl"): shutil.copy(DATA / f"{name}{suffix}", toy.parent)
    done = subprocess.run([sys.executable, "-c", MUTATE, str(Path(__file__).parent), str(toy.with_name(f"{name}.mp4")), "0", str(many)], cwd=DATA.parent, capture_output=True, text=True, timeout=300)
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
    assert len(recording) == len(read(toy)) == len(recording.actions) == len(recording.teleported) == FRAMES
    assert np.allclose(recording.actions[:, 22], 0.3)


def test_basalt_lines_open(toy):
    "BASALT recordings hold mouse, keyboard, hotbar and isGuiOpen, no state."
    write_lines(toy.with_suffix(".jsonl"), [LINE] * FRAMES)
    recording = open_recording(toy)
    assert set(recording.state) == {"hotbar", "isGuiOpen"} and not recording.teleported.any()


def test_state_is_read_where_all_lines_have_it(toy):
    write_lines(toy.with_suffix(".jsonl"), [{**LINE, "yaw": t, "pitch": 1.5, **({"xpos": 1.0} if t else {}), "zpos": None} for t in range(FRAMES)])
    state = open_recording(toy).state
    assert list(state) == ["yaw", "pitch", "hotbar", "isGuiOpen"] and state["yaw"].tolist() == list(range(FRAMES))


def test_typed_characters_split_no_line(toy):
    "U+2028 and U+0085 end a line for Python, but may stand in a JSON string; a byte that is no UTF-8 came in where a player's chat was cut."
    odd = json.dumps({**LINE, "keyboard": {**LINE["keyboard"], "chars": "a\u2028b\u0085c"}}, ensure_ascii=False).encode().replace(b"\xc2\x85c", b"\xc2\x85\xe2")
    toy.with_suffix(".jsonl").write_bytes(b"\r\n".join([odd] * FRAMES) + b"\r\n")
    assert len(open_recording(toy)) == FRAMES


def test_teleports_and_missing_ticks_are_marked(toy):
    ticks = [t + 3 * (t > 20) for t in range(FRAMES)]
    write_lines(toy.with_suffix(".jsonl"), [{**LINE, "tick": t, "teleported": i == 7} for i, t in enumerate(ticks)])
    assert np.flatnonzero(open_recording(toy).teleported).tolist() == [7, 20]


def test_cursor_is_painted_where_a_screen_is_open(toy):
    plain = read(toy)
    write_lines(toy.with_suffix(".jsonl"), [{**LINE, "isGuiOpen": t >= 20, "mouse": {**LINE["mouse"], "x": 320.0, "y": 540.0}} for t in range(FRAMES)])
    changed = [np.argwhere((a != b).any(2)) for a, b in zip(plain, read(toy))]
    assert not any(len(c) for c in changed[:20]) and all(len(c) for c in changed[20:])
    for c in changed[20:]: assert c.min(0) == pytest.approx([36, 16], abs=1) and (c.max(0) - c.min(0) < 8).all()  # x, y a quarter and three quarters in


def test_frames_are_rgb_and_area_averaged():
    recording = open_recording(DATA / f"{NAMES[0]}.mp4")
    full, small = next(recording.frames()).astype(float), next(recording.frames(30, 40)).astype(float)
    assert full.shape == (90, 160, 3)
    sky = full[:12].mean((0, 1))
    assert sky[2] > sky[0] + 20  # blue last
    averaged = full.reshape(30, 3, 40, 4, 3).mean((1, 3))
    assert np.abs(small - averaged).mean() < 2 < np.abs(small - full[1::3, 2::4]).mean()


@pytest.mark.parametrize("name", NAMES)
def test_bundled_recordings_are_whole(name):
    recording = open_recording(DATA / name)
    assert len(recording) == (600 if int(name[6:9]) <= 348 else 240) and set(recording.state) == {"yaw", "pitch", "xpos", "ypos", "zpos", "hotbar", "isGuiOpen"}
    assert (DATA / f"{name}.jsonl").read_bytes().count(b"\n") == len(recording)
    turned = (np.diff(recording.state["yaw"]) + 180) % 360 - 180
    plain = ~recording.teleported[:-1] & ~recording.state["isGuiOpen"].astype(bool)[:-1] & ~recording.state["isGuiOpen"].astype(bool)[1:]  # on a screen the mouse moves the cursor
    assert np.allclose(turned[plain], recording.actions[:-1, 22][plain], atol=0.02) and plain.mean() > 0.5  # the line holds the state before its action


@pytest.mark.parametrize("name, group", [
    ("cheeky-cornflower-setter-02e496ce4abb-20220421-092639", "cheeky-cornflower-setter-02e496ce4abb"),
    ("Player123-f153ac423f61-20210916-150500", "Player123-f153ac423f61"),
    ("a_b-f153ac423f61-20210916-150500", "a_b-f153ac423f61"),
    ("world-201_0837", "world-201"), ("world-209", "world-209"), ("my_long_name_3", "my_long_name"), ("_3", "_3")])
def test_group_of_a_name(name, group): assert group_of(name) == group


def test_no_group_of_the_sample_stands_on_two_sides():
    split = split_recordings(DATA)
    assert sorted(sum(split.values(), [])) == NAMES
    groups = {side: {group_of(n) for n in names} for side, names in split.items()}
    assert all(groups.values()) and sum(map(len, groups.values())) == len(set().union(*groups.values()))
    assert groups["test"] == {f"world-{w}" for w in (321, 322, 323, 324, 345, 346, 347, 348)}


@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=25), st.integers(0, 2**32))
def test_no_group_is_dealt_to_two_sides(tmp_path_factory, pieces, seed):
    folder = tmp_path_factory.mktemp("folder")
    names = sorted(f"w{w}_{piece}" for w, piece in pieces)
    for n in names:
        for suffix in (".mp4", ".jsonl"): (folder / f"{n}{suffix}").touch()
    if len({group_of(n) for n in names}) < 3:
        with pytest.raises(RecordingError, match="at least 3"): split_recordings(folder, seed)
        return
    split = split_recordings(folder, seed)
    assert sorted(sum(split.values(), [])) == names and all(split.values()) and list(split) == list(SIDES)
    groups = [group_of(n) for ns in split.values() for n in {group_of(n): n for n in ns}.values()]
    assert len(groups) == len(set(groups))
    assert split == split_recordings(folder, seed)
