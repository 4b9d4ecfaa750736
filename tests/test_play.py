"""The dream, its sessions and its server: what is saved plays back, and nothing sent can end it."""

import asyncio
import contextlib
import copy
import errno
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import aiohttp
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from PIL import Image
from served import NAMES, copy_recordings, plan_to_turn, running

from minecraft_jepa.cli import main
from minecraft_jepa.config import preset
from minecraft_jepa.data.actions import NOOP
from minecraft_jepa.data.recordings import open_recording
from minecraft_jepa.model.decoders import RegressionHead
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.play import assets as play_assets
from minecraft_jepa.play import page as play_page
from minecraft_jepa.play import session as play_session
from minecraft_jepa.play import session_messages
from minecraft_jepa.play.assets import PlayAssets
from minecraft_jepa.play.dream import Dream, replay
from minecraft_jepa.play.images import read_image
from minecraft_jepa.play.messages import Refused, unpack_frame
from minecraft_jepa.play.plan_commands import choose_candidates
from minecraft_jepa.play.session import Session
from minecraft_jepa.play.trajectory import save_film, save_pair

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "data/weights/tiny"
LEFT, FORWARD = NOOP.copy(), NOOP.copy()
LEFT[22], FORWARD[0] = -6, 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return copy_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="module")
def assets(data):
    made = PlayAssets(WEIGHTS, data)
    made.load_bank()
    return made


@pytest.fixture
def dream(assets):
    made = Dream(assets.model, assets.head)
    made.reset(*assets.start(NAMES[2], 100))
    return made


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def recorded(trajectory):
    return [trajectory.frame(t) for t in range(len(trajectory))]


# ---- the dream


def test_what_is_saved_gives_the_same_frames_played_back(dream, assets, tmp_path):
    actions = assets.clip(NAMES[2]).actions[100:130]
    for action in actions:
        dream.step(action)
    dream.rewind(7)
    for action in (LEFT, FORWARD, LEFT):
        dream.step(action)
    dream.observe(assets.clip(NAMES[3]).frames[60])
    for action in (FORWARD, LEFT):
        dream.step(action)
    shown = recorded(dream.trajectory)
    pair = save_pair(dream.trajectory, tmp_path / "dream")
    recording = open_recording(tmp_path / "dream")
    assert same([f.transpose(2, 0, 1) for f in recording.frames()], shown)
    assert same(list(replay(Dream(assets.model, assets.head), pair[0])), shown)
    assert len(shown) == 30 - 7 + 3 + 2 + 1 and len(recording.lines) == len(shown)


@pytest.mark.parametrize("name", ["overshoot", "statistics", "subspace", "neighbours"])
def test_a_corrected_dream_plays_back_with_its_correction(dream, assets, tmp_path, name):
    dream.step(LEFT)
    dream.correction = assets.corrections[name]
    plain = Dream(assets.model, assets.head)
    plain.reset(*assets.start(NAMES[2], 100))
    plain.step(LEFT)
    for _ in range(3):
        dream.step(FORWARD)
        plain.step(FORWARD)
    assert not np.array_equal(dream.frame, plain.frame)
    pair = save_pair(dream.trajectory, tmp_path / "corrected")
    again = replay(Dream(assets.model, assets.head), pair[0], assets.corrections)
    assert same(list(again), recorded(dream.trajectory))
    with pytest.raises(ValueError, match=f"corrected.jsonl, line 2: .*{name}"):
        list(replay(Dream(assets.model, assets.head), pair[0]))


def test_a_rewind_past_a_change_of_correction_plays_back(assets, tmp_path):
    dream = Dream(assets.model, assets.head)
    correction = assets.corrections["overshoot"]
    dream.reset(*assets.start(NAMES[0], 30))
    for _ in range(6):
        dream.step(LEFT)
    dream.correction = correction
    dream.step(LEFT)
    dream.rewind(4)  # to where there was none
    for _ in range(4):
        dream.step(LEFT)
    shown = [dream.trajectory.frame(t) for t in range(len(dream.trajectory))]
    pair = save_pair(dream.trajectory, tmp_path / "dream")
    again = replay(Dream(assets.model, assets.head), pair[0], assets.corrections)
    assert all(np.array_equal(a, b) for a, b in zip(shown, again, strict=True))


def test_a_dream_that_ends_with_a_look_plays_back_with_it(dream, assets, tmp_path):
    """The last frame has no action after it, so it had no line to say that it was given."""
    dream.step(LEFT)
    dream.observe(assets.clip(NAMES[3]).frames[60])
    pair = save_pair(dream.trajectory, tmp_path / "looked")
    again = list(replay(Dream(assets.model, assets.head), pair[0]))
    assert same(again, recorded(dream.trajectory)) and len(again) == 2
    dream.step(LEFT)
    assert not np.array_equal(dream.frame, again[1])


def test_cursor_and_wheel_of_a_recording_survive(dream, assets, tmp_path):
    """A line with an open screen paints a cursor when it is read, over what was imagined."""
    action = FORWARD.copy()
    action[20:22], action[24] = (0.25, 0.75), 1
    for _ in range(3):
        dream.step(action)
    pair = save_pair(dream.trajectory, tmp_path / "screen")
    assert np.array_equal(open_recording(pair[0]).actions[:3], [action] * 3)
    again = replay(Dream(assets.model, assets.head), pair[0])
    assert same(list(again), recorded(dream.trajectory))


def test_after_a_rewind_it_is_as_if_nothing_had_been(dream, assets):
    other = Dream(assets.model, assets.head)
    other.reset(*assets.start(NAMES[2], 100))
    for _ in range(5):
        dream.step(LEFT)
    dream.rewind(5)
    assert np.array_equal(dream.step(FORWARD), other.step(FORWARD))
    assert torch.equal(dream.latent, other.latent) and dream.tick == other.tick == 1


def test_rewind_keeps_so_many_latents_and_no_more(assets):
    dream = Dream(assets.model, assets.head, keep=5)
    dream.reset(*assets.start(NAMES[2], 100))
    seen = [dream.step(LEFT) for _ in range(12)]
    assert dream.kept == 5
    assert np.array_equal(dream.rewind(99), seen[6]) and dream.tick == 7
    assert same([dream.step(LEFT) for _ in range(5)], seen[7:])


def test_a_trajectory_that_is_full_keeps_its_beginning(assets, tmp_path):
    record = math.prod(assets.model.config.frame.shape) + 4 * 28
    dream = Dream(assets.model, assets.head, limit=4 * record)
    dream.reset(*assets.start(NAMES[2], 100))
    seen = [dream.frame] + [dream.step(LEFT) for _ in range(6)]
    assert dream.trajectory.is_full and len(dream.trajectory) == 4
    dream.rewind(2)  # still beyond its end: nothing may be added after a gap
    dream.step(FORWARD)
    pair = save_pair(dream.trajectory, tmp_path / "full")
    assert same(list(replay(Dream(assets.model, assets.head), pair[0])), seen[:4])
    dream.rewind(4)
    dream.step(FORWARD)
    assert len(dream.trajectory) == 3 or len(dream.trajectory) == dream.tick + 1


def test_a_model_of_one_tick_dreams_without_a_history():
    config = preset("tiny", history_ticks=1, frame_height=36, frame_width=60)
    dream = Dream(WorldModel(config).eval(), RegressionHead(config).eval())
    dream.reset(np.zeros((3, 36, 60), np.uint8), np.tile(NOOP, (5, 1)))
    dream.step(FORWARD)
    assert dream.step(LEFT).shape == (3, 36, 60)
    dream.rewind(1)
    assert dream.tick == 1 and dream.history.shape == (0, 28)


def test_a_wrong_action_leaves_the_dream_as_it_was(dream):
    before = dream.latent
    for wrong in (
        [1] * 27,
        [[0] * 28],
        [math.nan] * 28,
        [math.inf] + [0] * 27,
        None,
        "w",
        ["w"] * 28,
    ):
        with pytest.raises(ValueError, match=r"28 numbers|not finite"):
            dream.step(wrong)
    assert dream.latent is before and dream.tick == 0 and len(dream.trajectory) == 1


def test_nothing_half_written_is_left_by_a_save_that_fails(dream, tmp_path, monkeypatch):
    dream.step(LEFT)

    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("minecraft_jepa.play.trajectory.os.replace", fails)
    with pytest.raises(OSError, match="disk is full"):
        save_pair(dream.trajectory, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "field",
    [
        '"dream":3',
        '"dream":{"given":true,"history":[[1,2]]}',
        '"dream":{"given":true,"history":5}',
        '"dream":{"correction":["a"],"given":true,"history":[]}',
        '"dream":{"given":false}',
        '"dream":{"given":true}',
    ],
)
def test_a_damaged_mark_names_file_and_line(dream, assets, tmp_path, field):
    dream.step(LEFT)
    dream.step(LEFT)
    _, lines = save_pair(dream.trajectory, tmp_path / "broken")
    first, *others = lines.read_text().splitlines()
    row = json.loads(first) | json.loads("{" + field + "}")
    lines.write_text("\n".join([json.dumps(row), *others]) + "\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1"):
        list(replay(Dream(assets.model, assets.head), lines))


def test_a_film_of_a_long_dream_is_its_end(dream, tmp_path):
    for _ in range(12):
        dream.step(LEFT)
    with Image.open(save_film(dream.trajectory, tmp_path / "film.gif", ticks=4)) as film:
        assert film.n_frames <= 5


# ---- pictures


def drawn(mode, size=(160, 90), kind="PNG", **options):
    file = io.BytesIO()
    ramp = np.linspace(0, 255, size[0] * size[1]).astype(np.uint8).reshape(size[::-1])
    picture = Image.fromarray(ramp)
    if mode == "I;16":
        picture = Image.fromarray(ramp.astype(np.uint16) << 8)
    elif mode == "LA":
        picture = picture.convert("LA")
    else:
        picture = picture.convert(mode)
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
        ("I;16", "PNG"),
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
    ],
)
def test_pictures_of_every_kind_become_frames(assets, mode, kind):
    frame, note = read_image(drawn(mode, kind=kind), assets.model.config.frame)
    assert (
        frame.shape == assets.model.config.frame.shape
        and frame.dtype == np.uint8
        and "160 x 90" in note
    )
    assert frame[:, 40].mean() > frame[:, 5].mean() + 40, "it grows brighter downwards"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (81, 48), (4000, 30)])
def test_pictures_of_every_size_become_frames(assets, size):
    frame, note = read_image(drawn("RGB", size), assets.model.config.frame)
    assert frame.shape == assets.model.config.frame.shape and note


def test_a_picture_of_the_models_size_is_taken_as_it_is(assets):
    frame = assets.model.config.frame
    size = frame.height, frame.width, 3
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    frame, note = read_image(file.getvalue(), frame)
    assert note == "" and np.array_equal(frame.transpose(1, 2, 0), pixels)


def test_a_photograph_is_turned_as_its_camera_says(assets):
    told = Image.Exif()
    told[0x0112] = 6  # to be turned by a quarter
    _, note = read_image(drawn("RGB", (90, 160), "JPEG", exif=told), assets.model.config.frame)
    assert "160 x 90" in note


def bomb(width, height):
    """A PNG of a few bytes that promises very many pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "picture",
    [
        b"",
        b"GIF89a",
        drawn("RGB")[:200],
        drawn("RGB", kind="JPEG")[:300],
        drawn("RGB", kind="GIF"),
        bomb(30_000, 30_000),
        bomb(10, 10),
        os.urandom(3000),
    ],
)
def test_what_is_no_picture_is_refused(assets, picture):
    with pytest.raises(ValueError, match="PNG or JPEG"):
        read_image(picture, assets.model.config.frame)


def test_a_missing_picture_is_named(assets, tmp_path):
    with pytest.raises(ValueError, match=r"none\.png"):
        Dream(assets.model, assets.head).reset(tmp_path / "none.png")


# ---- the server


@pytest.fixture
def server(assets, tmp_path):
    with running(assets, tmp_path / "saved") as (url, held):
        yield url, held


class Page:
    """What a page does, without a browser."""

    def __init__(self, socket):
        self.socket, self.header, self.frame, self.told = socket, None, None, []

    async def take(self):
        message = await asyncio.wait_for(self.socket.receive(), 30)
        if message.type == aiohttp.WSMsgType.BINARY:
            self.header, (self.frame, *_) = unpack_frame(message.data)
        elif message.type == aiohttp.WSMsgType.TEXT:
            self.told.append(json.loads(message.data))
        else:
            self.told.append({"type": "closed", "code": self.socket.close_code})
        return message

    async def until(self, kind):
        """What is told next of a kind; 'frame' is any frame."""
        while True:
            before = len(self.told)
            message = await self.take()
            if kind == "frame" and message.type == aiohttp.WSMsgType.BINARY:
                return self.header
            for told in self.told[before:]:
                if told["type"] == kind:
                    return told
                assert told["type"] != "closed", self.told

    async def send(self, kind, **fields):
        await self.socket.send_str(json.dumps({"type": kind} | fields))

    async def hold(self, action, ticks):
        """Answer so many frames with an action."""
        seen = []
        for _ in range(ticks):
            await self.send("input", action=action.tolist(), acknowledged=self.header["number"])
            await self.until("frame")
            seen.append((self.header, self.frame))
        return seen


@contextlib.asynccontextmanager
async def opened(url, **options):
    async with (
        aiohttp.ClientSession() as client,
        client.ws_connect(url + "live", max_msg_size=0, **options) as socket,
    ):
        page = Page(socket)
        assert (await page.until("hello"))["starts"]
        await page.until("frame")
        yield page


async def emptied(held):
    """Wait until no page is open."""
    for _ in range(100):
        if not held.sessions:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("a page is still open")


def test_a_held_key_moves_the_dream_and_two_pages_have_two_dreams(server):
    url, held = server

    async def walk():
        async with opened(url) as one, opened(url) as other:
            await one.send("play")
            await one.until("frame")
            seen = await one.hold(FORWARD, 12)
            assert len(held.sessions) == 2
            await other.send("step")
            await other.until("frame")
            return seen, other

    seen, other = asyncio.run(walk())
    assert [h["tick"] for h, _ in seen] == list(range(seen[0][0]["tick"], seen[0][0]["tick"] + 12))
    assert seen[-1][0]["action"][0] == 1 and seen[-1][0]["playing"]
    assert np.abs(seen[0][1].astype(int) - seen[-1][1]).mean() > 1, "it moved"
    assert other.header["tick"] == 1 and other.header["action"][0] == 0


def test_nothing_is_imagined_while_it_is_paused(server):
    async def rest():
        async with opened(server[0]) as page:
            await page.send("play")
            await page.until("frame")
            await page.hold(FORWARD, 3)
            await page.send("pause")
            while (await page.until("frame"))["playing"]:
                await page.send("input", action=NOOP.tolist(), acknowledged=page.header["number"])
            tick = page.header["tick"]
            await page.send("input", action=FORWARD.tolist(), acknowledged=page.header["number"])
            await page.send("rewind", ticks=1)
            return tick, (await page.until("frame"))["tick"]

    tick, later = asyncio.run(rest())
    assert later == tick - 1


BAD = [
    "W",
    "",
    "[]",
    "null",
    "{",
    "[" * 9000,
    "9" * 5000,
    '{"type": "fly"}',
    '{"type": 5}',
    '{"type": ["input"]}',
    '{"type": "picture"}',
    '{"type": "__init__"}',
    '{"type": "rewind"}',
    '{"type": "rewind", "ticks": 1e3}',
    '{"type": "rewind", "ticks": -3}',
    '{"type": "seek", "name": "a", "share": 2}',
    '{"type": "correct", "name": 3}',
    '{"type": "start", "name": null}',
    '{"type": "input", "action": [0], "acknowledged": 0}',
    '{"type": "input", "acknowledged": 0}',
    json.dumps({"type": "input", "action": [math.nan] * 28, "acknowledged": 0}),
    json.dumps({"type": "input", "action": [math.inf] * 28, "acknowledged": 0}),
    json.dumps({"type": "input", "action": [0] * 27 + [True], "acknowledged": 0}),
    json.dumps({"type": "input", "action": [0] * 27 + [None], "acknowledged": 0}),
    json.dumps({"type": "input", "action": [0] * 27 + [10**300], "acknowledged": 0}),
    '{"type": "input", "action": [' + ",".join(["0"] * 27) + ', 1e999], "acknowledged": 0}',
    '{"type": "input", "acknowledged": 0, "action": "' + "x" * 50_000 + '"}',
]


def test_bad_messages_are_refused_and_the_dream_goes_on(server):
    async def send():
        async with opened(server[0]) as page:
            for text in BAD:
                await page.socket.send_str(text)
                assert (await page.until("refused"))["why"], text
            await page.socket.send_bytes(b"\xff\xfe no picture")
            assert "PNG" in (await page.until("refused"))["why"]
            for kind in ("look", "save"):
                await page.send(kind)
                assert (await page.until("refused"))["why"]
            await page.send("start", name="../../etc/passwd", tick=0)
            assert "no recording" in (await page.until("refused"))["why"]
            await page.send("start", name=NAMES[0], tick=10**6)
            assert "ticks 0 to" in (await page.until("refused"))["why"]
            await page.send("step")
            while (await page.until("frame"))["tick"] != 1:
                pass
            return page.header

    assert asyncio.run(send())["tick"] == 1


@pytest.mark.parametrize("text", [True, False])
def test_ten_megabytes_close_the_page_and_nothing_else(server, text):
    async def send():
        async with opened(server[0]) as other, opened(server[0]) as page:
            send = page.socket.send_str if text else page.socket.send_bytes
            with contextlib.suppress(ConnectionError):  # closed while it was being sent
                await send("x" * 10_000_000 if text else b"x" * 10_000_000)
            while not page.socket.closed:
                await page.take()
            code = page.socket.close_code
            await other.send("step")
            await other.until("frame")
            async with opened(server[0]) as again:
                return code, other.header["tick"], again.header["given"]

    code, tick, given = asyncio.run(send())
    assert code in (1009, 1006) and tick == 1 and given


def test_who_sends_nothing_but_nonsense_is_put_out(server):
    async def send():
        async with opened(server[0]) as page:
            for _ in range(play_page.MAX_REFUSALS + 5):
                with contextlib.suppress(ConnectionError):
                    await page.socket.send_str("nonsense")
            while not page.socket.closed:
                await page.take()
            return page.socket.close_code

    assert asyncio.run(send()) == 1008


def test_broken_frames_of_the_protocol_do_no_harm(server):
    url, held = server
    port = int(re.search(r":(\d+)/", url)[1])
    key = "GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    for rubbish in (
        b"\xff" * 64,
        b"\x81\x05hello",
        b"\x81\xff" + b"\x7f" * 8 + b"abcd",
        b"",
        b"\x81\x83abcd\xff\xfe\xfd",
    ):
        with socket.create_connection(("127.0.0.1", port), 10) as raw:
            raw.sendall(key.encode() + rubbish)
            raw.settimeout(10)
            raw.recv(100)

    async def look():
        await emptied(held)
        async with opened(url) as page:
            return page.header["given"]

    assert asyncio.run(look())


def test_a_closed_page_frees_its_dream(server):
    url, held = server

    async def come_and_go():
        for _ in range(6):  # more than may be open at a time
            async with opened(url):
                pass
            await emptied(held)

    files = len(os.listdir("/proc/self/fd"))
    asyncio.run(come_and_go())
    assert len(os.listdir("/proc/self/fd")) <= files + 3


def test_one_page_too_many_is_told_so(server):
    url, held = server

    async def crowd():
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(held.max_connections):
                await stack.enter_async_context(opened(url))
            async with aiohttp.ClientSession() as client, client.ws_connect(url + "live") as late:
                page = Page(late)
                told = await page.until("refused")
                while not late.closed:
                    await page.take()
                return told["why"], late.close_code

    why, code = asyncio.run(crowd())
    assert "close one" in why and code == 1013


async def status(url, **headers):
    async with aiohttp.ClientSession() as client, client.get(url, headers=headers) as answer:
        return answer.status, await answer.text(), answer.headers


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "a@127.0.0.1",
        "192.168.1.7",
    ],
)
def test_another_host_is_refused(server, host):
    for path in ("", "live", "saved/dream-1.gif"):
        assert asyncio.run(status(server[0] + path, Host=host))[0] == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9999", "[::1]:80", "LocalHost:1"])
def test_this_machine_is_let_in_by_any_port(server, host):
    """A tunnel of ssh has another port at its other end."""
    assert asyncio.run(status(server[0], Host=host))[0] == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "https://127.0.0.1", "null", "http://127.0.0.1:1", "file://", ""],
)
def test_a_page_of_another_origin_gets_no_socket(server, origin):
    async def try_it():
        async with aiohttp.ClientSession() as client:
            with pytest.raises(aiohttp.WSServerHandshakeError) as e:
                await client.ws_connect(server[0] + "live", headers={"Origin": origin})
            return e.value.status

    assert asyncio.run(try_it()) == 403


def test_its_own_origin_gets_a_socket(server):
    async def try_it():
        async with opened(server[0], headers={"Origin": server[0].rstrip("/")}) as page:
            return page.header["given"]

    assert asyncio.run(try_it())


def test_another_address_wants_the_token(assets, tmp_path):
    with running(assets, tmp_path, token="right") as (url, _):
        for query in ("", "?token=", "?token=wrong", "?token=righ", "?token=%FF", "?Token=right"):
            for path in ("", "live"):
                code, text, _ = asyncio.run(status(url + path + query))
                assert code == 403 and "token" in text and "right" not in text
        assert asyncio.run(status(url + "?token=right", Host="some.machine"))[0] == 200


def test_the_page_loads_nothing_from_elsewhere(server):
    code, text, headers = asyncio.run(status(server[0]))
    assert code == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert " style=" not in text, "the policy would strike it out"


@pytest.mark.parametrize(
    "path",
    [
        "saved/../page.py",
        "saved/%2e%2e%2fpage.py",
        "saved/dream-1.py",
        "saved/dream-1.gif",
        "saved/dream-..%2f1.gif",
        "saved/",
        "none",
        "saved/dream-1.gif%00.py",
    ],
)
def test_no_other_file_is_served(server, path):
    assert asyncio.run(status(server[0] + path))[0] == 404


def test_what_was_saved_can_be_fetched_and_read(server, tmp_path):
    url, held = server

    async def save():
        async with opened(url) as page:
            for _ in range(3):
                await page.send("step")
                await page.until("frame")
            await page.send("save")
            told, got = await page.until("saved"), {}
            async with aiohttp.ClientSession() as client:
                for name in told["files"]:
                    async with client.get(f"{url}saved/{name}") as answer:
                        got[name] = await answer.read()
            return got

    got = asyncio.run(save())
    assert {Path(n).suffix for n in got} == {".mp4", ".jsonl", ".gif"}
    for name, data in got.items():
        (tmp_path / name).write_bytes(data)
    pair = next(tmp_path.glob("*.mp4"))
    assert len(open_recording(pair)) == 4
    again = list(replay(Dream(held.assets.model, held.assets.head), pair))
    assert same(again, [f.transpose(2, 0, 1) for f in open_recording(pair).frames()])


def test_two_pages_that_save_at_once_write_two_recordings(assets, tmp_path):
    sessions = [begun(assets, tmp_path) for _ in range(4)]
    for session in sessions:
        session.receive('{"type": "step"}')
        session.receive('{"type": "save"}')
        session.work()
    with ThreadPoolExecutor(4) as pool:
        told = [message for out in pool.map(Session.run_job, sessions) for message in out]
    assert [message["type"] for message in told] == ["saved"] * 4, told
    assert len({name for message in told for name in message["files"]}) == 12
    assert len(list(tmp_path.iterdir())) == 12


def test_two_saves_in_one_second_are_two_files(assets, tmp_path):
    session = Session(assets, tmp_path)
    names = set()
    for _ in range(3):
        session.receive('{"type": "step"}')
        session.receive('{"type": "save"}')
        session.work()
        names |= set(session.run_job()[0]["files"])
    assert len(names) == 9 == len(list(tmp_path.iterdir()))


# ---- the command


def command(data, *words):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [
        sys.executable,
        "-m",
        "minecraft_jepa",
        "play",
        "--data",
        data,
        "--weights",
        WEIGHTS,
        "--no-open",
        *words,
    ]
    return subprocess.Popen(
        [str(w) for w in words],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_ends_all_at_once(data, tmp_path):
    process = command(data, "--port", 0, "--out", tmp_path)
    try:
        url = next(m[0] for m in (re.search(r"http://\S+", line) for line in process.stdout) if m)

        async def play_on():
            async with opened(url) as page:
                await page.send("play")
                await page.hold(FORWARD, 5)
                process.send_signal(signal.SIGINT)
                while not page.socket.closed:
                    await page.take()
                return page.socket.close_code

        assert asyncio.run(play_on()) == 1001
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_told_with_a_free_one(data):
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = command(data, "--port", other.getsockname()[1])
        _, error = process.communicate(timeout=120)
    free = int(re.search(r"add --port (\d+)", error)[1])
    assert process.returncode == 1 and "in use" in error and "Traceback" not in error
    with socket.create_server(("127.0.0.1", free)):
        pass


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "none"], "no such folder"),
        (["--port", "70000"], "0 to 65535"),
        (["--host", "256.1.1.1"], "can't listen"),
    ],
)
def test_a_wrong_option_is_told_in_a_line(words, told, capsys):
    folders = ["--weights", str(WEIGHTS), "--data", str(ROOT / "data")]
    assert main(["play", *folders, *words])
    assert told in capsys.readouterr().err


def test_weights_or_recordings_that_cannot_be_used_are_told(data, tmp_path, capsys):
    assert main(["play", "--weights", str(tmp_path), "--data", str(data), "--port", "0"]) == 1
    assert main(["play", "--weights", str(WEIGHTS), "--data", str(tmp_path), "--port", "0"]) == 1
    assert "Traceback" not in capsys.readouterr().err


# ---- the clock


def test_a_slow_page_gets_no_queue_of_frames(assets, tmp_path):
    session = Session(assets, tmp_path)
    session.receive('{"type": "play"}')
    for _ in range(20):
        session.next_tick_time = 0
        session.work()
    assert session.dream.tick <= play_session.MAX_FRAMES_IN_FLIGHT and session.wait() == math.inf
    session.receive(
        json.dumps({"type": "input", "action": NOOP.tolist(), "acknowledged": session.frames_sent})
    )
    assert session.wait() < 1


def test_a_late_session_does_not_hurry_afterwards(assets, tmp_path):
    session = Session(assets, tmp_path)
    session.receive('{"type": "play"}')
    session.work()
    session.next_tick_time -= 5  # the machine was busy
    session.receive(
        json.dumps({"type": "input", "action": NOOP.tolist(), "acknowledged": session.frames_sent})
    )
    session.work()
    assert session.next_tick_time > time.monotonic() - 1


@pytest.mark.parametrize("looks", range(4))
def test_the_trust_meter_may_arrive_at_any_time(assets, tmp_path, looks):
    session = Session(copy.copy(assets), tmp_path)

    class Arriving(type(assets)):
        left = itertools.count()
        bank = property(lambda self: assets.bank if next(self.left) >= looks else None)

    del session.assets.bank
    session.assets.__class__ = Arriving
    header, _ = unpack_frame(session._frame())
    assert (header["drift"] is None) == (header["detail"] is None)


def test_commands_that_come_while_it_works_wait_for_the_next_frame(assets, tmp_path):
    session = begun(assets, tmp_path)
    step = session.do_step

    def step_and_ask_again(message):
        session.receive('{"type": "step"}')  # as a key that is held
        return step(message)

    session.do_step = step_and_ask_again
    session.receive('{"type": "step"}')
    headers = [unpack_frame(session.work()[-1])[0] for _ in range(3)]
    assert [header["tick"] for header in headers] == [1, 2, 3]


def test_drift_is_measured_without_the_recording_that_the_dream_began_in(assets, tmp_path):
    session = begun(assets, tmp_path)
    drifts = []
    for name in sorted({*assets.bank._groups}):
        session.receive(json.dumps({"type": "start", "name": str(name), "tick": 0}))
        drifts.append(unpack_frame(session.work()[-1])[0]["drift"])
    # the bank holds each first frame itself
    assert min(drifts) > 0.1 * float(assets.bank.real_drift.median())


def test_commands_in_a_flood_are_refused(assets, tmp_path):
    session = Session(assets, tmp_path)
    for _ in range(session_messages.MAX_WAITING_COMMANDS):
        session.receive('{"type": "sharpen"}')
    with pytest.raises(Refused, match="waiting"):
        session.receive('{"type": "sharpen"}')


# ---- beside reality


class FakeGame:
    """The game's part, played by a recording; it ends when it is told to fail."""

    made: ClassVar = []

    def __init__(self, **options):
        self.options, self.t, self.acted, self.open = options, 0, [], True
        self.fails = self.ended = False
        self.ticks = self.late = 0  # late: further ticks that pass in each step
        self.recording = list(open_recording(ROOT / "data" / NAMES[3]).frames(144, 256))[:120]
        FakeGame.made.append(self)

    def reset(self, *, seed=None, options=None):
        return self.recording[0], {"tick": 0}

    def step(self, action):
        if self.ended:
            raise ResetNeeded("call reset first: no game is running")
        self.acted.append(action)
        self.t += 1
        if self.fails:
            self.ended = True
            return (
                self.recording[self.t],
                0.0,
                False,
                True,
                {"failure": "the game has died; its log:"},
            )
        self.ticks += 1 + self.late
        return self.recording[self.t], 0.0, False, False, {"tick": self.ticks}

    def close(self):
        self.open = False


@pytest.fixture
def game(monkeypatch, assets):
    env = pytest.importorskip("minecraft_jepa.game.env", exc_type=ImportError)
    monkeypatch.setattr(env, "LuantiEnv", FakeGame)
    for module in (play_session, session_messages):
        monkeypatch.setattr(module, "find_game", lambda: (True, ""))
    FakeGame.made.clear()
    yield FakeGame.made
    if assets.game.locked():  # a test that failed
        assets.game.release()


def begun(assets, folder):
    """A session whose first messages were taken."""
    session = Session(assets, folder)
    session.work()
    return session


def refused(session, kind, **fields):
    """Why a message is refused."""
    with pytest.raises(Refused) as refusal:
        session.receive(json.dumps({"type": kind} | fields))
    return str(refusal.value)


def did(session, kind, **fields):
    """Hand a session a message, let it work and finish its job; the headers of what it sends."""
    session.receive(json.dumps({"type": kind} | fields))
    out = session.work()
    if session.background_job:
        out += session.run_job() + session.work()
    return [unpack_frame(m)[0] if isinstance(m, bytes) else m for m in out]


def played(session, action, ticks):
    headers = []
    while len(headers) < ticks:
        session.next_tick_time = 0
        session.receive(
            json.dumps(
                {"type": "input", "action": action.tolist(), "acknowledged": session.frames_sent}
            )
        )
        headers += [unpack_frame(m)[0] for m in session.work() if isinstance(m, bytes)]
    return headers


def test_the_game_beside_the_dream_has_the_same_start_and_the_same_keys(assets, tmp_path, game):
    session = begun(assets, tmp_path)
    header = did(session, "reality")[-1]
    (fake,) = game
    _, height, width = assets.model.config.frame.shape
    assert header["sizes"] == [[height, width], [144, 256]]
    assert header["given"] and header["tick"] == 0
    shown = session.dream.frame.transpose(1, 2, 0).astype(int)
    small = Image.fromarray(fake.recording[0]).resize((width, height), Image.BOX)
    assert np.array_equal(shown, np.array(small))
    did(session, "play")
    headers = played(session, FORWARD, 10)
    assert all(np.array_equal(a, FORWARD) for a in fake.acted[-9:])
    errors = [h["errors"] for h in headers]
    assert errors[-1][0] > errors[0][0] > 0, "the dream leaves reality"
    looked = did(session, "look")[-1]
    assert looked["since_look"] <= 1 and looked["tick"] >= 10 <= headers[-1]["since_look"]
    assert played(session, FORWARD, 1)[-1]["errors"][0] < errors[-1][0]
    session.close()
    assert not fake.open and assets.game.acquire(blocking=False)
    assets.game.release()


def test_after_reality_the_dream_goes_on_alone(assets, tmp_path, game):
    session = begun(assets, tmp_path)
    did(session, "reality")
    assert did(session, "rewind", ticks=3)[0]["type"] == "refused"
    header = did(session, "leave")[-1]
    assert header["sizes"] == [list(assets.model.config.frame.shape[1:])] and not game[0].open
    assert did(session, "step")[-1]["tick"] == 1
    assert did(session, "look")[0]["type"] == "refused"
    did(session, "reality")
    assert len(game) == 2 and game[1].open
    session.close()


def test_ticks_that_the_game_ran_alone_are_told_until_the_next_look(assets, tmp_path, game):
    session = begun(assets, tmp_path)
    did(session, "reality")
    did(session, "play")
    assert played(session, FORWARD, 3)[-1]["missed"] == 0
    game[0].late = 2  # the machine is busy
    assert played(session, FORWARD, 3)[-1]["missed"] == 6
    game[0].late = 0
    assert did(session, "look")[-1]["missed"] == 0
    session.close()


def test_what_was_shown_and_measured_before_a_look_is_past(assets, tmp_path, game):
    session = begun(assets, tmp_path)
    did(session, "reality")
    did(session, "play")
    assert played(session, FORWARD, 5)[-1]["errors"][0] > 0
    assert did(session, "sharpen")[-1]["sharp"]
    looked = did(session, "look")[-1]
    assert looked["errors"] == [0, 0] and looked["since_look"] == 0 and not looked["sharp"]
    for _ in range(2):  # the dream steps from what the game shows now
        stepped = did(session, "step")[-1]
        assert stepped["since_look"] == 1 and stepped["errors"][0] > 0
    why = "the dream begins from the game"
    assert why in did(session, "start", **assets.starts[0])[0]["why"]
    picture = io.BytesIO()
    Image.fromarray(game[0].recording[0]).save(picture, "PNG")
    session.receive(picture.getvalue())
    assert why in session.work()[0]["why"]
    session.close()


def test_a_game_that_dies_is_told_and_left(assets, tmp_path, game):
    session = begun(assets, tmp_path)
    did(session, "reality")
    did(session, "play")
    game[0].fails = True
    session.next_tick_time, session.frames_acknowledged = 0, session.frames_sent
    told = [json.dumps(m) for m in session.work() if isinstance(m, dict)]
    assert "the game has died" in told[0]
    session.work()
    session.run_job()
    assert not game[0].open and session.reality is None
    assert did(session, "step")[-1]["tick"] == 1


def test_a_plan_needs_a_goal_and_a_planner(assets, tmp_path, monkeypatch):
    session = begun(assets, tmp_path)
    assert "goal" in did(session, "plan", ticks=4)[0]["why"]
    assert "a whole number from 1 to 60" in refused(session, "goal", ticks=0)
    assert "a whole number from 1 to 60" in refused(session, "plan", ticks=61)
    assert did(session, "mark")[0]["type"] == "goal"

    def none():
        raise ValueError("these weights have no planner")

    monkeypatch.setattr(assets, "planner", none)
    assert "no planner" in did(session, "plan", ticks=4)[0]["why"]
    assert did(session, "step")[-1]["tick"] == 1


def test_a_key_takes_over_from_a_plan_and_a_search_that_fails_is_told(
    assets, tmp_path, monkeypatch
):
    planner = SimpleNamespace(plan=plan_to_turn)
    monkeypatch.setattr(assets, "planner", lambda: planner)
    session = begun(assets, tmp_path)
    did(session, "goal", ticks=6)
    busy, searched, _ = did(session, "plan", ticks=6)
    assert busy["type"] == "busy" and searched["type"] == "plan" and searched["distance"] > 0
    did(session, "play")
    assert played(session, NOOP, 2)[-1]["action"][22] == 4
    taken_over = played(session, FORWARD, 2)[-1]
    assert taken_over["action"][0] == 1 and taken_over["action"][22] == 0
    assert played(session, NOOP, 2)[-1]["action"][22] == 0 and not session.plan
    did(session, "pause")

    def fail(*_):
        raise ValueError("horizon is too long")

    planner.plan = fail
    assert "too long" in did(session, "plan", ticks=6)[1]["why"]


def test_plans_of_no_finite_cost_are_not_shown(assets, tmp_path, monkeypatch):
    """JSON has no infinity: the page could not read the message."""

    def plan(*problem):
        found = plan_to_turn(*problem)
        found.costs = np.array([0.1, np.inf, np.nan])
        return found

    assert choose_candidates(np.array([np.inf, 3.0, np.nan, 1.0]), 4) == [3, 1]
    monkeypatch.setattr(assets, "planner", lambda: SimpleNamespace(plan=plan))
    session = begun(assets, tmp_path)
    did(session, "goal", ticks=6)
    searched = did(session, "plan", ticks=6)[1]
    assert [strip["cost"] for strip in searched["strips"]] == [0.1]
    json.dumps(searched, allow_nan=False)


def test_a_full_disk_does_not_end_a_dream(assets, tmp_path, monkeypatch):
    session = begun(assets, tmp_path)
    did(session, "step")

    pwrite = os.pwrite

    def fill(fd, raw, at):  # as a disk does: a part is written, without an error
        return pwrite(fd, raw[: len(raw) // 2], at)

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", fill)
        assert did(session, "step")[-1]["full"]
        header = did(session, "step")[-1]
    assert header["tick"] == 3 and len(session.dream.trajectory) == 2
    assert did(session, "save")[-2]["type"] == "saved"  # what was kept


def test_a_bank_that_cannot_be_made_is_told(data, monkeypatch):
    made = PlayAssets(WEIGHTS, data)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(play_assets.ClipStore, "build", full)
    made.load_bank()
    assert made.bank is None and "No space left" in made.bank_error


def planned(assets, folder, monkeypatch):
    """A session with a plan of six ticks towards a later frame of its recording."""
    monkeypatch.setattr(assets, "planner", lambda: SimpleNamespace(plan=plan_to_turn))
    session = begun(assets, folder)
    did(session, "goal", ticks=6)
    assert did(session, "plan", ticks=6)[-1]["planned"] == 6
    return session


@pytest.mark.parametrize("kind", ["reset", "rewind", "seek"])
def test_a_plan_for_another_place_is_dropped(assets, tmp_path, monkeypatch, kind):
    session = planned(assets, tmp_path, monkeypatch)
    assert did(session, "step")[-1]["planned"] == 5
    fields = {"reset": {}, "rewind": {"ticks": 1}, "seek": {"name": NAMES[0], "share": 0.5}}[kind]
    assert did(session, kind, **fields)[-1]["planned"] == 0
    assert did(session, "step")[-1]["action"] == NOOP.tolist()


def test_beside_the_game_no_plan_of_a_recording_goes_on(assets, tmp_path, monkeypatch, game):
    session = planned(assets, tmp_path, monkeypatch)
    assert did(session, "reality")[-1]["planned"] == 0
    assert "did not begin in a recording" in did(session, "goal", ticks=6)[0]["why"]
    session.close()


@pytest.mark.parametrize("kind", ["pause", "sharpen", "step"])
def test_where_it_stands_still_the_game_holds_no_key(assets, tmp_path, game, kind):
    session = begun(assets, tmp_path)
    did(session, "reality")
    did(session, "play")
    played(session, FORWARD, 3)
    assert np.array_equal(game[0].acted[-1], FORWARD)
    session.next_tick_time = math.inf
    did(session, kind)
    assert np.array_equal(game[0].acted[-1], NOOP)
    session.close()


@pytest.mark.parametrize("kind", ["play", "look", "step"])
def test_a_game_that_dies_while_it_is_paused_is_told_and_left(assets, tmp_path, game, kind):
    session = begun(assets, tmp_path)
    did(session, "reality")
    game[0].fails = True
    session.frames_acknowledged = session.frames_sent
    told = [m["why"] for m in did(session, kind) if m["type"] == "refused"]
    assert any("the game has died" in why for why in told)
    session.work()
    session.run_job()
    assert session.reality is None and did(session, "step")[-1]["tick"] >= 1


def test_there_is_one_game_at_a_time(assets, tmp_path, game):
    one, other = (begun(assets, tmp_path) for _ in range(2))
    did(one, "reality")
    assert "already" in did(other, "reality")[0]["why"]
    one.close()
    assert did(other, "reality")[-1]["given"]
    other.close()


def test_a_page_that_leaves_while_the_game_starts_ends_it(assets, tmp_path, game, monkeypatch):
    session, make = begun(assets, tmp_path), play_session.Reality

    def make_while_the_page_leaves(*arguments, **options):
        reality = make(*arguments, **options)
        session.close()
        return reality

    monkeypatch.setattr(play_session, "Reality", make_while_the_page_leaves)
    session.receive('{"type": "reality"}')
    session.work()
    session.run_job()
    assert not game[0].open and assets.game.acquire(blocking=False)
    assets.game.release()


def test_a_page_that_has_gone_before_the_game_starts_lets_another_have_it(assets, tmp_path, game):
    """The page vanishes between its wish and our answer: nothing may keep the game."""

    class Gone:
        closed = False

        async def send_str(self, text):
            raise ConnectionResetError("Cannot write to closing transport")

        send_bytes = send_str

    server = play_page.Server(assets, tmp_path)
    session = begun(assets, tmp_path)
    session.receive('{"type": "reality"}')
    with pytest.raises(ConnectionResetError):
        asyncio.run(server.work(Gone(), session, asyncio.Event()))
    assert not game and assets.game.acquire(blocking=False)
    assets.game.release()
    server.worker.shutdown()
    server.helpers.shutdown()


def test_a_session_that_cannot_begin_says_so(assets, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise ValueError("no such start")

    async def told(url):
        async with aiohttp.ClientSession() as client, client.ws_connect(url + "live") as socket:
            message = await asyncio.wait_for(socket.receive(), 30)
            return message.type, socket.close_code

    monkeypatch.setattr(play_page, "Session", fail)
    with running(assets, tmp_path / "saved") as (url, _):
        assert asyncio.run(told(url)) == (aiohttp.WSMsgType.CLOSE, 1011)
    assert "ValueError: no such start" in capsys.readouterr().err


def test_without_the_game_the_page_tells_the_line_that_installs_it(assets, tmp_path, monkeypatch):
    luanti = pytest.importorskip("minecraft_jepa.game.luanti", exc_type=ImportError)
    monkeypatch.setattr(luanti.shutil, "which", lambda *_, **__: None)
    session = begun(assets, tmp_path)
    assert "install" in session.hello()["game"]["line"]
    assert "install" in did(session, "reality")[0]["why"]
    assert did(session, "step")[-1]["tick"] == 1


@pytest.mark.xdist_group("game")
def test_the_real_game_beside_the_dream(assets, tmp_path):
    found, why = play_session.find_game()
    if not found:
        pytest.skip(why)
    session = begun(assets, tmp_path)
    try:
        assert did(session, "reality")[-1]["given"]
        did(session, "play")
        headers = played(session, LEFT, 8)
        assert headers[-1]["errors"][0] > 0 and headers[-1]["action"][22] == -6
        assert did(session, "leave")[-1]["given"]
    finally:
        session.close()
