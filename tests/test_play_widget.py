"""The page under a cell: with somebody before it a widget, without a film."""

import json
import math
import shutil
import subprocess
import time

import numpy as np
import pytest
from served import ROOT, copy_recordings

from minecraft_jepa.data.actions import NOOP
from minecraft_jepa.play.assets import PlayAssets
from minecraft_jepa.play.messages import unpack_frame

pytest.importorskip("anywidget", reason="anywidget is not installed: pip install anywidget")
play_widget = pytest.importorskip("minecraft_jepa.play.widget", exc_type=ImportError)
WEIGHTS = ROOT / "data/weights/tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return copy_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture
def widget(data, tmp_path):
    """A widget and what it sends, in order."""
    made, sent = play_widget.PlayWidget(PlayAssets(WEIGHTS, data), tmp_path), []
    made.send = lambda content, buffers=None: sent.append((content, buffers))
    yield made, sent
    made.close_session()


def until(sent, fits, seconds=60):
    """The first message that fits."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for content, buffers in list(sent):
            header = unpack_frame(buffers[0])[0] if buffers else content
            if fits(header):
                return header
        time.sleep(0.02)
    raise AssertionError(f"nothing fits: {[c for c, b in sent if not b]}")


def test_a_widget_plays_as_the_page_does(widget):
    made, sent = widget
    made._take(made, {"type": "step"}, [])  # nobody has opened it yet
    assert not sent
    made._take(made, {"type": "open"}, [])
    given = until(sent, lambda m: m["type"] == "frame" and m["given"])
    forward = NOOP.copy()
    forward[0] = 1
    made._take(made, {"type": "play"}, [])
    message = {"type": "input", "action": forward.tolist(), "acknowledged": given["number"]}
    made._take(made, message, [])
    until(sent, lambda m: m["type"] == "frame" and m["action"][0] == 1)
    made._take(made, {"type": "input", "action": [math.nan] * 28, "acknowledged": 0}, [])
    made._take(made, ["no", "message"], [])
    until(sent, lambda m: m["type"] == "refused")
    made._take(made, {"type": "picture"}, [memoryview(b"no picture")])
    until(sent, lambda m: m["type"] == "refused" and "PNG" in m["why"])


def test_a_fault_of_ours_is_told_and_ends_the_dream(widget, monkeypatch):
    made, sent = widget
    monkeypatch.setattr(play_widget.Session, "work", lambda session: 1 / 0)
    made._take(made, {"type": "open"}, [])
    told = until(sent, lambda m: m["type"] == "refused")
    assert "ZeroDivisionError" in told["why"] and "run the cell again" in told["why"]
    assert made._session.closed


def test_opened_again_it_begins_again_and_closed_it_ends(widget):
    made, _ = widget
    made._take(made, {"type": "open"}, [])
    first = made._session
    made._take(made, {"type": "open"}, [])
    assert first.closed and not made._session.closed
    made._take(made, {"type": "close"}, [])
    assert made._session.closed


def test_a_view_that_is_removed_leaves_the_dream_of_another(widget):
    made, _ = widget
    for view in ("one", "two"):
        made._take(made, {"type": "open", "view": view}, [])
    made._take(made, {"type": "close", "view": "one"}, [])
    assert not made._session.closed
    made._take(made, {"type": "close", "view": "two"}, [])
    assert made._session.closed


def test_the_module_holds_the_page_and_nothing_of_the_server():
    text = play_widget.PlayWidget._esm
    text = text if isinstance(text, str) else str(text)
    assert "function mountPlay(root, link)" in text and "export default" in text
    assert "WebSocket" not in text and "location" not in text
    node = shutil.which("node")
    if node:
        words = [node, "--input-type=module", "--check", "-"]
        assert subprocess.run(words, input=text, text=True, check=False).returncode == 0


def test_a_notebook_without_a_person_shows_a_film(data, tmp_path):
    """As papermill and nbconvert run it."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code = (
        "from minecraft_jepa.play.widget import play\n"
        f"play({str(data)!r}, {str(WEIGHTS)!r}, ticks=8)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook.metadata["kernelspec"] = kernel
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    (shown,) = [o for o in notebook.cells[0].outputs if o.output_type == "execute_result"]
    assert "image/gif" in shown.data and len(json.dumps(shown.data)) > 3000


def test_the_film_is_of_the_recorded_actions(data):
    assets = PlayAssets(WEIGHTS, data)
    path = data / "world-324_0340.jsonl"
    film = play_widget.film_recording(assets, path, ticks=5)
    other = play_widget.film_recording(assets, data / "world-305_0360", ticks=5)
    assert film.data[:3] == b"GIF" and film.data != other.data
    assert np.frombuffer(film.data, np.uint8).size > 1000
