"Downloads from a server with the faults of real ones, and killed at random moments."

import base64
import bz2
import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from commands import refused
from soak import repeats

from minecraft_jepa.cli import main
from minecraft_jepa.data import http_client, transfer
from minecraft_jepa.data.checks import check_folder, find_recordings
from minecraft_jepa.data.download import download_recordings
from minecraft_jepa.data.http_client import DownloadError
from minecraft_jepa.data.ledger import read_ledger
from minecraft_jepa.data.manifest import (
    IndexEntry,
    read_index,
    read_manifest,
    select_recordings,
    write_manifest,
)
from minecraft_jepa.data.recording_files import RecordingError, parse_name
from minecraft_jepa.data.splits import assign_splits, load_split
from minecraft_jepa.folders import lock_folder

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
INDEXES = sorted((DATA / "vpt-index").glob("*.json.gz"))
SOURCES = sorted(p.stem for p in DATA.glob("*.mp4"))


class Server(ThreadingHTTPServer):
    """Serves `files` {path: bytes} with ETag and Range.

    `faults` {path: [fault, ...]} has one fault for each request; a fault that is no list stays.
    `encodings` {path: Content-Encoding}, `tag` (an ETag of all files) and `rate` (bytes a second)
    change the answers. `asked` and `sent` count requests and bytes.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.encodings = {}, {}, {}
        self.tag, self.rate = None, None
        self.asked, self.sent = defaultdict(list), 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def base(self):
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, *_):
        pass  # clients that hang up are what is tested


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        content = self.server.files.get(self.path)
        if self.server.faults.get("HEAD"):
            self.answer(405)
        else:
            self.answer(404 if content is None else 200, content or b"", with_body=False)

    def do_GET(self):
        self.server.asked[self.path].append(self.headers.get("Range"))
        fault = self.server.faults.get(self.path)
        if isinstance(fault, list):
            fault = fault.pop(0) if fault else None
        content = self.server.files.get(self.path)
        if content is None:
            self.answer(404)
        elif isinstance(fault, tuple):
            self.refuse(*fault)
        elif isinstance(fault, int):
            self.answer(fault, headers={"Retry-After": "0"} if fault == 429 else {})
        elif isinstance(fault, bytes):  # another version from now on
            self.server.files[self.path] = fault
            self.answer_range(fault, "")
        else:
            self.answer_range(content, fault or "")

    def answer_range(self, content, fault):
        requested = self.headers.get("Range")
        if not requested or fault == "ignore range":
            self.answer(200, content, 0, fault)
            return
        begin = int(requested.removeprefix("bytes=").rstrip("-"))
        if begin >= len(content):
            self.answer(416, headers={"Content-Range": f"bytes */{len(content)}"})
        else:
            self.answer(206, content, begin, fault)

    def refuse(self, status, phrase, body, headers):
        self.send_response(status, phrase)
        for k, v in {"Content-Length": len(body), **headers}.items():
            self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, status, content=b"", begin=0, fault="", with_body=True, headers=None):
        self.send_response(status)
        size = len(content)
        headers = {"Content-Length": size - begin, **(headers or {})}
        if content and fault != "no version":
            headers["ETag"] = self.server.tag or f'"{hashlib.md5(content).hexdigest()}"'
        if content and self.path in self.server.encodings:
            headers["Content-Encoding"] = self.server.encodings[self.path]
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{size - 1}/{size}"
        if fault in ("md5", "wrong md5"):
            digest = hashlib.md5(content + b"x" * (fault == "wrong md5")).digest()
            headers["Content-MD5"] = base64.b64encode(digest).decode()
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if with_body:
            self.send_body(content[begin:], fault)

    def send_body(self, body, fault):
        if fault == "cut":
            body = body[: max(len(body) // 3, 1)]
            self.close_connection = True
        if fault == "stall":
            body = body[:1000]
        if self.server.rate:
            for i in range(0, len(body), 8192):
                self.wfile.write(body[i : i + 8192])
                time.sleep(8192 / self.server.rate)
                self.server.sent += 8192
        else:
            self.wfile.write(body)
        if fault == "stall":
            self.wfile.flush()
            time.sleep(4)
        if fault == "cut":
            self.connection.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def offer(server, num_recordings=3):
    "Real recordings on the server, as of several players; gives their entries."
    entries = []
    for i in range(num_recordings):
        name = f"player{i}-{i:012x}-20220101-000000"
        source = SOURCES[i % len(SOURCES)]
        for suffix in (".mp4", ".jsonl"):
            server.files[f"/data/8.0/{name}{suffix}"] = (DATA / f"{source}{suffix}").read_bytes()
        entries.append(IndexEntry(name, f"{server.base}data/8.0/{name}.mp4", "test"))
    return entries


def path_of(entry, suffix=".mp4"):
    return "/" + entry.url.split("/", 3)[3].removesuffix(".mp4") + suffix


def get(folder, **options):
    return download_recordings(folder, progress=False, pause=0.01, timeout=1, **options)


def assert_complete(server, folder, entries):
    "Every file of the entries is the server's, byte by byte."
    for entry in entries:
        for suffix in (".mp4", ".jsonl"):
            content = (folder / f"{entry.name}{suffix}").read_bytes()
            assert content == server.files[path_of(entry, suffix)], entry.name


def left_behind(folder):
    "Files that are no result of a download."
    results = (".mp4", ".jsonl", ".json", ".ndjson")
    return [p.name for p in folder.iterdir() if p.suffix not in results and p.name != ".lock"]


FAULTS = {  # fault of the first requests for a video -> how many times it is asked for
    "broken off": (["cut"], 2),
    "broken off three times": (["cut", "cut", "cut"], 4),
    "stalls": (["stall"], 2),
    "server error": ([500, 503], 3),
    "too many requests": ([429], 2),
    "Range is ignored": (["cut", "ignore range"], 2),
    "no version": (["no version"], 1),
    "broken off, no version": ([["no version", "cut"]], None),
    "wrong MD5": (["wrong md5"], 2),
    "right MD5": (["md5"], 1),
}


@pytest.mark.parametrize(("faults", "asked"), FAULTS.values(), ids=FAULTS)
def test_file_comes_whole_in_spite_of(server, tmp_path, monkeypatch, faults, asked):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    path = path_of(entries[0])
    if faults == [["no version", "cut"]]:  # nothing to go by: it must be read from the beginning
        real_answer, real_header, planned = Handler.answer, Handler.send_header, ["cut"]

        def answer(self, status, content=b"", begin=0, fault="", **options):
            if self.path == path and self.command == "GET" and planned:
                fault = planned.pop()
            real_answer(self, status, content, begin, fault, **options)

        def send_header(self, name, value):
            if name != "ETag":
                real_header(self, name, value)

        monkeypatch.setattr(Handler, "answer", answer)
        monkeypatch.setattr(Handler, "send_header", send_header)
        rows = get(tmp_path)
    else:
        server.faults[path] = list(faults)
        rows = get(tmp_path)
        assert len(server.asked[path]) == asked
    assert {r["status"] for r in rows.values()} == {"done"}
    assert_complete(server, tmp_path, entries)
    assert not left_behind(tmp_path)


def test_transfer_goes_on_where_it_broke_off(server, tmp_path):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    path = path_of(entries[0])
    server.faults[path] = ["cut", "cut"]
    get(tmp_path)
    first, second, third = server.asked[path]  # as in `bytes=100-`
    size = len(server.files[path])
    assert first is None
    assert abs(int(second[6:-1]) - size / 3) < 2
    assert int(third[6:-1]) > size / 2


@pytest.mark.parametrize("longer", [True, False])
def test_versions_of_a_file_are_never_joined(server, tmp_path, longer):
    "The file changes after a third of it came."
    entries = offer(server)
    write_manifest(tmp_path, entries)
    path = path_of(entries[0], ".jsonl")
    old = server.files[path]
    new = old.replace(b'"dwheel":0.0', b'"dwheel":1.0')
    if not longer:  # too few lines for the video
        new = old[: len(old) // 4].rpartition(b"\n")[0] + b"\n"
    server.faults[path] = ["cut", new]
    rows = get(tmp_path)
    assert (tmp_path / f"{entries[0].name}.jsonl").read_bytes() == new
    assert not left_behind(tmp_path)
    assert rows[f"{entries[0].name}.jsonl"]["status"] == ("done" if longer else "corrupt")


def test_what_is_missing_and_broken_is_told_and_left_out(server, tmp_path):
    entries = offer(server, 7)
    names = [e.name for e in entries]
    del server.files[path_of(entries[0])], server.files[path_of(entries[1], ".jsonl")]
    video = server.files[path_of(entries[2])]
    server.files[path_of(entries[2])] = video[: len(video) // 2]
    # a line after the last frame's is not needed
    server.files[path_of(entries[3], ".jsonl")] += b'{"mouse": {"x": 64'
    server.faults[path_of(entries[4])] = 403
    lines = server.files[path_of(entries[5], ".jsonl")].splitlines(keepends=True)
    server.files[path_of(entries[5], ".jsonl")] = b"".join(lines[:-3])
    write_manifest(tmp_path, entries)
    rows = get(tmp_path)
    status = {f: (r["status"], r["why"]) for f, r in rows.items() if r["status"] != "done"}
    assert status[f"{names[0]}.mp4"] == ("missing", "HTTP 404")
    assert "its other half" in status[f"{names[0]}.jsonl"][1]
    assert status[f"{names[1]}.jsonl"] == ("missing", "HTTP 404")
    assert not server.asked[path_of(entries[1])]
    assert status[f"{names[2]}.mp4"][0] == "corrupt"
    assert f"{names[2]}.mp4: " in status[f"{names[2]}.mp4"][1]
    assert status[f"{names[4]}.mp4"] == ("failed", "HTTP 403")
    assert status[f"{names[5]}.jsonl"][0] == "corrupt"
    assert "jsonl, line" in status[f"{names[5]}.jsonl"][1]
    assert len(status) == 7
    assert [p.stem for p in find_recordings(tmp_path)] == [names[3], names[6]]
    assert not left_behind(tmp_path)
    unused = [row for row in check_folder(tmp_path, progress=False) if not row["used"]]
    assert sorted(row["name"] for row in unused) == [names[2], names[4], names[5]]
    assert all(row["why"] for row in unused)

    server.asked.clear()  # a second run asks for what failed, and for nothing else
    del server.faults[path_of(entries[4])]
    assert get(tmp_path)[f"{names[4]}.mp4"]["status"] == "done"
    assert list(server.asked) == [path_of(entries[4])]
    assert [p.stem for p in find_recordings(tmp_path)] == [names[3], names[4], names[6]]
    server.files[path_of(entries[2])] = video  # mended on the server, and asked for by name
    assert get(tmp_path)[f"{names[2]}.mp4"]["status"] == "corrupt"
    assert get(tmp_path, again=["corrupt"])[f"{names[2]}.mp4"]["status"] == "done"
    assert len(find_recordings(tmp_path)) == 4


@pytest.mark.parametrize("suffix", [".mp4", ".jsonl"])
def test_what_was_missing_is_fetched_when_it_is_asked_for_again(server, tmp_path, suffix):
    entries = offer(server, 3)
    contents = server.files.pop(path_of(entries[0], suffix))
    write_manifest(tmp_path, entries)
    get(tmp_path)
    reason = get(tmp_path, again=["missing"])[f"{entries[0].name}{suffix}"]["why"]
    assert reason == "HTTP 404"  # still the true one
    server.files[path_of(entries[0], suffix)] = contents
    assert get(tmp_path)[f"{entries[0].name}{suffix}"]["status"] == "missing"
    get(tmp_path, again=["missing"])
    assert_complete(server, tmp_path, entries)


def test_second_run_does_only_what_is_left(server, tmp_path):
    entries = offer(server, 4)
    write_manifest(tmp_path, entries)
    get(tmp_path)
    server.asked.clear()
    get(tmp_path)
    assert not server.asked
    (tmp_path / f"{entries[0].name}.mp4").unlink()
    (tmp_path / f"{entries[1].name}.jsonl").write_text("{}")
    get(tmp_path)
    assert sorted(server.asked) == sorted([path_of(entries[0]), path_of(entries[1], ".jsonl")])
    assert_complete(server, tmp_path, entries)
    with open(tmp_path / "ledger.ndjson", "ab") as ledger:
        ledger.write(b'{"file": "pla')  # a kill
    server.asked.clear()
    get(tmp_path)
    assert not server.asked
    more = offer(server, 6)
    write_manifest(tmp_path, more)
    get(tmp_path)
    assert len(server.asked) == 4
    assert len(find_recordings(tmp_path)) == 6


def test_server_without_head_is_no_hindrance(server, tmp_path):
    entries = offer(server)
    server.faults["HEAD"] = True
    write_manifest(tmp_path, entries)
    assert {r["status"] for r in get(tmp_path).values()} == {"done"}
    assert_complete(server, tmp_path, entries)


def test_server_that_never_recovers_is_given_up(server, tmp_path):
    entries = offer(server)
    server.faults[path_of(entries[0])] = 503
    write_manifest(tmp_path, entries)
    row = get(tmp_path, tries=3)[f"{entries[0].name}.mp4"]
    assert (row["status"], row["why"]) == ("failed", "HTTP 503 (3 tries)")
    assert len(server.asked[path_of(entries[0])]) == 3
    server.shutdown()
    server.server_close()
    assert get(tmp_path, tries=2)[f"{entries[0].name}.mp4"]["status"] == "failed"


def test_trickle_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(transfer, "MIN_BYTES_PER_SECOND", 10**7)
    entries = offer(server)
    server.rate = 50_000
    write_manifest(tmp_path, entries)
    stop = threading.Timer(1.5, lambda: setattr(server, "rate", None))
    stop.start()
    get(tmp_path, tries=50)
    assert_complete(server, tmp_path, entries)
    assert max(map(len, server.asked.values())) > 1


def test_full_disk_is_told_first(server, tmp_path, monkeypatch):
    write_manifest(tmp_path, offer(server))
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match="choose fewer hours"):
        get(tmp_path)
    assert not server.asked


def test_two_fetches_in_a_folder_are_refused(server, tmp_path):
    write_manifest(tmp_path, offer(server))
    with lock_folder(tmp_path), pytest.raises(DownloadError, match="another download works here"):
        get(tmp_path)


def test_second_download_that_is_refused_leaves_the_manifest_as_it_is(server, tmp_path, capsys):
    entries = offer(server, 5)
    write_manifest(tmp_path / "v", entries[:3])
    before = (tmp_path / "v/manifest.json").read_bytes()
    words = ["download", tmp_path / "v", "--index", listed(server, tmp_path, entries)]
    with lock_folder(tmp_path / "v"):
        refused(capsys, words, "another download works here")
    assert (tmp_path / "v/manifest.json").read_bytes() == before


def test_refused_manifest_leaves_no_folder(server, tmp_path):
    with pytest.raises(RecordingError, match="at least 3"):
        write_manifest(tmp_path / "v", offer(server, 1))
    assert not (tmp_path / "v").exists()


def test_server_that_cuts_ever_sooner_is_given_up(server, tmp_path):
    "Without a version nothing is continued: what comes again is no progress."
    entries = offer(server)
    path, client = path_of(entries[0]), httpx.Client()
    lengths = iter([5000, 3000, 4000, 2000, 4500, 6000, 1, 2, 3, 4, 5, 6])
    cuts = []

    def answer(self, begin=0):
        cuts.append(next(lengths))
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.files[path])))
        self.end_headers()
        self.wfile.write(server.files[path][: cuts[-1]])
        self.wfile.flush()
        self.close_connection = True

    server.RequestHandlerClass = type("Cutting", (Handler,), {"do_GET": answer})
    status, reason, _ = transfer.download_file(
        client, entries[0].url, tmp_path / "a", 6, 0.001, lambda _: None, threading.Event()
    )
    assert (status, cuts) == ("failed", [5000, 3000, 4000, 2000, 4500, 6000, 1, 2, 3, 4, 5])
    assert "(6 tries)" in reason


def test_only_parts_of_listed_recordings_are_removed(server, tmp_path):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    others = ["mine.part", "movie.mp4.0123456789abcdef.part", f"{entries[0].name}.mp4.notes.part"]
    stale = f"{entries[0].name}.mp4.{16 * 'a'}.part"
    get(tmp_path)
    for name in [*others, stale]:
        (tmp_path / name).write_text("half")
    get(tmp_path)
    assert sorted(left_behind(tmp_path)) == sorted(others)


def test_corrupt_file_that_was_deleted_is_downloaded_again(server, tmp_path, capsys):
    entries = offer(server)
    good = server.files[path_of(entries[0])]
    server.files[path_of(entries[0])] = good[: len(good) // 2]
    words = ["download", tmp_path / "v", "--index", listed(server, tmp_path, entries)]
    assert main([*map(str, words), "--no-progress"]) == 0
    said = capsys.readouterr().out  # without a bar, too
    assert "1 files corrupt, 5 files done" in said
    assert f"minecraft-jepa download {tmp_path / 'v'} --again corrupt" in said
    server.files[path_of(entries[0])] = good
    assert get(tmp_path / "v")[f"{entries[0].name}.mp4"]["status"] == "corrupt"
    (tmp_path / "v" / f"{entries[0].name}.mp4").unlink()
    assert get(tmp_path / "v")[f"{entries[0].name}.mp4"]["status"] == "done"
    assert_complete(server, tmp_path / "v", entries)


def test_server_that_answers_head_with_404_is_asked_again(server, tmp_path, monkeypatch):
    entries = offer(server)
    del server.files[path_of(entries[0])]
    monkeypatch.setattr(Handler, "do_HEAD", lambda self: self.answer(404))
    write_manifest(tmp_path, entries)
    rows = get(tmp_path)
    assert rows[f"{entries[0].name}.mp4"]["status"] == "missing"
    assert rows[f"{entries[0].name}.jsonl"]["status"] == "missing"
    assert_complete(server, tmp_path, entries[1:])


def test_whole_file_in_a_partial_answer_is_taken(server, tmp_path, monkeypatch):
    entries = offer(server)
    real = Handler.answer

    def answer(self, status, content=b"", begin=0, fault="", **options):
        real(self, 206 if self.command == "GET" else status, content, begin, fault, **options)

    monkeypatch.setattr(Handler, "answer", answer)
    write_manifest(tmp_path, entries)
    get(tmp_path, tries=2)
    assert_complete(server, tmp_path, entries)


def test_same_recording_in_an_index_or_two_counts_once(tmp_path):
    paths = ["8.0/a-1.mp4", "8.0/a-1.jsonl", "8.0/b-1.mp4", "8.0/b-1.mp4"]
    (tmp_path / "i.json").write_text(json.dumps({"basedir": "http://a/", "relpaths": paths}))
    entries = read_index(tmp_path / "i.json")
    assert [entry.name for entry in entries] == ["a-1", "b-1"]
    assert select_recordings([*entries, *entries]) == entries
    assert select_recordings([*entries, entries[0]]) == entries  # where it was listed first
    ten_hours = select_recordings(real_entries(), hours=10, seed=1)
    assert select_recordings([*real_entries(), *real_entries()], hours=10, seed=1) == ten_hours


def test_a_folder_that_a_refused_download_made_is_removed_under_its_lock(tmp_path, monkeypatch):
    held = []
    lock_folder = http_client.lock_folder

    @contextlib.contextmanager
    def lock(folder):
        with lock_folder(folder) as is_locked:
            yield is_locked
            held.append(folder.exists())

    monkeypatch.setattr(http_client, "lock_folder", lock)
    with http_client.lock_downloads(tmp_path / "new"):
        pass
    assert held == [False]


def test_folder_without_a_manifest_names_the_command(tmp_path, capsys):
    refused(capsys, ["download", tmp_path], f"minecraft-jepa download {tmp_path} --index all_10xx")


def test_disk_without_locks_is_no_hindrance(server, tmp_path, monkeypatch, capsys):
    def flock(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    entries = offer(server)
    write_manifest(tmp_path, entries)
    get(tmp_path)
    assert_complete(server, tmp_path, entries)
    assert f"{tmp_path}: this disk does not lock files" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_number_of_players_may_be_of_any_type(kind):
    entries = [
        IndexEntry(f"player{i}-{i:012x}-20220101-000000", "http://a/x.mp4", "test")
        for i in range(4)
    ]
    assert len(select_recordings(entries, players=kind(2))) == 2


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "a/../../outside",
        "/etc/outside",
        "..\\outside",
        ".bashrc",
        "a\0b",
        "https://elsewhere/x",
    ],
)
def test_no_name_leads_out_of_the_folder(server, tmp_path, name):
    (tmp_path / "index.json").write_text(json.dumps({"basedir": server.base, "relpaths": [name]}))
    with pytest.raises(DownloadError, match="do not trust"):
        read_index(tmp_path / "index.json")
    row = {"url": server.base + "x.mp4", "side": "train"}
    manifest = {"split_by": "player", "recordings": {name: row}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DownloadError, match="no recording"):
        get(tmp_path)


def test_links_are_not_followed_out_of_the_folder(server, tmp_path):
    "A link planted under the name of a part or of a recording: what it points to stays as it is."
    entries = offer(server)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "vpt"
    write_manifest(folder, entries)
    path = path_of(entries[0])
    content = server.files[path]
    mark = f'"{hashlib.md5(content).hexdigest()}" {len(content)}'
    version = hashlib.sha256(mark.encode()).hexdigest()[:16]
    (folder / f"{entries[0].name}.mp4.{version}.part").symlink_to(outside)
    with contextlib.suppress(OSError):
        get(folder, tries=2)
    assert outside.read_text() == "mine"


# imports once, forks a fetch for each line of its input, and prints its id and exit code
NURSERY = """
import os
import sys
import traceback

from minecraft_jepa.data.download import download_recordings

for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            download_recordings(sys.argv[1], workers=3, progress=False, pause=0.01, timeout=5)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.write(1, b"%d\\n" % pid)
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_killed_at_random_it_ends_with_every_byte(server, tmp_path):
    """Killed again and again, over a server that also breaks off, errs and ignores Range.

    A file that has its final name is complete at every moment.
    """
    entries = offer(server, repeats(4, 8))
    random, often = np.random.default_rng(0), repeats(6, 25)
    server.rate = 500_000
    total = sum(map(len, server.files.values()))
    kinds = [None, "cut", 503, "ignore range"]
    for path in server.files:
        server.faults[path] = [kinds[i] for i in random.integers(0, len(kinds), 6)]
    write_manifest(tmp_path, entries)
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(tmp_path)],
        cwd=ROOT,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    kills = partial = 0
    for _ in range(10 * often):
        nursery.stdin.write(b"\n")
        pid = int(nursery.stdout.readline())
        kill_at = server.sent + random.integers(total // (2 * often), total // often)
        has_ended = False
        while server.sent < kill_at and not has_ended:
            has_ended = bool(select.select([nursery.stdout], [], [], 0.002)[0])
        if not select.select([nursery.stdout], [], [], 0)[0]:
            os.kill(pid, signal.SIGKILL)
        code = int(nursery.stdout.readline())
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        partial += bool(list(tmp_path.glob("*.part")))
        for file in (*tmp_path.glob("*.mp4"), *tmp_path.glob("player*.jsonl")):
            assert file.read_bytes() == server.files[f"/data/8.0/{file.name}"], file.name
    nursery.stdin.close()
    assert nursery.wait(30) == 0
    assert code == 0
    assert kills >= 3 and partial >= 2
    assert_complete(server, tmp_path, entries)
    assert {row["status"] for row in read_ledger(tmp_path).values()} == {"done"}
    assert len(find_recordings(tmp_path)) == len(entries)
    assert not left_behind(tmp_path)


def test_command_line_from_index_to_split(server, tmp_path, capsys):
    entries = offer(server, 6)
    server.files["/snapshots/toy.json"] = json.dumps(
        {"basedir": server.base, "relpaths": [path_of(e)[1:] for e in entries]}
    ).encode()
    words = [sys.executable, "-m", "minecraft_jepa", "download", str(tmp_path / "vpt")]
    done = subprocess.run(
        [*words, "--index", f"{server.base}snapshots/toy.json", "--hours", "0.4", "--seed", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "10 files done" in done.stdout, done
    assert list(read_manifest(tmp_path / "vpt")["recordings"]) == sorted(
        e.name for e in select_recordings(entries, 0.4, seed=3)
    )
    split = load_split(tmp_path / "vpt")
    assert sum(map(len, split.values())) == 5 and all(split.values())
    words = ["download", tmp_path / "vpt", "--index", f"{server.base}snapshots/none.json"]
    refused(capsys, words, "HTTP 404; known snapshots")


@cache
def test_a_damaged_compressed_index_is_told(tmp_path):
    path = tmp_path / "index.json.gz"
    for damaged in (INDEXES[0].read_bytes()[:-400], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(DownloadError, match=r"index\.json\.gz"):
            read_index(path)


def real_entries():
    return [e for path in INDEXES for e in read_index(path)]


@pytest.mark.parametrize("by", ["player", "session"])
@pytest.mark.parametrize("seed", range(repeats(2, 5)))
def test_real_indexes_do_not_leak(by, seed):
    """No session of 11,127 recordings is in two splits, though some are in both indexes.

    No player is either, where the split is by player.
    """
    entries = real_entries()
    sessions = [
        {e.session for e in entries if e.index == path.name.partition(".")[0]} for path in INDEXES
    ]
    assert len(entries) == len({e.name for e in entries}) == 11_127
    assert len(sessions[0] & sessions[1]) == 17
    splits = assign_splits([e.name for e in entries], seed, by=by)
    assert sum(map(len, splits.values())) == 11_127
    for kind in {"session", by}:
        groups = [{getattr(parse_name(n), kind) for n in names} for names in splits.values()]
        assert sum(map(len, groups)) == len(set.union(*groups))
    for split in ("validation", "test"):
        assert 0.05 < len(splits[split]) / 11_127 < 0.2


@pytest.mark.parametrize("by", ["player", "session"])
def test_another_seed_gives_other_splits(by):
    names = [e.name for e in real_entries()]
    assert len({str(assign_splits(names, s, by=by)) for s in range(3)}) == 3


def test_growing_choice_moves_nobody(tmp_path):
    entries = real_entries()
    previous = {}
    for hours in (20, 60, 200):
        splits = write_manifest(tmp_path, select_recordings(entries, hours), "session")
        split_of = {name: split for split, names in splits.items() for name in names}
        assert all(split_of[name] == split for name, split in previous.items())
        assert len(split_of) > len(previous)
        previous = split_of
    rows = read_manifest(tmp_path)["recordings"].values()
    assert Counter(row["side"] for row in rows) == Counter(previous.values())


# Proxies and addresses


@pytest.fixture
def no_proxies(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return monkeypatch


def listed(server, tmp_path, entries):
    "An index of these entries, as a file."
    path = tmp_path / "index.json"
    relpaths = [path_of(entry)[1:] for entry in entries]
    path.write_text(json.dumps({"basedir": server.base, "relpaths": relpaths}))
    return path


@pytest.mark.parametrize(
    "name", ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
)
@pytest.mark.parametrize(
    "value",
    [
        "http://proxy:port",
        "http://[::1",
        "socks://127.0.0.1:9/",
        "ftp://127.0.0.1:9",
        "http://",
        "http://:80",
        "http://a:99999",
        "proxy:port",
        "http://a b:3",
        "http://" + "ä" * 70,
    ],
)
def test_proxy_that_cannot_be_used_is_named(no_proxies, name, value):
    no_proxies.setenv(name, value)
    with pytest.raises(DownloadError) as e:
        http_client.open_client()
    message = str(e.value)
    assert message.startswith(f"{name}={value}: this proxy can't be used (")
    assert "\n" not in message


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "socks5h://127.0.0.1:9"])
def test_socks_proxy_without_its_package_names_it(no_proxies, value):
    no_proxies.setitem(sys.modules, "socksio", None)
    no_proxies.setenv("ALL_PROXY", value)
    with pytest.raises(DownloadError, match=r"^ALL_PROXY=socks5.*pip install 'httpx\[socks\]'"):
        http_client.open_client()


def test_no_password_of_a_proxy_is_shown(no_proxies):
    no_proxies.setenv("HTTPS_PROXY", "http://me:secret@proxy:port")
    with pytest.raises(DownloadError, match=r"HTTPS_PROXY=http://\.\.\.@proxy:port") as e:
        http_client.open_client()
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("value", ["localhost,127.0.0.1,[::1]", "fe80::/10", "*.exämple.org"])
def test_no_proxy_that_cannot_be_read_is_named(no_proxies, value):
    no_proxies.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    no_proxies.setenv("NO_PROXY", value)
    with pytest.raises(DownloadError) as e:
        http_client.open_client()
    assert str(e.value).startswith(f"NO_PROXY={value}: can't be read")


def test_proxy_that_is_never_asked_may_be_wrong(no_proxies):
    no_proxies.setenv("HTTP_PROXY", "http://proxy:port")
    no_proxies.setenv("NO_PROXY", "*")
    http_client.open_client().close()


def test_certificates_that_are_not_there_are_named(no_proxies, tmp_path):
    no_proxies.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(DownloadError, match=r"SSL_CERT_FILE=.*none\.pem"):
        http_client.open_client()


def test_fetch_and_index_name_the_proxy(no_proxies, server, tmp_path, capsys):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    no_proxies.setenv("all_proxy", "socks://127.0.0.1:9")
    for call in (lambda: get(tmp_path), lambda: read_index(f"{server.base}snapshots/toy.json")):
        with pytest.raises(DownloadError, match=r"^all_proxy=socks://"):
            call()
    assert not server.asked
    refused(capsys, ["download", tmp_path], "^minecraft-jepa download: all_proxy=")


BAD_ADDRESSES = [
    "http://127.0.0.1:port/",
    "http:///x/",
    "http://a:0/",
    "http://a:65536/",
    "http://a b/",
    "http://a..b/",
    "http://[::1/",
    "http://☃.com/",
    "http://" + "ä" * 70 + "/",
]


@pytest.mark.parametrize("address", [*BAD_ADDRESSES, "ftp://a.org/", "s3://bucket/"])
def test_index_at_an_address_that_cannot_be_is_named(no_proxies, address):
    with pytest.raises(DownloadError) as e:
        read_index(address + "index.json")
    message = str(e.value)
    assert message.startswith(f"{address}index.json: no address of an index")
    assert "\n" not in message


@pytest.mark.parametrize("address", [*BAD_ADDRESSES, "https://a.org/x/?sig=1"])
def test_basedir_that_cannot_be_is_named(tmp_path, address):
    (tmp_path / "i.json").write_text(json.dumps({"basedir": address, "relpaths": ["data/a.mp4"]}))
    with pytest.raises(DownloadError, match=r"i\.json: basedir '.*' can't be used"):
        read_index(tmp_path / "i.json")


def test_url_in_a_manifest_that_cannot_be_is_named(server, tmp_path):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(entries[1].url, "http://127.0.0.1:port/x.mp4"))
    message = f"manifest.json: the url of {entries[1].name} can't be used"
    with pytest.raises(DownloadError, match=message):
        get(tmp_path)
    assert not server.asked


# What the server says

XML = (
    b'<?xml version="1.0"?><Error><Code>%s</Code><Message>%s\nRequestId:1\nTime:2</Message></Error>'
)
NOT_PUBLIC = "Public access is not permitted on this storage account."
REFUSALS = {
    "409 of Azure": (
        (
            409,
            NOT_PUBLIC,
            XML % (b"PublicAccessNotPermitted", NOT_PUBLIC.encode()),
            {"x-ms-error-code": "PublicAccessNotPermitted"},
        ),
        f"HTTP 409 PublicAccessNotPermitted: {NOT_PUBLIC}",
    ),
    "403, a key that is too old": (
        (
            403,
            "Server failed to authenticate the request.",
            XML % (b"AuthenticationFailed", b"Signature not valid in the specified time frame"),
            {},
        ),
        "HTTP 403 AuthenticationFailed: Signature not valid in the specified time frame",
    ),
    "401 in JSON": (
        (401, "Unauthorized", b'{"error": {"code": 401, "message": "log in first"}}', {}),
        "HTTP 401: log in first",
    ),
    "a phrase alone": ((403, "Blocked by policy 7", b"", {}), "HTTP 403: Blocked by policy 7"),
    "a page for people": (
        (
            403,
            "Forbidden",
            b"<html><title>403 Forbidden</title></html>",
            {"Content-Type": "text/html"},
        ),
        "HTTP 403",
    ),
}


@pytest.mark.parametrize(("fault", "why"), REFUSALS.values(), ids=REFUSALS)
def test_every_file_refused_is_no_success(server, tmp_path, capsys, fault, why):
    entries = offer(server)
    for path in server.files:
        server.faults[path] = fault
    words = ["download", str(tmp_path / "v"), "--index", str(listed(server, tmp_path, entries))]
    assert main(words) == 1
    said = capsys.readouterr()
    told = said.err.splitlines()[-1]
    assert told == (
        f"minecraft-jepa download: {tmp_path / 'v'}: not one of 3 recordings can be used: {why}"
    )
    assert {(r["status"], r["why"]) for r in read_ledger(tmp_path / "v").values()} == {
        ("failed", why)
    }
    assert f"  6 failed: {why} (" in said.out


def test_every_file_missing_is_no_success(server, tmp_path, capsys):
    entries = offer(server)
    index = listed(server, tmp_path, entries)
    server.files.clear()
    assert main(["download", str(tmp_path / "v"), "--index", str(index)]) == 1
    assert "not one of 3 recordings can be used: HTTP 404" in capsys.readouterr().err


def test_every_file_broken_is_no_success(server, tmp_path, capsys):
    entries = offer(server)
    for path in server.files:
        if path.endswith(".mp4"):
            server.files[path] = b"<html>log in</html>"
    words = ["download", str(tmp_path / "v"), "--index", str(listed(server, tmp_path, entries))]
    assert main(words) == 1
    why = "not one of 3 recordings can be used: NAME.mp4: not a readable video"
    assert why in capsys.readouterr().err


def test_some_files_refused_are_named_the_most_frequent_reason_first(server, tmp_path, capsys):
    entries = offer(server, 5)
    for e in entries[:2]:
        server.faults[path_of(e)] = (403, "Blocked", b"", {})
    server.faults[path_of(entries[2])] = 401
    words = ["download", str(tmp_path / "v"), "--index", str(listed(server, tmp_path, entries))]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].endswith("7 files done, 3 files failed; ledger.ndjson has a row for each")
    files = f"{entries[0].name}.mp4, {entries[1].name}.mp4"
    assert lines[-2] == f"  2 failed: HTTP 403: Blocked ({files})"
    assert lines[-1] == f"  1 failed: HTTP 401 ({entries[2].name}.mp4)"
    assert [p.stem for p in find_recordings(tmp_path / "v")] == [e.name for e in entries[3:]]


# Packed on the server


def raw_deflate(data):
    return zlib.compress(data)[2:-4]


PACKED = {  # header, and what the server does to the file
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "twice": ("gzip, gzip", lambda d: gzip.compress(gzip.compress(d))),
    "header and file": ("gzip", lambda d: gzip.compress(gzip.compress(d))),
    "no header": (None, gzip.compress),
    "header alone": ("gzip", lambda d: d),
    "deflate alone": ("deflate", lambda d: d),
    "identity": ("identity", lambda d: d),
    "bzip2": (None, bz2.compress),
    "xz": (None, lzma.compress),
    "no bytes after": ("aws-chunked", lambda d: d),
}


@pytest.mark.parametrize(("header", "pack"), PACKED.values(), ids=PACKED)
def test_packed_on_the_server_is_unpacked(server, tmp_path, header, pack):
    entries = offer(server)
    path, video = path_of(entries[0], ".jsonl"), path_of(entries[1])
    plain = {p: server.files[p] for p in (path, video)}
    for packed_path, content in plain.items():
        server.files[packed_path] = pack(content)
        if header:
            server.encodings[packed_path] = header
    server.faults[path] = ["cut", "cut"]  # its parts are put together before they are unpacked
    write_manifest(tmp_path, entries)
    rows = get(tmp_path)
    assert {r["status"] for r in rows.values()} == {"done"}
    server.files.update(plain)
    assert_complete(server, tmp_path, entries)
    assert not left_behind(tmp_path)
    assert len(server.asked[path]) == 3
    server.asked.clear()
    get(tmp_path)
    assert not server.asked


def test_packed_and_plain_parts_are_never_joined(server, tmp_path, monkeypatch):
    "The server goes from one to the other, with the same tag and as many bytes."
    entries = offer(server)
    path = path_of(entries[0], ".jsonl")
    packed = gzip.compress(server.files[path])
    lines = server.files[path][: len(packed)].rpartition(b"\n")[0]
    plain = lines + b"\n" * (len(packed) - len(lines))
    server.files[path], server.tag, server.encodings[path] = packed, '"1"', "gzip"
    real_answer = Handler.answer

    def answer(self, *args, **options):
        if self.path == path and self.command == "GET" and len(self.server.asked[path]) > 1:
            self.server.encodings.pop(path, None)
        real_answer(self, *args, **options)

    server.faults[path] = ["cut", plain]
    write_manifest(tmp_path, entries)
    monkeypatch.setattr(Handler, "answer", answer)
    get(tmp_path)
    assert (tmp_path / f"{entries[0].name}.jsonl").read_bytes() == plain
    assert not left_behind(tmp_path)


@pytest.mark.parametrize(
    ("header", "content", "reason"),
    [
        (
            "gzip",
            gzip.compress(b"{}\n" * 999, mtime=0)[:-9],
            "what was sent packed as 'gzip' is broken",
        ),
        ("gzip", b"\x1f\x8b" + b"x" * 99, "what was sent packed as 'gzip' is broken"),
        ("br", b"\x0b\x02\x80", "pip install brotli"),
        ("zstd", b"\x28\xb5\x2f\xfd", "pip install zstandard"),
        ("compress", b"\x1f\x9d\x90", "'compress', which is not known here"),
        (None, b"PK\3\4" + b"x" * 99, "'zip', which is not known here"),
    ],
)
def test_what_cannot_be_unpacked_is_named(server, tmp_path, monkeypatch, header, content, reason):
    for module in ("brotli", "brotlicffi", "zstandard", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    entries = offer(server)
    path = path_of(entries[0], ".jsonl")
    server.files[path] = content
    if header:
        server.encodings[path] = header
    write_manifest(tmp_path, entries)
    row = get(tmp_path, tries=2)[f"{entries[0].name}.jsonl"]
    assert row["status"] == "failed"
    assert reason in row["why"]
    assert not (tmp_path / f"{entries[0].name}.jsonl").exists()
    assert not left_behind(tmp_path)


@pytest.mark.parametrize(
    ("header", "modules", "content"),
    [("br", ("brotli",), b"br"), ("zstd", ("zstandard",), b"\x28\xb5\x2f\xfd")],
)
def test_an_installed_unpacker_is_used(server, tmp_path, monkeypatch, header, modules, content):
    "A stand-in: these packages are no dependency of ours."
    entries = offer(server)
    path = path_of(entries[0], ".jsonl")
    plain = server.files[path]
    server.files[path] = content
    server.encodings[path] = header

    class StandIn:
        def decompress(self, data):
            return plain

        def open(self, path, mode):
            return (tmp_path / "plain").open(mode)

    (tmp_path / "plain").write_bytes(plain)
    for module in ("brotlicffi", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, modules[0], StandIn())
    write_manifest(tmp_path / "v", entries)
    get(tmp_path / "v")
    server.files[path] = plain
    assert_complete(server, tmp_path / "v", entries)


@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16", "utf-16-le", "gzip"])
def test_index_in_another_encoding_is_read(server, tmp_path, code):
    entries = offer(server)
    text = listed(server, tmp_path, entries).read_text()
    data = gzip.compress(text.encode()) if code == "gzip" else text.encode(code)
    (tmp_path / "index.json").write_bytes(data)
    server.files["/snapshots/toy.json"] = data
    for source in (tmp_path / "index.json", f"{server.base}snapshots/toy.json"):
        assert [e.url for e in read_index(source)] == [e.url for e in entries]


def test_manifest_with_a_byte_order_mark_is_read(server, tmp_path):
    write_manifest(tmp_path, offer(server))
    before = read_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    text = path.read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert read_manifest(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"recordings": []}',
        '{"split_by": "player", "recordings": {"a": {"side": "train"}}}',
        '{"split_by": "player", "recordings": {"a": 3}}',
    ],
)
def test_file_that_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DownloadError, match=r"manifest\.json: .*write it again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "relpath",
    [
        "a/.hidden",
        "a/..",
        "",
        "a b",
        "a?x",
        "a%2e",
        "a\\b",
        "a/\0",
        "http://x/a",
        3,
        None,
        "a" * 201,
    ],
)
def test_path_that_is_no_recording_is_named_with_its_place(tmp_path, relpath):
    index = {"basedir": "http://127.0.0.1:9/", "relpaths": ["8.0/ok", relpath]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DownloadError, match=r"relpaths\[1\]"):
        read_index(tmp_path / "index.json")


@pytest.mark.parametrize("relpath", ["8.0/a-1", "8.0/a-1.mp4", "8.0/a-1.jsonl"])
def test_path_of_an_index_may_have_a_suffix(tmp_path, relpath):
    index = {"basedir": "http://127.0.0.1:9/", "relpaths": [relpath]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    (entry,) = read_index(tmp_path / "index.json")
    assert (entry.name, entry.url) == ("a-1", "http://127.0.0.1:9/8.0/a-1.mp4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"basedir": ', "line 2: not JSON"),
        ("[]", "expected an object"),
        ('{"basedir": "/local", "relpaths": []}', r"http\(s\)"),
        ('{"basedir": "http://a/", "relpaths": ["1/a", "2/a"]}', "a is listed 2 times"),
        (None, "one of all_6xx"),
    ],
)
def test_file_that_is_no_index_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(DownloadError, match=rf"index\.json.*{message}"):
        read_index(tmp_path / "index.json")


def test_selection_that_the_index_does_not_hold_is_named():
    entries = real_entries()
    with pytest.raises(ValueError, match="did you mean wiggy-aquamarine-tapir"):
        select_recordings(entries, players=["wiggy-tapir"])
    with pytest.raises(ValueError, match="players=99: the index has 28"):
        select_recordings(entries, players=99)
    with pytest.raises(ValueError, match="at most 927"):
        select_recordings(entries, hours=1000)
    names = ["wiggy-aquamarine-tapir"]
    assert {entry.player for entry in select_recordings(entries, players=names)} == set(names)
    first, second = (select_recordings(entries, hours=10, seed=seed) for seed in (1, 2))
    assert {entry.name for entry in first} != {entry.name for entry in second}


def test_manifest_that_does_not_go_with_the_call_is_named(tmp_path):
    with pytest.raises(DownloadError, match="no such file; write_manifest makes it, and so does"):
        read_manifest(tmp_path)
    entries = select_recordings(real_entries(), hours=10)
    write_manifest(tmp_path, entries, "session")
    with pytest.raises(DownloadError, match="split by session"):
        write_manifest(tmp_path, entries, "player")
    elsewhere = IndexEntry(entries[0].name, "http://other/x.mp4", "x")
    with pytest.raises(DownloadError, match="already listed"):
        write_manifest(tmp_path, [elsewhere], "session")


@pytest.mark.parametrize(
    "address",
    [
        "http://a.org/x",
        "https://a.org:8443/",
        "http://127.0.0.1:1/",
        "http://[::1]:80/",
        "HTTP://a_b/",
        "https://exämple.org/",
    ],
)
def test_address_that_can_be_is_taken(address):
    assert http_client.find_address_fault(address) == ""
