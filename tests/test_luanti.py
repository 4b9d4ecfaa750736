"""Luanti. What input, lines and player do needs no game.

The other tests are skipped where the game or its display is missing.
"""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import refused
from game_here import needs_game
from soak import repeats

from minecraft_jepa.cli import main
from minecraft_jepa.data.actions import CAMERA, KEYS, NOOP, encode_actions
from minecraft_jepa.data.checks import check_recording, find_recordings
from minecraft_jepa.data.recordings import open_recording
from minecraft_jepa.game import appearance, client, luanti, recorder
from minecraft_jepa.game.client import read_state
from minecraft_jepa.game.display import frames_ahead, read_frame_id
from minecraft_jepa.game.env import LuantiEnv, action_to_input
from minecraft_jepa.game.luanti import LuantiError, find_programs

ROOT = Path(__file__).parent.parent


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False


def python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


@pytest.mark.parametrize("width", [140, 256, 320, 640])
def test_code_is_read_at_any_width_and_shade(width):
    for number in range(0, 4096, 7):
        bits = [1, 0, *((number ^ number >> 1) >> k & 1 for k in range(12))]
        row = np.array([bits[x * 14 // width] for x in range(width)], np.uint8)
        assert read_frame_id(row * 255) == read_frame_id(row * 90 + 5) == number
        assert frames_ahead(number, number + 3 * 4096) == 0


def test_what_is_sent_is_what_an_action_says():
    rng, rest = np.random.default_rng(0), np.zeros(2)
    moved, expected = np.zeros(2), np.zeros(2)  # pixels
    for _ in range(200):
        action = NOOP.copy()
        action[:20] = rng.integers(0, 2, 20)
        action[CAMERA] = rng.normal(0, 3, 2)
        action[25:] = rng.integers(0, 2, 3)
        pressed, right, down, _, rest = action_to_input(action, False, rest, 256)
        keys = {key for key, value in zip(KEYS, action) if value} - {"key.keyboard.escape"}
        assert pressed == keys | {button for button in range(3) if action[25 + button]}
        moved += right, down
        expected += action[CAMERA] / 0.15
    assert np.abs(moved - expected).max() <= 0.5


def test_lines_come_back_as_the_actions_of_the_game():
    rng = np.random.default_rng(1)
    states = []
    for t in range(50):
        yaw, pitch = rng.integers(0, 2400) * 0.15, rng.integers(-300, 300) * 0.15
        words = t, 50000 * t, yaw, pitch, 0, 0, 0, rng.integers(0, 512), 0, 0
        states.append(read_state([str(word) for word in words]))
    screens = ((False, (0.5, 0.5)),) * 2
    line, lines = None, []
    for now, then in itertools.pairwise(states):
        line = recorder.make_vpt_line(now, then, set(), 0, screens, line, now["frame"])
        lines.append(json.loads(json.dumps(line)))
    for action, (now, then) in zip(encode_actions(lines), itertools.pairwise(states)):
        assert {key for key, value in zip(KEYS, action) if value} == then["held"] - {0, 1}
        assert set(np.flatnonzero(action[25:])) == then["held"] & {0, 1}
        yaw_error = (now["yaw"] + action[22] - then["yaw"] + 180) % 360 - 180
        assert yaw_error == pytest.approx(0, abs=0.02)
        assert now["pitch"] + action[23] == pytest.approx(then["pitch"], abs=0.02)
    keys, old_keys = lines[1]["keyboard"]["keys"], lines[0]["keyboard"]["keys"]
    assert lines[1]["keyboard"]["newKeys"] == [key for key in keys if key not in old_keys]


def test_killed_writer_leaves_no_half_pair(tmp_path):
    code = """
import sys, numpy as np
from minecraft_jepa.game.recorder import RecordingWriter

with RecordingWriter(sys.argv[1], "w", 64, 36) as pair:
    for t in range(10**6):
        pair.write(np.zeros((36, 64, 3), np.uint8), {})
        print(t, flush=True)
"""
    process = python(code, tmp_path)
    for _ in range(50):
        process.stdout.readline()
    process.kill()
    process.wait()
    assert {p.suffix for p in tmp_path.iterdir()} == {".part"}


def test_a_full_disk_leaves_no_half_pair(tmp_path):
    class FullDisk:
        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    pair = recorder.RecordingWriter(tmp_path, "w", 64, 36)
    pair.write(np.zeros((36, 64, 3), np.uint8), {})
    pair.lines.close()
    pair.lines = FullDisk()
    with pytest.raises(OSError, match="No space left"):
        pair.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_two_writers_of_a_recording_do_not_mix(tmp_path):
    def grey(value):
        return np.full((36, 64, 3), value, np.uint8)

    with recorder.RecordingWriter(tmp_path, "w", 64, 36) as pair:
        pair.write(grey(10), {"who": 1})
        with pytest.raises(recorder.RecordingInUseError, match="w is being recorded by another"):
            recorder.RecordingWriter(tmp_path, "w", 64, 36)
        with recorder.RecordingWriter(tmp_path, "other", 64, 36) as other:
            other.write(grey(20), {})
        pair.write(grey(10), {"who": 1})
    assert (tmp_path / "w.jsonl").read_text() == 2 * '{"who":1}\n'
    assert len({path.name for path in tmp_path.iterdir()}) == 4
    with recorder.RecordingWriter(tmp_path, "w", 64, 36) as pair:  # free again
        pair.write(grey(30), {"who": 2})
    assert (tmp_path / "w.jsonl").read_text() == '{"who":2}\n'


def test_names_are_taken_until_both_files_are_in_place(tmp_path, monkeypatch):
    """Another process may begin between the two renames."""
    replace, refused = os.replace, []

    def replace_and_try(source, target):
        try:
            recorder.RecordingWriter(tmp_path, "w", 64, 36)
        except recorder.RecordingInUseError:
            refused.append(Path(source).name)
        replace(source, target)

    monkeypatch.setattr(recorder.os, "replace", replace_and_try)
    with recorder.RecordingWriter(tmp_path, "w", 64, 36) as pair:
        pair.write(np.zeros((36, 64, 3), np.uint8), {})
    assert refused == ["w.mp4.part", "w.jsonl.part"]
    assert {path.name for path in tmp_path.iterdir()} == {"w.mp4", "w.jsonl"}


def test_a_recording_that_cannot_begin_lets_go_of_its_names(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recorder.av, "open", fail)
        with pytest.raises(OSError, match="No space left"):
            recorder.RecordingWriter(tmp_path, "w", 64, 36)
    assert not list(tmp_path.iterdir())
    with recorder.RecordingWriter(tmp_path, "w", 64, 36) as pair:
        pair.write(np.zeros((36, 64, 3), np.uint8), {})


def test_recording_whose_frames_all_came_late_is_kept(tmp_path, monkeypatch):
    def play(game, player, recording, pair, num_frames, seed):
        state = {"held": set(), "hotbar": 0, "yaw": 0.0, "pitch": 0.0, "position": (0, 0, 0)}
        picture, screen = np.zeros((16, 16, 3), np.uint8), (False, (0.5, 0.5))
        ticks = []
        for frame in (0, 9):
            now = state | {"frame": frame, "micros": 50_000 * frame}
            ticks.append(recorder._Tick(now, (frame, picture, *screen), set(), (0, 0), 0))
        pair.write(picture, recording.make_line(*ticks, ticks[1].state))

    monkeypatch.setattr(recorder, "Game", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(recorder, "_play", play)
    counts = recorder.record(tmp_path, minutes=0.01, width=16, height=16)
    assert counts["frames_a_second"] == 0 and counts["frames"] == 1
    assert (tmp_path / "world-0.mp4").exists()


@pytest.mark.parametrize("error", [recorder.RecordingInUseError, FileNotFoundError])
def test_world_that_another_process_records_costs_no_other_seed(
    tmp_path, monkeypatch, capsys, error
):
    def record(out_dir, minutes, seed, *_, **__):
        if seed == 2:
            raise error(f"{out_dir}/world-2: busy")
        for suffix in (".mp4", ".jsonl"):  # as if another process recorded world 3 meanwhile
            (tmp_path / f"world-3{suffix}").write_text("")
        return {"name": f"world-{seed}"}

    monkeypatch.setattr(recorder, "record", record)
    monkeypatch.setattr("minecraft_jepa.game.luanti.find_programs", lambda: None)
    status = main(["record", str(tmp_path), "--seeds", "1-4"])
    assert status == (error is FileNotFoundError)
    said = capsys.readouterr()
    assert [json.loads(line)["name"] for line in said.out.splitlines()] == ["world-1", "world-4"]
    assert "world 2: " in said.err and "busy" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 255}, "255 x 144 pixels: both sides have to be even"),
        ({"minutes": 0}, "minutes is 0, less than a frame"),
        ({"minutes": -1}, "less than a frame"),
        ({"minutes": float("inf")}, "minutes=inf must be a finite number"),
        ({"minutes": float("nan")}, "minutes=nan must be a finite number"),
    ],
)
def test_what_cannot_be_recorded_is_told_before_the_game_starts(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        recorder.record(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"biome": "sea"}, "choose 'any' or one of"), ({"time_of_day": 7}, "0.5, noon")],
)
def test_env_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        LuantiEnv(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "hard"}, "choose one of survival, creative"),
        ({"width": 20}, "choose from 64 x 36"),
    ],
)
def test_game_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        client.Game(**settings)


def test_without_the_game_the_error_tells_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    install = "sudo apt-get install --no-install-recommends minetest xvfb"
    with pytest.raises(LuantiError, match=f"minetest and Xvfb not found: {install}"):
        LuantiEnv().reset(seed=0)
    words = ["record", tmp_path, "--seeds", "1", "--minutes", "0.1"]
    refused(capsys, words, "sudo apt-get install")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["gymnasium", "Xlib"])
def test_without_a_package_the_error_tells_how_to_get_it(package):
    code = f"""
import sys
sys.modules["{package}"] = None
try:
    import minecraft_jepa.game.recorder
except ImportError as error:
    print(error)
"""
    install = "pip install 'minecraft_jepa[luanti]', in a clone pip install -e '.[luanti]'"
    assert f"{package} is needed to play Luanti: {install}" in python(code).communicate()[0]


def test_without_a_package_the_command_says_one_line():
    code = (
        "import sys; sys.modules['gymnasium'] = None; from minecraft_jepa.cli import main; "
        "sys.exit(main(['record', 'nowhere', '--seeds', '1']))"
    )
    process = python(code, stderr=subprocess.PIPE)
    message = process.communicate()[1]
    assert process.returncode == 1
    assert message.count("\n") == 1
    assert message.startswith(
        "minecraft-jepa record: gymnasium is needed to play Luanti: pip install"
    )


def test_without_the_game_nothing_is_asked_of_what_is_there_already(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    for suffix in (".mp4", ".jsonl"):
        (tmp_path / f"world-1{suffix}").touch()
    assert main(["record", str(tmp_path), "--seeds", "1"]) == 0
    assert main(["record", str(tmp_path), "--seeds", "1-9"]) == 1
    assert capsys.readouterr().err.count("sudo apt-get install") == 1  # not once for each world


RELEASES = {  # of /etc/os-release -> the package
    "Debian 12": ('ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm', "minetest"),
    "Debian 13": ('ID=debian\nVERSION_ID="13"\nVERSION_CODENAME=trixie', "luanti"),
    "Debian unstable": (
        'PRETTY_NAME="Debian GNU/Linux forky/sid"\nID=debian\nVERSION_CODENAME=forky',
        "luanti",
    ),
    "Ubuntu 22.04": ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="22.04"', "minetest"),
    "Ubuntu 24.04": (
        'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\nUBUNTU_CODENAME=noble',
        "minetest",
    ),
    "Ubuntu 24.10": ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.10"', "luanti"),
    "Ubuntu 26.04": ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="26.04"', "luanti"),
    "Mint 22": (
        'ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_ID="22"\n'
        "VERSION_CODENAME=wilma\nUBUNTU_CODENAME=noble",
        "minetest",
    ),
    "LMDE 6": (
        'ID=linuxmint\nID_LIKE=debian\nVERSION_ID="6"\n'
        "VERSION_CODENAME=faye\nDEBIAN_CODENAME=bookworm",
        "minetest",
    ),
    "Raspbian 13": (
        'ID=raspbian\nID_LIKE=debian\nVERSION_ID="13"\nVERSION_CODENAME=trixie',
        "luanti",
    ),
}


@pytest.mark.parametrize(("text", "package"), RELEASES.values(), ids=RELEASES)
def test_line_that_installs_the_game_is_that_of_the_system(tmp_path, text, package):
    (tmp_path / "os-release").write_text(text + "\n")
    game = {"minetest": "minetest", "luanti": "luanti luanti-game-minetest"}[package]
    assert luanti.game_package(tmp_path / "os-release") == (
        package,
        f"sudo apt-get install --no-install-recommends {game} xvfb",
    )


@pytest.mark.parametrize("text", ["ID=fedora\nVERSION_ID=42", "", "# nothing\n"])
def test_no_line_is_made_up_for_another_system(tmp_path, text):
    (tmp_path / "os-release").write_text(text)
    assert "apt" not in luanti.game_package(tmp_path / "os-release")[1]
    assert luanti.game_package(tmp_path / "none") == luanti.game_package(tmp_path / "os-release")


@pytest.mark.parametrize("name", ["minetest", "luanti"])
def test_game_is_found_under_either_name(monkeypatch, tmp_path, name):
    for program in (name, "Xvfb"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setattr(os, "defpath", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda n, path: which(n, path=path.removesuffix(":/usr/games"))
    )
    assert find_programs() == {"minetest": str(tmp_path / name), "Xvfb": str(tmp_path / "Xvfb")}


def test_settings_override_ours_and_are_written_once(tmp_path):
    luanti.write_home(tmp_path, settings={"fov": 90, "texture_path": "/a/pack"})
    lines = (tmp_path / ".minetest/minetest.conf").read_text().splitlines()
    settings = dict(line.split(" = ") for line in lines)
    assert len(settings) == len(lines)
    assert (settings["fov"], settings["texture_path"]) == ("90", "/a/pack")
    assert settings["time_speed"] == "0"
    assert 0.10 < float(settings["mouse_sensitivity"]) < 0.11, "0.15 would turn 1.4 times as far"


@needs_game
@pytest.mark.parametrize("fov", [62, 72, 90])
def test_a_pixel_of_the_mouse_turns_as_far_in_every_view(fov):
    game = client.Game(world=12, frames_per_tick=1, settings={"fov": fov})
    try:
        game.spawn(3, "savanna")
        before = game.wait(game.latest + 1)
        game.send(set(), 40, -20, 0)
        after = game.wait(before["frame"] + 5)
    finally:
        game.close()
    turned = [(after[k] - before[k] + 180) % 360 - 180 for k in ("yaw", "pitch")]
    np.testing.assert_allclose(turned, [40 * 0.15, -20 * 0.15], atol=0.01)


@needs_game
def test_other_look_is_seen_and_is_the_same_place(tmp_path):
    pictures, places = {}, []
    for name in ("standard", "all"):
        settings = appearance.appearance_settings(name, tmp_path)
        game = client.Game(world=12, settings=settings)
        try:
            game.spawn(3, "savanna")
            state = game.wait(game.latest + 1)
            pictures[name] = game.grab(state["frame"])[1].astype(float)
            places.append([*state["position"], state["yaw"], state["pitch"]])
        finally:
            game.close()
    np.testing.assert_allclose(*places, atol=0.1)
    assert np.abs(pictures["standard"] - pictures["all"]).mean() > 10  # grey levels


@needs_game
def test_missing_content_of_the_game_is_named(tmp_path, monkeypatch):
    "In Debian 13 the content of the game is a package of its own, which is only recommended."
    program = tmp_path / "luanti"
    program.write_text("#!/bin/sh\necho 'ERROR[Main]: Could not find or load game: minetest'\n")
    program.chmod(0o755)
    monkeypatch.setattr(
        client, "find_programs", lambda: find_programs() | {"minetest": str(program)}
    )
    with pytest.raises(
        LuantiError, match="the game that is played in it is missing: sudo apt-get install"
    ):
        LuantiEnv().reset(seed=0)


def test_step_before_reset_is_refused():
    import gymnasium

    with pytest.raises(gymnasium.error.ResetNeeded, match="reset first"):
        LuantiEnv().step(NOOP)


@pytest.mark.parametrize("step", ["write_home", "find_free_port"])
def test_start_that_fails_leaves_no_folder(step, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(client, "find_programs", lambda: {"minetest": "game", "Xvfb": "display"})
    monkeypatch.setattr(client.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(client, step, fail)
    with pytest.raises(OSError, match="No space left"):
        client.Game()
    assert list(tmp_path.iterdir()) == []


@needs_game
def test_game_stays_off_the_users_wayland_desktop(tmp_path, monkeypatch):
    program = tmp_path / "minetest"
    program.write_text("#!/bin/sh\necho [$WAYLAND_DISPLAY] on $SDL_VIDEODRIVER\n")
    program.chmod(0o755)
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    monkeypatch.setattr(
        client, "find_programs", lambda: find_programs() | {"minetest": str(program)}
    )
    with pytest.raises(LuantiError, match=r"\[\] on x11"):
        client.Game()


def test_render_before_reset_is_refused_and_close_does_no_harm():
    import gymnasium

    env = LuantiEnv()
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset first"):
        env.render()
    env.close()
    env.close()
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset first"):
        env.render()


class NoGame:
    "A game that only remembers what it was sent."

    frames_per_tick, latest = 2, 100

    def wait(self, n):
        return {
            "frame": n,
            "position": (0, 0, 0),
            "yaw": 0.0,
            "pitch": 0.0,
            "hotbar": 0,
            "held": set(),
        }

    def send(self, *arguments):
        self.sent = arguments

    def grab(self, n):
        return n, np.zeros((144, 256, 3), np.uint8), False, (0.5, 0.5)

    def close(self):
        pass


@pytest.fixture
def played():
    env = LuantiEnv()
    env.game, env.running, env.biome, env.start, env.rest = NoGame(), 0, "any", 0, np.zeros(2)
    env.shot = env.game.grab(100)
    return env


class NoSuchPlace(NoGame):
    "A game in whose world the player can't be put anywhere."

    def spawn(self, *place):
        raise LuantiError("world without a spawn point in 'taiga'")


def test_step_after_a_refused_first_reset_is_refused(monkeypatch):
    "The game runs, but its world has no such place: there is no picture to act on."
    import gymnasium

    monkeypatch.setattr("minecraft_jepa.game.env.Game", lambda *options: NoSuchPlace())
    env = LuantiEnv(biome="taiga")
    with pytest.raises(LuantiError, match="without a spawn point"):
        env.reset(seed=0)
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset first"):
        env.step(NOOP)


def test_picture_of_another_world_is_not_acted_on(played, monkeypatch):
    import gymnasium

    monkeypatch.setattr("minecraft_jepa.game.env.Game", lambda *options: NoSuchPlace())
    with pytest.raises(LuantiError, match="without a spawn point"):
        played.reset(options={"world": 1, "biome": "taiga"})
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset first"):
        played.step(NOOP)


def action_with(index, value):
    action = np.zeros(28)
    action[index] = value
    return action


WRONG = {
    "a scalar": (1, "shape is ()"),
    "one number": (np.ones(1), "shape is (1,)"),
    "27 numbers": (np.ones(27), "shape is (27,)"),
    "a batch of one": (np.zeros((1, 28)), "shape is (1, 28)"),
    "nothing": (None, "shape is ()"),
    "text": (["1"] * 28, "no numbers"),
    "complex": (np.zeros(28, complex), "no numbers"),
    "objects": ([None] * 28, "no numbers"),
    "ragged": ([[1], [1, 2]], "action: "),
    "NaN": (action_with(22, np.nan), "dx is not finite"),
    "infinite": (action_with(23, np.inf), "dy is not finite"),
    "a dict": ({}, "keyboard"),
    "no mouse": ({"keyboard": {"keys": []}}, "mouse"),
    "no keys": ({"mouse": {"dx": 0, "dy": 0, "buttons": []}, "keyboard": {}}, "keyboard.keys"),
    "no movement": ({"mouse": {"dx": 0, "buttons": []}, "keyboard": {"keys": []}}, "mouse.dy"),
    "keys of another kind": (
        {"mouse": {"dx": 0, "dy": 0, "buttons": []}, "keyboard": {"keys": [1]}},
        "keyboard.keys",
    ),
}


@pytest.mark.parametrize(("action", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_action_is_refused(played, action, message):
    with pytest.raises(ValueError, match=r"^action: ") as error:
        played.step(action)
    assert message in str(error.value)
    assert not hasattr(played.game, "sent")


@pytest.mark.parametrize(
    "action",
    [
        action_with(0, 1).tolist(),
        action_with(0, 1).astype(np.float16),
        action_with(0, 1).astype(int),
        action_with(0, 1).astype(bool),
        tuple(action_with(0, 1)),
        action_with(slice(0, 1), 1e300),
    ],
)
def test_28_numbers_of_any_type_are_taken(played, action):
    played.step(action)
    assert played.game.sent[0] == {"key.keyboard.w"}


@pytest.mark.parametrize(
    "settings",
    [
        {"world": -1},
        {"world": 1.5},
        {"world": "7"},
        {"world": True},
        {"width": 256.0},
        {"height": "144"},
        {"time_of_day": "noon"},
        {"time_of_day": float("nan")},
        {"render_mode": "human"},
    ],
)
def test_impossible_setting_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LuantiEnv(**settings)


def test_whole_numbers_of_any_type_are_taken():
    env = LuantiEnv(world=np.uint8(3), width=np.int64(160), height=np.int16(90))
    assert env.options["world"] == 3
    assert type(env.options["world"]) is int
    assert env.observation_space.shape == (90, 160, 3)


@pytest.fixture(scope="module")
def env():
    env = LuantiEnv(world=11, biome="grassland", width=160, height=90)
    env.reset(seed=0)
    yield env
    env.close()


def distance(info, other_info):
    "Blocks between two positions."
    return np.linalg.norm(np.subtract(info["position"], other_info["position"]))


@needs_game
def test_gymnasium_accepts_it():
    import gymnasium
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make("Luanti-v0", width=128, height=72).unwrapped
    check_env(env)
    env.close()


@needs_game
def test_turn_and_walk_are_those_of_the_actions(env):
    frame, start = env.reset(seed=3)
    assert frame.shape == (90, 160, 3)
    assert frame.std() > 5
    action = NOOP.copy()
    action[[22, 23]] = 1.5, 0.75
    for _ in range(20):
        _, _, _, failed, info = env.step(action)
    for _ in range(3):
        frame, _, _, _, info = env.step(NOOP)
    assert not failed
    assert (info["yaw"] - start["yaw"]) % 360 == pytest.approx(30, abs=0.1)
    assert info["pitch"] - start["pitch"] == pytest.approx(15, abs=0.1)
    walk = {
        "mouse": {"dx": 0, "dy": 0, "buttons": []},
        "keyboard": {"keys": ["key.keyboard.w", "key.keyboard.space"]},
    }
    for _ in range(30):
        env.step(walk)
    info = env.step(NOOP)[4]
    assert distance(info, start) > 1
    assert (env.render() != frame).any()
    assert info["tick"] >= 54


@needs_game
def test_same_seed_same_place_without_a_new_game(env):
    pids = env.game.pids
    first, other, again = (env.reset(seed=seed)[1] for seed in (5, 6, 5))
    assert distance(first, again) < 0.6 < distance(first, other)
    assert first["yaw"] == again["yaw"]
    assert env.game.pids == pids
    assert {info["biome"] for info in (first, other, again)} == {"grassland"}
    with pytest.raises(ValueError, match="unknown option 'bioem'"):
        env.reset(options={"bioem": "desert"})


@needs_game
def test_in_step_over_many_steps(env):
    "Turns add up to those of the actions, however many; the full count in a soak run."
    _, info = env.reset(seed=2)
    action, start = NOOP.copy(), info["yaw"]
    right, num_synchronised = 0.0, 0
    for t in range(repeats(60, 10_000)):
        action[22] = 2.1 if t % 40 < 20 else -1.8
        right += action[22]
        _, _, _, failed, info = env.step(action)
        assert not failed, info["failure"]
        num_synchronised += info["in_step"]
    for _ in range(3):
        info = env.step(NOOP)[4]
    assert (info["yaw"] - start - right + 180) % 360 == pytest.approx(180, abs=0.2)
    assert num_synchronised > 0


@needs_game
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_lost_game_is_reported_and_started_again(env, number):
    env.reset(seed=1)
    home, pids = env.game.home, env.game.pids
    os.kill(pids["minetest"], number)
    for _ in range(20):
        frame, _, _, failed, info = env.step(NOOP)
        if failed:
            break
    assert failed
    assert "log" in info["failure"]
    assert not info["in_step"]
    assert frame.shape == (90, 160, 3)
    assert wait_for(lambda: not any(alive(pids[n]) for n in ("Xvfb", "minetest")))
    assert not Path(home).exists()
    assert env.reset(seed=1)[0].std() > 5


@needs_game
def test_two_at_once_share_nothing_and_listen_here_only(env):
    other = client.Game(world=12, width=160, height=90)
    try:
        ports = []
        for game in (env.game, other):
            paths = Path(f"/proc/{game.pids['minetest']}/fd").iterdir()
            fds = [os.readlink(path) for path in paths if path.is_symlink()]
            rows = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
            bound = [row[1].split(":") for row in rows if f"socket:[{row[9]}]" in fds]
            ports += [port for address, port in bound if address == "0100007F"]
        assert len(set(ports)) == 2
        assert other.pids["display"] != env.game.pids["display"]
        assert other.home != env.game.home
        assert not env.step(NOOP)[3]
        assert other.wait(other.latest + 5)["frame"] > 5
    finally:
        other.close()


@needs_game
@pytest.mark.parametrize("victim", ["parent", "guard"])
def test_nothing_outlives_its_parent(victim):
    code = """
import json, time
from minecraft_jepa.game.client import Game

game = Game(width=128, height=72)
print(json.dumps([game.pids, game.home, game.guard.pid]), flush=True)
time.sleep(1000)
"""
    process = python(code)
    pids, home, guard = json.loads(process.stdout.readline())
    os.kill(process.pid if victim == "parent" else guard, signal.SIGKILL)
    try:
        assert wait_for(lambda: not any(map(alive, (pids["Xvfb"], pids["minetest"], guard))))
        assert victim == "guard" or wait_for(lambda: not Path(home).exists())
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


@needs_game
def test_runs_without_root(tmp_path):
    if os.getuid():
        pytest.skip("all tests of this run are without root")
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    command += ["--bounding-set=-all", sys.executable, "-c"]
    imports = (
        "import subprocess, sys; "
        "subprocess.run([sys.executable, '-c', 'import gymnasium'], check=True)"
    )
    can_run = (
        shutil.which("setpriv")
        and not subprocess.run([*command, imports], capture_output=True, check=False).returncode
    )
    if not can_run:
        pytest.skip(f"no setpriv, or {sys.executable} is not for other users")
    code = """
import os
from minecraft_jepa.game.client import Game

game = Game(width=128, height=72)
print(os.getuid(), game.wait(game.latest + 3)["frame"], flush=True)
game.close()
"""
    process = subprocess.Popen(
        [*command, code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    uid, frame = map(int, process.communicate(timeout=120)[0].split())
    assert uid == 65534
    assert frame > 3


@needs_game
def test_recording_is_read_by_the_reader(tmp_path):
    counts = recorder.record(tmp_path, 0.1, seed=5, biome="savanna", width=128, height=72)
    path = tmp_path / "world-5.mp4"
    assert [p.stem for p in find_recordings(tmp_path)] == ["world-5"]
    assert len(list(tmp_path.iterdir())) == 2
    recording, check = open_recording(path), check_recording(path, decode=True)
    assert check["used"]
    assert not check["remarks"]
    assert len(recording) == counts["frames"] == 120
    assert recording.group == "world-5"
    assert recording.actions[:, 0].any()
    assert (recording.actions[:, CAMERA] != 0).any()
    assert next(recording.frames()).shape == (72, 128, 3)


@needs_game
def test_killed_recording_leaves_nothing_that_looks_complete(tmp_path):
    code = """
import sys
from minecraft_jepa.cli import main

options = ["--seeds", "4", "--minutes", "5", "--width", "128", "--height", "72"]
main(["record", sys.argv[1], *options])
"""

    def has_begun():
        return any(path.stat().st_size > 5000 for path in tmp_path.glob("*.jsonl.part"))

    process = python(code, tmp_path)
    try:
        assert wait_for(has_begun, 90)
    finally:
        process.kill()
        process.wait()
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".part"]
