"The downloader against a server that does all that real ones do wrong, and killed at random moments."
import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from minecraft_jepa import download
from minecraft_jepa.download import DownloadError, Entry, choose, fetch, read_index, read_ledger, read_manifest, write_manifest
from minecraft_jepa.recordings import check_folder, deal_sides, find_recordings, parse_name, split_recordings

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
INDEXES = sorted((DATA / "vpt-index").glob("*.json"))
SOURCES = sorted(p.stem for p in DATA.glob("*.mp4"))


class Server(ThreadingHTTPServer):
    "Serves `files` {path: bytes} with ETag and Range, unless `faults` {path: [fault, ...]} has one for this request; a fault that is no list stays."
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked, self.rate = {}, {}, defaultdict(list), None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def base(self): return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, *_): pass  # clients that hang up are what is tested


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def do_HEAD(self):
        whole = self.server.files.get(self.path)
        if self.server.faults.get("HEAD"): return self.answer(405)
        self.answer(404 if whole is None else 200, whole or b"", body=False)

    def do_GET(self):
        self.server.asked[self.path].append(self.headers.get("Range"))
        planned = self.server.faults.get(self.path)
        fault = (planned.pop(0) if planned else None) if isinstance(planned, list) else planned
        whole = self.server.files.get(self.path)
        if whole is None: return self.answer(404)
        if isinstance(fault, int): return self.answer(fault, headers={"Retry-After": "0"} if fault == 429 else {})
        if isinstance(fault, bytes): whole = self.server.files[self.path] = fault  # another version from now on
        begin, status, kind = 0, 200, fault if isinstance(fault, str) else ""
        asked = self.headers.get("Range")
        if asked and kind != "ignore range":
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(whole): return self.answer(416, headers={"Content-Range": f"bytes */{len(whole)}"})
            status = 206
        self.answer(status, whole, begin, kind)

    def answer(self, status, whole=b"", begin=0, kind="", body=True, headers=None):
        self.send_response(status)
        told = {"Content-Length": len(whole) - begin, **(headers or {})}
        if whole and kind != "no version": told["ETag"] = f'"{hashlib.md5(whole).hexdigest()}"'
        if status == 206: told["Content-Range"] = f"bytes {begin}-{len(whole) - 1}/{len(whole)}"
        if kind in ("md5", "wrong md5"): told["Content-MD5"] = base64.b64encode(hashlib.md5(whole + (b"x" if kind == "wrong md5" else b"")).digest()).decode()
        for k, v in told.items(): self.send_header(k, str(v))
        self.end_headers()
        if not body: return
        rest = whole[begin:]
        if kind == "cut": rest, self.close_connection = rest[:max(len(rest) // 3, 1)], True
        if kind == "stall": rest = rest[:1000]
        if self.server.rate:
            for i in range(0, len(rest), 8192):
                self.wfile.write(rest[i:i + 8192]); time.sleep(8192 / self.server.rate)
        else: self.wfile.write(rest)
        if kind == "stall": self.wfile.flush(); time.sleep(4)
        if kind == "cut": self.connection.close()


@pytest.fixture
def server():
    s = Server()
    yield s
    s.shutdown(); s.server_close()


def offer(server, many=3, where="data/8.0/"):
    "Real pairs of several players on the server; gives their entries."
    entries = []
    for i in range(many):
        name = f"player{i}-{i:012x}-20220101-000000"
        for suffix in (".mp4", ".jsonl"): server.files[f"/{where}{name}{suffix}"] = (DATA / f"{SOURCES[i % len(SOURCES)]}{suffix}").read_bytes()
        entries.append(Entry(name, f"{server.base}{where}{name}.mp4", "test"))
    return entries


def path_of(entry, suffix=".mp4"): return "/" + entry.url.split("/", 3)[3].removesuffix(".mp4") + suffix


def get(folder, **options): return fetch(folder, progress=False, pause=0.01, timeout=1, **options)


def same(server, folder, entries):
    for e in entries:
        for suffix in (".mp4", ".jsonl"): assert (folder / f"{e.name}{suffix}").read_bytes() == server.files[path_of(e, suffix)], e.name


def left_behind(folder): return [p.name for p in folder.iterdir() if p.suffix not in (".mp4", ".jsonl", ".json", ".ndjson") and p.name != ".lock"]


FAULTS = {  # fault of the first requests for a video -> how many times it is asked for
    "broken off": (["cut"], 2), "broken off three times": (["cut", "cut", "cut"], 4), "stalls": (["stall"], 2),
    "server error": ([500, 503], 3), "too many requests": ([429], 2), "Range is ignored": (["cut", "ignore range"], 2),
    "no version": (["no version", ], 1), "broken off, no version": ([["no version", "cut"]], None), "wrong MD5": (["wrong md5"], 2), "right MD5": (["md5"], 1)}


@pytest.mark.parametrize("faults, asked", FAULTS.values(), ids=FAULTS)
def test_file_comes_whole_in_spite_of(server, tmp_path, faults, asked):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    path = path_of(entries[0])
    if faults == [["no version", "cut"]]:  # nothing to go by: it must be read from the beginning
        tell, Handler_answer = [], Handler.answer
        def answer(self, status, whole=b"", begin=0, kind="", **more):
            if self.path == path and self.command == "GET" and not tell: tell.append(1); kind = "cut"
            headers = self.send_header
            self.send_header = lambda k, v: None if k == "ETag" else headers(k, v)
            Handler_answer(self, status, whole, begin, kind, **more)
        Handler.answer = answer
        try: rows = get(tmp_path)
        finally: Handler.answer = Handler_answer
    else:
        server.faults[path] = list(faults)
        rows = get(tmp_path)
        assert len(server.asked[path]) == asked
    assert {r["status"] for r in rows.values()} == {"done"}
    same(server, tmp_path, entries)
    assert not left_behind(tmp_path)


def test_transfer_goes_on_where_it_broke_off(server, tmp_path):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    path = path_of(entries[0])
    server.faults[path] = ["cut", "cut"]
    get(tmp_path)
    first, second, third = server.asked[path]
    whole = len(server.files[path])
    assert first is None and abs(int(second[6:-1]) - whole / 3) < 2 and int(third[6:-1]) > whole / 2


@pytest.mark.parametrize("longer", [True, False])
def test_versions_of_a_file_are_never_joined(server, tmp_path, longer):
    "The file changes after a third of it came."
    entries = offer(server)
    write_manifest(tmp_path, entries)
    path = path_of(entries[0], ".jsonl")
    old = server.files[path]
    new = old.replace(b'"dwheel":0.0', b'"dwheel":1.0') if longer else old[:len(old) // 4].rpartition(b"\n")[0] + b"\n"
    server.faults[path] = ["cut", new]
    rows = get(tmp_path)
    assert (tmp_path / f"{entries[0].name}.jsonl").read_bytes() == new and not left_behind(tmp_path)
    assert rows[f"{entries[0].name}.jsonl"]["status"] == ("done" if longer else "corrupt")  # too few lines for the video


def test_what_is_missing_and_broken_is_told_and_left_out(server, tmp_path):
    entries = offer(server, 7)
    names = [e.name for e in entries]
    del server.files[path_of(entries[0])], server.files[path_of(entries[1], ".jsonl")]
    video = server.files[path_of(entries[2])]
    server.files[path_of(entries[2])] = video[:len(video) // 2]
    server.files[path_of(entries[3], ".jsonl")] += b'{"mouse": {"x": 64'
    server.faults[path_of(entries[4])] = 403
    server.files[path_of(entries[5], ".jsonl")] = server.files[path_of(entries[5], ".jsonl")][:-300]
    write_manifest(tmp_path, entries)
    rows = get(tmp_path)
    status = {f: (r["status"], r["why"]) for f, r in rows.items() if r["status"] != "done"}
    assert status[f"{names[0]}.mp4"] == ("missing", "HTTP 404") and "its other half" in status[f"{names[0]}.jsonl"][1]
    assert status[f"{names[1]}.jsonl"] == ("missing", "HTTP 404") and not server.asked[path_of(entries[1])]
    assert status[f"{names[2]}.mp4"][0] == "corrupt" and f"{names[2]}.mp4: " in status[f"{names[2]}.mp4"][1]
    for i in (3, 5): assert status[f"{names[i]}.jsonl"][0] == "corrupt" and "jsonl, line" in status[f"{names[i]}.jsonl"][1]
    assert status[f"{names[4]}.mp4"] == ("failed", "HTTP 403") and len(status) == 8
    assert [p.stem for p in find_recordings(tmp_path)] == [names[6]] and not left_behind(tmp_path)
    why = {r["name"]: r["why"] for r in check_folder(tmp_path, progress=False) if not r["used"]}
    assert sorted(why) == sorted([*names[2:6]]) and all(why.values())

    server.asked.clear()  # a second run asks for what failed, and for nothing else
    del server.faults[path_of(entries[4])]
    assert get(tmp_path)[f"{names[4]}.mp4"]["status"] == "done" and list(server.asked) == [path_of(entries[4])]
    assert [p.stem for p in find_recordings(tmp_path)] == [names[4], names[6]]
    server.files[path_of(entries[2])] = video  # mended on the server, and asked for by name
    assert get(tmp_path)[f"{names[2]}.mp4"]["status"] == "corrupt"
    assert get(tmp_path, again=["corrupt"])[f"{names[2]}.mp4"]["status"] == "done"
    assert len(find_recordings(tmp_path)) == 3


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
    same(server, tmp_path, entries)
    with open(tmp_path / "ledger.ndjson", "ab") as f: f.write(b'{"file": "pla')  # a kill
    server.asked.clear()
    get(tmp_path)
    assert not server.asked
    more = offer(server, 6)
    write_manifest(tmp_path, more)
    get(tmp_path)
    assert len(server.asked) == 4 and len(find_recordings(tmp_path)) == 6


def test_server_without_head_is_no_hindrance(server, tmp_path):
    entries = offer(server)
    server.faults["HEAD"] = True
    write_manifest(tmp_path, entries)
    assert {r["status"] for r in get(tmp_path).values()} == {"done"}
    same(server, tmp_path, entries)


def test_server_that_never_recovers_is_given_up(server, tmp_path):
    entries = offer(server)
    server.faults[path_of(entries[0])] = 503
    write_manifest(tmp_path, entries)
    row = get(tmp_path, tries=3)[f"{entries[0].name}.mp4"]
    assert (row["status"], row["why"]) == ("failed", "HTTP 503 (3 tries)") and len(server.asked[path_of(entries[0])]) == 3
    server.shutdown(); server.server_close()
    assert get(tmp_path, tries=2)[f"{entries[0].name}.mp4"]["status"] == "failed"


def test_trickle_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL", 0.5); monkeypatch.setattr(download, "SLOWEST", 10**7)
    entries = offer(server)
    server.rate = 50_000
    write_manifest(tmp_path, entries)
    stop = threading.Timer(1.5, lambda: setattr(server, "rate", None)); stop.start()
    get(tmp_path, tries=50)
    same(server, tmp_path, entries)
    assert max(map(len, server.asked.values())) > 1


def test_full_disk_is_told_first(server, tmp_path, monkeypatch):
    write_manifest(tmp_path, offer(server))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(DownloadError, match="choose fewer hours"): get(tmp_path)
    assert not server.asked


def test_two_fetches_in_a_folder_are_refused(server, tmp_path):
    write_manifest(tmp_path, offer(server))
    with download._alone(tmp_path), pytest.raises(DownloadError, match="another fetch works here"): get(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/outside", "..\\outside", ".bashrc", "a\0b", "https://elsewhere/x"])
def test_no_name_leads_out_of_the_folder(server, tmp_path, name):
    (tmp_path / "index.json").write_text(json.dumps({"basedir": server.base, "relpaths": [name]}))
    with pytest.raises(DownloadError, match="do not trust"): read_index(tmp_path / "index.json")
    (tmp_path / "manifest.json").write_text(json.dumps({"split_by": "player", "recordings": {name: {"url": server.base + "x.mp4", "side": "train"}}}))
    with pytest.raises(DownloadError, match="no recording"): get(tmp_path)


def test_links_are_not_followed_out_of_the_folder(server, tmp_path):
    "A link planted under the name of a part or of a recording: what it points to stays as it is."
    entries = offer(server)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "vpt"
    write_manifest(folder, entries)
    path = path_of(entries[0])
    total = len(server.files[path])
    version = hashlib.sha256(f'"{hashlib.md5(server.files[path]).hexdigest()}" {total}'.encode()).hexdigest()[:16]
    (folder / f"{entries[0].name}.mp4.{version}.part").symlink_to(outside)
    try: get(folder, tries=2)
    except OSError: pass
    assert outside.read_text() == "mine"


def test_killed_at_random_it_ends_with_every_byte(server, tmp_path):
    "Killed again and again, over a server that also breaks off, errs and ignores Range; whatever has its final name is whole at every moment."
    entries = offer(server, 8)
    random, server.rate = np.random.default_rng(0), 500_000
    for path in server.files: server.faults[path] = [[None, "cut", 503, "ignore range"][i] for i in random.integers(0, 4, 6)]
    write_manifest(tmp_path, entries)
    source = f"from minecraft_jepa.download import fetch; fetch({str(tmp_path)!r}, workers=3, progress=False, pause=0.01, timeout=5)"
    kills = partial = 0
    for _ in range(60):
        run = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stderr=subprocess.PIPE)
        try: run.wait(random.uniform(0.3, 2.2)); break
        except subprocess.TimeoutExpired: run.send_signal(signal.SIGKILL); run.communicate()
        kills += 1
        partial += bool(list(tmp_path.glob("*.part")))
        for p in (*tmp_path.glob("*.mp4"), *tmp_path.glob("player*.jsonl")): assert p.read_bytes() == server.files[f"/data/8.0/{p.name}"], p.name
    assert run.returncode == 0, run.stderr.read().decode()[-2000:]
    assert kills >= 3 and partial >= 2
    same(server, tmp_path, entries)
    assert {r["status"] for r in read_ledger(tmp_path).values()} == {"done"} and len(find_recordings(tmp_path)) == 8 and not left_behind(tmp_path)


def test_command_line_from_index_to_split(server, tmp_path):
    entries = offer(server, 6)
    server.files["/snapshots/toy.json"] = json.dumps({"basedir": server.base, "relpaths": [path_of(e)[1:] for e in entries]}).encode()
    words = [sys.executable, "-m", "minecraft_jepa.download", str(tmp_path / "vpt")]
    done = subprocess.run([*words, "--index", f"{server.base}snapshots/toy.json", "--hours", "0.4", "--seed", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "10 files done" in done.stdout, done
    assert list(read_manifest(tmp_path / "vpt")["recordings"]) == sorted(e.name for e in choose(entries, 0.4, seed=3))
    split = split_recordings(tmp_path / "vpt")
    assert sum(map(len, split.values())) == 5 and all(split.values())
    wrong = subprocess.run([*words, "--index", f"{server.base}snapshots/none.json"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "known snapshots" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("by", ["player", "session"])
@pytest.mark.parametrize("seed", range(5))
def test_real_indexes_do_not_leak(by, seed):
    "11,127 recordings; sessions that span files and both indexes stand on one side, and so do players where the split is by player."
    entries = [e for path in INDEXES for e in read_index(path)]
    sessions = [{e.session for e in read_index(path)} for path in INDEXES]
    assert len(entries) == len({e.name for e in entries}) == 11_127 and len(sessions[0] & sessions[1]) == 17
    sides = deal_sides([e.name for e in entries], seed, by=by)
    assert sum(map(len, sides.values())) == 11_127
    for kind in {"session", by}:
        groups = [{getattr(parse_name(n), kind) for n in names} for names in sides.values()]
        assert sum(map(len, groups)) == len(set.union(*groups))
    shares = [len(sides[s]) / 11_127 for s in ("validation", "test")]
    assert all(0.05 < s < 0.2 for s in shares), shares
    assert len({str(deal_sides([e.name for e in entries], s, by=by)) for s in range(3)}) == 3


def test_growing_choice_moves_nobody(tmp_path):
    entries = [e for path in INDEXES for e in read_index(path)]
    before = {}
    for hours in (20, 60, 200):
        sides = write_manifest(tmp_path, choose(entries, hours), "session")
        now = {n: side for side, names in sides.items() for n in names}
        assert all(now[n] == side for n, side in before.items()) and len(now) > len(before)
        before = now
    assert Counter(r["side"] for r in read_manifest(tmp_path)["recordings"].values()) == Counter(before.values())
