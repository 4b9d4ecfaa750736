"""The agent's tasks, in a stand-in world and, where it is installed, in the game."""

import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from game_here import needs_game

from minecraft_jepa.agent import films
from minecraft_jepa.agent.benchmark import ClosedLoop, ResultFile, summarize, wilson_interval
from minecraft_jepa.agent.closed_loop import Episode
from minecraft_jepa.agent.films import draw_film, load_film, stack_films
from minecraft_jepa.agent.goal_pictures import (
    Goal,
    Start,
    begin_episode,
    list_fresh_worlds,
    list_test_worlds,
    load_goal,
    make_goal,
    save_goal,
)
from minecraft_jepa.agent.planning_policy import PlanningPolicy
from minecraft_jepa.agent.policies import FixedActions, Oracle, draw_random_actions
from minecraft_jepa.agent.receding_horizon import RecedingHorizon
from minecraft_jepa.agent.tasks import TASKS, allow_action, hold_keys, measure_errors, read_info
from minecraft_jepa.data.actions import ACTION_NAMES, NOOP
from minecraft_jepa.data.splits import load_split
from minecraft_jepa.data.video import picture_to_frame
from minecraft_jepa.game.luanti import LuantiError
from minecraft_jepa.notebook_runner import run_notebook

ROOT = Path(__file__).parent.parent
FRAME = SimpleNamespace(height=48, width=80)


class StandIn:
    """A flat world without a clock, whose picture is a panorama.

    `run_on` is what happens while somebody thinks: the keys that were last sent act on.
    """

    def __init__(self, wall_at=None, dies_at=None):
        random = np.random.default_rng(0)
        self.panorama = random.integers(0, 256, (180, 720, 3)).astype(np.uint8)
        self.wall_at, self.dies_at = wall_at, dies_at
        self.closed, self.resets, self.total = 0, 0, 0

    def reset(self, seed, options):
        self.at, self.yaw, self.pitch = np.zeros(3), 7.0 * seed % 360, 6.0
        self.tick, self.slot, self.last, self.behind = 0, 3, NOOP, 0
        self.resets += 1

    def info(self, in_step=True):
        state = {"position": tuple(self.at), "yaw": self.yaw % 360, "pitch": self.pitch}
        return state | {"hotbar": self.slot, "tick": self.tick, "in_step": in_step}

    def move(self, action):
        heading = math.radians(self.yaw)
        steps = 0.195 * (action[0] - action[2])  # w and s
        ahead = steps * np.array([math.cos(heading), 0, -math.sin(heading)])
        if self.wall_at is None or np.linalg.norm(self.at + ahead) < self.wall_at:
            self.at = self.at + ahead
        self.tick += 1

    def run_on(self, ticks):
        for _ in range(ticks):
            self.move(self.last)
        self.behind = ticks

    def step(self, action):
        self.total += 1
        if self.total == self.dies_at:
            return None, 0.0, False, True, {"failure": "the game has died; its log"}
        in_step, self.behind = not self.behind, 0
        self.yaw, self.pitch = self.yaw + action[22], self.pitch + action[23]
        if action[11:20].any():
            self.slot = int(np.argmax(action[11:20]))
        self.move(action)
        self.last = action
        left, top = round(self.yaw % 360), round(60 + self.pitch)
        picture = self.panorama[top : top + 60, left : left + 160]
        return picture, 0.0, False, False, self.info(in_step)

    def close(self):
        self.closed += 1


class Thinker:
    """Acts by a function of what it is given, and lets the world run on before it answers."""

    def __init__(self, world, answer, ticks=0):
        self.world, self.answer, self.ticks, self.seen = world, answer, ticks, []

    def act(self, frame, goal_frame, history, ticks_left):
        self.seen.append((frame, history, ticks_left))
        self.world.run_on(self.ticks)
        return self.answer(len(self.seen))


@pytest.mark.parametrize("name", TASKS)
def test_oracle_solves_each_task_and_no_op_none(name):
    for number in range(4):
        world = StandIn()
        goal = make_goal(world, name, 321, "desert", number, FRAME)
        result = Episode(world, goal, FRAME).run(Oracle(TASKS[name]), "oracle")
        assert result["success"] and result["stopped"], result
        assert result["ticks"] <= TASKS[name].budget / 2
        idle = FixedActions(hold_keys(TASKS[name].budget))
        assert not Episode(world, goal, FRAME).run(idle, "no_op")["success"]


def test_goal_is_the_picture_at_the_goal_state():
    world = StandIn()
    goal = make_goal(world, "turn", 321, "desert", 0, FRAME)
    episode = Episode(world, goal, FRAME)
    episode.run(Oracle(TASKS["turn"]), "oracle")
    seen = [np.abs(f.astype(int) - goal.frame).mean() for f in episode.film["reality"]]
    assert seen[-1] < 0.5 * seen[0]
    assert np.argmin(seen) == len(seen) - 1


def test_passing_the_goal_by_is_no_success():
    world = StandIn()
    goal = make_goal(world, "turn", 321, "desert", 0, FRAME)
    right, down = (measure_errors(goal.start_state, goal.state)[k] for k in ("yaw", "pitch"))
    there = hold_keys(20, right=right / 20, down=down / 20)
    chunks = [there, hold_keys(10, right=9), hold_keys(0)]
    thinker = Thinker(world, lambda n: chunks[n - 1])
    result = Episode(world, goal, FRAME).run(thinker, "passes")
    assert result["reached"] == 20 and not result["success"]


@pytest.mark.parametrize("ticks", [0, 1, 50])
def test_nothing_moves_while_the_policy_thinks(ticks):
    world = StandIn()
    goal = make_goal(world, "walk", 321, "desert", 0, FRAME)
    walk = Thinker(world, lambda n: hold_keys(8, "w"), ticks)
    result = Episode(world, goal, FRAME).run(walk, "walker")
    assert result["drift"] == {"blocks": 0.0, "degrees": 0.0}
    assert result["ticks"] == TASKS["walk"].budget
    walked = math.dist(result["path"][0][:3], result["path"][1][:3])
    assert walked == pytest.approx(8 * 0.195, abs=0.02)  # and not the ticks of thinking


def test_drift_is_told_where_the_world_does_run_on():
    class Sliding(StandIn):
        def run_on(self, ticks):
            self.at = np.add(self.at, (0.3, 0, 0))
            self.behind = ticks

    world = Sliding()
    goal = make_goal(world, "walk", 321, "desert", 0, FRAME)
    result = Episode(world, goal, FRAME).run(Thinker(world, lambda n: hold_keys(8), 9), "slides")
    assert result["drift"]["blocks"] == pytest.approx(0.3)


def test_history_ends_with_what_was_done_and_the_rest_after_it():
    world = StandIn()
    goal = make_goal(world, "walk", 321, "desert", 0, FRAME)
    thinker = Thinker(world, lambda n: hold_keys(4, "w", right=2) if n < 3 else hold_keys(0))
    Episode(world, goal, FRAME).run(thinker, "walker")
    first, second = thinker.seen[0][1], thinker.seen[1][1]
    assert first.shape == second.shape == (25, 28)
    assert not first[:, 0].any()
    pressed = np.flatnonzero(second[:, 0])
    assert len(pressed) == 4 and np.ptp(pressed) == 3
    assert (second[pressed[-1] + 1 :] == NOOP).all()
    assert [left for *_, left in thinker.seen] == [140, 136, 132]


def test_late_ticks_are_counted_and_their_keys_are_in_the_history():
    class Late(StandIn):
        def step(self, action):
            if action[0]:
                self.move(self.last)  # the game was a tick ahead
            return super().step(action)

    world = Late()
    goal = make_goal(StandIn(), "walk", 321, "desert", 0, FRAME)
    thinker = Thinker(world, lambda n: hold_keys(5, "w", right=3) if n == 1 else hold_keys(0))
    result = Episode(world, goal, FRAME).run(thinker, "late")
    assert result["late_ticks"] == 5
    history = thinker.seen[1][1]
    assert history[:, 0].sum() == 9  # of ten ticks the first held nothing yet
    assert history[:, 22].sum() == 15  # a late tick does not turn again


def test_keys_that_change_the_world_are_released():
    action = np.ones(28)
    pressed = {ACTION_NAMES[i] for i in np.flatnonzero(allow_action(action) != NOOP)}
    assert not pressed & {"attack", "use", "pick", "e", "q", "escape", "f", "x", "y"}
    assert {"w", "space", "9", "dx"} <= pressed


@pytest.mark.parametrize(
    "actions", [np.zeros((3, 27)), np.full((2, 28), np.nan), np.zeros(28)], ids=str
)
def test_what_is_no_action_is_refused_by_the_name_of_the_policy(actions):
    world = StandIn()
    goal = make_goal(world, "turn", 321, "desert", 0, FRAME)
    with pytest.raises(ValueError, match="policy 'odd' gave"):
        Episode(world, goal, FRAME).run(Thinker(world, lambda n: actions), "odd")


def test_another_start_is_refused():
    world = StandIn()
    goal = make_goal(world, "turn", 321, "desert", 0, FRAME)
    state = goal.start_state | {"yaw": goal.start_state["yaw"] + 2}
    other = Goal(goal.task, goal.start, state, goal.state, goal.frame)
    with pytest.raises(LuantiError, match="the start is another one"):
        begin_episode(world, other)


def test_where_a_wall_is_in_the_way_another_start_is_tried():
    assert make_goal(StandIn(), "walk", 321, "desert", 0, FRAME).start.attempt == 0
    blocked = StandIn(wall_at=2.6)
    goal = make_goal(blocked, "walk", 321, "desert", 0, FRAME)
    assert 2 <= math.dist(goal.state["position"], goal.start_state["position"]) <= 8
    with pytest.raises(LuantiError, match="no room for 'walk'"):
        make_goal(StandIn(wall_at=1), "walk", 321, "desert", 0, FRAME)


def test_goals_come_back_from_disk(tmp_path):
    goal = make_goal(StandIn(), "turn and walk", 321, "desert", 1, FRAME)
    again = load_goal(save_goal(goal, tmp_path))
    assert (again.frame == goal.frame).all()
    assert (again.task, again.start, again.state) == (goal.task, goal.start, goal.state)
    (tmp_path / f"{goal.name}.json").write_text("{}")
    with pytest.raises(ValueError, match="delete both"):
        load_goal(tmp_path / f"{goal.name}.json")


def test_worlds_are_test_worlds():
    split = load_split(ROOT / "data")
    worlds = [seed for seed, _ in list_test_worlds(split, 8)]
    known = [*split["train"], *split["validation"]]
    assert not {f"world-{seed}" for seed in worlds} & {name.split("_")[0] for name in known}


def test_world_that_is_named_twice_is_one_world():
    split = load_split(ROOT / "data")
    assert [seed for seed, _ in list_fresh_worlds(split, "933, 934, 933")] == [933, 934]


POLICIES = {
    "oracle": lambda goal: Oracle(TASKS[goal.task]),
    "no_op": lambda goal: FixedActions(hold_keys(TASKS[goal.task].budget)),
}


def run(folder, make_world=StandIn, starts=range(2), policies=POLICIES, settings=None):
    lines = []
    loop = ClosedLoop(make_world, FRAME, folder, settings or {"weights": "a"}, ("oracle",))
    loop.run_world(321, "desert", starts, ["turn", "tool"], policies, lines.append)
    return lines


def test_run_goes_on_where_it_was_stopped(tmp_path):
    assert len(run(tmp_path, starts=range(1))) == 4
    first = json.loads((tmp_path / "world-321.json").read_text())["results"]
    assert len(run(tmp_path)) == 4
    results = json.loads((tmp_path / "world-321.json").read_text())["results"]
    assert results[:4] == first and len(results) == 8
    assert run(tmp_path) == []
    goals = {(r["task"], r["start"], *r["start_errors"].values()) for r in results}
    assert len(goals) == 4  # the same for both methods
    assert len([*tmp_path.glob("films/*-oracle.npz")]) == 4
    assert not [*tmp_path.rglob("*.part")]


def test_stopped_in_an_episode_it_loses_that_episode_alone(tmp_path):
    class Stop(Exception):
        pass

    def stop(goal):
        raise Stop

    with pytest.raises(Stop):
        run(tmp_path, policies=POLICIES | {"stops": stop})
    assert len(ResultFile(tmp_path / "world-321.json", {"weights": "a"}).results) == 2
    assert len(run(tmp_path)) == 6


def test_game_that_dies_is_started_again(tmp_path):
    worlds = []

    def make_world():
        worlds.append(StandIn(dies_at=90 if not worlds else None))
        return worlds[-1]

    lines = run(tmp_path, make_world, range(1))
    assert any("the game has died" in line for line in lines)
    assert [world.closed for world in worlds] == [1, 1]
    assert len(ResultFile(tmp_path / "world-321.json", {"weights": "a"}).results) == 4
    with pytest.raises(LuantiError):
        run(tmp_path / "b", lambda: StandIn(dies_at=5))


def test_start_that_the_game_gives_no_second_time_is_left_out_for_all_methods(tmp_path):
    resets = itertools.count()

    class Moving(StandIn):
        def reset(self, seed, options):
            super().reset(seed, options)
            if seed == 321_050:  # start 1
                self.yaw += 5 * next(resets)

    lines = run(tmp_path, Moving)
    assert sum("left out for all methods" in line for line in lines) == 2  # of turn and tool
    file = ResultFile(tmp_path / "world-321.json", {"weights": "a"})
    assert {r["start"] for r in file.results} == {0}
    assert sorted(file.skipped) == [["tool", 1], ["turn", 1]]
    assert run(tmp_path, Moving) == []  # it is not tried again


def test_start_without_room_is_left_out_at_once_and_the_others_are_run(tmp_path):
    """Its spawn points are drawn by its seed, so a second try finds no other."""
    resets = []

    class Walled(StandIn):
        def reset(self, seed, options):
            super().reset(seed, options)
            resets.append(seed)
            self.wall_at = 1 if seed < 321_050 else None  # around all points of start 0

    lines = []
    loop = ClosedLoop(Walled, FRAME, tmp_path, {"weights": "a"})
    loop.run_world(321, "desert", range(2), ["walk"], POLICIES, lines.append)
    assert "no room for 'walk'" in lines[0] and "left out for all methods" in lines[1]
    assert [seed for seed in resets if seed < 321_050] == [*range(321_000, 321_020)]
    file = ResultFile(tmp_path / "world-321.json", {"weights": "a"})
    assert [r["start"] for r in file.results] == [1, 1]
    assert file.skipped == [["walk", 0]]


def test_goals_of_another_size_of_frames_are_made_anew(tmp_path):
    """Who deletes results as the error about other weights says keeps the goals."""
    run(tmp_path, starts=range(1))
    (tmp_path / "world-321.json").unlink()
    smaller, settings = SimpleNamespace(height=36, width=60), {"weights": "b"}
    loop = ClosedLoop(StandIn, smaller, tmp_path, settings)
    loop.run_world(321, "desert", range(1), ["turn"], POLICIES, print)
    assert load_goal(tmp_path / "goals/turn-321-0.json").frame.shape == (3, 36, 60)
    assert load_goal(tmp_path / "goals/tool-321-0.json").frame.shape == (3, 48, 80)


def test_start_left_out_takes_its_results_with_it(tmp_path):
    file = ResultFile(tmp_path / "world-1.json", {"weights": "a"})
    for number in range(2):
        file.add({"task": "turn", "start": number, "method": "a"})
    file.skip("turn", 1)
    again = ResultFile(tmp_path / "world-1.json", {"weights": "a"})
    assert [r["start"] for r in again.results] == [0]
    assert again.skipped == [["turn", 1]]


def test_start_left_out_by_another_process_gets_no_result(tmp_path):
    one, other = (ResultFile(tmp_path / "world-1.json", {"weights": "a"}) for _ in range(2))
    one.skip("turn", 0)
    assert not other.add({"task": "turn", "start": 0, "method": "a"})
    assert other.add({"task": "tool", "start": 0, "method": "a"})
    goal = SimpleNamespace(task="turn", start=SimpleNamespace(number=0))
    assert other.has(goal, "b")  # no method tries it
    assert [r["task"] for r in ResultFile(one.path, {"weights": "a"}).results] == ["tool"]


def test_results_of_other_weights_are_not_mixed(tmp_path):
    run(tmp_path, starts=range(1))
    with pytest.raises(ValueError, match="another weights"):
        run(tmp_path, settings={"weights": "b"})
    (tmp_path / "world-321.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        run(tmp_path)


def test_two_processes_lose_no_result_of_each_other(tmp_path):
    path, settings = tmp_path / "world-1.json", {"weights": "a"}
    one, other = (ResultFile(path, settings) for _ in range(2))
    for n, file in enumerate((one, other, one)):
        file.add({"task": "turn", "start": n, "method": "a"})
    assert [r["start"] for r in ResultFile(path, settings).results] == [0, 1, 2]
    assert not other.add({"task": "turn", "start": 2, "method": "a"})  # both were at it
    assert [r["start"] for r in ResultFile(path, settings).results] == [0, 1, 2]
    goal = SimpleNamespace(task="turn", start=SimpleNamespace(number=2))
    assert other.has(goal, "a") and one.has(goal, "a") and not one.has(goal, "b")


def test_films_are_drawn(tmp_path):
    run(tmp_path, starts=range(1))
    film = load_film(tmp_path / "films" / "turn-321-0-oracle.npz")
    assert film["reality"].shape == film["imagined"].shape
    assert len(film["actions"]) == len(film["reality"]) - 1
    pictures = stack_films({"reached": draw_film(film), "again": draw_film(film)})
    assert len({p.tobytes() for p in pictures}) > 3


def test_killed_between_film_and_result_the_episode_is_played_again(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(ResultFile, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, starts=range(1))
    assert len([*tmp_path.glob("films/*.npz")]) == 1
    assert len(run(tmp_path, starts=range(1))) == 4


def test_film_of_an_episode_that_ends_at_its_first_look_is_one_picture(tmp_path):
    stops = {"oracle": lambda goal: SimpleNamespace(act=lambda *told: hold_keys(0))}
    run(tmp_path, starts=range(1), policies=stops)
    film = load_film(tmp_path / "films" / "turn-321-0-oracle.npz")
    assert film["actions"].shape == (0, 28)
    assert len(draw_film(film)) == 1


def test_film_says_where_nothing_was_imagined_and_counts_ticks(monkeypatch):
    calls = {}
    monkeypatch.setattr(films, "comparison_frames", lambda *a, **k: calls.update(k, panels=a[0]))
    frames = np.full((8, 3, 48, 80), 90, np.uint8)
    imagined = frames.copy()
    imagined[4] = 0
    film = {"reality": frames, "imagined": imagined, "goal": frames[0]}
    draw_film(film | {"actions": hold_keys(7)}, every=4, every_imagined=3)
    assert list(calls["ticks"]) == [0, 3, 4, 6, 7]
    shown = calls["panels"]["imagined"]
    assert (shown[1] == 90).all() and len(np.unique(shown[2])) > 2
    imagined[:] = 0
    draw_film(film | {"actions": hold_keys(7)}, every=4, every_imagined=3)
    assert list(calls["ticks"]) == [0, 4, 7]


def test_intervals_and_counts():
    assert wilson_interval(0, 10) == pytest.approx([0, 0.2775], abs=1e-3)
    assert wilson_interval(10, 10) == pytest.approx([0.7225, 1], abs=1e-3)
    with pytest.raises(ValueError, match="episodes=0"):
        wilson_interval(0, 0)
    made = {"task": "turn", "reached": 3, "ticks": 5, "seconds_per_plan": 1.0}
    rows = [made | {"method": m, "success": s} for m, s in (("a", True), ("a", False), ("b", True))]
    table = summarize(rows)["turn"]
    assert (table["a"]["successes"], table["a"]["episodes"]) == (1, 2)
    assert table["b"]["interval"] == wilson_interval(1, 1)


def test_random_actions_do_everything_that_counts():
    actions = draw_random_actions(np.random.default_rng(0), 3000)
    assert np.abs(actions[:, 22:24]).max(0) == pytest.approx([10, 4], abs=0.3)
    assert 0.3 < actions[:, 0].mean() < 0.7
    assert actions[:, 11:20].any(0).all()


class Sighted:
    """A planner that turns towards (yaw, pitch) where the yaw is in view."""

    other = 0.0  # what no turn can lower

    def plan(self, model, z, goal, history, horizon):
        gap = (goal - z + 180) % 360 - 180
        turn = gap if abs(gap[0]) < 50 else np.zeros(2)
        left = np.abs(gap - turn).max()
        actions = hold_keys(horizon, right=turn[0] / horizon, down=turn[1] / horizon)
        return SimpleNamespace(actions=actions, cost=left**2 + self.other)


class Known(PlanningPolicy):
    """The agent with an exact sense of place in place of the encoder, blind beyond 50 degrees."""

    def __init__(self, world, goal, planner):
        groups = {"turn": ("camera",), "tool": ("hotbar",)}.get(goal.task, ("camera", "move"))
        super().__init__(None, planner, groups=groups)
        self.world, self.state = world, goal.state

    def encode(self, frame, goal_frame):
        self.now = np.array([self.world.yaw, self.world.pitch])
        self.goal = np.array([self.state["yaw"], self.state["pitch"]])
        self.errors = measure_errors(read_info(self.world.info()), self.state)
        self.views = [torch.from_numpy(self.now)]
        if self.planner:
            self.planner.other = self.errors["blocks"] ** 2 + self.errors["slot"]

    def compare_looks(self, looks):
        yaw = self.goal[0] - torch.stack(looks)[:, 0].numpy()
        return np.abs((yaw + 180) % 360 - 180)

    def change_since(self, before):
        return 1.0  # it always thinks that it has moved

    def distance(self):
        angle = max(abs(self.errors["yaw"]), abs(self.errors["pitch"]))
        angle = min(angle, 50 + angle / 100)
        return angle**2 + self.errors["blocks"] ** 2 + self.errors["slot"]


class Alone(Known):
    """Without trying."""

    episode_steps = RecedingHorizon.episode_steps


def count_successes(name, agent, planner, starts=6):
    successes = 0
    for number in range(starts):
        world = StandIn()
        goal = make_goal(world, name, 321, "desert", number, FRAME)
        successes += Episode(world, goal, FRAME).run(agent(world, goal, planner), "a")["success"]
    return successes


def test_agent_that_turns_around_finds_what_is_out_of_view():
    assert count_successes("turn", Known, Sighted()) == 6
    assert count_successes("turn", Alone, Sighted()) < 6
    assert count_successes("turn", Known, None) < 6


class TrueTurn:
    """A guess that knows the turn, and says how sure it is where the goal is in view."""

    def __init__(self, expected_error):
        self.expected_error = expected_error

    def guess(self, z, goal, horizon):
        gap = (goal - z + 180) % 360 - 180
        error = self.expected_error if abs(gap[0]) < 50 else 90.0
        return gap / horizon, np.full(2, error / horizon)


def test_agent_that_may_only_turn_goes_by_what_it_imagines():
    """A view looks more like the goal than the goal's own does, but no plan leads from it there."""

    class Deceived(Known):
        def distance(self):
            angle = abs((self.errors["yaw"] - 120 + 180) % 360 - 180)
            return min(super().distance(), angle**2 - 1000)

    world, planner = StandIn(), Sighted()
    planner.guess = TrueTurn(1.0)
    for number in range(4):
        goal = make_goal(world, "turn", 321, "desert", number, FRAME)
        result = Episode(world, goal, FRAME).run(Deceived(world, goal, planner), "a")
        assert result["success"] and result["stopped"]
        assert result["errors"]["blocks"] == 0
        alone = Episode(world, goal, FRAME).run(Deceived(world, goal, None), "a")
        assert not alone["success"]


def test_agent_that_went_the_wrong_way_comes_back_and_tries_another():
    """A wrong direction looks likelier than the goal's, and nothing comes nearer there."""

    class Misled(Known):
        def compare_looks(self, looks):
            yaw = self.goal[0] - torch.stack(looks)[:, 0].numpy()
            apart = [np.abs((yaw + degrees + 180) % 360 - 180) for degrees in (0, 150)]
            return np.minimum(apart[0], apart[1] - 30)

    world, sure = StandIn(), Sighted()
    sure.guess = TrueTurn(1.0)
    for number in range(4):
        goal = make_goal(world, "turn and walk", 321, "desert", number, FRAME)
        result = Episode(world, goal, FRAME).run(Misled(world, goal, sure), "a")
        assert result["success"], result
        # Without a guess it never doubts, and stays where it went first.
        alone = Episode(world, goal, FRAME).run(Misled(world, goal, Sighted()), "a")
        assert not alone["success"]


def test_agent_that_may_only_walk_does_not_turn():
    world, planner = StandIn(), Sighted()
    planner.guess = TrueTurn(1.0)
    goal = make_goal(world, "turn and walk", 321, "desert", 0, FRAME)
    agent = Known(world, goal, planner)
    agent.groups = ("move",)
    result = Episode(world, goal, FRAME).run(agent, "a")
    assert {tuple(place[3:]) for place in result["path"]} == {tuple(result["path"][0][3:])}
    assert len({tuple(place[:3]) for place in result["path"]}) > 1


def test_agent_that_a_wall_has_stopped_comes_back_to_where_the_goal_fitted_best():
    world = StandIn(wall_at=4.6)
    goal = make_goal(world, "walk", 321, "desert", 0, FRAME)
    blocks = math.dist(goal.state["position"], goal.start_state["position"])
    assert blocks < 4.4  # so the wall lies behind the goal
    result = Episode(world, goal, FRAME).run(Known(world, goal, Sighted()), "a")
    assert result["success"], result


@pytest.mark.parametrize("name", ["walk", "turn and walk", "tool"])
def test_agent_that_tries_walks_and_changes_the_slot(name):
    assert count_successes(name, Known, Sighted(), 4) == 4
    assert count_successes(name, Alone, Sighted(), 4) == 0


@pytest.mark.parametrize("name", ["10_agent", "11_appearance"])
def test_without_the_game_the_notebook_names_the_line_that_installs_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    parameters = {"data_dir": ROOT / "data", "out_dir": tmp_path / "out"}
    executed = tmp_path / f"{name}.ipynb"
    run_notebook(ROOT / f"nbs/study/{name}.ipynb", executed, parameters)
    assert "sudo apt-get install" in executed.read_text().split("skipped,")[1]
    assert not [*(tmp_path / "out").iterdir()]


@pytest.fixture(scope="module")
def env():
    from minecraft_jepa.game.env import LuantiEnv

    env = LuantiEnv(slow_motion=4)
    yield env
    env.close()


@needs_game
def test_in_the_game_picture_and_state_are_those_of_one_frame(env):
    goal = make_goal(env, "turn", 319, "cold_desert", 0, FRAME)
    episode = Episode(env, goal, FRAME)
    result = episode.run(Oracle(TASKS["turn"]), "oracle")
    assert result["success"], result
    assert result["drift"]["blocks"] < 0.01
    seen = [np.abs(f.astype(int) - goal.frame).mean() for f in episode.film["reality"]]
    assert seen[-1] < 0.5 * seen[0]


@needs_game
def test_in_the_game_the_player_stands_still_while_somebody_thinks(env):
    class Slow:
        def __init__(self):
            self.walks = [hold_keys(6, "w"), hold_keys(6, "w"), hold_keys(0)]

        def act(self, *told):
            time.sleep(1)
            return self.walks.pop(0)

    goal = make_goal(env, "tool", 319, "cold_desert", 0, FRAME)
    result = Episode(env, goal, FRAME).run(Slow(), "slow")
    assert result["drift"]["blocks"] < 0.01
    assert result["drift"]["degrees"] < 0.01


@needs_game
def test_in_the_game_a_stopped_process_makes_up_for_the_time(env):
    """The reason why the keys rest: SIGSTOP alone does not hold the player."""
    goal = make_goal(env, "tool", 319, "cold_desert", 0, FRAME)
    begin_episode(env, goal)
    for action in hold_keys(8, "w"):
        *_, info = env.step(action)
    before, pid = info["position"], env.game.pids["minetest"]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(pid, signal.SIGCONT)
    *_, info = env.step(hold_keys(1, "w")[0])
    assert math.dist(read_info(info)["position"], before) > 0.3


@needs_game
def test_in_the_game_slow_motion_is_a_walk_at_a_quarter_of_its_speed(env):
    goal = make_goal(env, "walk", 319, "cold_desert", 0, FRAME)
    begin_episode(env, goal)
    trail = []
    for action in hold_keys(12, "w"):
        *_, info = env.step(action)
        trail.append((env.game.states[env.shot[0]]["micros"] / 1e6, info["position"]))
    (begin, here), (end, there) = trail[4], trail[9]
    assert math.dist(here, there) / (end - begin) == pytest.approx(
        4 / 4, rel=0.15
    )  # blocks a second


@needs_game
def test_in_the_game_the_slot_is_chosen(env):
    goal = make_goal(env, "tool", 319, "cold_desert", 1, FRAME)
    assert goal.start_state["hotbar"] == 0
    assert Episode(env, goal, FRAME).run(Oracle(TASKS["tool"]), "oracle")["success"]


def test_pictures_are_resized_by_their_mean():
    picture = np.zeros((96, 160, 3), np.uint8)
    picture[::2] = 200
    assert (picture_to_frame(picture, FRAME) == 100).all()
    assert picture_to_frame(picture, FRAME).shape == (3, 48, 80)
    assert Start(321, "desert", 2, 1).seed == 321101
