"Shards: every window once over ranks and workers, going on in mid-epoch, and the storages: disk, web server, S3."

import json
import os
import shutil
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pairs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import repeats
from torch.utils.data import DataLoader

from minecraft_jepa.config import preset
from minecraft_jepa.data import shard_reader, shards
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.clips import runs_of
from minecraft_jepa.data.shard_reader import ShardWindows, draw_windows, every, some_windows
from minecraft_jepa.data.shards import ShardError, cut_segments, starts_in, write_shards

DATA = Path(__file__).parent.parent / "data"
NAMES = ["world-303_0880", "world-319_1320", "world-321_0740"]
TICKS, ROLLOUT, BATCH = 25, 2, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ClipStore.build(
        DATA, preset("tiny").frame, tmp_path_factory.mktemp("store"), names=NAMES, progress=False
    )


@pytest.fixture(scope="module")
def written(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(store, folder, length=60, per_shard=7, progress=False)
    return folder


@pytest.fixture(scope="module")
def all_windows(store):
    return Counter(
        key(store.window(n, t, TICKS, ROLLOUT)[1])
        for n in NAMES
        for t in store.starts(n, TICKS, ROLLOUT)
    )


def key(actions):
    return actions.numpy().tobytes()


def windows(url, **options):
    return ShardWindows(url, TICKS, ROLLOUT, BATCH, **{"even": False, "buffer": 5} | options)


def drawn(reader, workers):
    return [
        [key(a) for a in actions]
        for _, actions in DataLoader(reader, batch_size=None, num_workers=workers)
    ]


@settings(max_examples=repeats(30, 100))
@given(
    st.sets(st.integers(0, 149), max_size=6),
    st.integers(1, 60),
    st.integers(1, 30),
    st.integers(1, 9),
    st.data(),
)
def test_segments_hold_every_window_once(gaps, length, history, reach, data):
    ticks, rollout = data.draw(st.integers(1, history)), data.draw(st.integers(1, reach))
    runs = runs_of(np.isin(np.arange(150), list(gaps)))
    segments = cut_segments(runs, length, history, reach)
    assert [t for s in segments for t in starts_in(s, ticks, rollout)] == [
        t for a, b in runs for t in range(a + ticks - 1, b - rollout)
    ]
    for s in segments:
        for t in starts_in(s, ticks, rollout):
            assert (
                s["actions"] <= t - ticks + 1 and t + rollout < s["first"] + s["frames"]
            )  # all it needs is there


@settings(max_examples=repeats(30, 100))
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 8), st.integers(0, 99))
def test_every_window_is_drawn_once_and_released_last(counts, buffer, seed):
    draws = list(draw_windows(counts, buffer, np.random.default_rng(seed)))
    assert sorted((s, k) for s, k, _ in draws) == [
        (s, k) for s, n in enumerate(counts) for k in range(n)
    ]
    for n, (_, _, done) in enumerate(draws):
        assert not {s for s, _, _ in draws[n + 1 :]} & set(done)
    assert {s for _, _, done in draws for s in done} == {s for s, n in enumerate(counts) if n}


def test_draws_are_shuffled(written):
    order = [k for batch in drawn(windows(written), 0) for k in batch]
    again, other, epoch = windows(written), windows(written, seed=1), windows(written)
    epoch.resume(1)
    assert order == [k for b in drawn(again, 0) for k in b]
    for different in (other, epoch):
        found = [k for b in drawn(different, 0) for k in b]
        assert found != order and Counter(found) == Counter(order)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_no_window_twice_and_none_lost(written, all_windows, world, workers):
    found = [drawn(windows(written, rank=r, world=world), workers) for r in range(world)]
    assert Counter(k for rank in found for batch in rank for k in batch) == all_windows
    assert [len(rank) for rank in found] == [
        sum(windows(written, rank=r, world=world).batches(workers)) for r in range(world)
    ]


def test_even_readers_have_equally_many_full_batches(written, all_windows):
    found = [drawn(windows(written, rank=r, world=2, even=True), 2) for r in range(2)]
    assert len(found[0]) == len(found[1]) and {len(b) for rank in found for b in rank} == {BATCH}
    taken = Counter(k for rank in found for b in rank for k in b)
    assert not taken - all_windows and sum(taken.values()) > 0.8 * sum(all_windows.values())


@pytest.mark.parametrize("workers, stop", [(0, 1), (0, 37), (1, 10), (2, 9), (2, 24), (3, 17)])
def test_goes_on_in_mid_epoch(written, workers, stop):
    whole = drawn(windows(written, rank=1, world=2), workers)
    reader = windows(written, rank=1, world=2)
    reader.resume(0, stop)
    assert len(whole) > stop
    rest = drawn(reader, workers)
    if stop % max(workers, 1) == 0:
        assert rest == whole[stop:]
    assert Counter(k for b in rest for k in b) == Counter(k for b in whole[stop:] for k in b)


def test_going_on_fetches_only_what_is_needed(written, monkeypatch):
    fetched = []
    real = shard_reader._Segments.fetch
    monkeypatch.setattr(
        shard_reader._Segments, "fetch", lambda self, i, *a: fetched.append(i) or real(self, i, *a)
    )
    reader = windows(written)
    last = reader.batches()[0] - 1
    reader.resume(0, last)
    assert len(list(reader)) == 1 and len(fetched) <= 5


@pytest.mark.parametrize("quality, least", [(None, 200), (95, 35), (60, 28)])
def test_pixels_are_those_of_the_store(store, tmp_path, quality, least):
    write_shards(store, tmp_path, names=NAMES[1:2], length=300, quality=quality, progress=False)
    by_actions = {
        key(a): f
        for f, a in (
            store.window(NAMES[1], t, TICKS, ROLLOUT)
            for t in store.starts(NAMES[1], TICKS, ROLLOUT)
        )
    }
    errors = [
        (f.float() - by_actions[key(a)].float()).square().mean().item()
        for frames, actions in windows(tmp_path)
        for f, a in zip(frames, actions)
    ]
    assert 10 * np.log10(255**2 / max(np.mean(errors), 1e-20)) > least and len(errors) == len(
        by_actions
    )


def test_names_and_split_are_kept(written, store):
    assert windows(written).about["split"] == {
        "train": NAMES[:1],
        "validation": NAMES[1:2],
        "test": NAMES[2:],
    }
    mine = Counter(
        key(store.window(NAMES[1], t, TICKS, ROLLOUT)[1])
        for t in store.starts(NAMES[1], TICKS, ROLLOUT)
    )
    assert Counter(k for b in drawn(windows(written, names=[NAMES[1]]), 0) for k in b) == mine


def test_webdataset_reads_them(written):
    wds = pytest.importorskip("webdataset")
    samples = list(
        wds.WebDataset([str(p) for p in sorted(written.glob("*.tar"))], shardshuffle=False).decode(
            "rgb8"
        )
    )
    told = [
        s
        for shard in json.loads((written / "shards.json").read_text())["shards"]
        for s in shard["segments"]
    ]
    assert len(samples) == len(told)
    for sample, segment in zip(samples, told):
        assert sample["json"]["name"] == segment["name"] and sample["0000.jpg"].shape == (48, 80, 3)
        assert (
            len(sample["actions.npy"])
            == segment["first"] + segment["frames"] - 1 - segment["actions"]
            and f"{segment['frames'] - 1:04d}.jpg" in sample
        )


def test_place_comes_from_torchrun(written, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert drawn(windows(written), 0) == drawn(windows(written, rank=1, world=2), 0)


class Web(ThreadingHTTPServer):
    "A folder over HTTP; knows Range or ignores it, and fails as often as `failures` says."

    def __init__(self, folder, ranges=True):
        self.folder, self.ranges, self.failures, self.partial = folder, ranges, 0, 0
        super().__init__(("127.0.0.1", 0), WebHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class WebHandler(SimpleHTTPRequestHandler):
    def __init__(self, request, address, server):
        super().__init__(request, address, server, directory=str(server.folder))

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked = self.headers.get("Range")
        if asked and self.server.failures:
            self.server.failures -= 1
            return self.send_error(503)
        if not asked or not self.server.ranges:
            return super().do_GET()
        begin, end = map(int, asked.removeprefix("bytes=").split("-"))
        whole = Path(self.translate_path(self.path)).read_bytes()
        self.server.partial += 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{min(end, len(whole) - 1)}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole[begin : end + 1])))
        self.end_headers()
        self.wfile.write(whole[begin : end + 1])


@pytest.mark.parametrize("ranges", [True, False])
def test_over_http(written, all_windows, ranges):
    pytest.importorskip("aiohttp")
    web = Web(written, ranges)
    found = [drawn(windows(web.url, rank=r, world=2), 2) for r in range(2)]
    web.shutdown()
    web.server_close()
    assert (
        Counter(k for rank in found for b in rank for k in b) == all_windows
        and (web.partial > 0) == ranges
    )


def test_failing_network_is_tried_again_then_told(written, all_windows, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(time, "sleep", lambda s: None)
    web = Web(written)
    web.failures = 3
    assert (
        Counter(k for b in drawn(windows(web.url), 0) for k in b) == all_windows
        and web.failures == 0
    )
    web.failures = 10**6
    with pytest.raises(ShardError, match=r"clips-\d+.tar: .*go on with resume"):
        drawn(windows(web.url), 0)
    web.shutdown()
    web.server_close()


@pytest.fixture(scope="module")
def s3():
    "A stand-in for S3 on this machine."
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    old = {k: os.environ.get(k) for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    os.environ.update(dict.fromkeys(old, "testing"))
    yield {"endpoint_url": f"http://{host}:{port}"}
    for k, v in old.items():
        os.environ.pop(k) if v is None else os.environ.update({k: v})
    server.stop()


def test_over_s3_two_ranks_two_workers(store, s3):
    import fsspec

    fsspec.filesystem("s3", **s3).mkdir("recordings")
    write_shards(
        store, "s3://recordings/vpt", names=NAMES[1:2], length=60, per_shard=7, progress=False, **s3
    )
    all_windows = Counter(
        key(store.window(NAMES[1], t, TICKS, ROLLOUT)[1])
        for t in store.starts(NAMES[1], TICKS, ROLLOUT)
    )
    whole = [drawn(windows("s3://recordings/vpt", rank=r, world=2, **s3), 2) for r in range(2)]
    assert Counter(k for rank in whole for b in rank for k in b) == all_windows
    rest = windows("s3://recordings/vpt", rank=0, world=2, **s3)
    rest.resume(0, 4)
    assert len(whole[0]) > 8 and drawn(rest, 2) == whole[0][4:]


def test_writing_goes_on_and_a_half_written_set_is_refused(store, tmp_path, monkeypatch):
    real, done = shards._put, []

    def killed(fs, path, source):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(path)
        real(fs, path, source)

    monkeypatch.setattr(shards, "_put", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(store, tmp_path, length=60, per_shard=7, workers=1, progress=False)
    with pytest.raises(ShardError, match="no shards.json"):
        windows(tmp_path)
    monkeypatch.setattr(shards, "_put", real)
    there = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    write_shards(store, tmp_path, length=60, per_shard=7, progress=False)
    kept = [n for n, t in there.items() if (tmp_path / n).stat().st_mtime_ns == t]
    assert (
        len(kept) == 2
        and len(list(tmp_path.glob("*.tar"))) > 3
        and not list(tmp_path.glob("*.part"))
    )
    write_shards(
        store, tmp_path, length=60, per_shard=7, quality=50, progress=False
    )  # another plan: none is kept
    assert all((tmp_path / n).stat().st_mtime_ns != t for n, t in there.items())


def test_damaged_and_missing_shards_are_named(written, tmp_path):
    shutil.copytree(written, tmp_path / "bad")
    tar = tmp_path / "bad/clips-000000.tar"
    whole = bytearray(tar.read_bytes())
    whole[len(whole) // 2] ^= 255
    tar.write_bytes(whole)
    with pytest.raises(ShardError, match="clips-000000.tar: bytes .* write the shards again"):
        drawn(windows(tmp_path / "bad"), 0)
    tar.unlink()
    with pytest.raises(ShardError, match="clips-000000.tar: no such shard"):
        drawn(windows(tmp_path / "bad"), 0)
    with pytest.raises(ShardError, match="no shards.json"):
        windows(tmp_path)
    with pytest.raises(ShardError, match="no segment can be cut"):
        write_shards(ClipStore({}, {}), tmp_path, progress=False)
    for wrong in ({"ticks": 26}, {"rollout": 17}, {"ticks": 0}):
        with pytest.raises(ShardError, match="cut for 1 to"):
            ShardWindows(written, **wrong)


FEW = 40


def shards_of(folder, name="toy", lines=FEW, **how):
    "Shards of one recording made in code, lossless."
    pairs.make_pair(folder / "v", name, FEW, lines)
    store = ClipStore.build(
        folder / "v", preset("tiny").frame, folder / "store", progress=False, workers=1
    )
    write_shards(
        store,
        folder / "shards",
        **{"length": 10, "reach": 8, "quality": None, "workers": 1, "progress": False} | how,
    )
    return store, folder / "shards"


@pytest.mark.parametrize("lines", [FEW, FEW - 1])
@pytest.mark.parametrize("length", [10, 7, 200])
def test_last_window_ends_on_the_last_frame(tmp_path, lines, length):
    "With a line for it or without; the last action that leads anywhere is used, and that of the last frame never."
    store, folder = shards_of(tmp_path, lines=lines, length=length)
    for rollout in (1, 3):
        found = [
            (f, a)
            for frames, actions in ShardWindows(folder, 5, rollout, 4, even=False)
            for f, a in zip(frames, actions)
        ]
        by_first = {pairs.ticks_of(a)[0]: (f, a) for f, a in found}
        assert (
            len(found) == len(by_first) == len(store.starts("toy", 5, rollout)) == FEW - 4 - rollout
        )
        frames, actions = by_first[FEW - 5 - rollout]
        assert (
            torch.equal(frames, store.window("toy", FEW - 1 - rollout, 5, rollout)[0])
            and frames[-1].float().mean() > 120
        )
        assert {t for _, a in found for t in pairs.ticks_of(a)} == set(range(FEW - 1))


@pytest.mark.parametrize(
    "name",
    [
        "a-player-with-a-very-long-alias-" * 3 + "0123456789ab-20220101-000000",
        "n" * 240,
        "\u00e9\u4e2d" * 40,
        "with.dots.in-it",
        "a b(1)",
    ],
    ids=["contractor", "long", "letters", "dots", "blank"],
)
def test_recordings_of_any_name_go_into_shards(tmp_path, name):
    store, folder = shards_of(tmp_path, name)
    frames, actions = next(iter(ShardWindows(folder, 5, 2, 2, names=[name])))
    assert frames.shape == (2, 3, 3, 48, 80) and actions.shape == (2, 6, 28)
    wds = pytest.importorskip("webdataset")
    samples = list(
        wds.WebDataset([str(p) for p in folder.glob("*.tar")], shardshuffle=False).decode()
    )
    assert (
        len(samples) == 4
        and {s["json"]["name"] for s in samples} == {name}
        and len({s["__key__"] for s in samples}) == 4
    )


def test_names_that_look_alike_keep_their_segments_apart(tmp_path):
    for name in ("a.b", "a_b", "a b"):
        pairs.make_pair(tmp_path / "v", name, FEW)
    store = ClipStore.build(
        tmp_path / "v", preset("tiny").frame, tmp_path / "store", progress=False, workers=1
    )
    write_shards(store, tmp_path / "shards", reach=8, progress=False, workers=1)
    wds = pytest.importorskip("webdataset")
    samples = list(
        wds.WebDataset(str(tmp_path / "shards/clips-000000.tar"), shardshuffle=False).decode()
    )
    assert sorted(s["json"]["name"] for s in samples) == ["a b", "a.b", "a_b"]


def test_workers_that_live_on_follow_resume(tmp_path):
    "persistent_workers keep their copy of the windows; they see where the parent wants to go on all the same."
    _, folder = shards_of(tmp_path, length=5)
    fresh_windows = lambda: ShardWindows(folder, 5, 1, 4, even=False, buffer=3)
    reader = fresh_windows()
    loader = DataLoader(reader, batch_size=None, num_workers=2, persistent_workers=True)
    drawn_again = lambda: [[key(a) for a in actions] for _, actions in loader]
    first = drawn_again()
    for epoch, taken in ((1, 0), (0, 4), (0, 0)):
        reader.resume(epoch, taken)
        fresh = fresh_windows()
        fresh.resume(epoch, taken)
        assert drawn_again() == drawn(fresh, 2) and (reader.epoch, reader.taken) == (epoch, taken)
    assert drawn_again() == first


@pytest.mark.parametrize("world, workers", [(7, 1), (3, 3), (12, 0)])
def test_more_readers_than_segments_still_get_batches(tmp_path, world, workers):
    "As from a store: few recordings do for many ranks, and no window comes twice."
    store, folder = shards_of(tmp_path, length=20)
    assert len(ShardWindows(folder).segments) < world * max(workers, 1)
    readers = [ShardWindows(folder, 5, 1, 2, rank=r, world=world) for r in range(world)]
    found = [drawn(r, workers) for r in readers]
    assert (
        len({len(batches) for batches in found}) == 1
        and found[0]
        and {len(b) for batches in found for b in batches} == {2}
    )
    taken = Counter(k for batches in found for b in batches for k in b)
    assert set(taken.values()) == {1} and [len(f) for f in found] == [
        sum(r.batches(workers)) for r in readers
    ]
    rest = ShardWindows(folder, 5, 1, 2, rank=0, world=world)
    rest.resume(0, 1)
    assert Counter(k for b in drawn(rest, workers) for k in b) == Counter(
        k for b in found[0][1:] for k in b
    )


def test_small_validation_set_is_had_whole_on_every_rank(written, store, monkeypatch):
    mine = Counter(
        key(store.window(NAMES[1], t, TICKS, ROLLOUT)[1])
        for t in store.starts(NAMES[1], TICKS, ROLLOUT)
    )

    def some(count, rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "16")
        return [key(a) for a in some_windows(written, count, TICKS, ROLLOUT, names=[NAMES[1]])[1]]

    assert (
        Counter(some(10**6, 0)) == mine
        and some(128, 0) == some(128, 15)
        and len(some(128, 3)) == 128
    )
    assert some_windows(written, 8, 1, 1, names=[NAMES[1]], far=9)[0].shape == (8, 3, 3, 48, 80)


def test_steps_are_counted_over_epochs_of_unlike_length(tmp_path):
    for i, many in enumerate((30, 60, 33, 90)):
        pairs.make_pair(tmp_path / "v", f"r{i}", many)
    store = ClipStore.build(
        tmp_path / "v", preset("tiny").frame, tmp_path / "store", progress=False, workers=1
    )
    write_shards(store, tmp_path / "shards", length=20, reach=4, progress=False, workers=1)
    reader = ShardWindows(
        tmp_path / "shards", 5, 1, 8, rank=1, world=2, even=False
    )  # dealt evenly, all are as long
    walked, epoch = [], 0
    while len(walked) < 40:
        reader.resume(epoch)
        walked += [(epoch, n) for n in range(sum(reader.batches()))]
        epoch += 1
    assert (
        len({sum(e == k for e, _ in walked) for k in range(epoch - 1)}) > 1
    )  # else this shows nothing
    for step in (0, 1, 11, 23, 39):
        reader.resume_at(step)
        assert (reader.epoch, reader.taken) == walked[step]
    with pytest.raises(ShardError, match="take a smaller batch"):
        ShardWindows(tmp_path / "shards", 5, 1, 500, rank=0, world=2).resume_at(3)


def test_names_are_gone_through_once(written):
    "Not once a segment: of twenty thousand segments that took minutes."

    class Names(list):
        times = 0

        def __iter__(self):
            self.times += 1
            return super().__iter__()

    names = Names(NAMES)
    assert len(ShardWindows(written, names=names).segments) > 3 and names.times == 1


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=repeats(30, 100))
def test_every_takes_each_draw_once_and_forgets_none_done(counts, step, buffer):
    draws = list(draw_windows(counts, buffer, np.random.default_rng(0)))
    dealt = [list(every(iter(draws), c, step)) for c in range(step)]
    assert sorted((s, k) for part in dealt for s, k, _ in part) == sorted(
        (s, k) for s, k, _ in draws
    )
    for c, part in enumerate(dealt):
        told = [d for _, _, done in part for d in done]
        last = max((n for n in range(len(draws)) if n % step == c), default=-1)
        assert told == [d for _, _, done in draws[: last + 1] for d in done]


@pytest.mark.parametrize(
    "kind", [np.uint8, np.int16, np.array, torch.tensor], ids=lambda k: k.__name__
)
def test_whole_numbers_of_any_type_are_taken(tmp_path, kind):
    store, folder = shards_of(
        tmp_path,
        length=kind(10),
        per_shard=kind(2),
        history=kind(25),
        reach=kind(8),
        quality=None,
        workers=kind(1),
    )
    assert json.loads((folder / "shards.json").read_text())["reach"] == 8
    one, other = (
        ShardWindows(folder, k(5), k(2), k(4), k(3), rank=k(0), world=k(2), buffer=k(2), far=k(6))
        for k in (int, kind)
    )
    for reader, k in ((one, int), (other, kind)):
        reader.resume(k(1), k(1))
    assert [key(a) for _, a in one] == [key(a) for _, a in other] and one.batches(
        kind(2)
    ) == one.batches(2)


@pytest.mark.parametrize("wrong", [2.0, True, "2", np.float32(2), torch.tensor(2.0)], ids=repr)
def test_numbers_that_are_not_whole_are_refused(written, store, tmp_path, wrong):
    for what in ("ticks", "rollout", "batch", "seed", "buffer", "rank", "world", "far"):
        with pytest.raises(ValueError, match=f"{what}=.* must be a whole number"):
            ShardWindows(written, **{what: wrong})
    for what in ("length", "per_shard", "history", "reach", "workers", "quality"):
        with pytest.raises(ValueError, match=f"{what}=.* must be a whole number"):
            write_shards(store, tmp_path, **{what: wrong})
    for place in ((wrong, 0), (0, wrong)):
        with pytest.raises(ValueError, match="must be a whole number"):
            windows(written).resume(*place)


def test_numbers_that_cannot_be_are_refused(written, store, tmp_path):
    for wrong in ({"batch": 0}, {"buffer": 0}, {"rank": 2, "world": 2}, {"world": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be"):
            ShardWindows(written, **wrong)
    with pytest.raises(ShardError, match="no clip 'nobody'"):
        write_shards(store, tmp_path, names=["nobody"])
