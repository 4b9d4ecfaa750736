"""Small recordings made in code, for tests: a video of numbered frames and its lines."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from minecraft_jepa.data.actions import ACTION_NAMES, DEGREES_PER_PIXEL

HEIGHT, WIDTH = 48, 80


def line(t=0, **fields):
    """One VPT line of tick t; `...` removes a field.

    The mouse moves `t % 50` pixels to the right, which `ticks_of` reads back.
    """
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
    defaults = {
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
    }
    return {k: v for k, v in (defaults | fields).items() if v is not ...}


def write_lines(path, rows):
    """Write rows, dicts or finished text, as a jsonl."""
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(path).write_text("".join(row + "\n" for row in text))


def write_video(path, frames, codec="mpeg4", seconds=None, **options):
    """Write `frames` frames; frame t is a grey of 4 t, shown at `seconds[t]`, or t / 20."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as video:
        stream = video.add_stream(codec, rate=20, options=options)
        if seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(frames):
            grey = np.full((HEIGHT, WIDTH, 3), 4 * t % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            if seconds is not None:
                frame.pts, frame.time_base = round(1000 * seconds[t]), Fraction(1, 1000)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())


def make_pair(folder, name, frames=60, lines=None, rows=None):
    """Make NAME.mp4 and NAME.jsonl, and give the path of the mp4.

    The jsonl holds `rows`, or `lines` lines, by default as many as frames.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / f"{name}.mp4", frames)
    if rows is None:
        rows = [line(t) for t in range(frames if lines is None else lines)]
    write_lines(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.mp4"


def ticks_of(actions):
    """The ticks that actions (..., 28) were made for by `line`."""
    dx = np.asarray(actions)[..., ACTION_NAMES.index("dx")]
    return np.rint(dx / DEGREES_PER_PIXEL).astype(int).tolist()


def mutated(original, random):
    """Bytes with one to four changes at random places: overwritten, cut, repeated or broken off."""
    data = bytearray(original)
    for _ in range(random.integers(1, 5)):
        start, length = int(random.integers(0, max(len(data), 1))), int(random.integers(1, 40))
        change = random.choice(["overwrite", "cut", "repeat", "break off"])
        if change == "overwrite":
            data[start : start + length] = random.bytes(min(length, len(data) - start))
        elif change == "cut":
            del data[start : start + length]
        elif change == "repeat":
            data[start:start] = data[start : start + length]
        else:
            del data[start:]
    return bytes(data)
