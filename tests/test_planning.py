"""Planners on a toy world whose best plan is known by rule, networks on pairs, and the scores."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pairs
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minecraft_jepa.config import preset
from minecraft_jepa.data.actions import CAMERA, NOOP
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.planning import action_prior, inverse_model, temporal_distance
from minecraft_jepa.planning.action_prior import ActionPrior, nearest_horizon
from minecraft_jepa.planning.benchmark import join_guess_and_habit
from minecraft_jepa.planning.costs import COSTS, squared_distance
from minecraft_jepa.planning.goal_motion import RelativeMotionNet
from minecraft_jepa.planning.inverse_model import InverseModel
from minecraft_jepa.planning.motion_pairs import LatentClip, Pairs, accumulate_motion
from minecraft_jepa.planning.networks import training_sides
from minecraft_jepa.planning.planners import PLANNERS, default_planner
from minecraft_jepa.planning.search import (
    CountingModel,
    Search,
    best_plans,
    imagine_plans,
    toy_problem,
)
from minecraft_jepa.planning.swm import SwmPlanner, import_solvers
from minecraft_jepa.planning.temporal_distance import RemainingMotionCost, TemporalDistance

DATA = Path(__file__).parent.parent / "data"
WEIGHTS = DATA / "weights/tiny"
PRIOR = ActionPrior.load(WEIGHTS / "action_prior.json")
TOKENS = preset("tiny").frame.patches


def make(name, **options):
    "A planner with a budget that finds the answers of the toy world."
    given = {"samples": 8, "rounds": 25} if name == "gradient" else {"samples": 96, "rounds": 10}
    return PLANNERS[name](PRIOR, **(given | options))


def turned(plan):
    return plan.actions[:, CAMERA].sum(0)


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize(("right", "down"), [(24, -8), (-16, 6)])
def test_planner_finds_the_turn(name, right, down):
    plan = make(name).plan(CountingModel(), *toy_problem(right, down, forward=8))
    assert np.abs(turned(plan) - [right, down]).max() < (11 if name == "random_shooting" else 4)
    assert plan.actions[:, 0].mean() > 0.5 and np.isfinite(plan.costs).all()
    assert plan.imagined_ticks >= plan.candidates.shape[0] * 8 and plan.seconds > 0


@pytest.mark.parametrize("name", PLANNERS)
def test_wrong_sign_of_the_cost_is_caught(name):
    def away(latents, goal):
        return -squared_distance(latents, goal)

    plan = make(name, cost=away).plan(CountingModel(), *toy_problem(24, -8, forward=8))
    assert np.abs(turned(plan) - [24, -8]).max() > 12


@pytest.mark.parametrize("name", PLANNERS)
def test_goal_equal_to_the_start_gives_no_op(name):
    plan = make(name).plan(CountingModel(), *toy_problem())
    assert np.abs(turned(plan)).max() < (11 if name == "random_shooting" else 3)
    assert not plan.actions[:, :4].any() or plan.cost < 0.05


@pytest.mark.parametrize("name", PLANNERS)
def test_same_seed_same_plan(name):
    problem = toy_problem(12, 4)
    plans = [make(name, seed=seed).plan(CountingModel(), *problem) for seed in (3, 3, 4)]
    assert (plans[0].actions == plans[1].actions).all()
    assert (plans[0].candidates[:20] != plans[2].candidates[:20]).any()


@pytest.mark.parametrize("name", PLANNERS)
def test_groups_that_are_off_stay_at_rest(name):
    plan = make(name, groups=("move",), rounds=2).plan(
        CountingModel(), *toy_problem(24, 0, forward=8)
    )
    assert not plan.candidates[..., CAMERA].any() and not plan.candidates[..., 7:20].any()
    plan = make(name, groups="camera", rounds=2).plan(
        CountingModel(), *toy_problem(24, 0, forward=8)
    )
    assert not plan.candidates[..., :20].any() and plan.candidates[..., 22].any()
    assert not plan.actions[:, :20].any()


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"goal": None}, "goal is missing"),
        ({"goal": torch.zeros(1, 5, 1)}, "goal is .* as z is"),
        ({"z": torch.full((1, 4, 1), torch.nan)}, "not finite"),
        ({"horizon": 0}, "horizon"),
        ({"history": np.zeros((3, 5))}, "history is"),
        ({"history": np.full((3, 28), np.inf)}, "history holds"),
    ],
)
def test_bad_input_is_told(name, change, told):
    problem = dict(zip(("z", "goal", "history", "horizon"), toy_problem())) | change
    with pytest.raises(ValueError, match=told):
        make(name).plan(CountingModel(), **problem)


def test_plans_stay_within_what_the_data_has():
    for name in PLANNERS:
        plan = make(name, rounds=3).plan(CountingModel(), *toy_problem(400, 300))
        assert (np.abs(plan.candidates[..., CAMERA]) <= PRIOR.limit + 1e-5).all(), name


def test_warm_start_is_among_what_is_tried():
    start = np.tile(NOOP, (8, 1))
    start[:, 22] = 3.3
    for name in ("primitives", "cem", "icem"):
        plan = make(name, rounds=1).plan(CountingModel(), *toy_problem(26.4), start=start)
        assert np.isclose(plan.candidates[..., 22], 3.3, atol=1e-4).all(1).any(), name


@pytest.mark.parametrize("name", sorted({*PLANNERS} - {"gradient"}))
def test_warm_start_stays_within_the_limit_and_the_groups(name):
    start = np.tile(NOOP, (8, 1))
    start[:, 22], start[:, 0], start[:, 7] = 50, 1, 1
    for groups in ("camera", "move"):
        problem = toy_problem(40)
        plan = make(name, groups=groups, rounds=1).plan(CountingModel(), *problem, start=start)
        tried = np.concatenate([plan.candidates, plan.actions[None]])
        assert (np.abs(tried[..., CAMERA]) <= PRIOR.limit + 1e-5).all()
        assert not tried[..., 7].any()  # no key of either group
        assert not tried[..., 0 if groups == "camera" else 22].any()


def test_a_search_from_the_goal_alone_does_not_look_at_the_history():
    z, goal, history, horizon = toy_problem(16)
    other = history.copy()
    other[-3:, 22], other[-1, 0] = 6, 1
    for draws, is_same in ((False, True), (True, False)):
        planner = make("primitives", rounds=1, draw_from_history=draws)
        plans = [planner.plan(CountingModel(), z, goal, h, horizon) for h in (history, other)]
        assert np.array_equal(plans[0].candidates, plans[1].candidates) == is_same


def test_the_gradient_planner_answers_with_whole_keys():
    for right in (-16, 8, 24):
        plan = make("gradient", rounds=3).plan(CountingModel(), *toy_problem(right, 4, forward=3))
        assert set(np.unique(plan.actions[:, :7])) <= {0.0, 1.0}


def test_habit_follows_the_last_ticks():
    z, goal, history, horizon = toy_problem()
    history[-3:, 22] = 6
    free = make("primitives").plan(CountingModel(), z, goal, history, horizon)
    bound = make("primitives", habit_weight=5.0).plan(CountingModel(), z, goal, history, horizon)
    assert turned(bound)[0] > turned(free)[0] + 3


def test_costs_are_lowest_at_the_goal():
    path = torch.randn(3, 8, TOKENS, 128)
    distance = TemporalDistance(preset("tiny")).eval()
    distance.network.amount.data.normal_()
    for name, cost in (COSTS | {"left": RemainingMotionCost(distance)}).items():
        if name != "summed":
            assert cost(path, path[1:2, -1]).argmin() == 1, name


def test_history_computed_once_changes_nothing():
    model = WorldModel(preset("tiny")).eval()
    z, history, plans = torch.randn(1, TOKENS, 128), torch.randn(24, 28), torch.randn(3, 4, 28)
    with torch.inference_mode():
        together = torch.cat([history.expand(3, -1, -1), plans], 1)
        slow = model.imagine(z, together)
        assert torch.allclose(imagine_plans(model, z, history, plans), slow, atol=1e-4)


@pytest.mark.parametrize("name", PLANNERS)
def test_latents_of_inference_mode_will_do(name):
    model = WorldModel(preset("tiny")).eval()
    with torch.inference_mode():
        z, goal = torch.randn(2, TOKENS, 128)
    plan = make(name, samples=4, rounds=1).plan(model, z, goal, None, 2)
    assert plan.actions.shape == (2, 28) and np.isfinite(plan.cost)


def test_swapped_frames_give_the_opposite_motion():
    network = RelativeMotionNet((6, 10), 128).eval()
    network.amount.data.normal_()
    a, b = torch.randn(2, 2, 60, 128)
    with torch.inference_mode():
        motion, ticks, _ = network(a, b)
        back, back_ticks, _ = network(b, a)
    assert torch.allclose(motion, -back, atol=1e-3) and motion.abs().max() > 1e-2
    assert torch.allclose(ticks, back_ticks, atol=1e-3)


def test_expected_error_is_larger_where_frames_do_not_overlap():
    inverse, model = InverseModel.from_pretrained(WEIGHTS), WorldModel.from_pretrained(WEIGHTS)
    names = ["world-319_1320", "world-320_1060", "world-343_1320", "world-344_0000"]
    store = ClipStore.build(DATA, model.config.frame, names=names, progress=False)
    frames = torch.stack([torch.from_numpy(np.array(store[n].frames[[40, 41]])) for n in names])
    with torch.inference_mode():
        latents = model.encode(frames.flatten(0, 1)).unflatten(0, (4, 2))
    near = [inverse.guess(now[None], goal[None], 1)[1][0] for now, goal in latents]
    far = [inverse.guess(latents[i, :1], latents[i - 1, :1], 1)[1][0] for i in range(4)]
    assert max(near) < min(far)  # one tick apart, or in two worlds


def test_ticks_are_learned_from_real_pairs_alone(monkeypatch):
    monkeypatch.setattr(temporal_distance, "train_on_pairs", lambda *given: given)
    actions, frames = torch.tensor(NOOP).repeat(4, 1), torch.arange(4.0)[:, None, None]
    clip = LatentClip(torch.stack([frames, frames]), *accumulate_motion(actions), None, actions)
    start = {"clip": 0, "t": 0, "ticks": [1], "latents": torch.full((2, 1, 1, 1), 9.0)}
    start["cumulative_motion"] = torch.zeros(2, 1, 13)
    given = RelativeMotionNet(preset("tiny").frame.grid, 128, extra=1)
    for imagined, real in (([], 32), ([start], 16)):
        distance, (_, loss, draw, *_) = temporal_distance.train_temporal_distance(
            preset("tiny"), [clip], [clip], imagined, 1, network=given
        )
        drawn = draw(np.random.default_rng(0))
        assert (drawn.ticks > 0).tolist() == [True] * real + [False] * (32 - real)
        assert torch.equal(drawn.now.flatten() == 9, drawn.ticks == 0)
    own, given = distance.network.state_dict(), given.state_dict()
    # The network that is given takes one number more.
    assert [k for k in own if not torch.equal(own[k], given[k])] == ["mlp.0.weight"]
    distance.network.forward = lambda now, goal: (torch.zeros(2, 4), torch.full((2,), 8.0), None)
    pair = Pairs(None, None, torch.zeros(2, 4), torch.tensor([24.0, 0.0]), None)
    assert float(loss(pair)) == pytest.approx(0.225)  # 0.3 times the mean of 1.5 and 0


def test_the_inverse_model_learns_the_keys_too(monkeypatch):
    monkeypatch.setattr(inverse_model, "train_on_pairs", lambda *given: given)
    monkeypatch.setattr(inverse_model, "fit_expected_error", lambda *given: None)
    inverse, (_, loss, *_) = inverse_model.train_inverse_model(preset("tiny"), [], [], 1)
    inverse.network.forward = lambda *given: (torch.zeros(1, 4), None, torch.zeros(1, 9))
    z, ones = torch.zeros(1, 1, 1), torch.ones(1, 9)
    pair = Pairs(z, z, torch.zeros(1, 4), torch.ones(1), ones)
    assert float(loss(pair)) == pytest.approx(0.3 * np.log(2))  # the motion is right


def test_shipped_networks_load_and_plan():
    planner = default_planner(WEIGHTS)
    assert isinstance(planner.guess, InverseModel)
    TemporalDistance.from_pretrained(WEIGHTS)
    model = WorldModel.from_pretrained(WEIGHTS)
    tokens = model.config.frame.patches
    z, goal = torch.randn(2, tokens, 128)
    plan = replace(planner, num_initial_plans=8, rounds=0).plan(model, z, goal, None, 3)
    assert plan.actions.shape == (3, 28) and plan.latents.shape == (3, tokens, 128)


def test_guess_and_habit_are_weighed_by_their_precision():
    history = np.tile(NOOP, (24, 1))
    window = SimpleNamespace(
        actions=np.tile(NOOP, (8, 1)), history=history, z=torch.zeros(1, 2, 3), goal=None
    )
    habit, _ = PRIOR.expect(history, 8)
    deviation = PRIOR.residual[nearest_horizon(8)].std(0)

    def turn_of(mean, spread):
        guess = SimpleNamespace(guess=lambda *_: (np.array(mean), np.array(spread)))
        return join_guess_and_habit(PRIOR, guess, window)[:, CAMERA]

    assert np.allclose(turn_of([3.0, -2.0], [1e-4, 1e-4]), [3.0, -2.0], atol=1e-3)  # sure of it
    assert np.allclose(turn_of([3.0, -2.0], [1e4, 1e4]), habit, atol=1e-3)  # knows nothing
    assert np.allclose(turn_of([3.0, -2.0], deviation), np.mean([habit, [3.0, -2.0]], 0), atol=1e-3)


def test_without_a_split_planning_learns_from_none_that_it_is_judged_on(tmp_path):
    def sides_of(seeds):  # the weights have seen none of these
        folder = tmp_path / str(len(seeds))
        for seed in seeds:
            pairs.make_pair(folder, f"world-{seed}_0000", 40)
        store = ClipStore.build(folder, preset("tiny").frame, folder / "clips", progress=False)
        return training_sides(WEIGHTS, folder, store)

    sides = sides_of(range(901, 907))
    assert len(sides["train"]) == len(sides["validation"]) == 2
    learned = {*sides["train"], *sides["validation"]}
    assert len(learned) == 4  # and two are left to be judged on
    with pytest.raises(ValueError, match="2 recordings that the weights have not seen"):
        sides_of(range(901, 903))
    learned = json.loads((WEIGHTS / "training.json").read_text())["train"]
    seeds = sorted({int(name.partition("_")[0].removeprefix("world-")) for name in learned})[:3]
    one = sides_of([*range(901, 904), seeds[0]])
    assert one == {"train": ["world-901_0000"], "validation": ["world-902_0000"]}
    three = sides_of([*seeds, 904, 905])  # whose pieces have other names than those it learned from
    first, second, third = (f"world-{seed}_0000" for seed in seeds)
    assert three == {"train": [first, third], "validation": [second]}


def test_what_planning_has_learned_from_stays_on_its_side_when_recordings_are_added(tmp_path):
    names = [f"world-{seed}_0000" for seed in range(901, 907)]
    told = {"train": names[:2], "validation": names[3:4]}
    training = {"train": [], "validation": [], "planning": told}
    (tmp_path / "training.json").write_text(json.dumps(training))
    assert training_sides(tmp_path, tmp_path, SimpleNamespace(names=names)) == told
    later = [*names, "world-901_0500", "world-909_0000"]  # one more of a world that it learned in
    sides = training_sides(tmp_path, tmp_path, SimpleNamespace(names=later))
    assert sides == {"train": [*names[:2], "world-901_0500"], "validation": names[3:4]}
    elsewhere = SimpleNamespace(names=names[4:])  # what it learned from is not here
    with pytest.raises(ValueError, match="no such folder"):  # so it asks the folder
        training_sides(tmp_path, tmp_path / "empty", elsewhere)


def test_a_missing_prior_says_how_to_make_it(tmp_path):
    with pytest.raises(ValueError, match="7_planning"):
        ActionPrior.load(tmp_path / "action_prior.json")


@pytest.mark.parametrize("name", PLANNERS)
def test_futures_that_are_not_finite_count_for_nothing(name):
    def one_is_finite(latents, goal):
        costs = squared_distance(latents, goal)
        return torch.where(costs > costs.min(), torch.nan, costs)

    def none_is_finite(latents, goal):
        return torch.nan * squared_distance(latents, goal)

    plan = PLANNERS[name](PRIOR, cost=one_is_finite).plan(CountingModel(), *toy_problem(24, -8))
    assert np.isfinite(plan.actions).all()
    with pytest.raises(ValueError, match="no plan has a finite cost"):
        PLANNERS[name](PRIOR, cost=none_is_finite).plan(CountingModel(), *toy_problem(24, -8))


def test_a_gradient_that_is_not_finite_leaves_plans_finite():
    def finite_without_a_gradient(latents, goal):
        costs = squared_distance(latents, goal)
        return costs + (costs - costs).sqrt()  # adds 0, with an infinite slope

    plan = PLANNERS["gradient"](PRIOR, cost=finite_without_a_gradient).plan(
        CountingModel(), *toy_problem(24, -8)
    )
    assert np.isfinite(plan.actions).all() and np.isfinite(plan.costs).all()


def test_a_gradient_that_is_lost_later_stops_its_plan():
    rounds = []

    def steep_after_the_first_round(latents, goal):
        rounds.append(latents.detach()[:, -1, 0, 0])  # yaw at the end, of each plan
        costs = squared_distance(latents, goal)
        return costs + (costs - costs).sqrt() if len(rounds) > 1 else costs

    PLANNERS["gradient"](PRIOR, cost=steep_after_the_first_round).plan(
        CountingModel(), *toy_problem(24, -8)
    )
    assert not torch.equal(rounds[0], rounds[1])
    assert torch.equal(rounds[1], rounds[5])  # in spite of the momentum of the first step


def test_plans_without_a_finite_cost_once_their_keys_are_rounded_are_refused():
    def only_relaxed(latents, goal):
        costs = squared_distance(latents, goal)
        return costs if costs.requires_grad else torch.full_like(costs, torch.nan)

    with pytest.raises(ValueError, match="no plan has a finite cost with its keys rounded"):
        PLANNERS["gradient"](PRIOR, cost=only_relaxed).plan(CountingModel(), *toy_problem(24, -8))


def test_best_plans_are_finite_and_in_order():
    costs = np.array([np.inf, 3.0, 1.0, np.nan, 1.0])
    assert best_plans(costs, 4).tolist() == [2, 4, 1]
    assert not len(best_plans(costs[:1], 1))
    assert best_plans(np.array([-np.inf, 2.0, 1.0]), 1).tolist() == [2]


def test_too_few_first_plans_are_refused_at_once():
    with pytest.raises(ValueError, match="num_initial_plans=7 must be at least 8"):
        make("primitives", num_initial_plans=7)


@pytest.mark.parametrize("name", PLANNERS)
def test_a_model_of_one_tick_needs_no_history(name):
    class Forgetful(CountingModel):
        config = preset("tiny", history_ticks=1)

        def imagine(self, z, actions):
            return super().imagine(
                z, torch.cat([actions.new_zeros(len(actions), 24, 28), actions], 1)
            )

    z, goal, history, horizon = toy_problem(24, -8)
    plan = make(name).plan(Forgetful(), z, goal, history, horizon)
    assert np.abs(turned(plan) - [24, -8]).max() < 12


def test_planners_follow_latents_to_another_device(monkeypatch):
    def numpy(tensor):
        assert tensor.device.type == "cpu"
        return np.zeros(tensor.shape)

    inverse = InverseModel.from_pretrained(WEIGHTS)
    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU without memory
        z, ticks = torch.empty(1, TOKENS, 128, device="cuda:0"), torch.empty(1, device="cuda:0")
        assert inverse(z, z, ticks)[0].shape == (1, 4)
        assert inverse.guess(z, z, 4)[0].shape == (2,)
        z, history = torch.empty(1, 4, 1, device="cuda:0"), torch.empty(24, 28, device="cuda:0")
        search = Search(CountingModel(), squared_distance, z, z, history, 8)
        plans = torch.empty(4, 8, 28, requires_grad=True)
        assert search.costs_with_grad(plans).requires_grad
    assert [x.shape for x in search.tried[0]] == [(4, 8, 28), (4,)]


def test_memory_of_the_prior_has_a_limit(monkeypatch):
    monkeypatch.setattr(action_prior, "MAX_WINDOW_TICKS", 2**14, raising=False)
    actions = np.tile(NOOP, (300, 1))
    actions[:, CAMERA] = np.random.default_rng(0).normal(size=(300, 2))

    class Repeated:
        def __getitem__(self, name):
            return SimpleNamespace(actions=actions)

        def window_starts(self, name, ticks, horizon):
            return np.arange(ticks - 1, 300 - horizon)

    def peak(count):
        tracemalloc.start()
        action_prior.fit_action_prior(Repeated(), range(count))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(40) < 1.5 * peak(10)


@pytest.mark.parametrize("solver", ["cem", "icem", "mppi", "gradient"])
def test_solvers_of_stable_worldmodel(solver):
    try:
        import_solvers()
    except ImportError as missing:
        pytest.skip(str(missing))
    options = {"samples": 8, "rounds": 25} if solver == "gradient" else {"samples": 64, "rounds": 8}
    planner = SwmPlanner(PRIOR, solver, elites=8, **options)
    plan = planner.plan(CountingModel(), *toy_problem(24, -8))
    assert np.abs(turned(plan) - [24, -8]).max() < 8
