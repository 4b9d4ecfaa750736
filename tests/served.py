"""A play server in a thread, on a few recordings of the sample, for tests."""

import asyncio
import contextlib
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from aiohttp import web

from minecraft_jepa.data.actions import NOOP
from minecraft_jepa.play import page

ROOT = Path(__file__).parent.parent
NAMES = (
    "world-301_0680",
    "world-305_0360",
    "world-321_0740",
    "world-324_0340",
)  # the last two unseen


def copy_recordings(folder):
    """Copy four recordings of the sample into `folder`, and return it."""
    for name in NAMES:
        for suffix in (".mp4", ".jsonl"):
            shutil.copy(ROOT / "data" / f"{name}{suffix}", folder)
    return folder


def plan_to_turn(model, z, goal, history, horizon):
    """What a planner gives: the best of three plans turns to the right."""
    candidates = np.repeat(NOOP[None, None], 3 * horizon, 1).reshape(3, horizon, -1).copy()
    candidates[:, :, 22] = np.array([4, 0, -4])[:, None]
    return SimpleNamespace(
        actions=candidates[0],
        cost=0.1,
        candidates=candidates,
        costs=np.array([0.1, 0.2, 0.3]),
        imagined_ticks=3 * horizon,
        seconds=0.0,
    )


@contextlib.contextmanager
def running(assets, folder, **options):
    """Serve in a thread of its own: gives the address and the Server."""
    taken, ready, box = page.take_port("127.0.0.1", 0), threading.Event(), {}
    app = page.make_app(assets, folder, **options)

    async def go():
        runner = web.AppRunner(app)
        box["stop"], box["loop"] = asyncio.Event(), asyncio.get_running_loop()
        await runner.setup()
        await web.SockSite(runner, taken).start()
        ready.set()
        await box["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=[go()])
    thread.start()
    assert ready.wait(30)
    try:
        yield page.page_url(taken, "127.0.0.1"), app[page.SERVER]
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(30)
    assert not thread.is_alive(), "it ends at once"
