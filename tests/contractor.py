"""Small recordings in the format of OpenAI's contractors, made in code."""

import json
from pathlib import Path

import av
import numpy as np


def name_of(player: str, session: int = 0, minute: int = 0) -> str:
    """ALIAS-12HEX-YYYYMMDD-HHMMSS; a session may lie in several files."""
    return f"{player}-made-up-{session:012x}-20220101-12{minute:02d}00"


def line(t: int, **over) -> dict:
    """Line `t` with every field of the format; `over` replaces fields, `...` removes one."""
    fields = {
        "mouse": {
            "x": 640.0,
            "y": 360.0,
            "dx": float(t % 5 - 2),
            "dy": 0.0,
            "scaledX": 0.0,
            "scaledY": 0.0,
            "dwheel": 0.0,
            "buttons": [],
            "newButtons": [],
        },
        "keyboard": {"keys": ["key.keyboard.w"] if t % 7 < 3 else [], "newKeys": [], "chars": ""},
        "isGuiOpen": False,
        "isGuiInventory": False,
        "hotbar": 0,
        "yaw": 1.5 * t,
        "pitch": 3.0,
        "xpos": t / 10,
        "ypos": 64.0,
        "zpos": 0.0,
        "tick": t,
        "milli": 1640000000000 + 50 * t,
        "inventory": [],
        "serverTick": 100 + t,
        "serverTickDurationMs": 20.0,
        "stats": {},
    }
    fields.update(over)
    return {k: v for k, v in fields.items() if v is not ...}


def lines_of(num_lines: int, changed: dict | None = None) -> list[dict]:
    """Lines 0 .. num_lines - 1, some with other fields: {t: fields}."""
    changed = changed or {}
    return [line(t, **changed.get(t, {})) for t in range(num_lines)]


def with_mouse(t: int, **fields) -> dict:
    """The fields of a line whose mouse does something else."""
    return {"mouse": line(t)["mouse"] | fields}


def write_pair(folder, name: str, frames: int, lines: list[dict], seed: int = 0) -> Path:
    """Write NAME.mp4, 64 x 36, of a picture that moves sideways, and NAME.jsonl.

    Gives the path of the mp4.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 16, 3), dtype=np.uint8)
    picture = blocks.repeat(6, 0).repeat(4, 1)  # (36, 64, 3)
    with av.open(str(folder / f"{name}.mp4"), "w", format="mp4") as video:
        options = {"crf": "20", "preset": "ultrafast", "g": "20"}
        stream = video.add_stream("libx264", rate=20, options=options)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        for t in range(frames):
            moved = np.ascontiguousarray(np.roll(picture, 3 * t, 1))
            video.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        video.mux(stream.encode())
    text = "".join(json.dumps(row) + "\n" for row in lines)
    (folder / f"{name}.jsonl").write_text(text)
    return folder / f"{name}.mp4"
