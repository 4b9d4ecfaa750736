"The downloader against a server that does all that real ones do wrong, and killed at random moments."

import base64
import bz2
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

import numpy as np
import pytest
from commands import refused
from soak import repeats

from minecraft_jepa.cli import main
from minecraft_jepa.data import download, transfer
from minecraft_jepa.data.checks import check_folder, find_recordings
from minecraft_jepa.data.download import fetch, read_ledger
from minecraft_jepa.data.manifest import Entry, choose, read_index, read_manifest, write_manifest
from minecraft_jepa.data.recordings import parse_name
from minecraft_jepa.data.splits import deal_sides, split_recordings
from minecraft_jepa.data.transfer import DownloadError

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
        self.encodings, self.tag, self.sent = (
            {},
            None,
            0,
        )  # of a path; the same for all files; bytes
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
        whole = self.server.files.get(self.path)
        if self.server.faults.get("HEAD"):
            return self.answer(405)
        self.answer(404 if whole is None else 200, whole or b"", body=False)

    def do_GET(self):
        self.server.asked[self.path].append(self.headers.get("Range"))
        planned = self.server.faults.get(self.path)
        fault = (planned.pop(0) if planned else None) if isinstance(planned, list) else planned
        whole = self.server.files.get(self.path)
        if whole is None:
            return self.answer(404)
        if isinstance(fault, tuple):
            return self.refuse(*fault)
        if isinstance(fault, int):
            return self.answer(fault, headers={"Retry-After": "0"} if fault == 429 else {})
        if isinstance(fault, bytes):
            whole = self.server.files[self.path] = fault  # another version from now on
        begin, status, kind = 0, 200, fault if isinstance(fault, str) else ""
        asked = self.headers.get("Range")
        if asked and kind != "ignore range":
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(whole):
                return self.answer(416, headers={"Content-Range": f"bytes */{len(whole)}"})
            status = 206
        self.answer(status, whole, begin, kind)

    def refuse(self, status, phrase, body, headers):
        self.send_response(status, phrase)
        for k, v in {"Content-Length": len(body), **headers}.items():
            self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, status, whole=b"", begin=0, kind="", body=True, headers=None):
        self.send_response(status)
        told = {"Content-Length": len(whole) - begin, **(headers or {})}
        if whole and kind != "no version":
            told["ETag"] = self.server.tag or f'"{hashlib.md5(whole).hexdigest()}"'
        if whole and self.path in self.server.encodings:
            told["Content-Encoding"] = self.server.encodings[self.path]
        if status == 206:
            told["Content-Range"] = f"bytes {begin}-{len(whole) - 1}/{len(whole)}"
        if kind in ("md5", "wrong md5"):
            told["Content-MD5"] = base64.b64encode(
                hashlib.md5(whole + (b"x" if kind == "wrong md5" else b"")).digest()
            ).decode()
        for k, v in told.items():
            self.send_header(k, str(v))
        self.end_headers()
        if not body:
            return
        rest = whole[begin:]
        if kind == "cut":
            rest, self.close_connection = rest[: max(len(rest) // 3, 1)], True
        if kind == "stall":
            rest = rest[:1000]
        if self.server.rate:
            for i in range(0, len(rest), 8192):
                self.wfile.write(rest[i : i + 8192])
                time.sleep(8192 / self.server.rate)
                self.server.sent += 8192
        else:
            self.wfile.write(rest)
        if kind == "stall":
            self.wfile.flush()
            time.sleep(4)
        if kind == "cut":
            self.connection.close()


@pytest.fixture
def server():
    s = Server()
    yield s
    s.shutdown()
    s.server_close()


def offer(server, many=3, where="data/8.0/"):
    "Real pairs of several players on the server; gives their entries."
    entries = []
    for i in range(many):
        name = f"player{i}-{i:012x}-20220101-000000"
        for suffix in (".mp4", ".jsonl"):
            server.files[f"/{where}{name}{suffix}"] = (
                DATA / f"{SOURCES[i % len(SOURCES)]}{suffix}"
            ).read_bytes()
        entries.append(Entry(name, f"{server.base}{where}{name}.mp4", "test"))
    return entries


def path_of(entry, suffix=".mp4"):
    return "/" + entry.url.split("/", 3)[3].removesuffix(".mp4") + suffix


def get(folder, **options):
    return fetch(folder, progress=False, pause=0.01, timeout=1, **options)


def same(server, folder, entries):
    for e in entries:
        for suffix in (".mp4", ".jsonl"):
            assert (folder / f"{e.name}{suffix}").read_bytes() == server.files[
                path_of(e, suffix)
            ], e.name


def left_behind(folder):
    return [
        p.name
        for p in folder.iterdir()
        if p.suffix not in (".mp4", ".jsonl", ".json", ".ndjson") and p.name != ".lock"
    ]


FAULTS = {  # fault of the first requests for a video -> how many times it is asked for
    "broken off": (["cut"], 2),
    "broken off three times": (["cut", "cut", "cut"], 4),
    "stalls": (["stall"], 2),
    "server error": ([500, 503], 3),
    "too many requests": ([429], 2),
    "Range is ignored": (["cut", "ignore range"], 2),
    "no version": (
        [
            "no version",
        ],
        1,
    ),
    "broken off, no version": ([["no version", "cut"]], None),
    "wrong MD5": (["wrong md5"], 2),
    "right MD5": (["md5"], 1),
}


@pytest.mark.parametrize("faults, asked", FAULTS.values(), ids=FAULTS)
def test_file_comes_whole_in_spite_of(server, tmp_path, faults, asked):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    path = path_of(entries[0])
    if faults == [["no version", "cut"]]:  # nothing to go by: it must be read from the beginning
        tell, Handler_answer = [], Handler.answer

        def answer(self, status, whole=b"", begin=0, kind="", **more):
            if self.path == path and self.command == "GET" and not tell:
                tell.append(1)
                kind = "cut"
            headers = self.send_header
            self.send_header = lambda k, v: None if k == "ETag" else headers(k, v)
            Handler_answer(self, status, whole, begin, kind, **more)

        Handler.answer = answer
        try:
            rows = get(tmp_path)
        finally:
            Handler.answer = Handler_answer
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
    new = (
        old.replace(b'"dwheel":0.0', b'"dwheel":1.0')
        if longer
        else old[: len(old) // 4].rpartition(b"\n")[0] + b"\n"
    )
    server.faults[path] = ["cut", new]
    rows = get(tmp_path)
    assert (tmp_path / f"{entries[0].name}.jsonl").read_bytes() == new and not left_behind(tmp_path)
    assert rows[f"{entries[0].name}.jsonl"]["status"] == (
        "done" if longer else "corrupt"
    )  # too few lines for the video


def test_what_is_missing_and_broken_is_told_and_left_out(server, tmp_path):
    entries = offer(server, 7)
    names = [e.name for e in entries]
    del server.files[path_of(entries[0])], server.files[path_of(entries[1], ".jsonl")]
    video = server.files[path_of(entries[2])]
    server.files[path_of(entries[2])] = video[: len(video) // 2]
    server.files[path_of(entries[3], ".jsonl")] += (
        b'{"mouse": {"x": 64'  # after the last frame's: it is not missed
    )
    server.faults[path_of(entries[4])] = 403
    server.files[path_of(entries[5], ".jsonl")] = b"".join(
        server.files[path_of(entries[5], ".jsonl")].splitlines(True)[:-3]
    )
    write_manifest(tmp_path, entries)
    rows = get(tmp_path)
    status = {f: (r["status"], r["why"]) for f, r in rows.items() if r["status"] != "done"}
    assert (
        status[f"{names[0]}.mp4"] == ("missing", "HTTP 404")
        and "its other half" in status[f"{names[0]}.jsonl"][1]
    )
    assert (
        status[f"{names[1]}.jsonl"] == ("missing", "HTTP 404")
        and not server.asked[path_of(entries[1])]
    )
    assert (
        status[f"{names[2]}.mp4"][0] == "corrupt"
        and f"{names[2]}.mp4: " in status[f"{names[2]}.mp4"][1]
    )
    assert (
        status[f"{names[5]}.jsonl"][0] == "corrupt"
        and "jsonl, line" in status[f"{names[5]}.jsonl"][1]
    )
    assert status[f"{names[4]}.mp4"] == ("failed", "HTTP 403") and len(status) == 7
    assert [p.stem for p in find_recordings(tmp_path)] == [names[3], names[6]] and not left_behind(
        tmp_path
    )
    why = {r["name"]: r["why"] for r in check_folder(tmp_path, progress=False) if not r["used"]}
    assert sorted(why) == [names[2], names[4], names[5]] and all(why.values())

    server.asked.clear()  # a second run asks for what failed, and for nothing else
    del server.faults[path_of(entries[4])]
    assert get(tmp_path)[f"{names[4]}.mp4"]["status"] == "done" and list(server.asked) == [
        path_of(entries[4])
    ]
    assert [p.stem for p in find_recordings(tmp_path)] == [names[3], names[4], names[6]]
    server.files[path_of(entries[2])] = video  # mended on the server, and asked for by name
    assert get(tmp_path)[f"{names[2]}.mp4"]["status"] == "corrupt"
    assert get(tmp_path, again=["corrupt"])[f"{names[2]}.mp4"]["status"] == "done"
    assert len(find_recordings(tmp_path)) == 4


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
    with open(tmp_path / "ledger.ndjson", "ab") as f:
        f.write(b'{"file": "pla')  # a kill
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
    assert (row["status"], row["why"]) == ("failed", "HTTP 503 (3 tries)") and len(
        server.asked[path_of(entries[0])]
    ) == 3
    server.shutdown()
    server.server_close()
    assert get(tmp_path, tries=2)[f"{entries[0].name}.mp4"]["status"] == "failed"


def test_trickle_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STALL", 0.5)
    monkeypatch.setattr(transfer, "SLOWEST", 10**7)
    entries = offer(server)
    server.rate = 50_000
    write_manifest(tmp_path, entries)
    stop = threading.Timer(1.5, lambda: setattr(server, "rate", None))
    stop.start()
    get(tmp_path, tries=50)
    same(server, tmp_path, entries)
    assert max(map(len, server.asked.values())) > 1


def test_full_disk_is_told_first(server, tmp_path, monkeypatch):
    write_manifest(tmp_path, offer(server))
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6),
    )
    with pytest.raises(DownloadError, match="choose fewer hours"):
        get(tmp_path)
    assert not server.asked


def test_two_fetches_in_a_folder_are_refused(server, tmp_path):
    write_manifest(tmp_path, offer(server))
    with download._alone(tmp_path), pytest.raises(DownloadError, match="another fetch works here"):
        get(tmp_path)


def test_disk_without_locks_is_no_hindrance(server, tmp_path, monkeypatch, capsys):
    def flock(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    entries = offer(server)
    write_manifest(tmp_path, entries)
    get(tmp_path)
    same(server, tmp_path, entries)
    assert f"{tmp_path}: this disk knows no locks" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_number_of_players_may_be_of_any_type(kind):
    entries = [
        Entry(f"player{i}-{i:012x}-20220101-000000", "http://a/x.mp4", "test") for i in range(4)
    ]
    assert len(choose(entries, players=kind(2))) == 2


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
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "split_by": "player",
                "recordings": {name: {"url": server.base + "x.mp4", "side": "train"}},
            }
        )
    )
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
    total = len(server.files[path])
    version = hashlib.sha256(
        f'"{hashlib.md5(server.files[path]).hexdigest()}" {total}'.encode()
    ).hexdigest()[:16]
    (folder / f"{entries[0].name}.mp4.{version}.part").symlink_to(outside)
    try:
        get(folder, tries=2)
    except OSError:
        pass
    assert outside.read_text() == "mine"


NURSERY = """
import os, sys, traceback
from minecraft_jepa.data.download import fetch
for _ in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            fetch(sys.argv[1], workers=3, progress=False, pause=0.01, timeout=5)
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    os.write(1, b"%d\\n" % pid)
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""  # imports once, and forks a fetch for each line


def test_killed_at_random_it_ends_with_every_byte(server, tmp_path):
    "Killed again and again, over a server that also breaks off, errs and ignores Range; whatever has its final name is whole at every moment."
    entries = offer(server, repeats(4, 8))
    random, server.rate, often = np.random.default_rng(0), 500_000, repeats(6, 25)
    total = sum(map(len, server.files.values()))
    for path in server.files:
        server.faults[path] = [
            [None, "cut", 503, "ignore range"][i] for i in random.integers(0, 4, 6)
        ]
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
        pid, enough = (
            int(nursery.stdout.readline()),
            server.sent + random.integers(total // (2 * often), total // often),
        )
        while server.sent < enough and not select.select([nursery.stdout], [], [], 0.002)[0]:
            pass
        if not select.select([nursery.stdout], [], [], 0)[0]:
            os.kill(pid, signal.SIGKILL)
        code = int(nursery.stdout.readline())
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        partial += bool(list(tmp_path.glob("*.part")))
        for p in (*tmp_path.glob("*.mp4"), *tmp_path.glob("player*.jsonl")):
            assert p.read_bytes() == server.files[f"/data/8.0/{p.name}"], p.name
    nursery.stdin.close()
    assert nursery.wait(30) == 0 and code == 0
    assert kills >= 3 and partial >= 2
    same(server, tmp_path, entries)
    assert (
        {r["status"] for r in read_ledger(tmp_path).values()} == {"done"}
        and len(find_recordings(tmp_path)) == len(entries)
        and not left_behind(tmp_path)
    )


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
    )
    assert done.returncode == 0 and "10 files done" in done.stdout, done
    assert list(read_manifest(tmp_path / "vpt")["recordings"]) == sorted(
        e.name for e in choose(entries, 0.4, seed=3)
    )
    split = split_recordings(tmp_path / "vpt")
    assert sum(map(len, split.values())) == 5 and all(split.values())
    words = ["download", tmp_path / "vpt", "--index", f"{server.base}snapshots/none.json"]
    refused(capsys, words, "HTTP 404; known snapshots")


@cache
def real_entries():
    return [e for path in INDEXES for e in read_index(path)]


@pytest.mark.parametrize("by", ["player", "session"])
@pytest.mark.parametrize("seed", range(repeats(2, 5)))
def test_real_indexes_do_not_leak(by, seed):
    "11,127 recordings; sessions that span files and both indexes stand on one side, and so do players where the split is by player."
    entries = real_entries()
    sessions = [{e.session for e in entries if e.index == path.stem} for path in INDEXES]
    assert (
        len(entries) == len({e.name for e in entries}) == 11_127
        and len(sessions[0] & sessions[1]) == 17
    )
    sides = deal_sides([e.name for e in entries], seed, by=by)
    assert sum(map(len, sides.values())) == 11_127
    for kind in {"session", by}:
        groups = [{getattr(parse_name(n), kind) for n in names} for names in sides.values()]
        assert sum(map(len, groups)) == len(set.union(*groups))
    shares = [len(sides[s]) / 11_127 for s in ("validation", "test")]
    assert all(0.05 < s < 0.2 for s in shares), shares


@pytest.mark.parametrize("by", ["player", "session"])
def test_another_seed_deals_other_sides(by):
    names = [e.name for e in real_entries()]
    assert len({str(deal_sides(names, s, by=by)) for s in range(3)}) == 3


def test_growing_choice_moves_nobody(tmp_path):
    entries = real_entries()
    before = {}
    for hours in (20, 60, 200):
        sides = write_manifest(tmp_path, choose(entries, hours), "session")
        now = {n: side for side, names in sides.items() for n in names}
        assert all(now[n] == side for n, side in before.items()) and len(now) > len(before)
        before = now
    assert Counter(r["side"] for r in read_manifest(tmp_path)["recordings"].values()) == Counter(
        before.values()
    )


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
    path.write_text(
        json.dumps({"basedir": server.base, "relpaths": [path_of(e)[1:] for e in entries]})
    )
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
        transfer._open_client()
    assert str(e.value).startswith(
        f"{name}={value}: this proxy can't be used ("
    ) and "\n" not in str(e.value)


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "socks5h://127.0.0.1:9"])
def test_socks_proxy_without_its_package_names_it(no_proxies, value):
    no_proxies.setitem(sys.modules, "socksio", None)
    no_proxies.setenv("ALL_PROXY", value)
    with pytest.raises(DownloadError, match=r"^ALL_PROXY=socks5.*pip install 'httpx\[socks\]'"):
        transfer._open_client()


def test_no_password_of_a_proxy_is_shown(no_proxies):
    no_proxies.setenv("HTTPS_PROXY", "http://me:secret@proxy:port")
    with pytest.raises(DownloadError, match="HTTPS_PROXY=http://...@proxy:port") as e:
        transfer._open_client()
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("value", ["localhost,127.0.0.1,[::1]", "fe80::/10", "*.exämple.org"])
def test_no_proxy_that_cannot_be_read_is_named(no_proxies, value):
    no_proxies.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    no_proxies.setenv("NO_PROXY", value)
    with pytest.raises(DownloadError) as e:
        transfer._open_client()
    assert str(e.value).startswith(f"NO_PROXY={value}: can't be read")


def test_proxy_that_is_never_asked_may_be_wrong(no_proxies):
    no_proxies.setenv("HTTP_PROXY", "http://proxy:port")
    no_proxies.setenv("NO_PROXY", "*")
    transfer._open_client().close()


def test_certificates_that_are_not_there_are_named(no_proxies, tmp_path):
    no_proxies.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(DownloadError, match="SSL_CERT_FILE=.*none.pem"):
        transfer._open_client()


def test_fetch_and_index_name_the_proxy(no_proxies, server, tmp_path, capsys):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    no_proxies.setenv("all_proxy", "socks://127.0.0.1:9")
    for call in (lambda: get(tmp_path), lambda: read_index(f"{server.base}snapshots/toy.json")):
        with pytest.raises(DownloadError, match="^all_proxy=socks://"):
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
    assert str(e.value).startswith(
        f"{address}index.json: no address of an index"
    ) and "\n" not in str(e.value)


@pytest.mark.parametrize("address", [*BAD_ADDRESSES, "https://a.org/x/?sig=1"])
def test_basedir_that_cannot_be_is_named(tmp_path, address):
    (tmp_path / "i.json").write_text(json.dumps({"basedir": address, "relpaths": ["data/a.mp4"]}))
    with pytest.raises(DownloadError, match="i.json: basedir '.*' can't be used"):
        read_index(tmp_path / "i.json")


def test_url_in_a_manifest_that_cannot_be_is_named(server, tmp_path):
    entries = offer(server)
    write_manifest(tmp_path, entries)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(
        text.replace(entries[1].url, "http://127.0.0.1:port/x.mp4")
    )
    with pytest.raises(
        DownloadError, match=f"manifest.json: the url of {entries[1].name} can't be used"
    ):
        get(tmp_path)
    assert not server.asked


# What the server says

XML = (
    b'<?xml version="1.0"?><Error><Code>%s</Code><Message>%s\nRequestId:1\nTime:2</Message></Error>'
)
REFUSALS = {
    "409 of Azure": (
        (
            409,
            "Public access is not permitted on this storage account.",
            XML
            % (
                b"PublicAccessNotPermitted",
                b"Public access is not permitted on this storage account.",
            ),
            {"x-ms-error-code": "PublicAccessNotPermitted"},
        ),
        "HTTP 409 PublicAccessNotPermitted: Public access is not permitted on this storage account.",
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


@pytest.mark.parametrize("fault, why", REFUSALS.values(), ids=REFUSALS)
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
    assert (
        lines[-2] == f"  2 failed: HTTP 403: Blocked ({entries[0].name}.mp4, {entries[1].name}.mp4)"
    )
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


@pytest.mark.parametrize("header, pack", PACKED.values(), ids=PACKED)
def test_packed_on_the_server_is_unpacked(server, tmp_path, header, pack):
    entries = offer(server)
    path, video = path_of(entries[0], ".jsonl"), path_of(entries[1])
    plain = {p: server.files[p] for p in (path, video)}
    for p in plain:
        server.files[p] = pack(plain[p])
        if header:
            server.encodings[p] = header
    server.faults[path] = ["cut", "cut"]  # its parts are put together before they are unpacked
    write_manifest(tmp_path, entries)
    rows = get(tmp_path)
    assert {r["status"] for r in rows.values()} == {"done"}
    server.files.update(plain)
    same(server, tmp_path, entries)
    assert not left_behind(tmp_path) and len(server.asked[path]) == 3
    server.asked.clear()
    get(tmp_path)
    assert not server.asked


def test_packed_and_plain_parts_are_never_joined(server, tmp_path):
    "The server goes from one to the other, with the same tag and as many bytes."
    entries = offer(server)
    path = path_of(entries[0], ".jsonl")
    packed = gzip.compress(server.files[path])
    lines = server.files[path][: len(packed)].rpartition(b"\n")[0]
    plain = lines + b"\n" * (len(packed) - len(lines))
    server.files[path], server.tag, server.encodings[path] = packed, '"1"', "gzip"
    whole, send = Handler.answer, Handler.answer

    def answer(self, *words, **more):
        if self.path == path and self.command == "GET" and len(self.server.asked[path]) > 1:
            self.server.encodings.pop(path, None)
        send(self, *words, **more)

    server.faults[path] = ["cut", plain]
    write_manifest(tmp_path, entries)
    Handler.answer = answer
    try:
        get(tmp_path)
    finally:
        Handler.answer = whole
    assert (tmp_path / f"{entries[0].name}.jsonl").read_bytes() == plain and not left_behind(
        tmp_path
    )


@pytest.mark.parametrize(
    "header, content, told",
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
def test_what_cannot_be_unpacked_is_named(server, tmp_path, monkeypatch, header, content, told):
    for module in ("brotli", "brotlicffi", "zstandard", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    entries = offer(server)
    path = path_of(entries[0], ".jsonl")
    server.files[path] = content
    if header:
        server.encodings[path] = header
    write_manifest(tmp_path, entries)
    row = get(tmp_path, tries=2)[f"{entries[0].name}.jsonl"]
    assert row["status"] == "failed" and told in row["why"]
    assert not (tmp_path / f"{entries[0].name}.jsonl").exists() and not left_behind(tmp_path)


@pytest.mark.parametrize(
    "header, modules, content",
    [("br", ("brotli",), b"br"), ("zstd", ("zstandard",), b"\x28\xb5\x2f\xfd")],
)
def test_an_installed_unpacker_is_used(server, tmp_path, monkeypatch, header, modules, content):
    "A stand-in: these packages are no dependency of ours."
    entries = offer(server)
    path = path_of(entries[0], ".jsonl")
    plain, server.files[path], server.encodings[path] = server.files[path], content, header

    class Stand:
        def decompress(self, data):
            return plain

        def open(self, path, mode):
            return (tmp_path / "plain").open(mode)

    (tmp_path / "plain").write_bytes(plain)
    for module in ("brotlicffi", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, modules[0], Stand())
    write_manifest(tmp_path / "v", entries)
    get(tmp_path / "v")
    server.files[path] = plain
    same(server, tmp_path / "v", entries)


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
    (tmp_path / "manifest.json").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "manifest.json").read_bytes()
    )
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
    with pytest.raises(DownloadError, match="manifest.json: .*write it again"):
        read_manifest(tmp_path)
