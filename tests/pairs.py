"""Small recordings made in code, for tests: a video of numbered frames and its lines."""

import json
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 48, 80


def line(t=0, **fields):
    """One VPT line of tick t; its movement, `t % 50` pixels to the right, tells the tick. `...` removes a field."""
    mouse = {
        "x": 640.0,
        "y": 360.0,
        "dx": float(t % 50),
        "dy": 0.0,
        "dwheel": 0.0,
        "buttons": [],
        "newButtons": [],
    }
    keyboard = {"keys": [], "newKeys": [], "chars": ""}
    found = {
        "mouse": mouse,
        "keyboard": keyboard,
        "isGuiOpen": False,
        "hotbar": 0,
        "tick": t,
        "milli": 50 * t,
        "yaw": 1.0 * t,
        "pitch": 0.0,
        "xpos": 0.0,
        "ypos": 64.0,
        "zpos": 0.0,
    } | fields
    return {k: v for k, v in found.items() if v is not ...}


def write_lines(path, rows):
    """Write rows, dicts or finished text, as a jsonl."""
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(path).write_text("".join(row + "\n" for row in text))


def write_video(path, frames, codec="mpeg4", **options):
    """Write `frames` frames; frame t is a grey of 4 t."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as video:
        stream = video.add_stream(codec, rate=20, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(frames):
            grey = np.full((HEIGHT, WIDTH, 3), 4 * t % 256, np.uint8)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        video.mux(stream.encode())


def make_pair(folder, name, frames=60, lines=None, rows=None):
    """Make NAME.mp4 and NAME.jsonl; `lines` of them, by default as many as frames, or those given as `rows`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / f"{name}.mp4", frames)
    lines = frames if lines is None else lines
    write_lines(folder / f"{name}.jsonl", [line(t) for t in range(lines)] if rows is None else rows)
    return folder / f"{name}.mp4"


def ticks_of(actions):
    """The ticks that actions (..., 28) were made for by `line`."""
    return np.rint(np.asarray(actions)[..., 22] * 2400 / 360).astype(int).tolist()


def mutated(whole, random):
    """Bytes with one to four changes at random places: overwritten, cut, repeated or broken off."""
    changed = bytearray(whole)
    for _ in range(random.integers(1, 5)):
        at, many = int(random.integers(0, max(len(changed), 1))), int(random.integers(1, 40))
        what = random.integers(0, 4)
        if what == 0:
            changed[at : at + many] = random.bytes(min(many, len(changed) - at))
        elif what == 1:
            del changed[at : at + many]
        elif what == 2:
            changed[at:at] = changed[at : at + many]
        else:
            del changed[at:]
    return bytes(changed)
