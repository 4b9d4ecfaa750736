"The clip store: windows, teleports, sampling, atomic building, and frames in step with actions."

import errno
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pairs
import pytest
import torch
from commands import refused
from hypothesis import given
from hypothesis import strategies as st
from soak import repeats

from minecraft_jepa.cli import main
from minecraft_jepa.config import preset
from minecraft_jepa.data import clip_store
from minecraft_jepa.data.alignment import image_shift, lag_correlation
from minecraft_jepa.data.checks import check_folder
from minecraft_jepa.data.clip_store import Clips, ClipStore, DecodingStopped, store_of
from minecraft_jepa.data.clips import FORMAT, Clip, StaleStore, runs_of
from minecraft_jepa.data.loader import sample_windows
from minecraft_jepa.data.recordings import Recording, RecordingError, open_recording
from minecraft_jepa.data.splits import split_recordings

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
SPLIT = split_recordings(DATA)
FRAME = preset("tiny").frame
SHORT, OTHER = SPLIT["validation"][:2]


@pytest.fixture(scope="module")
def store():
    return ClipStore.build(DATA, FRAME, progress=False)


@pytest.fixture
def folder(tmp_path):
    "A copy of one recording that may be spoilt."
    for suffix in (".mp4", ".jsonl"):
        shutil.copy(DATA / f"{SHORT}{suffix}", tmp_path)
    return tmp_path


class Numbered(Clips):
    "Two clips whose frame t and action t say t, the second from 100 on; `teleports` are in the first."

    def __init__(self, *teleports, ticks=60):
        t = np.arange(ticks)
        frames, actions = (
            np.broadcast_to(t[:, None, None, None], (ticks, 3, 8, 8)).astype(np.uint8),
            np.broadcast_to(t[:, None], (ticks, 28)).astype(np.float32),
        )
        self.clips = {
            "a": Clip(frames, actions, np.isin(t, teleports), {}),
            "b": Clip(frames[:40] + 100, actions[:40] + 100, np.zeros(40, bool), {}),
        }
        super().__init__(
            dict.fromkeys(self.clips),
            {
                n: {"ticks": len(c.actions), "runs": runs_of(c.teleported), "height": 8, "width": 8}
                for n, c in self.clips.items()
            },
        )
        self._here.files = self

    def __getitem__(self, name):
        return self.clips[name]

    def read(self, picks, ticks=25, rollout=1, far=0):
        cut = [
            (
                self.clips[n].frames[t : t + rollout + 1],
                self.clips[n].actions[t - ticks + 1 : t + rollout],
            )
            for n, t in picks
        ]
        return tuple(torch.from_numpy(np.stack(x)) for x in zip(*cut))


numbered = Numbered


@given(st.sets(st.integers(0, 59), max_size=4), st.integers(1, 30), st.integers(1, 8))
def test_windows_cross_no_teleport_and_no_end(teleports, ticks, rollout):
    allowed = [
        t
        for t in range(60)
        if t - ticks + 1 >= 0
        and t + rollout < 60
        and not any(t - ticks + 1 <= i < t + rollout for i in teleports)
    ]
    assert numbered(*teleports).starts("a", ticks, rollout).tolist() == allowed


@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_window_is_a_slice(ticks, rollout, data):
    t = data.draw(st.integers(ticks - 1, 60 - rollout - 1))
    frames, actions = numbered().window("a", t, ticks, rollout)
    assert frames[:, 0, 0, 0].tolist() == [t + k for k in range(rollout + 1)] and frames.shape == (
        rollout + 1,
        3,
        8,
        8,
    )
    assert (
        actions[:, 0].tolist() == [t - ticks + 1 + j for j in range(ticks - 1 + rollout)]
        and actions.shape[1] == 28
    )


@pytest.mark.parametrize("t", [-1, 0, 23, 58, 60])
def test_window_beyond_the_recording_is_refused(t):
    with pytest.raises(
        IndexError,
        match=f"a: no window at tick {t}; it has 60 ticks, 24 are needed before and 2 after",
    ):
        numbered().window("a", t, 25, 2)


@given(st.integers(0, 10**6), st.integers(0, 20))
def test_sampling_depends_on_seed_and_step_only(seed, skipped):
    made, arguments = numbered(30), (["a", "b"], 5, 2, 4, seed)
    walked = sample_windows(made, *arguments)
    for _ in range(skipped):
        next(walked)
    for one, other in zip(next(walked), next(sample_windows(made, *arguments, start_step=skipped))):
        assert torch.equal(one, other)


def test_samples_are_whole_windows_of_one_clip():
    frames, actions = next(sample_windows(numbered(30), ["a", "b"], 5, 2, 2000, seed=0))
    assert (
        frames.shape == (2000, 3, 3, 8, 8)
        and frames.dtype == torch.uint8
        and actions.shape == (2000, 6, 28)
        and actions.dtype == torch.float32
    )
    t = frames[:, 0, 0, 0, 0].float()
    assert torch.equal(actions[:, :, 0], t[:, None] + torch.arange(-4, 2)) and torch.equal(
        frames[:, :, 0, 0, 0], (t[:, None] + torch.arange(3)).byte()
    )
    drawn = set(t.int().tolist())
    made = numbered(30)
    assert drawn == {
        *made.starts("a", 5, 2).tolist(),
        *(made.starts("b", 5, 2) + 100).tolist(),
    }  # all of them, and nothing else
    in_proportion = len(made.starts("b", 5, 2)) / len(drawn)
    assert (t >= 100).float().mean().item() == pytest.approx(in_proportion, abs=0.04)


def test_no_window_at_all_is_refused():
    for names, ticks in ((["a"], 100), ([], 25)):
        with pytest.raises(ValueError, match="use longer recordings"):
            next(sample_windows(numbered(), names, ticks, 1, 4, seed=0))


def test_store_holds_what_the_recording_does(store):
    recording = open_recording(DATA / SHORT)
    clip = store[SHORT]
    assert (
        clip.frames.shape == (len(recording), 3, FRAME.height, FRAME.width)
        and clip.frames.dtype == np.uint8
    )
    assert np.array_equal(clip.actions, recording.actions) and np.array_equal(
        clip.teleported, recording.teleported
    )
    assert list(clip.state) == list(recording.state) and all(
        np.array_equal(clip.state[k], v) for k, v in recording.state.items()
    )
    for t, frame in enumerate(recording.frames(FRAME.height, FRAME.width)):
        assert np.array_equal(clip.frames[t], frame.transpose(2, 0, 1))


def test_store_knows_names_and_groups(store):
    assert sorted(store.names) == sorted(sum(SPLIT.values(), []))
    assert store.groups["world-301_0680"] == "world-301"
    with pytest.raises(KeyError, match="no clip 'world-1'"):
        store["world-1"]


def test_teleports_of_the_sample_are_avoided(store):
    moved = {n: np.flatnonzero(store[n].teleported) for n in store.names}
    assert sum(map(len, moved.values())) == 58
    for n, at in moved.items():
        for i in at:
            assert not any(t - 24 <= i < t + 4 for t in store.starts(n, 25, 4))
        jump = np.hypot(*(np.diff(store[n].state[k]) for k in ("xpos", "zpos")))
        assert set(np.flatnonzero(jump > 20)) <= set(at)  # blocks in a tick


def made(store_dir):
    return {str(p): p.stat().st_mtime_ns for p in store_dir.rglob("*.npy")}


def clips(store_dir):
    return [p.name for p in store_dir.iterdir() if p.name not in ("store.json", ".lock")]


def test_second_build_decodes_nothing(folder, tmp_path, monkeypatch):
    first = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    before = made(tmp_path / "store")
    monkeypatch.setattr(Recording, "frames", lambda *_: pytest.fail("decoded again"))
    second = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert second.folders == first.folders and made(tmp_path / "store") == before and before


@pytest.fixture
def changed(folder):
    "Changes one half of the recording, so that it still opens."

    def change(suffix):
        path = folder / f"{SHORT}{suffix}"
        if suffix == ".jsonl":
            path.write_text(path.read_text().replace('"dwheel":0,', '"dwheel":1,'))
        else:
            for half in (".mp4", ".jsonl"):
                shutil.copy(DATA / f"{OTHER}{half}", folder / f"{SHORT}{half}")

    return change


@pytest.mark.parametrize("suffix", [".jsonl", ".mp4"])
def test_changed_source_is_refused_and_decoded_anew(folder, tmp_path, suffix, changed):
    first = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    old = first[SHORT].actions
    changed(suffix)
    assert np.array_equal(
        ClipStore.open(tmp_path / "store", FRAME)[SHORT].actions, old
    )  # without the source it can't be known
    with pytest.raises(
        StaleStore,
        match=f"{SHORT} has changed since.*minecraft-jepa store {folder} {tmp_path}/store --preset tiny",
    ):
        ClipStore.open(tmp_path / "store", FRAME, folder)
    assert (
        main(["store", str(folder), str(tmp_path / "store"), "--preset", "tiny"]) == 0
    )  # the command it names
    assert not np.array_equal(ClipStore.open(tmp_path / "store", FRAME, folder)[SHORT].actions, old)
    assert clips(tmp_path / "store") == [SHORT]


def test_touched_source_is_the_same(folder, tmp_path):
    ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    os.utime(folder / f"{SHORT}.mp4", (1, 1))
    assert ClipStore.open(tmp_path / "store", FRAME, folder).names == [SHORT]


def test_store_of_another_size_or_format_is_refused(folder, tmp_path):
    ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    small = preset("tiny", height=24, frame_width=40).frame
    with pytest.raises(StaleStore, match="other settings"):
        ClipStore.build(folder, small, tmp_path / "store", progress=False)
    with pytest.raises(StaleStore, match="--height 24 --width 40"):
        ClipStore.open(tmp_path / "store", small)
    with pytest.raises(StaleStore, match="not a clip store"):
        ClipStore.open(folder, FRAME)
    with pytest.raises(StaleStore, match=f"no clip of {OTHER}"):
        ClipStore.open(tmp_path / "store", FRAME, names=[OTHER])
    about = tmp_path / "store/store.json"
    about.write_text(about.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT - 1}'))
    with pytest.raises(StaleStore, match=f"rm -r {tmp_path}/store && minecraft-jepa store"):
        ClipStore.open(tmp_path / "store", FRAME)
    assert ClipStore.build(folder, small, progress=False)[SHORT].frames.shape[2:] == (
        24,
        40,
    )  # in the cache each size has its own


def test_a_store_stands_in_for_the_recordings(store):
    "`build` and `split_recordings` take a store where they take a folder of recordings."
    folder = store.folders[SHORT].parent
    assert (
        ClipStore.build(folder, FRAME).folders == store.folders
        and split_recordings(folder) == SPLIT
    )


def test_clip_that_was_cut_short_is_refused(folder, tmp_path):
    store = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    frames = store.folders[SHORT] / "frames.npy"
    with open(frames, "r+b") as f:
        f.truncate(frames.stat().st_size // 2)
    with pytest.raises(StaleStore, match="cut short"):
        store.window(SHORT, 500)
    assert store.window(SHORT, 100)[0].shape == (2, 3, 48, 80)


def test_failed_build_leaves_nothing(folder, tmp_path):
    "The video breaks off only while it is decoded; what came before it is thrown away, what is already there stays."
    video = folder / f"{SHORT}.mp4"
    good = video.read_bytes()
    broken = bytearray(good)
    broken[len(good) // 2 : len(good) // 2 + 4000] = bytes(4000)
    video.write_bytes(bytes(broken))
    with pytest.raises(RecordingError, match=f"{SHORT}.mp4: .*check_folder"):
        ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert not clips(tmp_path / "store")
    for suffix in (".mp4", ".jsonl"):
        shutil.copy(DATA / f"{OTHER}{suffix}", folder)
    with pytest.raises(RecordingError, match=f"{SHORT}.mp4: "):
        ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert clips(tmp_path / "store") == [OTHER]  # one bad recording keeps no other from being built
    assert [(r["name"], r["used"]) for r in check_folder(folder, decode=True, progress=False)] == [
        (SHORT, False),
        (OTHER, True),
    ]
    assert ClipStore.build(folder, FRAME, tmp_path / "store", progress=False).names == [OTHER]
    video.write_bytes(good)
    assert ClipStore.build(folder, FRAME, tmp_path / "store", progress=False).names == [
        SHORT,
        OTHER,
    ]


def test_interrupted_build_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        yield np.zeros((FRAME.height, FRAME.width, 3), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(Recording, "frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert not clips(tmp_path / "store")


def in_a_fork(words):
    "The command in a process of its own, forked: it need not import torch anew."
    pid = os.fork()
    if pid:
        return pid
    try:
        main(["store", *words])
    finally:
        os._exit(0)


def is_over(pid):
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def test_killed_build_goes_on(tmp_path):
    "Killed again and again, at a later moment each time; every clip is whole at all times, and in the end the store is the one never killed."
    source, target = tmp_path / "v", tmp_path / "store"
    source.mkdir()
    names = SPLIT["train"][: repeats(8, 60)] + SPLIT["validation"] + SPLIT["test"]
    for name in names:
        for suffix in (".mp4", ".jsonl"):
            os.symlink(DATA / f"{name}{suffix}", source / f"{name}{suffix}")
    (source / "split.json").write_text(
        json.dumps({side: [n for n in ns if n in names] for side, ns in SPLIT.items()})
    )
    killed = 0
    for delay in np.random.default_rng(0).uniform(0.0, 0.6, repeats(4, 12)):
        pid, over = in_a_fork([str(source), str(target), "--workers", "2"]), False
        while not (over := is_over(pid)) and not list(target.glob(".*.part-*")):
            time.sleep(0.005)
        if not over:
            time.sleep(delay)
            over = is_over(pid)
        if not over:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            killed += 1
        for name in ClipStore.open(target, FRAME).names:
            assert is_same(ClipStore.open(target, FRAME)[name], open_recording(DATA / name))
    assert killed > repeats(1, 3)
    store = ClipStore.build(source, FRAME, target, progress=False)
    assert store.names == sorted(names) and sorted(clips(target)) == sorted(
        [*store.names, "split.json"]
    )


def is_same(clip, recording):
    t = len(recording) - 1
    return (
        len(clip.frames) == len(clip.actions) == t + 1
        and np.array_equal(clip.actions, recording.actions)
        and clip.frames[t].any()
    )


def test_clip_is_read_without_a_video_library(folder, tmp_path):
    ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    source = f"""
import sys; sys.modules["av"] = None
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.loader import sample_windows
from minecraft_jepa.config import preset
store = ClipStore.open({str(tmp_path / "store")!r}, preset("tiny").frame)
print(next(sample_windows(store, store.names, 25, 2, 4, 0))[0].shape)
try: ClipStore.build({str(folder)!r}, preset("tiny").frame, {str(tmp_path / "new")!r})
except ImportError as e: print(e)
"""
    said = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert "torch.Size([4, 3, 3, 48, 80])" in said.stdout and "pip install av" in said.stdout, said


def test_memory_does_not_grow_with_the_recordings(folder, tmp_path):
    "Peak of the process while windows are drawn from 20 and from 600 recordings of the same size."
    store = ClipStore.build(folder, FRAME, tmp_path / "20", progress=False)
    shutil.copytree(tmp_path / "20", tmp_path / "600")
    for many in (20, 600):
        for i in range(many):
            shutil.copytree(
                tmp_path / "20" / SHORT, tmp_path / str(many) / f"copy{i}_0", copy_function=os.link
            )
    source = """
import sys
from pathlib import Path
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.loader import sample_windows
store = ClipStore.open(sys.argv[1])
windows = sample_windows(store, store.names, 25, 2, 64, 0)
for _ in range(60): next(windows)
peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]  # ru_maxrss would tell the parent's, if that is larger
print(len(store.names), peak[0].split()[1])
"""
    peaks = {}
    for many in (20, 600):
        said = subprocess.run(
            [sys.executable, "-c", source, str(tmp_path / str(many))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names, peaks[many] = map(int, said.split())
        assert names == many + 1
    assert peaks[600] < peaks[20] + 20_000  # KiB; the 600 hold 4.3 GB of frames


def exact(frame):
    "BT.601, limited range, in floating point, (H, W, 3)."
    y, u, v = (
        np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : p.width].astype(float)
        for p in frame.planes
    )
    y, (u, v) = (
        (y - 16) * 255 / 219,
        ((c.repeat(2, 0).repeat(2, 1) - 128) * 255 / 224 for c in (u, v)),
    )
    return np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1).clip(
        0, 255
    )


def test_colours_are_closer_than_by_the_usual_conversion():
    "Against floating point, shrunk three and four times: half a grey level. PyAV's rgb24 is off by two, and darker throughout."
    recording = open_recording(DATA / SHORT)
    with av.open(str(recording.path)) as video:
        for frame, ours, one in zip(
            itertools.islice(video.decode(video=0), 20),
            recording.frames(30, 40),
            recording.frames(30, 40, threads=False),
        ):
            true, usual = (
                exact(frame).reshape(30, 3, 40, 4, 3).mean((1, 3)),
                frame.to_ndarray(format="rgb24", height=30, width=40, interpolation="AREA"),
            )
            assert (
                np.array_equal(ours, one)
                and np.abs(ours - true).mean() < 0.7
                and 2 * np.abs(ours - true).mean() < np.abs(usual - true).mean()
            )
            assert np.abs((ours - true).mean((0, 1))).max() < 0.3


def test_one_bad_recording_is_named_and_can_be_left_out(folder, tmp_path):
    for suffix in (".mp4", ".jsonl"):
        shutil.copy(DATA / f"{OTHER}{suffix}", folder)
    lines = (folder / f"{OTHER}.jsonl").read_text().splitlines(True)
    (folder / f"{OTHER}.jsonl").write_text(
        "".join([*lines[:300], lines[300][:50] + "\n", *lines[301:]])
    )
    with pytest.raises(RecordingError, match=f"{OTHER}.jsonl, line 301: not JSON"):
        ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert ClipStore.build(
        folder, FRAME, tmp_path / "store", names=[SHORT], progress=False
    ).names == [SHORT]
    (folder / f"{OTHER}.jsonl").unlink()
    assert ClipStore.build(
        folder, FRAME, tmp_path / "store", names=[SHORT], progress=False
    ).names == [SHORT]  # a lone half is no hindrance to others


def test_store_stands_where_the_environment_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", str(tmp_path / "cache"))
    built = ClipStore.build(folder, FRAME, progress=False)
    assert (
        built.folders[SHORT].parent == store_of(folder, FRAME)
        and store_of(folder, FRAME).parent == tmp_path / "cache" / "clips"
    )
    assert json.loads((built.folders[SHORT] / "clip.json").read_text())["name"] == SHORT


LAGS = [*range(-5, 6)]


@pytest.fixture(scope="module")
def shifts(store):
    return {n: image_shift(store[n].frames) for n in {*store.names[:: repeats(6, 1)], *CLEAR}}


CLEAR = ["world-301_0680", "world-310_0340", "world-316_1220", "world-331_1040", "world-345_1080"]


def test_picture_follows_the_camera_at_its_own_tick(store, shifts):
    "The shift of the picture between t and t+1 belongs to the turn of tick t: over the bundled recordings, no other tick explains it as well."
    by_lag = np.mean(
        [lag_correlation(*shifts[n], store[n].actions[:, 22], LAGS) for n in shifts], 0
    )
    assert LAGS[int(by_lag.argmax())] == 0 and by_lag[5] > 0.8
    assert by_lag[5] > np.delete(by_lag, 5).max() + 0.05


@pytest.mark.parametrize("name", CLEAR)
@pytest.mark.parametrize("late", [-1, 0, 2])
def test_actions_out_of_step_would_show(store, shifts, name, late):
    "Where something far away is seen, each recording alone tells a single tick's delay."
    turn = np.roll(store[name].actions[:, 22], late)
    r = lag_correlation(*shifts[name], turn, LAGS)
    assert LAGS[int(np.argmax(r))] == late


FEW = 40


def small(folder, name="toy", **how):
    "A store of one recording made in code."
    pairs.make_pair(folder / "v", name, FEW, **how)
    return ClipStore.build(folder / "v", FRAME, folder / "store", progress=False, workers=1)


@pytest.mark.parametrize("lines", [FEW, FEW - 1, FEW + 2])
def test_last_window_ends_on_the_last_frame(tmp_path, lines):
    "With a line for it or without; the last action that leads anywhere is used, and that of the last frame never."
    store = small(tmp_path, lines=lines)
    last = np.stack(list(open_recording(tmp_path / "v/toy").frames(FRAME.height, FRAME.width)))[-1]
    for rollout in (1, 3):
        starts = store.starts("toy", 5, rollout)
        assert starts.tolist() == list(range(4, FEW - rollout))
        frames, actions = store.window("toy", starts[-1], 5, rollout)
        assert np.array_equal(frames[-1].numpy().transpose(1, 2, 0), last) and last.mean() > 120
        assert pairs.ticks_of(actions)[-1] == FEW - 2
        with pytest.raises(IndexError):
            store.window("toy", starts[-1] + 1, 5, rollout)
        drawn = [
            t
            for f, a in itertools.islice(sample_windows(store, ["toy"], 5, rollout, 64, 0), 5)
            for t in pairs.ticks_of(a)
        ]
        assert {t for ticks in drawn for t in ticks} == set(range(FEW - 1))
    frames, actions = store.read([("toy", 4)], 5, 1, far=FEW - 5)
    assert pairs.ticks_of(actions)[0] == list(range(FEW - 1)) and np.array_equal(
        frames[0, -1].numpy().transpose(1, 2, 0), last
    )
    clip = store["toy"]
    assert {len(x) for x in (clip.frames, clip.actions, clip.teleported, *clip.state.values())} == {
        FEW
    } and clip.spare_frames == (lines < FEW)


def test_no_window_crosses_a_tick_without_its_action(tmp_path):
    rows = [
        pairs.line(
            t, **({"keyboard": None} if t == 20 else {"yaw": float("nan")} if t == 30 else {})
        )
        for t in range(FEW)
    ]
    store = small(tmp_path, rows=rows)
    assert store.starts("toy", 3, 2).tolist() == [
        *range(2, 19),
        *range(23, 28),
        *range(33, 38),
    ]  # frame 30 stands in none
    assert all(np.isfinite(v).all() for v in store["toy"].state.values())


KINDS = np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint64, np.array, torch.tensor


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_whole_numbers_of_any_type_give_the_same_windows(tmp_path_factory, kind, toys):
    want = toys.window("toy", 30, 5, 2)
    for got in (
        toys.window("toy", kind(30), kind(5), kind(2)),
        [x[0] for x in toys.read([("toy", kind(30))], kind(5), kind(2), kind(0))],
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert toys.runs("toy", kind(5), kind(2)) == toys.runs("toy", 5, 2)
    pick = lambda k: next(
        sample_windows(toys, ["toy"], k(5), k(2), k(4), k(0), k(3), k(0), k(2), k(6))
    )
    assert all(torch.equal(a, b) for a, b in zip(pick(kind), pick(int)))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return small(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize(
    "wrong", [30.0, True, "30", None, np.float32(30), torch.tensor(30.0), np.bool_(True)], ids=repr
)
def test_numbers_that_are_not_whole_are_refused(toys, wrong):
    for call in (
        lambda: toys.window("toy", wrong),
        lambda: toys.window("toy", 30, wrong),
        lambda: toys.window("toy", 30, 25, wrong),
        lambda: toys.starts("toy", wrong),
        lambda: toys.runs("toy", 25, wrong),
        lambda: toys.read([("toy", wrong)]),
        lambda: next(sample_windows(toys, ["toy"], 25, 1, wrong, 0)),
        lambda: next(sample_windows(toys, ["toy"], 25, 1, 4, wrong)),
    ):
        with pytest.raises(ValueError, match="must be a whole number"):
            call()


@pytest.mark.parametrize("t", [-1, 3, FEW - 1, 10**9])
def test_reading_beyond_a_recording_is_refused(toys, t):
    with pytest.raises(IndexError, match=f"toy: no window at tick {t}; it has {FEW} ticks"):
        toys.read([("toy", t)], 5, 1)
    with pytest.raises(KeyError, match="no clip 'nobody'"):
        toys.read([("nobody", 10)], 5, 1)


def test_store_that_may_only_be_read_serves(tmp_path, monkeypatch):
    "Nothing is written where all is there; and rights of a folder that may only be read do not pass to the store."
    for n in "abc":
        pairs.make_pair(tmp_path / "v", n, 4)
    split = tmp_path / "v/split.json"
    split.write_text(json.dumps({"train": ["a"], "validation": ["b"], "test": ["c"]}))
    split.chmod(0o444)
    build = lambda: ClipStore.build(
        tmp_path / "v", FRAME, tmp_path / "store", progress=False, workers=1
    )
    first = build()
    assert (tmp_path / "store/split.json").stat().st_mode & 0o200
    monkeypatch.setattr(clip_store, "_locked", lambda _: pytest.fail("locked"))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert (
        build().folders == first.folders
        and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    )
    monkeypatch.setattr(
        shutil,
        "copyfile",
        lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
    )
    split.chmod(0o644)
    split.write_text(json.dumps({"train": ["b"], "validation": ["a"], "test": ["c"]}))
    assert build().folders == first.folders


def test_clips_may_be_read_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        store = small(tmp_path)
    finally:
        os.umask(old)
    for p in [store.folders["toy"], *store.folders["toy"].iterdir()]:
        assert p.stat().st_mode & 0o044 == 0o044, p


@pytest.mark.parametrize("number", ["EACCES", "EROFS", "ENOSPC", "ENOTDIR"])
def test_disk_that_refuses_is_named_with_a_remedy(tmp_path, monkeypatch, capsys, number):
    pairs.make_pair(tmp_path / "v", "toy", 4)
    code = getattr(errno, number)

    def refuse(path, *_):
        raise OSError(code, os.strerror(code), None if number == "ENOSPC" else str(path))

    monkeypatch.setattr(clip_store, "write_json", refuse)
    with pytest.raises(
        OSError, match=rf"{os.strerror(code)}; .*MINECRAFT_JEPA_CACHE.*'{tmp_path}/store"
    ):
        ClipStore.build(tmp_path / "v", FRAME, tmp_path / "store", progress=False, workers=1)
    words = ["store", tmp_path / "v", tmp_path / "store", "--workers", "1"]
    refused(capsys, words, "MINECRAFT_JEPA_CACHE")


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_disk_that_knows_no_locks_is_told_and_used(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "store/.other.part-1").mkdir(parents=True)  # perhaps another process at work
    assert small(tmp_path).names == ["toy"] and (tmp_path / "store/.other.part-1").is_dir()
    assert f"{tmp_path}/store: this disk does not lock files" in capsys.readouterr().err


def test_killed_decoding_process_is_told_and_the_build_goes_on(tmp_path, monkeypatch, capsys):
    for n in "abcd":
        pairs.make_pair(tmp_path / "v", n, 4)
    real = clip_store.decode_clip

    def killed(path, *rest):
        if path.stem in "cd":
            os.kill(os.getpid(), 9)
        real(path, *rest)

    monkeypatch.setattr(clip_store, "decode_clip", killed)
    words = ["store", str(tmp_path / "v"), str(tmp_path / "store"), "--workers", "2"]
    text = refused(capsys, words, "a decoding process was killed")
    assert "memory" in text and "--workers 1" in text
    with pytest.raises(DecodingStopped):
        ClipStore.build(tmp_path / "v", FRAME, tmp_path / "store", progress=False, workers=2)
    assert issubclass(DecodingStopped, OSError)  # training's command tells these in a line
    monkeypatch.setattr(clip_store, "decode_clip", real)
    assert main(words) == 0
    assert ClipStore.open(tmp_path / "store").names == list("abcd")


@pytest.mark.parametrize(
    "name",
    ["n" * 240, "\u00e9" * 120, "with.dots.in it", "-dash"],
    ids=["long", "accents", "dots", "dash"],
)
def test_recordings_of_any_name_are_stored(tmp_path, name):
    assert small(tmp_path, name).window(name, 20, 5)[0].shape == (2, 3, 48, 80)


def test_hidden_folders_are_no_clips(tmp_path):
    store = small(tmp_path)
    shutil.copytree(store.folders["toy"], tmp_path / "store/.toy.part-1")
    assert ClipStore.open(tmp_path / "store").names == ["toy"]


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of other tests
@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((9, 3, 48, 80), np.uint8),
        np.random.default_rng(0).integers(0, 255, (1, 3, 48, 80), dtype=np.uint8).repeat(9, 0),
        np.zeros((1, 3, 48, 80), np.uint8),
        np.zeros((2, 3, 48, 80), np.uint8),
    ],
    ids=["black", "still", "one frame", "two frames"],
)
@pytest.mark.parametrize("turn", [0.0, 0.1])
def test_recordings_without_movement_can_be_looked_at(frames, turn):
    shift, agreement = image_shift(frames)
    assert (
        len(shift) == len(agreement) == len(frames) - 1
        and np.isfinite(agreement).all()
        and (np.abs(shift) < 0.5).all()
    )
    assert lag_correlation(shift, agreement, np.full(len(frames), turn), [-1, 0, 1]) == [0.0] * 3
    assert lag_correlation(
        shift, np.ones(len(shift)), np.full(len(frames), turn), [np.int8(0)], sure=0
    ) == [0.0]


def test_workers_are_as_many_as_cores_allowed(tmp_path, monkeypatch):
    for n in "abc":
        pairs.make_pair(tmp_path / "v", n, 4)
    asked = []
    monkeypatch.setattr(clip_store, "cores_allowed", lambda: 2)
    monkeypatch.setattr(
        clip_store,
        "_decode_all",
        lambda paths, frame, store_dir, workers, progress: asked.append(workers) or [],
    )
    with pytest.raises(StaleStore):
        ClipStore.build(tmp_path / "v", FRAME, tmp_path / "store", progress=False)
    assert asked == [2]
