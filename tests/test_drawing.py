"""Pictures: the right key lights up, the arrow points the right way, files are whole."""

import json
import sys
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minecraft_jepa.data.actions import ACTION_NAMES, NOOP
from minecraft_jepa.viz import action_panel, data_plots, plots, style, video

HEIGHT, WIDTH = 96, 640
NAMES = [n.removeprefix("key.keyboard.") for n in ACTION_NAMES]
KEYS = NAMES[:20]
PRESSABLE = [*KEYS, "attack", "use", "pick"]


def press(*names, dx=0.0, dy=0.0):
    action = NOOP.copy()
    for name in names:
        action[NAMES.index(name)] = 1
    action[NAMES.index("dx")], action[NAMES.index("dy")] = dx, dy
    return action


def box(name):
    return action_panel.action_panel_layout(HEIGHT, WIDTH)[name]


def crop(picture, name):
    x0, y0, x1, y1 = box(name)
    return picture[y0:y1, x0:x1]


@given(st.sets(st.sampled_from(PRESSABLE)))
@settings(max_examples=15, deadline=None)
def test_pressed_keys_change_their_own_pixels_only(names):
    idle, pressed = (
        action_panel.draw_action(a, HEIGHT, WIDTH).astype(int) for a in (NOOP, press(*names))
    )
    for name in PRESSABLE:
        changed = (crop(idle, name) != crop(pressed, name)).any(-1).mean()
        if name in names:
            assert changed > 0.5, name
        elif name not in ("attack", "use") or "pick" not in names:
            assert changed == 0, name  # the wheel lies between the two buttons
    for name in names:
        crop(pressed, name)[:] = crop(idle, name)
    assert (idle == pressed).all()


def test_wheel_shows_which_way_it_turned():
    wheels = []
    for notches in (0, 1, -1):
        action = NOOP.copy()
        action[NAMES.index("dwheel")] = notches
        wheels.append(crop(action_panel.draw_action(action, HEIGHT, WIDTH), "pick"))
    idle, up, down = wheels
    assert (idle != up).any()
    assert (up != down).any()


def draw_dial(dx, dy):
    return crop(action_panel.draw_action(press(dx=dx, dy=dy), HEIGHT, WIDTH), "camera").astype(int)


def arrow(dx, dy):
    "Centre of the arrow, from the middle of the dial, in pixels."
    dial = draw_dial(dx, dy)
    y, x = np.nonzero(dial[..., 0] - dial[..., 2] > 100)
    return np.array([x.mean() - (dial.shape[1] - 1) / 2, y.mean() - (dial.shape[0] - 1) / 2])


@pytest.mark.parametrize("angle", range(0, 360, 45))
def test_arrow_points_where_the_camera_turns(angle):
    direction = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    centre = arrow(*6 * direction)  # y grows downwards, as dy does
    assert centre @ direction / np.linalg.norm(centre) > 0.99


def test_longer_turns_have_longer_arrows_up_to_the_rim():
    lengths = [np.linalg.norm(arrow(degrees, 0)) for degrees in (0.5, 2, 8)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] / 2
    assert (draw_dial(10, 0) == draw_dial(90, 0)).all()


def test_standing_still_has_no_arrow():
    assert (draw_dial(0, 0)[..., 0] < 100).all()


@pytest.mark.parametrize(("height", "width"), [(24, 120), (40, 160), (96, 320), (192, 1280)])
def test_panel_has_the_size_asked_for(height, width):
    assert action_panel.draw_action(press(KEYS[0]), height, width).shape == (height, width, 3)


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (5, 3, 48, 80), dtype=np.uint8)  # (k, 3, h, w)


@pytest.fixture
def actions():
    return np.stack([press(KEYS[i]) for i in range(5)])  # (k, 28)


def test_panels_hold_the_frames_pixel_by_pixel_and_in_order(frames, actions):
    names = {"imagined": frames, "real": frames[::-1]}
    for i, picture in enumerate(video.comparison_frames(names, actions, scale=3)):
        assert picture.shape[1] == 2 * 240 + 3 * 12
        for x, panel in ((12, frames), (12 + 240 + 12, frames[::-1])):
            expected = video.upscale(panel[i], 3).transpose(1, 2, 0)
            assert (picture[28 : 28 + 144, x : x + 240] == expected).all()


def test_last_action_may_be_missing_and_keys_follow_the_tick(frames, actions):
    pictures = video.comparison_frames({"real": frames}, actions)
    without_last = video.comparison_frames({"real": frames}, actions[:-1])
    assert all((a == b).all() for a, b in zip(pictures[:-1], without_last[:-1]))
    assert (pictures[-1] != without_last[-1]).any()
    for picture, action in zip(pictures, actions):
        keys = action_panel.draw_action(action, 96 * picture.shape[1] // 530, picture.shape[1])
        bottom = picture.shape[0] - 6  # half of the gap of 12 is below the keys
        assert (picture[bottom - len(keys) : bottom] == keys).all()


def test_captions_count_from_the_first_tick(monkeypatch, frames, actions):
    ticks = []
    monkeypatch.setattr(video, "tick_caption", lambda tick: ticks.append(tick) or str(tick))
    video.comparison_frames({"real": frames}, actions, first=3)
    assert ticks == [3, 4, 5, 6, 7]


def test_given_frame_is_marked(frames, actions):
    def is_marked(picture):
        caption = picture[:28].astype(int)
        return (caption[..., 0] - caption[..., 2] > 150).any()  # amber

    marked = [is_marked(p) for p in video.comparison_frames({"real": frames}, actions)]
    assert marked == [True] + [False] * 4
    assert not any(
        is_marked(p) for p in video.comparison_frames({"real": frames}, actions, first=1)
    )


def test_torch_frames_draw_as_arrays_do(frames, actions):
    torch = pytest.importorskip("torch")
    tensors = {"real": torch.from_numpy(frames)}
    pictures = video.comparison_frames(tensors, torch.from_numpy(actions))
    expected = video.comparison_frames({"real": frames}, actions)
    assert all((a == b).all() for a, b in zip(pictures, expected))


@pytest.mark.parametrize(("fps", "delay"), [(20, 50), (10, 100), (30, 30)])
def test_gif_comes_back(tmp_path, frames, actions, fps, delay):
    pictures = video.comparison_frames({"real": frames}, actions)
    gif = Image.open(video.save_gif(pictures, tmp_path / "new" / "a.gif", fps=fps, hold=0.2))
    assert gif.n_frames == 5
    assert gif.info["loop"] == 0
    for i, picture in enumerate(pictures):
        gif.seek(i)
        assert gif.info["duration"] == delay + (200 if i == 4 else 0)
        keys = np.abs(np.array(gif.convert("RGB")).astype(int) - picture)[-80:]
        assert keys.mean() < 8
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.gif"]


def test_gif_is_the_same_bytes_every_time(tmp_path, frames, actions):
    pictures = video.comparison_frames({"real": frames}, actions)
    a, b = (video.save_gif(pictures, tmp_path / n).read_bytes() for n in ("a.gif", "b.gif"))
    assert a == b


def test_a_failed_gif_leaves_the_old_one(tmp_path):
    path = video.save_gif([np.zeros((8, 8, 3), np.uint8)], tmp_path / "a.gif")
    old = path.read_bytes()
    good, larger = np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)
    for pictures, message in (
        ([good, larger], r"frame 1 is uint8 \(9, 8, 3\)"),
        ([], "no frames to write"),
        ([good / 255], "all must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            video.save_gif(pictures, path)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]


def test_a_figure_without_its_numbers_is_not_saved(tmp_path):
    fig, _ = plt.subplots()
    with pytest.raises(TypeError):
        style.save_figure(fig, tmp_path, "a", {"loss": object()})
    assert list(tmp_path.iterdir()) == []
    plt.close(fig)


def test_filmstrip_and_its_numbers(tmp_path, frames):
    fig = plots.filmstrip(
        {"imagined": frames, "real": frames}, (0, 2, 4), {"imagined": ["", "30.1 dB", "25.0 dB"]}
    )
    texts = [t.get_text() for t in fig.texts]
    assert [t for t in texts if "\n" in t or t == "given frame"] == [
        "given frame",
        "t+2\n0.10 s",
        "t+4\n0.20 s",
    ]
    path = style.save_figure(fig, tmp_path, "strip", {"psnr": np.array([30.1, np.nan])})
    assert json.loads(path.with_suffix(".json").read_text()) == {"psnr": [30.1, None]}
    assert "Software" not in Image.open(path).info


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, a: video.comparison_frames({"real": f}, a[:2]), "5 frames"),
        (
            lambda f, a: video.comparison_frames({"real": f, "imagined": f[:3]}, a),
            "imagined .3, 3, 48, 80.",
        ),
        (
            lambda f, a: video.comparison_frames({"imagined": f.astype(np.float32)}, a),
            "imagined: expected uint8",
        ),
        (
            lambda f, a: video.comparison_frames({"imagined": f.transpose(0, 2, 3, 1)}, a),
            "imagined: expected uint8 frames .k, 3, h, w.",
        ),
        (lambda f, a: action_panel.draw_action(a, 96, 640), "expected .28,., found .5, 28."),
        (lambda f, a: plots.filmstrip({"real": f}, (5,)), "frames 0 to 4"),
        (
            lambda f, a: plots.plot_horizons(None, [1, 2], {"model": [{"mean": 1}]}),
            "model: 1 points for 2 horizons",
        ),
        (lambda f, a: plots.plot_curves(None, [{"step": 1}], ["loss"]), "it has step"),
    ],
)
def test_errors_say_what_does_not_fit(frames, actions, call, message):
    with pytest.raises(ValueError, match=message):
        call(frames, actions)


def test_key_bars_are_as_long_as_the_key_is_held():
    """Two ticks, and one tick at the very end, of ten that begin at tick 40."""
    play = np.tile(NOOP, (10, 1))
    play[[2, 3, 9], NAMES.index("w")] = 1
    fig, ax = plt.subplots()
    data_plots.plot_piano_roll(ax, play, 40, 44, 3, 2)
    (bars,) = ax.collections
    ticks = [20 * path.get_extents().intervalx for path in bars.get_paths()]
    np.testing.assert_allclose(ticks, [[42, 44], [49, 50]])
    np.testing.assert_allclose(ax.get_xlim(), [2.0, 2.5])
    plt.close(fig)


@pytest.mark.parametrize(("side", "told"), [("train", "none on two"), ("test", "1 on two")])
def test_title_of_the_split_counts_players_on_two_sides(side, told):
    """After a split by session a player may be on two sides."""
    rows = [("a", "train"), ("a", side), ("b", "test")]
    rows = [{"player": p, "side": s, "seconds": 60.0, "windows": 9} for p, s in rows]
    fig, ax = plt.subplots()
    data_plots.plot_split(ax, rows)
    title = ax.get_title(loc=matplotlib.rcParams["axes.titlelocation"])
    assert title == f"2 players or worlds, {told} sides"
    plt.close(fig)


def test_column_without_a_number_is_drawn_as_no_curve():
    fig, ax = plt.subplots()
    rows = [{"step": i, "loss": 1.0, "rank": None} for i in range(40)]
    plots.plot_curves(ax, rows, ["loss", "rank"], smooth=5)
    assert [len(line.get_xdata()) for line in ax.lines] == [40, 40, 0]  # faint, smooth, none
    assert len(ax.get_legend().get_texts()) == 2
    plt.close(fig)


# A user's own settings, and a notebook


def figures(folder):
    "Bytes of a figure that the library makes without a call of `style` before, and of axes."
    frames = np.full((3, 3, 48, 80), 90, np.uint8)
    strip = style.save_figure(plots.filmstrip({"real": frames}, ticks=(0, 2)), folder, "strip", {})
    style.set_style()
    fig, ax = plt.subplots()
    ax.set_title("a title, 50 % & more_of_it")
    plots.plot_horizons(ax, [1, 2, 4], {"model": [{"mean": 1.0, "interval": [0.5, 1.5]}] * 3})
    return strip.read_bytes(), style.save_figure(fig, folder, "axes", {}).read_bytes()


@pytest.mark.parametrize(
    "rc",
    [
        {"text.usetex": True},
        {"savefig.bbox": "tight", "savefig.pad_inches": 0.3},
        {"savefig.transparent": True},
        {"savefig.facecolor": "black"},
        {"savefig.format": "pdf"},
        {
            "figure.facecolor": "black",
            "axes.facecolor": "black",
            "text.color": "white",
            "lines.color": "white",
        },
        {
            "axes.prop_cycle": "cycler('color', ['r'])",
            "font.family": "serif",
            "figure.autolayout": True,
        },
    ],
    ids=lambda rc: next(iter(rc)),
)
def test_a_users_matplotlibrc_neither_stops_nor_changes_a_figure(rc, tmp_path):
    expected = figures(tmp_path)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(rc)
        assert figures(tmp_path) == expected


def test_a_figure_of_the_library_leaves_the_sessions_settings(frames):
    with matplotlib.rc_context({"axes.titlesize": 33}):
        plt.close(plots.filmstrip({"real": frames}, ticks=(0,)))
        assert matplotlib.rcParams["axes.titlesize"] == 33


def test_a_figure_is_shown_once_where_it_is_made(tmp_path, monkeypatch):
    import IPython.display

    shown, shell = [], SimpleNamespace(kernel=None)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    fig, _ = plt.subplots()
    path = style.save_figure(fig, tmp_path, "a", {})
    assert [image.data for image in shown] == [path.read_bytes()]
    assert fig.number not in plt.get_fignums()
    fig, _ = plt.subplots()
    style.save_figure(fig, tmp_path, "b", {}, show=False)  # its panels were shown before
    assert len(shown) == 1 and (tmp_path / "b.png").is_file()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)  # a script
    fig, _ = plt.subplots()
    style.save_figure(fig, tmp_path, "a", {})
    assert len(shown) == 1


# Times of a GIF


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps=0"),
        ({"fps": -1}, "fps=-1"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": float("inf")}, "fps=inf"),
        ({"fps": "20"}, "fps='20'"),
        ({"fps": None}, "fps=None"),
        ({"fps": 0.0015}, "no longer picture"),
        ({"fps": 1e-320}, "no longer picture"),
        ({"hold": -0.5}, "hold=-0.5"),
        ({"hold": float("nan")}, "hold=nan"),
        ({"hold": 700}, "655.35 s at most"),
        ({"hold": "1"}, "hold='1'"),
        ({"fps": 0.0016, "hold": 60}, "hold=60"),
        ({"limit": 0}, "limit=0"),
        ({"limit": float("nan")}, "limit=nan"),
    ],
)
def test_times_that_a_gif_cannot_have_are_refused(options, message, tmp_path):
    pictures = [np.full((8, 8, 3), i, np.uint8) for i in (0, 200)]
    with pytest.raises(ValueError, match=r"a\.gif: ") as error:
        video.save_gif(pictures, tmp_path / "a.gif", **options)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_equal_pictures_that_stand_too_long_are_refused(tmp_path):
    with pytest.raises(ValueError, match="equal pictures stand for more than 655 seconds"):
        video.save_gif([np.zeros((8, 8, 3), np.uint8)] * 8, tmp_path / "a.gif", fps=0.01)


def test_longest_times_and_a_single_picture(tmp_path):
    dark, light = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    for pictures, options, expected in (
        ([dark], {}, [550]),
        ([dark, light], {"hold": 655.3}, [50, 655350]),
        ([dark, light], {"fps": 100 / 65535, "hold": 0}, [655350] * 2),
        ([dark, light], {"fps": np.float32(10), "hold": np.int64(1)}, [100, 1100]),
    ):
        gif = Image.open(video.save_gif(pictures, tmp_path / "a.gif", **options))
        milliseconds = []
        for i in range(gif.n_frames):
            gif.seek(i)
            milliseconds.append(gif.info["duration"])
        assert milliseconds == expected
