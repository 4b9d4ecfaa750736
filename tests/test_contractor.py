"""From an index to a trained model: every recording is used or named.

The data set has every oddity of OpenAI's files.
"""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import numpy as np
import pytest
import torch
from contractor import line, lines_of, name_of, with_mouse, write_pair

from minecraft_jepa.cli import main
from minecraft_jepa.config import preset
from minecraft_jepa.data.actions import ACTION_NAMES
from minecraft_jepa.data.checks import find_recordings, read_checks
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.ledger import read_ledger
from minecraft_jepa.data.manifest import read_manifest
from minecraft_jepa.data.recording_files import parse_name
from minecraft_jepa.data.recordings import open_recording
from minecraft_jepa.data.splits import load_split
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.training.pipeline import run_training

FRAMES = 64
AT = {name: i for i, name in enumerate(ACTION_NAMES)}
BOM = b"\xef\xbb\xbf"
GUI = {"isGuiOpen": True, "isGuiInventory": True}
STRIPPED = "mouse", "keyboard", "hotbar", "isGuiOpen"  # all that BASALT's files are sure to hold


def screen(t):
    """An open screen, and the cursor on its way over it."""
    return GUI | with_mouse(t, x=300.0 + 10 * t, y=200.0, dx=10.0)


def held(t, new=()):
    """Button 0 is held."""
    return with_mouse(t, buttons=[0], newButtons=list(new))


FEW = FRAMES - 1
HELD = {t: held(t, [0] if t in (0, 40) else ()) for t in (*range(20), *range(40, 50))}
# name -> frames, lines
RECORDINGS = {
    name_of("alice"): (FRAMES, lines_of(FEW)),  # one line fewer: the usual file
    name_of("alice", 1): (FRAMES, lines_of(FRAMES)),  # as many
    name_of("alice", 2, 0): (FRAMES, lines_of(FEW)),  # a session in three pieces
    name_of("alice", 2, 5): (FRAMES, lines_of(FEW)),
    name_of("alice", 2, 10): (FRAMES, lines_of(FEW)),
    name_of("bob"): (FRAMES, lines_of(FEW, {30: {"mouse": None}, 31: {"keyboard": None}})),
    name_of("bob", 1): (FRAMES, lines_of(FEW, HELD)),  # the first press was before the recording
    name_of("carol"): (FRAMES, lines_of(FEW, {t: {"hotbar": 4} for t in range(20, FEW)})),
    name_of("carol", 1): (FRAMES, lines_of(FEW, {t: screen(t) for t in range(40, 50)})),
    name_of("carol", 2): (FRAMES, lines_of(FEW, {t: {"isGuiOpen": ...} for t in range(FEW)})),
    name_of("dave"): (
        FRAMES,
        [{k: v for k, v in line(t).items() if k in STRIPPED} for t in range(FEW)],
    ),
    name_of("dave", 1): (FRAMES, lines_of(FEW, {32: {"xpos": float("nan")}})),
    name_of("dave", 2): (FRAMES, lines_of(FRAMES + 3)),  # lines after the last frame
    name_of("erin"): (FRAMES, lines_of(FEW)),  # its lines begin with a byte order mark
    name_of("erin", 1): (FRAMES, lines_of(FEW)),  # its lines lie gzipped on the server
    name_of("frank"): (FRAMES, lines_of(FEW)),  # no video on the server
    name_of("frank", 1): (FRAMES, lines_of(FEW)),  # no lines
    name_of("frank", 2): (FRAMES, lines_of(FEW)),  # refused
    name_of("gina"): (FRAMES, lines_of(FEW)),  # its video is cut short
    name_of("gina", 1): (FRAMES, lines_of(FRAMES - 2)),  # two lines too few
    name_of("gina", 2): (FRAMES, lines_of(FEW)),
}
LEFT_OUT = {
    name_of("frank"): "HTTP 404",
    name_of("frank", 1): "HTTP 404",
    name_of("frank", 2): "HTTP 403: Blocked for you",
    name_of("gina"): ".mp4: ",
    name_of("gina", 1): ".jsonl, line 62",
}
USED = [name for name in RECORDINGS if name not in LEFT_OUT]


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` as Azure does, one of them gzipped."""

    def log_message(self, *words):
        pass

    def do_GET(self):
        body = self.server.files.get(self.path, b"")
        refused = name_of("frank", 2) in self.path
        if self.path not in self.server.files:
            self.send_response(404)
        elif refused:
            self.send_response(403, "Blocked for you")
        else:
            self.send_response(200)
        if not refused and name_of("erin", 1) + ".jsonl" in self.path:
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """The folder that is filled from the index."""
    folder = tmp_path_factory.mktemp("contractor")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {}
    base = f"http://127.0.0.1:{server.server_port}/minecraft-rl/"
    for seed, (name, (frames, lines)) in enumerate(RECORDINGS.items()):
        write_pair(folder / "server", name, frames, lines, seed)
        for suffix in (".mp4", ".jsonl"):
            path = f"/minecraft-rl/data/10.0/{name}{suffix}"
            server.files[path] = (folder / "server" / f"{name}{suffix}").read_bytes()
    root = "/minecraft-rl/data/10.0/"
    del server.files[f"{root}{name_of('frank')}.mp4"]
    del server.files[f"{root}{name_of('frank', 1)}.jsonl"]
    video = f"{root}{name_of('gina')}.mp4"
    server.files[video] = server.files[video][:-900]
    lines = f"{root}{name_of('erin')}.jsonl"
    server.files[lines] = BOM + server.files[lines]
    index = {"basedir": base, "relpaths": [f"data/10.0/{name}.mp4" for name in RECORDINGS]}
    server.files["/minecraft-rl/snapshots/made-up.json"] = BOM + json.dumps(index).encode()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    vpt = folder / "vpt"
    assert main(["download", str(vpt), "--index", f"{base}snapshots/made-up.json"]) == 0
    server.shutdown()
    server.server_close()
    return vpt


def test_every_recording_is_used_or_named(fetched):
    assert set(read_manifest(fetched)["recordings"]) == set(RECORDINGS)
    assert [p.stem for p in find_recordings(fetched)] == sorted(USED)
    ledger = read_ledger(fetched)
    for name, reason in LEFT_OUT.items():
        rows = [ledger[f"{name}{suffix}"] for suffix in (".jsonl", ".mp4")]
        assert reason in "".join(row["why"] for row in rows if row["status"] != "done"), name
    for name in USED:
        assert {ledger[f"{name}{suffix}"]["status"] for suffix in (".jsonl", ".mp4")} == {"done"}


def test_what_was_passed_over_is_told_in_the_checks(fetched):
    remarks = {n: " ".join(row["remarks"]) for n, row in read_checks(fetched).items()}
    for name, remark in (
        (name_of("bob"), "line 31"),
        (name_of("dave", 1), "line 33"),
        (name_of("dave", 2), "3 lines beyond the last frame"),
        (name_of("dave"), "without yaw"),
        (name_of("carol", 2), "isGuiOpen"),
    ):
        assert remark in remarks[name], (name, remarks[name])


def test_last_frame_without_a_line_is_kept(fetched):
    for name in (name_of("alice"), name_of("erin"), name_of("erin", 1)):
        recording = open_recording(fetched / name)
        assert len(recording) == FRAMES and recording.teleported[-1]
        assert sum(1 for _ in recording.frames(4, 8)) == FRAMES


def test_traps_of_the_format_are_read(fetched):
    def actions(name):
        return open_recording(fetched / name).actions

    gaps = np.flatnonzero(open_recording(fetched / name_of("bob")).teleported)
    assert gaps[:2].tolist() == [30, 31]
    stuck = actions(name_of("bob", 1))[:, AT["attack"]]
    assert np.flatnonzero(stuck).tolist() == list(range(40, 50))
    assert np.flatnonzero(actions(name_of("carol"))[:, AT["5"]]).tolist() == [19]  # scrolled to
    cursor = actions(name_of("carol", 1))[:, AT["x"]]
    assert cursor[39] == 0.5 and cursor[45] == pytest.approx(750 / 1280)
    # no line says that a screen is open
    assert (actions(name_of("carol", 2))[:, AT["x"]] == 0.5).all()
    camera = actions(name_of("alice"))[:5, AT["dx"]]
    assert camera.tolist() == pytest.approx([-0.3, -0.15, 0, 0.15, 0.3])  # not cut to whole degrees


def test_no_player_is_in_two_splits(fetched):
    splits = load_split(fetched)
    assert all(splits.values())
    assert sorted(chain(*splits.values())) == sorted(USED)
    players = [{parse_name(name).player for name in names} for names in splits.values()]
    assert sum(map(len, players)) == len(set.union(*players))


def test_model_is_trained_on_what_is_used(fetched, tmp_path):
    config = preset(
        "tiny",
        encoder_embed_dim=16,
        encoder_depth=1,
        conditioner_depth=1,
        predictor_depth=1,
        dit_embed_dim=16,
        dit_depth=1,
        bottleneck_dim=8,
        regression_depth=1,
        min_rank_fraction=0.0,
        min_latent_std=0.0,
        batch_size=2,
        steps=2,
        evaluate_every=2,
        decoder_batch_size=2,
        decoder_steps=2,
    )
    training = run_training(config, fetched, tmp_path / "run")
    assert training["steps"] == training["decoder_steps"] == 2
    for split in ("train", "validation"):
        assert training[split] == load_split(fetched)[split]
    model = WorldModel.from_pretrained(tmp_path / "run")
    store = ClipStore.build(fetched, config.frame, progress=False)
    assert sorted(store.names) == sorted(USED)
    assert {len(store[name].frames) for name in USED} == {FRAMES}
    frames = torch.from_numpy(np.array(store[USED[0]].frames[:1]))
    assert model.encode(frames).isfinite().all()
