"The clip store: windows, teleports, sampling, atomic building, and frames in step with actions."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from minecraft_jepa.clips import Clip, ClipStore, image_shift, lag_correlation, sample_windows
from minecraft_jepa.config import preset
from minecraft_jepa.recordings import Recording, RecordingError, open_recording, split_recordings

DATA = Path(__file__).parent.parent / "data"
SPLIT = split_recordings(DATA)
FRAME = preset("tiny").frame
SHORT, OTHER = SPLIT["validation"]


@pytest.fixture(scope="module")
def store(): return ClipStore.build(DATA, FRAME, progress=False)


@pytest.fixture
def folder(tmp_path):
    "A copy of one recording that may be spoilt."
    for suffix in (".mp4", ".jsonl"): shutil.copy(DATA / f"{SHORT}{suffix}", tmp_path)
    return tmp_path


def numbered(*teleports, ticks=60):
    "A store of two clips whose frame t and action t say t; `teleports` are in the first."
    t = np.arange(ticks)
    frames, actions = np.broadcast_to(t[:, None, None, None], (ticks, 3, 8, 8)).astype(np.uint8), np.broadcast_to(t[:, None], (ticks, 28)).astype(np.float32)
    made = ClipStore({"a": None, "b": None})
    made._open = {"a": Clip(frames, actions, np.isin(t, teleports), {}), "b": Clip(frames[:40] + 100, actions[:40] + 100, np.zeros(40, bool), {})}
    return made


@given(st.sets(st.integers(0, 59), max_size=4), st.integers(1, 30), st.integers(1, 8))
def test_windows_cross_no_teleport_and_no_end(teleports, ticks, rollout):
    allowed = [t for t in range(60) if t - ticks + 1 >= 0 and t + rollout < 60 and not any(t - ticks + 1 <= i < t + rollout for i in teleports)]
    assert numbered(*teleports).starts("a", ticks, rollout).tolist() == allowed


@given(st.integers(1, 30), st.integers(1, 8), st.data())
def test_window_is_a_slice(ticks, rollout, data):
    t = data.draw(st.integers(ticks - 1, 60 - rollout - 1))
    frames, actions = numbered().window("a", t, ticks, rollout)
    assert frames[:, 0, 0, 0].tolist() == [t + k for k in range(rollout + 1)] and frames.shape == (rollout + 1, 3, 8, 8)
    assert actions[:, 0].tolist() == [t - ticks + 1 + j for j in range(ticks - 1 + rollout)] and actions.shape[1] == 28


@pytest.mark.parametrize("t", [-1, 0, 23, 58, 60])
def test_window_beyond_the_recording_is_refused(t):
    with pytest.raises(IndexError, match=f"a: no window at tick {t}; it has 60 ticks, 24 are needed before and 2 after"): numbered().window("a", t, 25, 2)


@given(st.integers(0, 10**6), st.integers(0, 20))
def test_sampling_depends_on_seed_and_step_only(seed, skipped):
    made, arguments = numbered(30), (["a", "b"], 5, 2, 4, seed)
    walked = sample_windows(made, *arguments)
    for _ in range(skipped): next(walked)
    for one, other in zip(next(walked), next(sample_windows(made, *arguments, start_step=skipped))): assert torch.equal(one, other)


def test_samples_are_whole_windows_of_one_clip():
    frames, actions = next(sample_windows(numbered(30), ["a", "b"], 5, 2, 2000, seed=0))
    assert frames.shape == (2000, 3, 3, 8, 8) and frames.dtype == torch.uint8 and actions.shape == (2000, 6, 28) and actions.dtype == torch.float32
    t = frames[:, 0, 0, 0, 0].float()
    assert torch.equal(actions[:, :, 0], t[:, None] + torch.arange(-4, 2)) and torch.equal(frames[:, :, 0, 0, 0], (t[:, None] + torch.arange(3)).byte())
    drawn = set(t.int().tolist())
    made = numbered(30)
    assert drawn == {*made.starts("a", 5, 2).tolist(), *(made.starts("b", 5, 2) + 100).tolist()}  # all of them, and nothing else
    in_proportion = len(made.starts("b", 5, 2)) / len(drawn)
    assert (t >= 100).float().mean().item() == pytest.approx(in_proportion, abs=0.04)


def test_no_window_at_all_is_refused():
    for names, ticks in ((["a"], 100), ([], 25)):
        with pytest.raises(ValueError, match="use longer recordings"): next(sample_windows(numbered(), names, ticks, 1, 4, seed=0))


def test_store_holds_what_the_recording_does(store):
    recording = open_recording(DATA / SHORT)
    clip = store[SHORT]
    assert clip.frames.shape == (len(recording), 3, FRAME.height, FRAME.width) and clip.frames.dtype == np.uint8
    assert np.array_equal(clip.actions, recording.actions) and np.array_equal(clip.teleported, recording.teleported)
    assert list(clip.state) == list(recording.state) and all(np.array_equal(clip.state[k], v) for k, v in recording.state.items())
    for t, frame in enumerate(recording.frames(FRAME.height, FRAME.width)): assert np.array_equal(clip.frames[t], frame.transpose(2, 0, 1))


def test_store_knows_names_and_groups(store):
    assert sorted(store.names) == sorted(sum(SPLIT.values(), []))
    assert store.groups["world-201_0837"] == "world-201"
    with pytest.raises(KeyError, match="no clip 'world-1'"): store["world-1"]


def test_teleports_of_the_sample_are_avoided(store):
    moved = {n: np.flatnonzero(store[n].teleported) for n in store.names}
    assert sum(map(len, moved.values())) == 3
    for n, at in moved.items():
        for i in at: assert not any(t - 24 <= i < t + 4 for t in store.starts(n, 25, 4))
        jump = np.hypot(*(np.diff(store[n].state[k]) for k in ("xpos", "zpos")))
        assert set(np.flatnonzero(jump > 20)) <= set(at)  # blocks in a tick


def made(store_dir): return {p.name: p.stat().st_mtime_ns for p in store_dir.rglob("*")}


def test_second_build_decodes_nothing(folder, tmp_path, monkeypatch):
    first = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    before = made(tmp_path / "store")
    monkeypatch.setattr(Recording, "frames", lambda *_: pytest.fail("decoded again"))
    second = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert second.folders == first.folders and made(tmp_path / "store") == before


@pytest.mark.parametrize("suffix", [".jsonl", ".mp4"])
def test_changed_source_is_decoded_anew(folder, tmp_path, suffix):
    first = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    changed = folder / f"{SHORT}{suffix}"
    if suffix == ".mp4": shutil.copy(DATA / f"{OTHER}.mp4", changed)
    else: changed.write_text(changed.read_text().replace('"dwheel":0.0', '"dwheel":1.0'))
    if suffix == ".mp4": shutil.copy(DATA / f"{OTHER}.jsonl", changed.with_suffix(".jsonl"))
    second = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert second.folders[SHORT] != first.folders[SHORT]
    assert not np.array_equal(second[SHORT].actions, first[SHORT].actions)


def test_other_size_is_another_clip(folder, tmp_path):
    small = preset("tiny", height=24, frame_width=40).frame
    stores = [ClipStore.build(folder, f, tmp_path / "store", progress=False) for f in (FRAME, small)]
    assert [s[SHORT].frames.shape[2:] for s in stores] == [(48, 80), (24, 40)]


def test_failed_build_leaves_nothing(folder, tmp_path):
    "The video breaks off only while it is decoded; what came before it is thrown away, what is already there stays."
    video = folder / f"{SHORT}.mp4"
    good = video.read_bytes()
    broken = bytearray(good)
    broken[len(good) // 2:len(good) // 2 + 4000] = bytes(4000)
    video.write_bytes(bytes(broken))
    with pytest.raises(RecordingError, match=f"{SHORT}.mp4: "): ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert not list((tmp_path / "store").iterdir())
    video.write_bytes(good)
    built = ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert [p.name for p in (tmp_path / "store").iterdir()] == [built.folders[SHORT].name]


def test_interrupted_build_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        yield np.zeros((FRAME.height, FRAME.width, 3), np.uint8)
        raise KeyboardInterrupt
    monkeypatch.setattr(Recording, "frames", interrupted)
    with pytest.raises(KeyboardInterrupt): ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert not list((tmp_path / "store").iterdir())


def test_one_bad_recording_is_named_and_can_be_left_out(folder, tmp_path):
    for suffix in (".mp4", ".jsonl"): shutil.copy(DATA / f"{OTHER}{suffix}", folder)
    lines = (folder / f"{OTHER}.jsonl").read_text().splitlines(True)
    (folder / f"{OTHER}.jsonl").write_text("".join([*lines[:300], lines[300][:50] + "\n", *lines[301:]]))
    with pytest.raises(RecordingError, match=f"{OTHER}.jsonl, line 301: not JSON"): ClipStore.build(folder, FRAME, tmp_path / "store", progress=False)
    assert ClipStore.build(folder, FRAME, tmp_path / "store", names=[SHORT], progress=False).names == [SHORT]
    (folder / f"{OTHER}.jsonl").unlink()
    assert ClipStore.build(folder, FRAME, tmp_path / "store", names=[SHORT], progress=False).names == [SHORT]  # a lone half is no hindrance to others


def test_store_stands_where_the_environment_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINECRAFT_JEPA_CACHE", str(tmp_path / "cache"))
    assert ClipStore.build(folder, FRAME, progress=False).folders[SHORT].parent == tmp_path / "cache" / "clips"
    assert json.loads((next((tmp_path / "cache/clips").iterdir()) / "clip.json").read_text())["name"] == SHORT


LAGS = [*range(-5, 6)]


@pytest.fixture(scope="module")
def shifts(store): return {n: image_shift(store[n].frames) for n in store.names}


def test_picture_follows_the_camera_at_its_own_tick(store, shifts):
    "The shift of the picture between t and t+1 belongs to the turn of tick t: over the bundled recordings, no other tick explains it as well."
    by_lag = np.mean([lag_correlation(*shifts[n], store[n].actions[:, 22], LAGS) for n in store.names], 0)
    assert LAGS[int(by_lag.argmax())] == 0 and by_lag[5] > 0.45
    assert by_lag[5] > np.delete(by_lag, 5).max() + 0.02


@pytest.mark.parametrize("name", ["world-203_2822", "world-204_0808", "world-204_2812", "world-205_0820", "world-205_2809"])
@pytest.mark.parametrize("late", [-1, 0, 2])
def test_actions_out_of_step_would_show(store, shifts, name, late):
    "In these recordings the picture turns in the same uneven steps as the lines say, so each of them alone tells a single tick's delay."
    turn = np.roll(store[name].actions[:, 22], late)
    r = lag_correlation(*shifts[name], turn, LAGS)
    assert LAGS[int(np.argmax(r))] == late
