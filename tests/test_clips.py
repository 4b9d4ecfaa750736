"""Clips and their store: whole at any moment, decoded anew when stale, windows without gaps."""

import errno
import fcntl
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pairs
import pytest
import torch
from commands import refused
from hypothesis import given
from hypothesis import strategies as st
from numbered_clips import NumberedClips
from soak import repeats

from minecraft_jepa.cli import main
from minecraft_jepa.config import preset
from minecraft_jepa.data import clip_reader, clip_store, clips, store_build
from minecraft_jepa.data.checks import check_folder
from minecraft_jepa.data.clip_store import ClipStore, default_store_dir
from minecraft_jepa.data.clips import CLIP_FORMAT, StaleStoreError
from minecraft_jepa.data.loader import sample_windows
from minecraft_jepa.data.recording_files import RecordingError
from minecraft_jepa.data.recordings import Recording, open_recording
from minecraft_jepa.data.splits import load_split
from minecraft_jepa.data.store_build import DecodingStopped

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
SPLIT = load_split(DATA)
FRAME = preset("tiny").frame
SHORT, OTHER = SPLIT["validation"][:2]
SUFFIXES = ".mp4", ".jsonl"


@pytest.fixture(scope="module")
def store():
    return ClipStore.build(DATA, FRAME, progress=False)


@pytest.fixture
def folder(tmp_path):
    """A copy of one recording that may be changed."""
    for suffix in SUFFIXES:
        shutil.copy(DATA / f"{SHORT}{suffix}", tmp_path)
    return tmp_path


def build(folder, store_dir, **options):
    return ClipStore.build(folder, FRAME, store_dir, **{"progress": False} | options)


def clip_names(store_dir):
    names = [path.name for path in store_dir.iterdir()]
    return [name for name in names if name not in ("store.json", ".lock")]


def change_times(folder, pattern):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob(pattern)}


# Windows


@given(st.sets(st.integers(0, 59), max_size=4), st.integers(1, 30), st.integers(1, 8))
def test_windows_cross_no_teleport_and_no_end(teleports, ticks, rollout):
    allowed = [
        t
        for t in range(ticks - 1, 60 - rollout)
        if not any(t - ticks + 1 <= teleport < t + rollout for teleport in teleports)
    ]
    assert NumberedClips(*teleports).window_starts("a", ticks, rollout).tolist() == allowed


@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_window_is_a_slice(ticks, rollout, data):
    t = data.draw(st.integers(ticks - 1, 60 - rollout - 1))
    frames, actions = NumberedClips().window("a", t, ticks, rollout)
    assert frames.shape == (rollout + 1, 3, 8, 8)
    assert frames[:, 0, 0, 0].tolist() == list(range(t, t + rollout + 1))
    assert actions.shape[1] == 28
    assert actions[:, 0].tolist() == list(range(t - ticks + 1, t + rollout))


def test_threads_that_ask_for_clips_at_once_all_get_theirs(monkeypatch):
    class Slow(OrderedDict):
        """Other threads run while one looks how many clips are loaded."""

        def __len__(self):
            time.sleep(0.001)
            return super().__len__()

    monkeypatch.setattr(clip_reader, "load_clip", str)
    monkeypatch.setattr(clip_reader, "_MAX_LOADED_CLIPS", 1)
    names = [str(i) for i in range(40)]
    metadata = {name: {"ticks": 1} for name in names}
    reader = clip_reader.ClipReader(dict(zip(names, names)), metadata)
    reader._loaded = Slow()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reader.__getitem__, names)) == names


@pytest.mark.parametrize("t", [-1, 0, 23, 58, 60])
def test_window_beyond_the_recording_is_refused(t):
    message = f"a: no window at tick {t}; it has 60 ticks, 24 are needed before and 2 after"
    with pytest.raises(IndexError, match=message):
        NumberedClips().window("a", t, 25, 2)


# The bundled recordings


def test_store_holds_what_the_recording_does(store):
    recording, clip = open_recording(DATA / SHORT), store[SHORT]
    assert clip.frames.shape == (len(recording), 3, FRAME.height, FRAME.width)
    assert clip.frames.dtype == np.uint8
    assert np.array_equal(clip.actions, recording.actions)
    assert np.array_equal(clip.teleported, recording.teleported)
    assert list(clip.state) == list(recording.state)
    for name, values in recording.state.items():
        assert np.array_equal(clip.state[name], values)
    for t, frame in enumerate(recording.frames(FRAME.height, FRAME.width)):
        assert np.array_equal(clip.frames[t], frame.transpose(2, 0, 1))


def test_store_knows_names_and_groups(store):
    assert sorted(store.names) == sorted(itertools.chain(*SPLIT.values()))
    assert store.groups["world-301_0680"] == "world-301"
    with pytest.raises(KeyError, match="no clip 'world-1'"):
        store["world-1"]


def test_teleports_of_the_sample_are_avoided(store):
    teleports = {name: np.flatnonzero(store[name].teleported) for name in store.names}
    assert sum(map(len, teleports.values())) == 57
    for name, ticks in teleports.items():
        starts = store.window_starts(name, 25, 4)
        for tick in ticks:
            assert not ((starts - 24 <= tick) & (tick < starts + 4)).any()
        state = store[name].state
        distance = np.hypot(np.diff(state["xpos"]), np.diff(state["zpos"]))  # blocks in a tick
        assert set(np.flatnonzero(distance > 20)) <= set(ticks)


def test_a_store_stands_in_for_the_recordings(store):
    """`build` and `load_split` take a store where they take a folder of recordings."""
    folder = store.folders[SHORT].parent
    assert ClipStore.build(folder, FRAME).folders == store.folders
    assert load_split(folder) == SPLIT


# Stale stores


def test_second_build_decodes_nothing(folder, tmp_path, monkeypatch):
    store_dir = tmp_path / "store"
    first = build(folder, store_dir)
    before = change_times(store_dir, "*.npy")
    monkeypatch.setattr(Recording, "frames", lambda *_: pytest.fail("decoded again"))
    assert build(folder, store_dir).folders == first.folders
    assert before
    assert change_times(store_dir, "*.npy") == before


def change_recording(folder, suffix):
    """Change one of the two files, so that the recording still opens."""
    if suffix == ".jsonl":
        path = folder / f"{SHORT}.jsonl"
        path.write_text(path.read_text().replace('"dwheel":0,', '"dwheel":1,'))
    else:
        for half in SUFFIXES:
            shutil.copy(DATA / f"{OTHER}{half}", folder / f"{SHORT}{half}")


def test_what_leaves_the_folder_leaves_the_store(tmp_path, capsys):
    source, store_dir = tmp_path / "v", tmp_path / "store"
    for name in "abcd":
        pairs.make_pair(source, name, 4)
    split = {"train": ["a", "d"], "validation": ["b"], "test": ["c"]}
    (source / "split.json").write_text(json.dumps(split))
    build(source, store_dir, workers=1)
    assert load_split(store_dir) == split

    (source / "split.json").unlink()
    build(source, store_dir, workers=1)
    assert load_split(store_dir) == load_split(source) != split

    for suffix in SUFFIXES:
        shutil.move(source / f"d{suffix}", tmp_path)
    build(source, store_dir, names=["a"])
    assert ClipStore.open(store_dir).names == ["a", "b", "c", "d"]  # "a" is not all of the folder
    capsys.readouterr()
    build(source, store_dir, workers=1)
    said = capsys.readouterr().err
    assert f"since {source} does not hold their recordings: d (1 in all)" in said
    build(source, store_dir, names=["a"])
    assert not capsys.readouterr().err
    assert ClipStore.open(store_dir).names == ["a", "b", "c"]
    assert load_split(store_dir) == load_split(source)

    for suffix in SUFFIXES:
        shutil.move(tmp_path / f"d{suffix}", source)
    times = change_times(store_dir, "frames.npy")
    build(source, store_dir, names=["d"])
    assert ClipStore.open(store_dir).names == ["a", "b", "c", "d"]
    assert change_times(store_dir, "frames.npy") == times  # nothing is decoded again


@pytest.mark.parametrize("text", ["{", "1", "[1]"])
def test_damaged_list_of_removed_clips_is_named_with_a_remedy(folder, tmp_path, text):
    build(folder, tmp_path / "store")
    (tmp_path / "store/removed.json").write_text(text)
    with pytest.raises(RecordingError, match=r"removed.json.*; delete it and build the store"):
        ClipStore.open(tmp_path / "store")


@pytest.mark.parametrize("suffix", [".jsonl", ".mp4"])
def test_changed_source_is_refused_and_decoded_anew(folder, tmp_path, suffix):
    store_dir = tmp_path / "store"
    old_actions = build(folder, store_dir)[SHORT].actions
    change_recording(folder, suffix)
    # Without the recordings it can't be known.
    assert np.array_equal(ClipStore.open(store_dir, FRAME)[SHORT].actions, old_actions)
    command = f"minecraft-jepa store {folder} {store_dir} --preset tiny"
    with pytest.raises(StaleStoreError, match=f"{SHORT} has changed since.*{command}"):
        ClipStore.open(store_dir, FRAME, folder)
    assert main(command.split()[1:]) == 0
    new_actions = ClipStore.open(store_dir, FRAME, folder)[SHORT].actions
    assert not np.array_equal(new_actions, old_actions)
    assert clip_names(store_dir) == [SHORT]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_clip_that_a_power_cut_emptied_is_decoded_anew(tmp_path, text):
    store = make_toy_store(tmp_path)
    (store.folders["toy"] / "clip.json").write_text(text)
    with pytest.raises(StaleStoreError, match=r"toy/clip.json is damaged .*; delete its folder"):
        ClipStore.open(tmp_path / "store")
    assert build(tmp_path / "v", tmp_path / "store", workers=1)["toy"].frames.shape[0] == NUM_FRAMES


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY"])
@pytest.mark.parametrize("file", ["actions", "frames", "teleported"])
def test_damaged_array_of_a_clip_is_named_with_a_remedy(tmp_path, file, content):
    store = make_toy_store(tmp_path)
    path = store.folders["toy"] / f"{file}.npy"
    path.write_bytes(content)
    message = rf"{file}\.npy is damaged .*: rm -r {path.parent}"
    with pytest.raises(StaleStoreError, match=message):
        store["toy"]
    if file != "teleported":
        with pytest.raises(StaleStoreError, match=message):
            store.window("toy", 30)
    if content:  # an empty file is seen without reading it
        shutil.rmtree(path.parent)
    assert len(build(tmp_path / "v", tmp_path / "store", workers=1)["toy"].frames) == NUM_FRAMES


def test_damaged_settings_of_a_store_are_named_with_a_remedy(tmp_path):
    make_toy_store(tmp_path)
    (tmp_path / "store/store.json").write_text("")
    command = f"rm -r {tmp_path}/store && minecraft-jepa store {tmp_path}/v {tmp_path}/store"
    with pytest.raises(StaleStoreError, match=f"store.json is damaged; build it with: {command}"):
        build(tmp_path / "v", tmp_path / "store")
    with pytest.raises(StaleStoreError, match=r"store.json is damaged; build it with: rm -r"):
        ClipStore.open(tmp_path / "store")


def test_store_that_does_not_fit_on_the_disk_is_refused_before_it_is_decoded(
    tmp_path, monkeypatch, capsys
):
    source = tmp_path / "v"
    for name in "ab":
        pairs.make_pair(source, name, 40)
    num_bytes = 2 * 40 * (3 * FRAME.height * FRAME.width + 256)
    for free in (num_bytes - 1, num_bytes):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if free < num_bytes:
            with pytest.raises(OSError, match=r"0\.0 GB are needed and .* make room"):
                build(source, tmp_path / "store", workers=1)
            words = ["store", source, tmp_path / "store", "--preset", "tiny", "--workers", "1"]
            refused(capsys, words, "GB are free; make room")
            assert clip_names(tmp_path / "store") == []
        else:
            assert len(build(source, tmp_path / "store", workers=1).names) == 2
    usage = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # what is there needs no room
    assert len(build(source, tmp_path / "store", workers=1).names) == 2


def test_touched_source_is_the_same(folder, tmp_path, monkeypatch):
    build(folder, tmp_path / "store")
    os.utime(folder / f"{SHORT}.mp4", (1, 1))
    assert ClipStore.open(tmp_path / "store", FRAME, folder).names == [SHORT]
    assert not clips.is_stale(tmp_path / "store" / SHORT, folder / f"{SHORT}.mp4")
    monkeypatch.setattr(clips, "_sha256", lambda path: 1 / 0)  # nothing is hashed again
    assert ClipStore.open(tmp_path / "store", FRAME, folder).names == [SHORT]


def test_store_of_another_size_or_format_is_refused(folder, tmp_path):
    store_dir = tmp_path / "store"
    build(folder, store_dir)
    small = preset("tiny", height=24, frame_width=40, patch_size=8).frame
    with pytest.raises(StaleStoreError, match="other settings"):
        ClipStore.build(folder, small, store_dir, progress=False)
    with pytest.raises(StaleStoreError, match="--height 24 --width 40"):
        ClipStore.open(store_dir, small)
    with pytest.raises(StaleStoreError, match="not a clip store"):
        ClipStore.open(folder, FRAME)
    with pytest.raises(StaleStoreError, match=f"no clip of {OTHER}"):
        ClipStore.open(store_dir, FRAME, names=[OTHER])
    settings = store_dir / "store.json"
    old_format = settings.read_text().replace(
        f'"format": {CLIP_FORMAT}', f'"format": {CLIP_FORMAT - 1}'
    )
    settings.write_text(old_format)
    with pytest.raises(StaleStoreError, match=f"rm -r {store_dir} && minecraft-jepa store"):
        ClipStore.open(store_dir, FRAME)
    # In the cache each size has its own store.
    in_cache = ClipStore.build(folder, small, progress=False)
    assert in_cache[SHORT].frames.shape[2:] == (24, 40)


def test_clip_that_was_cut_short_is_refused(folder, tmp_path):
    store = build(folder, tmp_path / "store")
    path = store.folders[SHORT] / "frames.npy"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(StaleStoreError, match="cut short"):
        store.window(SHORT, 500)
    assert store.window(SHORT, 100)[0].shape == (2, *FRAME.shape)


# Builds that fail or are killed


def test_failed_build_leaves_nothing(folder, tmp_path):
    """The video breaks off while it is decoded.

    What came before it is thrown away; what is already there stays.
    """
    store_dir, video = tmp_path / "store", folder / f"{SHORT}.mp4"
    whole_video = video.read_bytes()
    broken = bytearray(whole_video)
    middle = len(broken) // 2
    broken[middle : middle + 4000] = bytes(4000)
    video.write_bytes(bytes(broken))
    with pytest.raises(RecordingError, match=rf"{SHORT}.mp4: .*check_folder") as told:
        build(folder, store_dir)
    assert not clip_names(store_dir)
    for suffix in SUFFIXES:
        shutil.copy(DATA / f"{OTHER}{suffix}", folder)
    with pytest.raises(RecordingError, match=f"{SHORT}.mp4: "):
        build(folder, store_dir)
    assert clip_names(store_dir) == [OTHER]  # one bad recording keeps no other from being built
    command = shlex.split(str(told.value).partition("all such: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    checks = check_folder(folder, progress=False)
    assert [(row["name"], row["used"]) for row in checks] == [(SHORT, False), (OTHER, True)]
    assert build(folder, store_dir).names == [OTHER]
    video.write_bytes(whole_video)
    assert build(folder, store_dir).names == [SHORT, OTHER]


def test_commands_that_errors_name_survive_a_space_in_a_path(tmp_path):
    store_dir = tmp_path / "my store"
    store_dir.mkdir()
    (store_dir / "store.json").write_text('{"format": 1}')
    with pytest.raises(StaleStoreError) as told:
        ClipStore.open(store_dir, FRAME, tmp_path / "my videos")
    words = shlex.split(str(told.value).partition("build it with: ")[2])
    remove, build_it = words[: words.index("&&")], words[words.index("&&") + 1 :]
    assert remove == ["rm", "-r", str(store_dir)]
    assert build_it[:4] == ["minecraft-jepa", "store", str(tmp_path / "my videos"), str(store_dir)]


def test_interrupted_build_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        yield np.zeros((FRAME.height, FRAME.width, 3), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(Recording, "frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "store")
    assert not clip_names(tmp_path / "store")


def build_in_a_fork(*args):
    """The command in a process of its own, forked: it need not import torch anew."""
    pid = os.fork()
    if pid:
        return pid
    try:
        main(["store", *map(str, args)])
    finally:
        os._exit(0)


def has_ended(pid):
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def kill_after_begin(pid, store_dir, delay):
    """Kill a build some time after it began to decode; False where it ended before."""
    while not list(store_dir.glob(".*.part-*")):
        if has_ended(pid):
            return False
        time.sleep(0.005)
    time.sleep(delay)
    if has_ended(pid):
        return False
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return True


def assert_whole(clip, recording):
    assert len(clip.frames) == len(clip.actions) == len(recording)
    assert np.array_equal(clip.actions, recording.actions)
    assert clip.frames[len(recording) - 1].any()


def test_killed_build_goes_on(tmp_path):
    """Killed again and again: every clip is whole at all times, and in the end all are there."""
    source, store_dir = tmp_path / "v", tmp_path / "store"
    source.mkdir()
    names = SPLIT["train"][: repeats(8, 60)] + SPLIT["validation"] + SPLIT["test"]
    for name in names:
        for suffix in SUFFIXES:
            os.symlink(DATA / f"{name}{suffix}", source / f"{name}{suffix}")
    split = {part: [n for n in members if n in names] for part, members in SPLIT.items()}
    (source / "split.json").write_text(json.dumps(split))
    num_kills = 0
    for delay in np.random.default_rng(0).uniform(0.0, 0.6, repeats(4, 12)):
        pid = build_in_a_fork(source, store_dir, "--workers", "2")
        num_kills += kill_after_begin(pid, store_dir, delay)
        store = ClipStore.open(store_dir, FRAME)
        for name in store.names:
            assert_whole(store[name], open_recording(DATA / name))
    assert num_kills > repeats(1, 3)
    store = build(source, store_dir)
    assert store.names == sorted(names)
    assert sorted(clip_names(store_dir)) == sorted([*names, "split.json"])


def test_killed_decoding_process_is_told_and_the_build_goes_on(tmp_path, monkeypatch, capsys):
    for name in "abcd":
        pairs.make_pair(tmp_path / "v", name, 4)
    decode_clip = store_build.decode_clip

    def decode_or_die(path, *args):
        if path.stem in "cd":
            os.kill(os.getpid(), 9)
        decode_clip(path, *args)

    words = ["store", str(tmp_path / "v"), str(tmp_path / "store"), "--workers", "2"]
    words += ["--height", "36", "--width", "60"]
    frame = replace(FRAME, height=36, width=60)
    with monkeypatch.context() as m:
        m.setattr(store_build, "decode_clip", decode_or_die)
        line = refused(capsys, words, "a decoding process was killed")
        assert "memory" in line
        assert "--workers 1" in line
        with pytest.raises(DecodingStopped):
            ClipStore.build(tmp_path / "v", frame, tmp_path / "store", progress=False, workers=2)
    assert issubclass(DecodingStopped, OSError)  # the commands tell these in a line
    assert main(line.strip().rpartition("minecraft-jepa ")[2].split()) == 0  # as it says
    assert ClipStore.open(tmp_path / "store", frame).names == list("abcd")


def test_one_bad_recording_is_named_and_can_be_left_out(folder, tmp_path):
    store_dir, lines_path = tmp_path / "store", folder / f"{OTHER}.jsonl"
    for suffix in SUFFIXES:
        shutil.copy(DATA / f"{OTHER}{suffix}", folder)
    lines = lines_path.read_text().splitlines(True)
    lines[300] = lines[300][:50] + "\n"
    lines_path.write_text("".join(lines))
    with pytest.raises(RecordingError, match=f"{OTHER}.jsonl, line 301: not JSON"):
        build(folder, store_dir)
    assert build(folder, store_dir, names=[SHORT]).names == [SHORT]
    lines_path.unlink()
    # A video without its lines is no hindrance to others.
    assert build(folder, store_dir, names=[SHORT]).names == [SHORT]


# Other machines, memory, disks


def test_clip_is_read_without_a_video_library(folder, tmp_path):
    build(folder, tmp_path / "store")
    source = f"""
import sys
sys.modules["av"] = None
from minecraft_jepa.config import preset
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.loader import sample_windows
frame = preset("tiny").frame
store = ClipStore.open({str(tmp_path / "store")!r}, frame)
print(next(sample_windows(store, store.names, 25, 2, 4, 0))[0].shape)
try:
    ClipStore.build({str(folder)!r}, frame, {str(tmp_path / "new")!r})
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", source]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"torch.Size([4, 3, 3, {FRAME.height}, {FRAME.width}])" in result.stdout, result
    assert "pip install av" in result.stdout, result


DRAW_AND_MEASURE = """
import sys
from pathlib import Path
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.loader import sample_windows
store = ClipStore.open(sys.argv[1])
windows = sample_windows(store, store.names, 25, 2, 64, 0)
for _ in range(60):
    next(windows)
# ru_maxrss would be the parent's, if that is larger
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(line for line in lines if line.startswith("VmHWM"))
print(len(store.names), peak.split()[1])
"""


def test_memory_does_not_grow_with_the_recordings(folder, tmp_path):
    """Peak of a process that draws windows from 20 and from 600 recordings of one size."""
    build(folder, tmp_path / "20")
    shutil.copytree(tmp_path / "20", tmp_path / "600")
    peaks = {}
    for num_copies in (20, 600):
        store_dir = tmp_path / str(num_copies)
        for i in range(num_copies):
            shutil.copytree(store_dir / SHORT, store_dir / f"copy{i}_0", copy_function=os.link)
        command = [sys.executable, "-c", DRAW_AND_MEASURE, str(store_dir)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        num_names, peaks[num_copies] = map(int, result.stdout.split())
        assert num_names == num_copies + 1
    assert peaks[600] < peaks[20] + 20_000  # KiB; the 600 hold 4.3 GB of frames


def test_store_stands_where_the_environment_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", str(tmp_path / "cache"))
    clip_dir = build(folder, None).folders[SHORT]
    assert clip_dir.parent == default_store_dir(folder, FRAME)
    assert clip_dir.parent.parent == tmp_path / "cache" / "clips"
    assert json.loads((clip_dir / "clip.json").read_text())["name"] == SHORT


def test_store_that_may_only_be_read_serves(tmp_path, monkeypatch):
    """Nothing is written where all is there.

    The rights of a folder that may only be read do not pass to the store.
    """
    source, store_dir = tmp_path / "v", tmp_path / "store"
    for name in "abc":
        pairs.make_pair(source, name, 4)
    split = source / "split.json"
    split.write_text(json.dumps({"train": ["a"], "validation": ["b"], "test": ["c"]}))
    split.chmod(0o444)
    first = build(source, store_dir, workers=1)
    assert (store_dir / "split.json").stat().st_mode & 0o200
    monkeypatch.setattr(store_build, "_build_lock", lambda _: pytest.fail("locked"))
    before = change_times(tmp_path, "*")
    assert build(source, store_dir, workers=1).folders == first.folders
    assert change_times(tmp_path, "*") == before

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "copyfile", refuse)
    split.chmod(0o644)
    split.write_text(json.dumps({"train": ["b"], "validation": ["a"], "test": ["c"]}))
    assert build(source, store_dir, workers=1).folders == first.folders


@pytest.mark.parametrize("error", ["EACCES", "EROFS", "ENOSPC", "ENOTDIR"])
def test_disk_that_refuses_is_named_with_a_remedy(tmp_path, monkeypatch, capsys, error):
    source, store_dir = tmp_path / "v", tmp_path / "store"
    pairs.make_pair(source, "toy", 4)
    code = getattr(errno, error)

    def refuse(path, *_):
        raise OSError(code, os.strerror(code), None if error == "ENOSPC" else str(path))

    monkeypatch.setattr(store_build, "write_json", refuse)
    message = rf"{os.strerror(code)}; .*MINECRAFT_JEPA_CACHE.*'{store_dir}"
    with pytest.raises(OSError, match=message):
        build(source, store_dir, workers=1)
    refused(capsys, ["store", source, store_dir, "--workers", "1"], "MINECRAFT_JEPA_CACHE")


@pytest.mark.parametrize("error", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_disk_that_knows_no_locks_is_told_and_used(tmp_path, monkeypatch, capsys, error):
    def flock(*_):
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

    monkeypatch.setattr(fcntl, "flock", flock)
    unfinished = tmp_path / "store/.other.part-1"  # perhaps of another process that still writes
    unfinished.mkdir(parents=True)
    assert make_toy_store(tmp_path).names == ["toy"]
    assert unfinished.is_dir()
    assert f"{tmp_path}/store: this disk does not lock files" in capsys.readouterr().err


def test_clips_may_be_read_by_others(tmp_path):
    umask = os.umask(0o022)
    try:
        clip_dir = make_toy_store(tmp_path).folders["toy"]
    finally:
        os.umask(umask)
    for path in (clip_dir, *clip_dir.iterdir()):
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_workers_are_as_many_as_cores_allowed(tmp_path, monkeypatch):
    for name in "abc":
        pairs.make_pair(tmp_path / "v", name, 4)
    num_workers = []

    def decode_all(paths, frame, store_dir, workers, progress):
        num_workers.append(workers)
        return []

    monkeypatch.setattr(clip_store, "cores_allowed", lambda: 2)
    monkeypatch.setattr(store_build, "_decode_all", decode_all)
    with pytest.raises(StaleStoreError):
        build(tmp_path / "v", tmp_path / "store")
    assert num_workers == [2]


# Colours


def convert_exactly(frame):
    """BT.601, limited range, in floating point, (H, W, 3)."""
    planes = [
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    ]
    y, u, v = (x[: p.height].astype(float) for x, p in zip(planes, frame.planes))
    y = (y - 16) * 255 / 219
    u, v = ((x.repeat(2, 0).repeat(2, 1) - 128) * 255 / 224 for x in (u, v))
    rgb = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1)
    return rgb.clip(0, 255)


def test_colours_are_closer_than_by_the_usual_conversion():
    """Half a gray level from floating point, shrunk three and four times.

    PyAV's rgb24 is off by two, and darker throughout.
    """
    recording = open_recording(DATA / SHORT)
    with av.open(str(recording.path)) as video:
        for frame, ours, single_threaded in zip(
            itertools.islice(video.decode(video=0), 20),
            recording.frames(30, 40),
            recording.frames(30, 40, threads=False),
        ):
            exact = convert_exactly(frame).reshape(30, 3, 40, 4, 3).mean((1, 3))
            usual = frame.to_ndarray(format="rgb24", height=30, width=40, interpolation="AREA")
            error = np.abs(ours - exact).mean()
            assert np.array_equal(ours, single_threaded)
            assert error < 0.7
            assert 2 * error < np.abs(usual - exact).mean()
            assert np.abs((ours - exact).mean((0, 1))).max() < 0.3


# A recording made in code

NUM_FRAMES = 40


def make_toy_store(folder, name="toy", **options):
    """A store of one recording made in code."""
    pairs.make_pair(folder / "v", name, NUM_FRAMES, **options)
    return build(folder / "v", folder / "store", workers=1)


@pytest.fixture(scope="module")
def toy_store(tmp_path_factory):
    return make_toy_store(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize("lines", [NUM_FRAMES, NUM_FRAMES - 1, NUM_FRAMES + 2])
def test_last_window_ends_on_the_last_frame(tmp_path, lines):
    """With a line for it or without.

    The last action that leads anywhere is used, and that of the last frame never.
    """
    store = make_toy_store(tmp_path, lines=lines)
    recording = open_recording(tmp_path / "v/toy")
    last_frame = list(recording.frames(FRAME.height, FRAME.width))[-1].transpose(2, 0, 1)
    assert last_frame.mean() > 120
    for rollout in (1, 3):
        starts = store.window_starts("toy", 5, rollout)
        assert starts.tolist() == list(range(4, NUM_FRAMES - rollout))
        frames, actions = store.window("toy", starts[-1], 5, rollout)
        assert np.array_equal(frames[-1], last_frame)
        assert pairs.ticks_of(actions)[-1] == NUM_FRAMES - 2
        with pytest.raises(IndexError):
            store.window("toy", starts[-1] + 1, 5, rollout)
        batches = itertools.islice(sample_windows(store, ["toy"], 5, rollout, 64, 0), 5)
        drawn = np.concatenate([pairs.ticks_of(actions) for _, actions in batches])
        assert set(drawn.flatten().tolist()) == set(range(NUM_FRAMES - 1))
    frames, actions = store.read_windows([("toy", 4)], 5, 1, far=NUM_FRAMES - 5)
    assert pairs.ticks_of(actions)[0] == list(range(NUM_FRAMES - 1))
    assert np.array_equal(frames[0, -1], last_frame)
    clip = store["toy"]
    arrays = clip.frames, clip.actions, clip.teleported, *clip.state.values()
    assert {len(array) for array in arrays} == {NUM_FRAMES}
    assert clip.spare_frames == (lines < NUM_FRAMES)


def test_no_window_crosses_a_tick_without_its_action(tmp_path):
    rows = [pairs.line(t) for t in range(NUM_FRAMES)]
    rows[20]["keyboard"] = None
    rows[30]["yaw"] = float("nan")  # frame 30 is in no window
    store = make_toy_store(tmp_path, rows=rows)
    starts = [*range(2, 19), *range(23, 28), *range(33, 38)]
    assert store.window_starts("toy", 3, 2).tolist() == starts
    assert all(np.isfinite(values).all() for values in store["toy"].state.values())


KINDS = np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint64, np.array, torch.tensor


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whole_numbers_of_any_type_give_the_same_windows(kind, toy_store):
    frames, actions = toy_store.window("toy", 30, 5, 2)
    window = toy_store.window("toy", kind(30), kind(5), kind(2))
    batch = toy_store.read_windows([("toy", kind(30))], kind(5), kind(2), kind(0))
    for other_frames, other_actions in (window, (batch[0][0], batch[1][0])):
        assert torch.equal(other_frames, frames)
        assert torch.equal(other_actions, actions)
    assert toy_store.window_ranges("toy", kind(5), kind(2)) == toy_store.window_ranges("toy", 5, 2)


@pytest.mark.parametrize(
    "value", [30.0, True, "30", None, np.float32(30), torch.tensor(30.0), np.bool_(True)], ids=repr
)
def test_numbers_that_are_not_whole_are_refused(toy_store, value):
    for call in (
        lambda: toy_store.window("toy", value),
        lambda: toy_store.window("toy", 30, value),
        lambda: toy_store.window("toy", 30, 25, value),
        lambda: toy_store.window_starts("toy", value),
        lambda: toy_store.window_ranges("toy", 25, value),
        lambda: toy_store.read_windows([("toy", value)]),
        lambda: next(sample_windows(toy_store, ["toy"], 25, 1, value, 0)),
        lambda: next(sample_windows(toy_store, ["toy"], 25, 1, 4, value)),
    ):
        with pytest.raises(ValueError, match="must be a whole number"):
            call()


@pytest.mark.parametrize("t", [-1, 3, NUM_FRAMES - 1, 10**9])
def test_reading_beyond_a_recording_is_refused(toy_store, t):
    message = f"toy: no window at tick {t}; it has {NUM_FRAMES} ticks"
    with pytest.raises(IndexError, match=message):
        toy_store.read_windows([("toy", t)], 5, 1)
    with pytest.raises(KeyError, match="no clip 'nobody'"):
        toy_store.read_windows([("nobody", 10)], 5, 1)


NAMES = {"long": "n" * 240, "accents": "\u00e9" * 120, "dots": "with.dots.in it", "dash": "-dash"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_recordings_of_any_name_are_stored(tmp_path, name):
    frames, _ = make_toy_store(tmp_path, name).window(name, 20, 5)
    assert frames.shape == (2, *FRAME.shape)


def test_hidden_folders_are_no_clips(tmp_path):
    store = make_toy_store(tmp_path)
    shutil.copytree(store.folders["toy"], tmp_path / "store/.toy.part-1")
    assert ClipStore.open(tmp_path / "store").names == ["toy"]
