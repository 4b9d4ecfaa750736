"""Shards: every window once over ranks and workers, resumed in mid-epoch, on disk, web and S3."""

import ast
import io
import json
import shutil
import tarfile
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

import fsspec
import numpy as np
import pairs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import repeats
from torch.utils.data import DataLoader

from minecraft_jepa.config import preset
from minecraft_jepa.data import segments, shard_reader, shards
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.clips import contiguous_runs
from minecraft_jepa.data.shard_order import assign_evenly, shuffle_windows, stride_windows
from minecraft_jepa.data.shard_reader import ShardWindows, some_windows
from minecraft_jepa.data.shards import ShardError, cut_segments, segment_starts, write_shards

DATA = Path(__file__).parent.parent / "data"
FRAME = preset("tiny").frame
NAMES = ["world-303_0880", "world-319_1320", "world-321_0740"]
TICKS, ROLLOUT, BATCH = 25, 2, 16
SEGMENTS = {"length": 60, "per_shard": 7, "progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store_dir = tmp_path_factory.mktemp("store")
    return ClipStore.build(DATA, FRAME, store_dir, names=NAMES, progress=False)


@pytest.fixture(scope="module")
def written(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(store, folder, **SEGMENTS)
    return folder


@pytest.fixture(scope="module")
def all_windows(store):
    return count_store_windows(store, NAMES)


def window_key(actions):
    """What tells a window from any other: the bytes of its actions."""
    return actions.numpy().tobytes()


def count_store_windows(store, names):
    windows = [(name, t) for name in names for t in store.window_starts(name, TICKS, ROLLOUT)]
    return Counter(window_key(store.window(*window, TICKS, ROLLOUT)[1]) for window in windows)


def shard_windows(url, **options):
    return ShardWindows(url, TICKS, ROLLOUT, BATCH, **{"even": False, "buffer": 5} | options)


def read_batches(windows, num_workers=0):
    """[[window key]] of each batch of a rank."""
    loader = DataLoader(windows, batch_size=None, num_workers=num_workers)
    return [[window_key(a) for a in actions] for _, actions in loader]


def count_windows(batches):
    """How often each window comes in batches."""
    return Counter(chain(*batches))


# Segments and the order of windows, without reading


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
    runs = contiguous_runs(np.isin(np.arange(150), list(gaps)))
    segments = cut_segments(runs, length, history, reach)
    in_segments = list(chain(*(segment_starts(segment, ticks, rollout) for segment in segments)))
    in_runs = list(chain(*(range(first + ticks - 1, end - rollout) for first, end in runs)))
    assert in_segments == in_runs
    for segment in segments:
        for t in segment_starts(segment, ticks, rollout):  # all it needs is there
            assert segment["actions"] <= t - ticks + 1
            assert t + rollout < segment["first"] + segment["frames"]


@settings(max_examples=repeats(30, 100))
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 8), st.integers(0, 99))
def test_every_window_is_drawn_once_and_released_last(counts, buffer, seed):
    draws = list(shuffle_windows(counts, buffer, np.random.default_rng(seed)))
    drawn = [(segment, window) for segment, window, _ in draws]
    assert sorted(drawn) == [(segment, i) for segment, n in enumerate(counts) for i in range(n)]
    for i, (_, _, finished) in enumerate(draws):
        assert not {segment for segment, _ in drawn[i + 1 :]} & set(finished)
    all_finished = set(chain(*(finished for _, _, finished in draws)))
    assert all_finished == {segment for segment, n in enumerate(counts) if n}


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=repeats(30, 100))
def test_every_takes_each_draw_once_and_forgets_none_done(counts, step, buffer):
    draws = list(shuffle_windows(counts, buffer, np.random.default_rng(0)))
    shares = [list(stride_windows(iter(draws), first, step)) for first in range(step)]
    dealt = sorted((segment, window) for share in shares for segment, window, _ in share)
    assert dealt == sorted((segment, window) for segment, window, _ in draws)
    for first, share in enumerate(shares):
        last = max((i for i in range(len(draws)) if i % step == first), default=-1)
        told = list(chain(*(finished for _, _, finished in share)))
        assert told == list(chain(*(finished for _, _, finished in draws[: last + 1])))


def test_eight_ranks_see_nearly_every_window_in_an_epoch():
    """Every rank gives as few windows as the poorest one.

    Dealt out in turn, segments left a rank with far fewer windows than another.
    """
    rng = np.random.default_rng(0)
    for _ in range(5):
        counts, order = rng.integers(0, 201, 200).tolist(), rng.permutation(200).tolist()
        shares = assign_evenly(order, counts, 8)
        num_windows = [sum(counts[segment] for segment in share) for share in shares]
        assert sorted(chain(*shares)) == sorted(order)
        assert 8 * min(num_windows) > 0.98 * sum(counts)
        for share in shares:  # read in the epoch's order
            assert share == sorted(share, key=order.index)


# Windows of ranks and workers


def test_draws_are_shuffled(written):
    batches = read_batches(shard_windows(written))
    assert read_batches(shard_windows(written)) == batches
    other_seed, other_epoch = shard_windows(written, seed=1), shard_windows(written)
    other_epoch.resume(1)
    for windows in (other_seed, other_epoch):
        other = read_batches(windows)
        assert list(chain(*other)) != list(chain(*batches))
        assert count_windows(other) == count_windows(batches)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_no_window_twice_and_none_lost(written, all_windows, world, workers):
    ranks = [shard_windows(written, rank=rank, world=world) for rank in range(world)]
    batches = [read_batches(windows, workers) for windows in ranks]
    assert count_windows(chain(*batches)) == all_windows
    assert list(map(len, batches)) == [sum(windows.batches(workers)) for windows in ranks]


def test_even_readers_have_equally_many_full_batches(written, all_windows):
    ranks = [shard_windows(written, rank=rank, world=2, even=True) for rank in range(2)]
    batches = [read_batches(windows, 2) for windows in ranks]
    assert len(batches[0]) == len(batches[1])
    assert {len(batch) for batch in chain(*batches)} == {BATCH}
    drawn = count_windows(chain(*batches))
    assert not drawn - all_windows
    assert sum(drawn.values()) > 0.8 * sum(all_windows.values())


@pytest.mark.parametrize(("workers", "stop"), [(0, 1), (0, 37), (1, 10), (2, 9), (2, 24), (3, 17)])
def test_goes_on_in_mid_epoch(written, workers, stop):
    all_batches = read_batches(shard_windows(written, rank=1, world=2), workers)
    assert len(all_batches) > stop
    windows = shard_windows(written, rank=1, world=2)
    windows.resume(0, stop)
    batches = read_batches(windows, workers)
    if stop % max(workers, 1) == 0:
        assert batches == all_batches[stop:]
    assert count_windows(batches) == count_windows(all_batches[stop:])


def test_going_on_fetches_only_what_is_needed(written, monkeypatch):
    fetched, fetch = [], shard_reader.SegmentFetcher.fetch

    def fetch_and_note(self, index, *args):
        fetched.append(index)
        return fetch(self, index, *args)

    monkeypatch.setattr(shard_reader.SegmentFetcher, "fetch", fetch_and_note)
    windows = shard_windows(written)
    windows.resume(0, windows.batches()[0] - 1)
    assert len(list(windows)) == 1
    assert len(fetched) <= 5


def test_threads_that_fetch_do_not_meet_in_the_parser(written, all_windows, monkeypatch):
    """`np.load` parses headers with `ast`; in Python 3.11 two threads at once fail now and then."""

    def fail(text):
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr(ast, "literal_eval", fail)
    assert count_windows(read_batches(shard_windows(written))) == all_windows


def test_place_comes_from_torchrun(written, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = read_batches(shard_windows(written, rank=1, world=2))
    assert read_batches(shard_windows(written)) == expected


def test_small_validation_set_is_had_whole_on_every_rank(written, store, monkeypatch):
    def draw(count, rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "16")
        _, actions = some_windows(written, count, TICKS, ROLLOUT, names=[NAMES[1]])
        return [window_key(a) for a in actions]

    assert Counter(draw(10**6, 0)) == count_store_windows(store, [NAMES[1]])
    assert draw(128, 0) == draw(128, 15)
    assert len(draw(128, 3)) == 128
    frames, _ = some_windows(written, 8, 1, 1, names=[NAMES[1]], far=9)
    assert frames.shape == (8, 3, *FRAME.shape)


# What shards hold


def test_closing_does_not_wait_for_a_segment_that_a_thread_has_just_taken():
    class Taken(SimpleQueue):
        """Looks full, and is empty when something is taken."""

        def empty(self):
            return False

        def get(self, block=True, timeout=None):
            if block:
                raise AssertionError("it would wait for ever")
            return super().get(False)

    fetcher = object.__new__(shard_reader.SegmentFetcher)
    fetcher.queue = Taken()
    fetcher.close()
    assert fetcher.queue.qsize() == 2  # the two threads are told to end


@pytest.mark.parametrize(("quality", "min_psnr"), [(None, 200), (95, 35), (60, 28)])
def test_pixels_are_those_of_the_store(store, tmp_path, quality, min_psnr):
    name = NAMES[1]
    write_shards(store, tmp_path, names=[name], length=300, quality=quality, progress=False)
    frames_by_key = {}
    for t in store.window_starts(name, TICKS, ROLLOUT):
        frames, actions = store.window(name, t, TICKS, ROLLOUT)
        frames_by_key[window_key(actions)] = frames.float()
    errors = [
        (frames.float() - frames_by_key[window_key(actions)]).square().mean().item()
        for batch in shard_windows(tmp_path)
        for frames, actions in zip(*batch)
    ]
    assert len(errors) == len(frames_by_key)
    assert 10 * np.log10(255**2 / max(np.mean(errors), 1e-20)) > min_psnr


def test_frames_of_a_segment_stay_in_order_beyond_ten_thousand():
    actions = io.BytesIO()
    np.save(actions, np.zeros((3, 28), np.float32))
    files = {"s.json": b"{}", "s.actions.npy": actions.getvalue()}
    for i in range(9998, 10002):
        files[f"s.{i:04d}.webp"] = shards._encode_image(
            np.full((3, 2, 2), i - 9990, np.uint8), None
        )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    frames, _, _ = segments._decode_segment(buffer.getvalue())
    assert frames[:, 0, 0, 0].tolist() == [8, 9, 10, 11]


def test_names_and_split_are_kept(written, store):
    split = {"train": NAMES[:1], "validation": NAMES[1:2], "test": NAMES[2:]}
    assert shard_windows(written).metadata["split"] == split
    batches = read_batches(shard_windows(written, names=[NAMES[1]]))
    assert count_windows(batches) == count_store_windows(store, [NAMES[1]])


def read_webdataset(paths, *decoders):
    wds = pytest.importorskip("webdataset")
    paths = [str(path) for path in sorted(paths)]
    return list(wds.WebDataset(paths, shardshuffle=False).decode(*decoders))


def test_webdataset_reads_them(written):
    samples = read_webdataset(written.glob("*.tar"), "rgb8")
    contents = json.loads((written / "shards.json").read_text())
    segments = list(chain(*(shard["segments"] for shard in contents["shards"])))
    assert len(samples) == len(segments)
    for sample, segment in zip(samples, segments):
        assert sample["json"]["name"] == segment["name"]
        assert sample["0000.jpg"].shape == (FRAME.height, FRAME.width, 3)
        end = segment["first"] + segment["frames"]
        assert len(sample["actions.npy"]) == end - 1 - segment["actions"]
        assert f"{segment['frames'] - 1:04d}.jpg" in sample


def test_writing_goes_on_and_a_half_written_set_is_refused(store, tmp_path, monkeypatch):
    upload, uploaded = shards._upload, []

    def upload_five(fs, path, source):
        if len(uploaded) == 5:
            raise KeyboardInterrupt
        uploaded.append(path)
        upload(fs, path, source)

    with monkeypatch.context() as m:
        m.setattr(shards, "_upload", upload_five)
        with pytest.raises(KeyboardInterrupt):
            write_shards(store, tmp_path, workers=1, **SEGMENTS)
    with pytest.raises(ShardError, match=r"no shards.json"):
        shard_windows(tmp_path)

    def change_times():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}

    before = change_times()
    write_shards(store, tmp_path, **SEGMENTS)
    after = change_times()
    assert len([name for name in before if after[name] == before[name]]) == 2
    assert len(after) > 3
    assert not list(tmp_path.glob("*.part"))
    write_shards(store, tmp_path, quality=50, **SEGMENTS)  # other contents: none is kept
    assert all(change_times()[name] != before[name] for name in before)


@pytest.mark.parametrize(
    ("module", "expected"), [("botocore", ShardError), ("builtins", Exception)]
)
def test_what_a_storage_says_comes_with_the_address(monkeypatch, module, expected):
    error = type("NoCredentialsError", (Exception,), {"__module__": module})

    def refuse(url, **storage):
        raise error("Unable to locate credentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(expected, match="Unable to locate credentials") as caught:
        shard_windows("s3://bucket/shards")
    explained = "s3://bucket/shards can't be read: NoCredentialsError" in str(caught.value)
    assert explained == (module == "botocore")


def test_damaged_and_missing_shards_are_named(written, tmp_path):
    shutil.copytree(written, tmp_path / "bad")
    tar = tmp_path / "bad/clips-000000.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    tar.write_bytes(damaged)
    message = r"clips-000000.tar: bytes .* write the shards again"
    with pytest.raises(ShardError, match=message):
        read_batches(shard_windows(tmp_path / "bad"))
    tar.unlink()
    with pytest.raises(ShardError, match=r"clips-000000.tar: no such shard"):
        read_batches(shard_windows(tmp_path / "bad"))
    with pytest.raises(ShardError, match=r"no shards.json"):
        shard_windows(tmp_path)
    (tmp_path / "shards.json").write_text("")  # as a power cut leaves it
    with pytest.raises(ShardError, match=rf"{tmp_path}/shards.json: not JSON.*jepa shards STORE"):
        shard_windows(tmp_path)
    with pytest.raises(ShardError, match="no segment can be cut"):
        write_shards(ClipStore({}, {}), tmp_path, progress=False)
    for options in ({"ticks": 26}, {"rollout": 17}, {"ticks": 0}):
        with pytest.raises(ShardError, match="cut for 1 to"):
            ShardWindows(written, **options)


def test_shard_whose_metadata_is_damaged_is_written_again(store, tmp_path):
    write_shards(store, tmp_path, **SEGMENTS)
    before = (tmp_path / "clips-000000.json").read_text()
    (tmp_path / "clips-000000.json").write_text("")
    write_shards(store, tmp_path, **SEGMENTS)
    assert (tmp_path / "clips-000000.json").read_text() == before


def test_names_are_gone_through_once(written):
    """Not once a segment: of twenty thousand segments that took minutes."""

    class Names(list):
        num_iterations = 0

        def __iter__(self):
            self.num_iterations += 1
            return super().__iter__()

    names = Names(NAMES)
    assert len(ShardWindows(written, names=names).segments) > 3
    assert names.num_iterations == 1


# Storages


class WebServer(ThreadingHTTPServer):
    """A folder over HTTP; knows Range or ignores it, and fails as often as `failures` says."""

    def __init__(self, folder, ranges=True):
        self.folder, self.ranges, self.failures, self.num_ranges = folder, ranges, 0, 0
        super().__init__(("127.0.0.1", 0), WebHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def close(self):
        self.shutdown()
        self.server_close()


class WebHandler(SimpleHTTPRequestHandler):
    def __init__(self, request, address, server):
        super().__init__(request, address, server, directory=str(server.folder))

    def log_message(self, *_):
        pass

    def do_GET(self):
        byte_range = self.headers.get("Range")
        if "//" in self.path:  # another key than with one slash, as on S3 and Azure
            self.send_error(404)
        elif byte_range and self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        elif byte_range and self.server.ranges:
            first, last = map(int, byte_range.removeprefix("bytes=").split("-"))
            self.send_range(first, last)
        else:
            super().do_GET()

    def send_range(self, first, last):
        contents = Path(self.translate_path(self.path)).read_bytes()
        body, last = contents[first : last + 1], min(last, len(contents) - 1)
        self.server.num_ranges += 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(contents)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("ranges", [True, False])
def test_over_http(written, all_windows, ranges):
    pytest.importorskip("aiohttp")
    web = WebServer(written.parent, ranges)
    url = f"{web.url}/{written.name}" + "/" * ranges  # with a slash at the end or without
    ranks = [shard_windows(url, rank=rank, world=2) for rank in range(2)]
    batches = [read_batches(windows, 2) for windows in ranks]
    web.close()
    assert count_windows(chain(*batches)) == all_windows
    assert (web.num_ranges > 0) == ranges


def test_failing_network_is_tried_again_then_told(written, all_windows, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    web = WebServer(written)
    web.failures = 3
    assert count_windows(read_batches(shard_windows(web.url))) == all_windows
    assert web.failures == 0
    web.failures = 10**6
    with pytest.raises(ShardError, match=r"clips-\d+.tar: .*go on with resume"):
        read_batches(shard_windows(web.url))
    web.close()


@pytest.fixture(scope="module")
def s3():
    """Options of a stand-in for S3 on this machine."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as m:
        m.setenv("AWS_ACCESS_KEY_ID", "testing")
        m.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        yield {"endpoint_url": f"http://{host}:{port}"}
    server.stop()


def test_over_s3_two_ranks_two_workers(store, s3):
    import fsspec

    url = "s3://recordings/vpt"
    fsspec.filesystem("s3", **s3).mkdir("recordings")
    write_shards(store, url, names=NAMES[1:2], **SEGMENTS, **s3)
    ranks = [shard_windows(url, rank=rank, world=2, **s3) for rank in range(2)]
    batches = [read_batches(windows, 2) for windows in ranks]
    assert count_windows(chain(*batches)) == count_store_windows(store, [NAMES[1]])
    resumed = shard_windows(url, rank=0, world=2, **s3)
    resumed.resume(0, 4)
    assert len(batches[0]) > 8
    assert read_batches(resumed, 2) == batches[0][4:]


# A recording made in code

NUM_FRAMES = 40


def write_toy_shards(folder, name="toy", lines=NUM_FRAMES, **options):
    """Store and shards of one recording made in code, lossless."""
    pairs.make_pair(folder / "v", name, NUM_FRAMES, lines)
    store = ClipStore.build(folder / "v", FRAME, folder / "store", progress=False, workers=1)
    defaults = {"length": 10, "reach": 8, "quality": None, "workers": 1, "progress": False}
    write_shards(store, folder / "shards", **defaults | options)
    return store, folder / "shards"


@pytest.mark.parametrize("lines", [NUM_FRAMES, NUM_FRAMES - 1])
@pytest.mark.parametrize("length", [10, 7, 200])
def test_last_window_ends_on_the_last_frame(tmp_path, lines, length):
    """With a line for it or without.

    The last action that leads anywhere is used, and that of the last frame never.
    """
    store, folder = write_toy_shards(tmp_path, lines=lines, length=length)
    for rollout in (1, 3):
        batches = ShardWindows(folder, 5, rollout, 4, even=False)
        windows = [window for batch in batches for window in zip(*batch)]
        by_first_tick = {pairs.ticks_of(a)[0]: frames for frames, a in windows}
        num_windows = NUM_FRAMES - 4 - rollout
        assert len(windows) == len(by_first_tick) == num_windows
        assert len(store.window_starts("toy", 5, rollout)) == num_windows
        frames = by_first_tick[NUM_FRAMES - 5 - rollout]
        store_frames, _ = store.window("toy", NUM_FRAMES - 1 - rollout, 5, rollout)
        assert torch.equal(frames, store_frames)
        assert frames[-1].float().mean() > 120
        ticks = set(chain(*(pairs.ticks_of(actions) for _, actions in windows)))
        assert ticks == set(range(NUM_FRAMES - 1))


STRANGE_NAMES = {
    "contractor": "a-player-with-a-very-long-alias-" * 3 + "0123456789ab-20220101-000000",
    "long": "n" * 240,
    "letters": "\u00e9\u4e2d" * 40,
    "dots": "with.dots.in-it",
    "blank": "a b(1)",
}


@pytest.mark.parametrize("name", STRANGE_NAMES.values(), ids=STRANGE_NAMES)
def test_recordings_of_any_name_go_into_shards(tmp_path, name):
    _, folder = write_toy_shards(tmp_path, name)
    frames, actions = next(iter(ShardWindows(folder, 5, 2, 2, names=[name])))
    assert frames.shape == (2, 3, *FRAME.shape)
    assert actions.shape == (2, 6, 28)
    samples = read_webdataset(folder.glob("*.tar"))
    assert len(samples) == 4
    assert {sample["json"]["name"] for sample in samples} == {name}
    assert len({sample["__key__"] for sample in samples}) == 4


def test_names_that_look_alike_keep_their_segments_apart(tmp_path):
    names = ["a b", "a.b", "a_b"]
    for name in names:
        pairs.make_pair(tmp_path / "v", name, NUM_FRAMES)
    store = ClipStore.build(tmp_path / "v", FRAME, tmp_path / "store", progress=False, workers=1)
    write_shards(store, tmp_path / "shards", reach=8, progress=False, workers=1)
    samples = read_webdataset([tmp_path / "shards/clips-000000.tar"])
    assert sorted(sample["json"]["name"] for sample in samples) == names


def test_workers_that_live_on_follow_resume(tmp_path):
    """With persistent_workers each keeps a copy of the windows, and still sees `resume`."""
    _, folder = write_toy_shards(tmp_path, length=5)
    options = {"even": False, "buffer": 3}
    windows = ShardWindows(folder, 5, 1, 4, **options)
    loader = DataLoader(windows, batch_size=None, num_workers=2, persistent_workers=True)

    def read():
        return [[window_key(a) for a in actions] for _, actions in loader]

    first = read()
    for epoch, taken in ((1, 0), (0, 4), (0, 0)):
        windows.resume(epoch, taken)
        fresh = ShardWindows(folder, 5, 1, 4, **options)
        fresh.resume(epoch, taken)
        assert read() == read_batches(fresh, 2)
        assert (windows.epoch, windows.taken) == (epoch, taken)
    assert read() == first


@pytest.mark.parametrize(("world", "workers"), [(7, 1), (3, 3), (12, 0)])
def test_more_readers_than_segments_still_get_batches(tmp_path, world, workers):
    """As from a store: few recordings do for many ranks, and no window comes twice."""
    _, folder = write_toy_shards(tmp_path, length=20)
    assert len(ShardWindows(folder).segments) < world * max(workers, 1)
    ranks = [ShardWindows(folder, 5, 1, 2, rank=rank, world=world) for rank in range(world)]
    batches = [read_batches(windows, workers) for windows in ranks]
    assert batches[0]
    assert len(set(map(len, batches))) == 1
    assert {len(batch) for batch in chain(*batches)} == {2}
    assert set(count_windows(chain(*batches)).values()) == {1}
    assert list(map(len, batches)) == [sum(windows.batches(workers)) for windows in ranks]
    resumed = ShardWindows(folder, 5, 1, 2, rank=0, world=world)
    resumed.resume(0, 1)
    assert count_windows(read_batches(resumed, workers)) == count_windows(batches[0][1:])


def test_steps_are_counted_over_epochs_of_unlike_length(tmp_path):
    for i, num_frames in enumerate((30, 60, 33, 90)):
        pairs.make_pair(tmp_path / "v", f"r{i}", num_frames)
    store = ClipStore.build(tmp_path / "v", FRAME, tmp_path / "store", progress=False, workers=1)
    folder = tmp_path / "shards"
    write_shards(store, folder, length=20, reach=4, progress=False, workers=1)
    # Dealt evenly, all epochs are as long.
    windows = ShardWindows(folder, 5, 1, 8, rank=1, world=2, even=False)
    places, lengths = [], []
    while len(places) < 40:
        windows.resume(len(lengths))
        lengths.append(sum(windows.batches()))
        places += [(windows.epoch, taken) for taken in range(lengths[-1])]
    assert len(set(lengths[:-1])) > 1  # else this shows nothing
    for step in (0, 1, 11, 23, 39):
        windows.resume_at(step)
        assert (windows.epoch, windows.taken) == places[step]
    with pytest.raises(ShardError, match="take a smaller batch"):
        ShardWindows(folder, 5, 1, 500, rank=0, world=2).resume_at(3)


# Arguments


@pytest.mark.parametrize(
    "kind", [np.uint8, np.int16, np.array, torch.tensor], ids=lambda kind: kind.__name__
)
def test_whole_numbers_of_any_type_are_taken(tmp_path, kind):
    sizes = {"length": 10, "per_shard": 2, "history": 25, "reach": 8, "workers": 1}
    sizes = {name: kind(value) for name, value in sizes.items()}
    _, folder = write_toy_shards(tmp_path, **sizes)
    assert json.loads((folder / "shards.json").read_text())["reach"] == 8

    def resumed_windows(kind):
        options = {"rank": 0, "world": 2, "buffer": 2, "far": 6}
        options = {name: kind(value) for name, value in options.items()}
        windows = ShardWindows(folder, kind(5), kind(2), kind(4), kind(3), **options)
        windows.resume(kind(1), kind(1))
        return windows

    expected, windows = resumed_windows(int), resumed_windows(kind)
    assert read_batches(windows) == read_batches(expected)
    assert windows.batches(kind(2)) == expected.batches(2)


@pytest.mark.parametrize("value", [2.0, True, "2", np.float32(2), torch.tensor(2.0)], ids=repr)
def test_numbers_that_are_not_whole_are_refused(written, store, tmp_path, value):
    for name in ("ticks", "rollout", "batch", "seed", "buffer", "rank", "world", "far"):
        with pytest.raises(ValueError, match=f"{name}=.* must be a whole number"):
            ShardWindows(written, **{name: value})
    for name in ("length", "per_shard", "history", "reach", "workers", "quality"):
        with pytest.raises(ValueError, match=f"{name}=.* must be a whole number"):
            write_shards(store, tmp_path, **{name: value})
    for place in ((value, 0), (0, value)):
        with pytest.raises(ValueError, match="must be a whole number"):
            shard_windows(written).resume(*place)


def test_numbers_that_cannot_be_are_refused(written, store, tmp_path):
    for options in (
        {"batch": 0},
        {"buffer": 0},
        {"rank": 2, "world": 2},
        {"world": 0},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match="must be"):
            ShardWindows(written, **options)
    with pytest.raises(ShardError, match="no clip 'nobody'"):
        write_shards(store, tmp_path, names=["nobody"])
