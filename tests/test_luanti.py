"Luanti: what hands, lines and player do needs no game; the rest is skipped where the game or its display is missing."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import refused
from soak import repeats

from minecraft_jepa.cli import main
from minecraft_jepa.data.actions import KEYS, NOOP, encode_actions
from minecraft_jepa.data.checks import check_recording, find_recordings
from minecraft_jepa.data.recordings import open_recording
from minecraft_jepa.game import client, luanti, recorder
from minecraft_jepa.game.client import ahead, read_code, read_state
from minecraft_jepa.game.env import LuantiEnv, to_input
from minecraft_jepa.game.luanti import LuantiError, find_programs

ROOT = Path(__file__).parent.parent
try:
    find_programs()
    missing = ""
except LuantiError as e:
    missing = str(e)
needs_game = pytest.mark.skipif(bool(missing), reason=missing)


def wait_for(true, seconds=30):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False


def python(code, *words, **more):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **more,
    )


@pytest.mark.parametrize("width", [140, 256, 320, 640])
def test_code_is_read_at_any_width_and_shade(width):
    for number in range(0, 4096, 7):
        bits = [1, 0, *((number ^ number >> 1) >> k & 1 for k in range(12))]
        row = np.array([bits[x * 14 // width] for x in range(width)], np.uint8)
        assert read_code(row * 255) == read_code(row * 90 + 5) == number
        assert ahead(number, number + 3 * 4096) == 0


def test_what_is_sent_is_what_an_action_says():
    rng, rest, moved, asked = np.random.default_rng(0), np.zeros(2), np.zeros(2), np.zeros(2)
    for _ in range(200):
        action = NOOP.copy()
        action[:20], action[22:24], action[25:] = (
            rng.integers(0, 2, 20),
            rng.normal(0, 3, 2),
            rng.integers(0, 2, 3),
        )
        keys, right, down, _, rest = to_input(action, False, rest, 256)
        assert keys == ({k for k, v in zip(KEYS, action) if v} - {"key.keyboard.escape"}) | {
            b for b in range(3) if action[25 + b]
        }
        moved, asked = moved + (right, down), asked + action[22:24] / 0.15
    assert np.abs(moved - asked).max() <= 0.5


def test_lines_come_back_as_the_actions_of_the_game():
    rng, before, lines, held = np.random.default_rng(1), None, [], []
    states = [
        read_state(
            [
                str(t),
                str(50000 * t),
                str(rng.integers(0, 2400) * 0.15),
                str(rng.integers(-300, 300) * 0.15),
                "0",
                "0",
                "0",
                str(rng.integers(0, 512)),
                "0",
                "0",
            ]
        )
        for t in range(50)
    ]
    for now, then in zip(states, states[1:]):
        before = recorder.write_line(
            now, then, set(), 0, ((False, (0.5, 0.5)),) * 2, before, now["frame"]
        )
        lines.append(json.loads(json.dumps(before)))
    actions = encode_actions(lines)
    for action, line, now, then in zip(actions, lines, states, states[1:]):
        assert {k for k, v in zip(KEYS, action) if v} == then["held"] - {0, 1} and set(
            np.flatnonzero(action[25:])
        ) == then["held"] & {0, 1}
        assert (now["yaw"] + action[22] - then["yaw"] + 180) % 360 == pytest.approx(
            180, abs=0.02
        ) and now["pitch"] + action[23] == pytest.approx(then["pitch"], abs=0.02)
    assert lines[1]["keyboard"]["newKeys"] == [
        k for k in lines[1]["keyboard"]["keys"] if k not in lines[0]["keyboard"]["keys"]
    ]


def test_killed_writer_leaves_no_half_pair(tmp_path):
    process = python(
        "import sys, numpy as np; from minecraft_jepa.game.recorder import PairWriter\nwith PairWriter(sys.argv[1], 'w', 64, 36) as pair:\n  for t in range(10**6):\n    pair.write(np.zeros((36, 64, 3), np.uint8), {}); print(t, flush=True)",
        tmp_path,
    )
    for _ in range(50):
        process.stdout.readline()
    process.kill()
    process.wait()
    assert {p.suffix for p in tmp_path.iterdir()} == {".part"}


@pytest.mark.parametrize(
    "words, told",
    [(dict(biome="sea"), "choose 'any' or one of"), (dict(time_of_day=7), "0.5, noon")],
)
def test_env_refuses(words, told):
    with pytest.raises(ValueError, match=told):
        LuantiEnv(**words)


@pytest.mark.parametrize(
    "words, told",
    [
        (dict(mode="hard"), "choose one of survival, creative"),
        (dict(width=20), "choose from 64 x 36"),
    ],
)
def test_game_refuses(words, told):
    with pytest.raises(ValueError, match=told):
        client.Game(**words)


def test_without_the_game_the_error_tells_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(
        LuantiError,
        match="minetest and Xvfb not found: sudo apt-get install --no-install-recommends minetest xvfb",
    ):
        LuantiEnv().reset(seed=0)
    words = ["record", tmp_path, "--seeds", "1", "--minutes", "0.1"]
    refused(capsys, words, "sudo apt-get install")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["gymnasium", "Xlib"])
def test_without_a_package_the_error_tells_how_to_get_it(package):
    done = python(
        f"import sys; sys.modules['{package}'] = None\ntry: import minecraft_jepa.game.recorder\nexcept ImportError as e: print(e)"
    )
    told = done.communicate()[0]
    assert (
        f"{package} is needed to play Luanti: pip install 'minecraft_jepa[luanti]', in a clone pip install -e '.[luanti]'"
        in told
    )


def test_without_a_package_the_command_says_one_line():
    code = (
        "import sys; sys.modules['gymnasium'] = None; from minecraft_jepa.cli import main; "
        "sys.exit(main(['record', 'nowhere', '--seeds', '1']))"
    )
    done = python(code, stderr=subprocess.PIPE)
    told = done.communicate()[1]
    assert done.returncode == 1 and told.count("\n") == 1
    assert told.startswith("minecraft-jepa record: gymnasium is needed to play Luanti: pip install")


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
        'ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_ID="22"\nVERSION_CODENAME=wilma\nUBUNTU_CODENAME=noble',
        "minetest",
    ),
    "LMDE 6": (
        'ID=linuxmint\nID_LIKE=debian\nVERSION_ID="6"\nVERSION_CODENAME=faye\nDEBIAN_CODENAME=bookworm',
        "minetest",
    ),
    "Raspbian 13": (
        'ID=raspbian\nID_LIKE=debian\nVERSION_ID="13"\nVERSION_CODENAME=trixie',
        "luanti",
    ),
}


@pytest.mark.parametrize("text, package", RELEASES.values(), ids=RELEASES)
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


@needs_game
def test_missing_game_in_the_program_is_told(tmp_path, monkeypatch):
    "Debian 13 has what is played in a package of its own, which is only recommended."
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

    def send(self, *words):
        self.sent = words

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


def but(where, value):
    action = np.zeros(28)
    action[where] = value
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
    "NaN": (but(22, np.nan), "dx is not finite"),
    "infinite": (but(23, np.inf), "dy is not finite"),
    "a dict": ({}, "keyboard"),
    "no mouse": ({"keyboard": {"keys": []}}, "mouse"),
    "no keys": ({"mouse": {"dx": 0, "dy": 0, "buttons": []}, "keyboard": {}}, "keyboard.keys"),
    "no movement": ({"mouse": {"dx": 0, "buttons": []}, "keyboard": {"keys": []}}, "mouse.dy"),
    "keys of another kind": (
        {"mouse": {"dx": 0, "dy": 0, "buttons": []}, "keyboard": {"keys": [1]}},
        "keyboard.keys",
    ),
}


@pytest.mark.parametrize("action, told", WRONG.values(), ids=WRONG)
def test_action_that_is_none_is_told(played, action, told):
    with pytest.raises(ValueError) as e:
        played.step(action)
    assert told in str(e.value) and not hasattr(played.game, "sent")


@pytest.mark.parametrize(
    "action",
    [
        but(0, 1).tolist(),
        but(0, 1).astype(np.float16),
        but(0, 1).astype(int),
        but(0, 1).astype(bool),
        tuple(but(0, 1)),
        but(slice(0, 1), 1e300),
    ],
)
def test_28_numbers_of_any_type_are_taken(played, action):
    played.step(action)
    assert played.game.sent[0] == {"key.keyboard.w"}


@pytest.mark.parametrize(
    "words",
    [
        dict(world=-1),
        dict(world=1.5),
        dict(world="7"),
        dict(world=True),
        dict(width=256.0),
        dict(height="144"),
        dict(time_of_day="noon"),
        dict(time_of_day=float("nan")),
        dict(render_mode="human"),
    ],
)
def test_setting_that_cannot_be_is_told(words):
    with pytest.raises(ValueError, match=next(iter(words))):
        LuantiEnv(**words)


def test_whole_numbers_of_any_type_are_taken():
    env = LuantiEnv(world=np.uint8(3), width=np.int64(160), height=np.int16(90))
    assert (
        env.options["world"] == 3
        and type(env.options["world"]) is int
        and env.observation_space.shape == (90, 160, 3)
    )


@pytest.fixture(scope="module")
def env():
    env = LuantiEnv(world=11, biome="grassland", width=160, height=90)
    env.reset(seed=0)
    yield env
    env.close()


@needs_game
def test_gymnasium_accepts_it():
    import gymnasium
    from gymnasium.utils.env_checker import check_env

    made = gymnasium.make("Luanti-v0", width=128, height=72).unwrapped
    check_env(made)
    made.close()


@needs_game
def test_turn_and_walk_are_those_asked_for(env):
    frame, start = env.reset(seed=3)
    assert frame.shape == (90, 160, 3) and frame.std() > 5
    action = NOOP.copy()
    action[[22, 23]] = 1.5, 0.75
    for _ in range(20):
        _, _, _, failed, info = env.step(action)
    for _ in range(3):
        frame, _, _, _, info = env.step(NOOP)
    assert (
        not failed
        and (info["yaw"] - start["yaw"]) % 360 == pytest.approx(30, abs=0.1)
        and info["pitch"] - start["pitch"] == pytest.approx(15, abs=0.1)
    )
    for _ in range(30):
        env.step(
            {
                "mouse": {"dx": 0, "dy": 0, "buttons": []},
                "keyboard": {"keys": ["key.keyboard.w", "key.keyboard.space"]},
            }
        )
    info = env.step(NOOP)[4]
    assert (
        np.linalg.norm(np.subtract(info["position"], start["position"])) > 1
        and (env.render() != frame).any()
        and info["tick"] >= 54
    )


@needs_game
def test_same_seed_same_place_without_a_new_game(env):
    pids = env.game.pids
    places = [env.reset(seed=s)[1] for s in (5, 6, 5)]
    assert (
        np.linalg.norm(np.subtract(places[0]["position"], places[2]["position"]))
        < 0.6
        < np.linalg.norm(np.subtract(places[0]["position"], places[1]["position"]))
    )
    assert (
        places[0]["yaw"] == places[2]["yaw"]
        and env.game.pids == pids
        and {p["biome"] for p in places} == {"grassland"}
    )
    with pytest.raises(ValueError, match="unknown option 'bioem'"):
        env.reset(options={"bioem": "desert"})


@needs_game
def test_in_step_over_many_steps(env):
    "Turns add up to what was asked for, however many; the full count in a soak run."
    steps, info = repeats(60, 10_000), env.reset(seed=2)[1]
    action, start, right, good = NOOP.copy(), info["yaw"], 0.0, 0
    for t in range(steps):
        action[22] = 2.1 if t % 40 < 20 else -1.8
        right += action[22]
        _, _, _, failed, info = env.step(action)
        assert not failed, info["failure"]
        good += info["in_step"]
    for _ in range(3):
        info = env.step(NOOP)[4]
    assert (info["yaw"] - start - right + 180) % 360 == pytest.approx(180, abs=0.2)
    assert good > 0


@needs_game
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_lost_game_is_told_and_started_again(env, how):
    env.reset(seed=1)
    home, pids = env.game.home, env.game.pids
    os.kill(pids["minetest"], how)
    for _ in range(20):
        frame, _, _, failed, info = env.step(NOOP)
        if failed:
            break
    assert (
        failed and "log" in info["failure"] and not info["in_step"] and frame.shape == (90, 160, 3)
    )
    assert (
        wait_for(lambda: not any(alive(pids[n]) for n in ("Xvfb", "minetest")))
        and not Path(home).exists()
    )
    assert env.reset(seed=1)[0].std() > 5


@needs_game
def test_two_at_once_share_nothing_and_listen_here_only(env):
    other = client.Game(world=12, width=160, height=90)
    try:
        ports = []
        for game in (env.game, other):
            fds = [
                os.readlink(f)
                for f in Path(f"/proc/{game.pids['minetest']}/fd").iterdir()
                if f.is_symlink()
            ]
            rows = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
            bound = [row[1].split(":") for row in rows if f"socket:[{row[9]}]" in fds]
            ports += [port for address, port in bound if address == "0100007F"]
        assert (
            len(set(ports)) == 2
            and other.pids["display"] != env.game.pids["display"]
            and other.home != env.game.home
        )
        assert not env.step(NOOP)[3] and other.wait(other.latest + 5)["frame"] > 5
    finally:
        other.close()


@needs_game
@pytest.mark.parametrize("victim", ["parent", "guard"])
def test_nothing_outlives_its_parent(victim):
    process = python(
        "import time, json; from minecraft_jepa.game.client import Game\ng = Game(width=128, height=72)\nprint(json.dumps([g.pids, g.home, g.guard.pid]), flush=True)\ntime.sleep(1000)"
    )
    pids, home, guard = json.loads(process.stdout.readline())
    os.kill(process.pid if victim == "parent" else guard, signal.SIGKILL)
    try:
        assert wait_for(lambda: not any(map(alive, (pids["Xvfb"], pids["minetest"], guard)))) and (
            victim == "guard" or wait_for(lambda: not Path(home).exists())
        )
    finally:
        process.kill()
        process.wait()
        subprocess.run(["rm", "-rf", home])


@needs_game
def test_runs_without_root(tmp_path):
    if os.getuid():
        pytest.skip("all tests of this run are without root")
    drop = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--bounding-set=-all",
        sys.executable,
        "-c",
    ]
    if (
        not shutil.which("setpriv")
        or subprocess.run(
            [
                *drop,
                "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import gymnasium'], check=True)",
            ],
            capture_output=True,
        ).returncode
    ):
        pytest.skip(f"no setpriv, or {sys.executable} is not for other users")
    code = "import os; from minecraft_jepa.game.client import Game\ng = Game(width=128, height=72); print(os.getuid(), g.wait(g.latest + 3)['frame'], flush=True); g.close()"
    process = subprocess.Popen(
        [*drop, code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    uid, frame = map(int, process.communicate(timeout=120)[0].split())
    assert uid == 65534 and frame > 3


@needs_game
def test_recording_is_read_by_the_reader(tmp_path):
    counts = recorder.record(tmp_path, 0.1, seed=5, biome="savanna", width=128, height=72)
    assert [p.stem for p in find_recordings(tmp_path)] == ["world-5"] and len(
        list(tmp_path.iterdir())
    ) == 2
    recording, row = (
        open_recording(tmp_path / "world-5.mp4"),
        check_recording(tmp_path / "world-5.mp4", decode=True),
    )
    assert (
        row["used"]
        and not row["remarks"]
        and len(recording) == counts["frames"] == 120
        and recording.group == "world-5"
    )
    assert (
        recording.actions[:, 0].any()
        and (recording.actions[:, 22:24] != 0).any()
        and next(recording.frames()).shape == (72, 128, 3)
    )


@needs_game
def test_killed_recording_leaves_nothing_that_looks_whole(tmp_path):
    process = python(
        "import sys; from minecraft_jepa.cli import main; main(['record', sys.argv[1], "
        "'--seeds', '4', '--minutes', '5', '--width', '128', '--height', '72'])",
        tmp_path,
    )
    try:
        assert wait_for(
            lambda: any(p.stat().st_size > 5000 for p in tmp_path.glob("*.jsonl.part")), 90
        )
    finally:
        process.kill()
        process.wait()
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".part"]
