"""The page of `play` in a real browser, Debian's chromium."""

import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from served import ROOT, copy_recordings, plan_to_turn, running

from minecraft_jepa.data.actions import NOOP
from minecraft_jepa.data.recordings import open_recording
from minecraft_jepa.play.assets import PlayAssets
from minecraft_jepa.play.dream import Dream, replay

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="no chromium here: sudo apt-get install chromium"),
    pytest.mark.xdist_group("browser"),
]
SHOTS = os.environ.get("SCREENSHOTS")  # a folder to keep pictures of the page in
PIXELS = """canvas => {
    const d = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return [d.height, d.width, Array.from(d.data)] }"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    made = PlayAssets(
        ROOT / "data/weights/tiny", copy_recordings(tmp_path_factory.mktemp("recordings"))
    )
    made.load_bank()
    return made


@pytest.fixture
def server(assets, tmp_path):
    with running(assets, tmp_path / "saved") as (url, held):
        yield url, held


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


class Seen:
    """A page, and what its user sees and does."""

    def __init__(self, page, url):
        self.page, self.faults = page, []
        page.on("pageerror", lambda e: self.faults.append(str(e)))
        page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        page.set_default_timeout(60_000)
        page.goto(url)
        self.until("one frame is given")

    def until(self, state):
        self.page.wait_for_function(
            "t => document.querySelector('.state').textContent.includes(t)", arg=state
        )

    def frame(self):
        height, width, data = self.page.locator(".stage.dream canvas").evaluate(PIXELS)
        return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]

    def tick(self):
        return int(self.page.locator(".stage.dream").get_attribute("data-tick"))

    def until_tick(self, tick, exact=False):
        what = "t => document.querySelector('.stage.dream').dataset.tick"
        self.page.wait_for_function(f"{what} {'==' if exact else '>='} t", arg=tick)

    def do(self, name):
        self.page.locator(f"[data-do={name}]").click()

    def pause(self):
        self.page.keyboard.press("p")
        self.page.wait_for_selector(".paused:not([hidden])")

    def shot(self, name):
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


@pytest.fixture
def visit(browser, server):
    contexts, visits = [], []

    def go(width=1280, height=720, **options):
        contexts.append(
            browser.new_context(
                viewport={"width": width, "height": height}, accept_downloads=True, **options
            )
        )
        visits.append(Seen(contexts[-1].new_page(), server[0]))
        return visits[-1]

    yield go
    for seen in visits:
        assert not seen.faults
    for context in contexts:
        context.close()


def far(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


def test_a_walk_from_load_to_reload(visit, server, assets, tmp_path):
    seen = visit()
    page, given = seen.page, seen.frame()
    page.locator(".starts button").nth(1).click()
    page.wait_for_selector(".starts button:nth-child(2)[aria-pressed=true]")
    page.wait_for_timeout(300)
    other = seen.frame()
    assert far(given, other) > 5, "another start"
    page.locator(".stage.dream").click()
    page.keyboard.down("w")
    seen.until_tick(20)
    assert "imagined" in page.locator(".state").text_content()
    page.keyboard.up("w")
    walked = seen.frame()
    assert far(other, walked) > 2, "it moves while a key is held"
    page.mouse.move(500, 300)
    before = seen.tick()
    for x in range(10):
        page.mouse.move(500 + 25 * x, 300)
        page.wait_for_timeout(30)
    seen.until_tick(before + 10)
    seen.pause()
    turned, tick = seen.frame(), seen.tick()
    page.wait_for_timeout(400)
    assert np.array_equal(turned, seen.frame()) and seen.tick() == tick, "paused"
    (session,) = server[1].sessions.values()
    acted = np.stack([session.dream.trajectory.action(t) for t in range(tick)])
    assert acted[:, 0].sum() >= 15, "W was held"
    assert (acted[:, 22] > 1).sum() >= 2, "the mouse went right"
    seen.do("step")
    seen.until_tick(tick + 1)
    assert not np.array_equal(turned, seen.frame())
    seen.do("rewind")
    seen.until_tick(tick - 19, exact=True)
    soft = seen.frame()
    seen.do("sharpen")
    seen.until("sharpened")
    assert far(soft, seen.frame()) > 0.5
    seen.do("save")
    page.wait_for_selector(".notes a")
    assert page.locator(".notes a").count() == 3
    for link in page.locator(".notes a").all():
        with page.expect_download() as told:
            link.click()
        told.value.save_as(tmp_path / "got" / told.value.suggested_filename)
    pair = next((tmp_path / "got").glob("*.jsonl"))
    recording = open_recording(pair)
    frames = [f.transpose(2, 0, 1) for f in recording.frames()]
    again = list(replay(Dream(assets.model, assets.head), pair))
    assert all(np.array_equal(a, b) for a, b in zip(frames, again)) and len(frames) == len(again)
    page.reload()
    seen.until("one frame is given")
    assert np.array_equal(seen.frame(), given)


def test_with_no_key_it_is_the_models_own_standstill(visit, assets):
    seen = visit()
    seen.page.locator(".stage.dream").focus()
    seen.page.keyboard.press("Enter")
    seen.until_tick(12)
    seen.pause()
    dream = Dream(assets.model, assets.head)
    dream.reset(*assets.start(**assets.starts[0]))
    for _ in range(seen.tick()):
        dream.step(NOOP)
    assert np.array_equal(seen.frame(), dream.frame.transpose(1, 2, 0))


def test_two_tabs_have_two_dreams(visit, server):
    one, other = visit(), visit()
    given = other.frame()
    one.page.keyboard.press("Enter")
    one.page.keyboard.down("s")
    one.until_tick(10)
    one.page.keyboard.up("s")
    assert np.array_equal(other.frame(), given) and other.tick() == 0
    assert len(server[1].sessions) == 2
    one.page.close()
    for _ in range(100):
        if len(server[1].sessions) == 1:
            break
        other.page.wait_for_timeout(100)
    assert len(server[1].sessions) == 1, "a closed tab frees its dream"
    other.page.keyboard.press("Enter")
    other.until_tick(5)


def test_both_mouse_buttons_act_at_once_and_each_is_let_go(visit, server):
    seen, (session,) = visit(), server[1].sessions.values()
    page = seen.page

    def until_held(attack, use):
        for _ in range(100):
            if [bool(session.controls.held[i]) for i in (25, 26)] == [attack, use]:
                return
            page.wait_for_timeout(50)
        raise AssertionError(f"held: {session.controls.held[25:27]}, not {attack}, {use}")

    page.locator(".stage.dream").click()  # this one only begins
    page.wait_for_function("() => document.pointerLockElement")
    seen.until_tick(2)
    until_held(False, False)
    page.mouse.down(button="left")
    until_held(True, False)
    page.mouse.down(button="right")
    until_held(True, True)
    page.mouse.up(button="left")
    until_held(False, True)
    page.mouse.up(button="right")
    until_held(False, False)


def test_a_key_that_is_held_steps_no_faster_than_the_dream(visit, assets, monkeypatch):
    seen = visit()
    step = assets.model.step
    monkeypatch.setattr(assets.model, "step", lambda *inputs: (time.sleep(0.2), step(*inputs))[1])
    for _ in range(60):
        seen.page.keyboard.down("n")  # again and again without `up`: repeats
        seen.page.wait_for_timeout(10)
    seen.page.keyboard.up("n")
    seen.page.wait_for_timeout(600)
    assert 1 <= seen.tick() <= 10
    assert not seen.page.locator(".notes .bad").count()


def test_recordings_that_were_seen_in_training_are_marked(visit):
    for width, height in ((1280, 720), (390, 844)):
        seen = visit(width, height)
        page = seen.page
        marked = page.locator(".starts button.seen").evaluate_all("all => all.map(b => b.title)")
        assert len(marked) == 2 and all("(seen in training)" in title for title in marked)
        assert page.locator(".starts button:not(.seen):not(.more)").count() == 2
        options = page.locator(".names option").all_inner_texts()
        assert sum("(seen in training)" in text for text in options) == 2
        seen.shot(f"starts_{width}")


def test_everything_is_reached_by_the_keyboard(visit):
    seen = visit()
    page, reached = seen.page, set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("(e => e.dataset.do || e.className || e.tagName)(document.activeElement)")
        )
    for name in ("toggle", "step", "reset", "sharpen", "smooth", "full", "help", "more", "correct"):
        assert any(name in r for r in reached), f"{name} is not reached by Tab: {reached}"
    page.locator(".starts button").nth(1).focus()
    page.keyboard.press("Space")
    page.wait_for_selector(".starts button:nth-child(2)[aria-pressed=true]")
    page.keyboard.press("n")
    seen.until_tick(1)
    page.keyboard.press("b")
    seen.until("one frame is given")
    page.keyboard.press("h")
    page.wait_for_selector("dialog.help[open]")
    seen.shot("help")
    page.keyboard.press("p")  # the dialog has the keys
    for key, state in (("h", ":not([open])"), ("h", "[open]"), ("Escape", ":not([open])")):
        page.keyboard.press(key)
        page.wait_for_selector(f"dialog.help{state}", state="attached")
    seen.until("one frame is given")  # p did not play
    page.locator(".stage.dream").focus()
    page.keyboard.press("Enter")
    page.keyboard.down("ArrowRight")
    seen.until_tick(8)
    page.keyboard.up("ArrowRight")
    page.keyboard.press("Escape")
    page.wait_for_selector(".paused:not([hidden])")


def test_a_plan_is_searched_shown_and_carried_out(visit, assets, monkeypatch):
    monkeypatch.setattr(assets, "planner", lambda: SimpleNamespace(plan=plan_to_turn))
    seen = visit()
    page = seen.page
    page.keyboard.press("t")
    page.wait_for_selector("dialog.goal[open]")
    page.locator("[data-goal='8']").click()
    page.wait_for_function("() => document.querySelector('.goal-name').textContent.includes('8')")
    seen.do("plan")
    page.wait_for_selector(".strip.chosen")
    assert page.locator(".strip").count() == 3
    seen.shot("plan-searched")
    seen.do("carry")
    page.wait_for_function(
        "() => document.querySelector('.plan-text').textContent.includes('Carried out')"
    )
    seen.until_tick(8, exact=True)  # the words may come before the last frame is drawn
    seen.shot("plan-carried-out")
    dream = Dream(assets.model, assets.head)
    dream.reset(*assets.start(**assets.starts[0]))
    for action in plan_to_turn(None, None, None, None, 8).actions:
        dream.step(action)
    assert np.array_equal(seen.frame(), dream.frame.transpose(1, 2, 0))


def test_a_picture_is_taken_with_a_note(visit, tmp_path):
    from PIL import Image

    seen = visit()
    given = seen.frame()
    Image.fromarray(np.full((600, 800, 3), (200, 40, 40), np.uint8)).save(tmp_path / "red.png")
    seen.page.locator(".more").click()
    seen.page.locator(".file").set_input_files(tmp_path / "red.png")
    seen.page.wait_for_function(
        "() => document.querySelector('.notes').textContent.includes('800 x 600')"
    )
    assert seen.frame()[..., 0].mean() > 190 > 60 > seen.frame()[..., 1].mean()
    (tmp_path / "no.png").write_bytes(b"no picture")
    seen.page.locator(".more").click()
    seen.page.locator(".file").set_input_files(tmp_path / "no.png")
    seen.page.wait_for_selector(".notes .bad")
    assert far(given, seen.frame()) > 5


SIZES = {"wide": (1280, 720), "phone": (390, 844)}


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_the_window_in_both_themes(visit, size, theme):
    width, height = SIZES[size]
    touch = (
        {"has_touch": True, "is_mobile": True, "device_scale_factor": 2} if size == "phone" else {}
    )
    seen = visit(width, height, color_scheme=theme, **touch)
    page = seen.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    ground = page.evaluate("getComputedStyle(document.querySelector('.play')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 380) == (theme == "light")
    seen.shot(f"{size}-{theme}-given")
    if size == "wide":
        bottom = page.locator(".starts").bounding_box()
        assert bottom["y"] + bottom["height"] <= height, "all is seen without scrolling"
        page.keyboard.press("Enter")
        page.keyboard.down("w")
        page.keyboard.down("ArrowRight")
        seen.until_tick(30)
        seen.shot(f"{size}-{theme}-walk")
    else:
        box = page.locator(".stick").bounding_box()
        page.locator(".stage.dream").tap()
        seen.until_tick(3)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        touches = page.context.new_cdp_session(page)
        touches.send(
            "Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]}
        )
        touches.send(
            "Input.dispatchTouchEvent",
            {"type": "touchMove", "touchPoints": [{"x": x, "y": y - 50}]},
        )
        page.wait_for_timeout(900)
        seen.shot(f"{size}-{theme}-walk")
        touches.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    seen.shot(f"{size}-{theme}")


def test_when_the_server_ends_the_page_says_so_and_comes_back(browser, assets, tmp_path):
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    with running(assets, tmp_path) as (url, _):
        seen = Seen(context.new_page(), url)
    seen.page.wait_for_function(
        "() => document.querySelector('.ask b').textContent.includes('ended')"
    )
    context.close()
