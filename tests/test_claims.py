"""The verdicts on the claims of the original, held against the numbers beside them."""

import json
import math
import shutil
from pathlib import Path

import pytest

from minecraft_jepa.evaluation import claims
from minecraft_jepa.evaluation.claim_numbers import load_numbers

FIGURES = Path(__file__).parent.parent / "figures"


def numbers(name):
    path = FIGURES / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: run make study")
    return json.loads(path.read_text())


def test_claims_are_judged_by_the_numbers_beside_them():
    shipped, report = numbers("claims"), numbers("evaluate")
    assert len(shipped["claims"]) == 6
    assert all(c["verdict"] in ("held", "partly", "not shown") for c in shipped["claims"])
    assert shipped["recordings"] == report["recordings"]
    assert shipped["weights"] == report["weights"]
    prediction, content = shipped["claims"][:2]
    better = {baseline: set(ticks) for baseline, ticks in report["ticks_better"].items()}
    baselines = [
        baseline for baseline in better if baseline not in ("shuffled_future", "without_history")
    ]
    at_all_baselines = set.intersection(*(better[baseline] for baseline in baselines))
    if len(at_all_baselines) == 15:
        expected = "held"
    else:
        expected = "partly" if at_all_baselines else "not shown"
    assert prediction["verdict"] == expected
    assert f"{report['retrieval']['top1']['4']['model']['mean']:.2f}" in content["evidence"]
    for c in shipped["claims"]:
        if c["figure"] != "ablations.png" or shipped["ablations"]:
            assert (FIGURES / c["figure"]).is_file()


# The rules, on numbers with known answers


def with_interval(mean, half_width=0.02):
    return {"mean": mean, "interval": [mean - half_width, mean + half_width]}


def toy(ticks=15, r2=0.9, top1=0.6, ratio=1.4, alarm=None, has_head=False):
    """A report with just what the rules read."""
    scores = {"mean_f1": 0.5, "always_on_f1": 0.3, "yaw_r2": 0.4}
    decoded = {kind: {"8": scores} for kind in ("real", "imagined")}
    baselines = ("copy_last", "shrunk_copy", "no_op", "shuffled_actions")
    relative = {"ratio": 0.7, "interval": [0.6, 0.8], "baseline": "shrunk_copy"}
    found = {"4": {"model": with_interval(top1), "copy_last": with_interval(0.3)}}
    gradients = {"prediction": 0.1, "inverse_dynamics": 0.1, "pitch": 0.2}
    by_source = (("model", r2), ("untrained", 0.3), ("pixels", 0.5))
    by_world = {"interval": [r2 - 0.05, r2 + 0.05]}
    return {
        "ticks_better": {r: list(range(1, ticks + 1)) for r in baselines} | {"without_history": []},
        "relative_to_best_baseline": {"8": relative},
        "probes": {source: {"pitch": v, "yaw_change": v} for source, v in by_source},
        "probes_by_world": {"pitch": by_world, "yaw_change": by_world},
        "retrieval": {"top1": found, "top1_without_given_frame": json.loads(json.dumps(found))},
        "action_sensitivity_ratio": {"8": with_interval(ratio)},
        "action_decoding": {"decoder_4_ticks": decoded}
        | ({"inverse_dynamics_head": decoded} if has_head else {}),
        "collapse": {"alarm": alarm, "rank": 40.0},
        "encoder_gradients": gradients,
        "psnr_by_sampling_steps": {"1": 27.5, "2": 28.3, "10": 28.35, "50": 25.0, "head": 28.7},
    }


@pytest.mark.parametrize(("ticks", "verdict"), [(15, "held"), (3, "partly"), (0, "not shown")])
def test_prediction_asks_for_all_ticks(ticks, verdict):
    assert claims.judge_prediction(toy(ticks=ticks))[1] == verdict


@pytest.mark.parametrize(
    ("r2", "top1", "verdict"),
    [
        (0.9, 0.6, "held"),
        (0.9, 0.2, "partly"),
        (0.7, 0.4, "partly"),
        (0.7, 0.31, "not shown"),
        (math.nan, 0.0, "not shown"),
        (0.82, 0.6, "partly"),  # the interval reaches below the threshold
    ],
)
def test_content_asks_for_probes_and_retrieval(r2, top1, verdict):
    assert claims.judge_content(toy(r2=r2, top1=top1))[1] == verdict


@pytest.mark.parametrize("copy", ["copy_last", "shifted_copy"])
def test_content_is_not_shown_where_copying_finds_the_future_as_often(copy):
    report = toy(r2=0.1)
    report["retrieval"]["top1_without_given_frame"]["4"][copy] = with_interval(0.6)
    assert claims.judge_content(report)[1] == "not shown"


def test_labels_are_not_tested_where_a_head_learns_the_actions():
    evidence, verdict = claims.judge_labels(toy(has_head=True))
    assert verdict == "not shown" and "1.0 and 2.0 times the prediction" in evidence
    report = toy(has_head=True)
    report["encoder_gradients"]["anti_collapse"] = 0.2  # not of the actions
    assert "1.0 and 2.0 times the prediction" in claims.judge_labels(report)[0]
    report["encoder_gradients"] = {}  # no recording was long enough
    assert "as labels: not tested" in claims.judge_labels(report)[0]


@pytest.mark.parametrize(
    ("r2", "alarm", "verdict"),
    [
        (0.9, None, "held"),
        (0.4, None, "partly"),
        (0.2, None, "not shown"),
        (-0.1, None, "not shown"),
        (0.9, "collapsing", "not shown"),
    ],
)
def test_labels_ask_for_more_than_random_weights_and_pixels(r2, alarm, verdict):
    assert claims.judge_labels(toy(r2=r2, alarm=alarm))[1] == verdict


def planned(worst=0.5):
    """Numbers of 7_planning; `worst` is the lower end of the interval of one of the methods."""
    methods = ("planner", *claims._SIMPLE_METHODS)
    rows = {
        name: {"camera_error_degrees": 9.0, "error_beyond_planner": [1.0, 3.0]} for name in methods
    }
    rows["guess_and_habit"]["error_beyond_planner"] = [worst, 3.0]
    return {"horizons": {"8": rows}}


def acted(low=0.6):
    """Numbers of 10_agent; `low` is the lower end of the planner's interval."""
    planner = {"successes": 30, "episodes": 40, "interval": [low, 0.9]}
    random = {"successes": 8, "episodes": 40, "interval": [0.1, 0.35]}
    return {"tasks": {"turn": {"planner": planner, "random": random}}}


@pytest.mark.parametrize(
    ("planning", "agent", "verdict"),
    [
        (planned(), acted(), "held"),
        (planned(-0.1), acted(), "partly"),
        (planned(), acted(0.3), "partly"),
        (planned(), None, "partly"),
        (planned(-0.1), acted(0.3), "not shown"),
        (None, None, "not shown"),
    ],
)
def test_planning_asks_for_better_plans_offline_and_in_the_game(planning, agent, verdict):
    assert claims.judge_planning(planning, agent)[1] == verdict


def test_planning_is_not_held_without_the_control_that_does_not_imagine():
    planning = planned()
    del planning["horizons"]["8"]["guess_and_habit"]
    assert claims.judge_planning(planning, acted())[1] == "partly"


@pytest.mark.parametrize(
    ("flops", "seconds", "verdict"),
    [  # drawing over imagining: by 3 evaluations of 99, and of 19
        (1 + 2.1 * 99 / 3, 1 + 2.1 * 19 / 3, "held"),
        (1 + 2.1 * 99 / 3, 1 + 1.9 * 19 / 3, "partly"),
        (1 + 1.9 * 99 / 3, 1 + 1.9 * 19 / 3, "not shown"),
    ],
)
def test_cost_asks_for_operations_and_seconds_in_the_fewest_steps(flops, seconds, verdict):
    sora = {
        "flops_one_second": {"latents": 1, "with_preview": 1.1, "with_pixels": flops},
        "seconds_one_second": {"latents": 1, "with_pixels": seconds},
        "seconds_preset": "tiny",
        "sampling_steps_assumed": {"flops_one_second": 50, "seconds_one_second": 10},
    }
    evidence, judged = claims.judge_cost(sora, toy())
    assert judged == verdict and evidence.startswith("in 2 steps")


def test_cost_in_few_steps_is_what_was_measured():
    costs = {"latents": 1, "with_preview": 1.1, "with_pixels": 40.0}
    sora = {
        "flops_one_second": costs | {"with_few_steps": 4.0},
        "seconds_one_second": costs | {"with_few_steps": 2.5},
        "seconds_preset": "tiny",
        "sampling_steps_assumed": {"flops_one_second": 50, "seconds_one_second": 10},
        "few_sampling_steps": 2,
    }
    evidence, judged = claims.judge_cost(sora, toy())
    assert judged == "partly" and "3.0 times the operations" in evidence
    assert "1.5 times the seconds" in evidence


@pytest.mark.parametrize(
    ("double", "verdict"),
    [
        ([0.7, 0.73, 0.71], "partly"),
        ([0.7, 0.73, 0.81], "not shown"),
        ([0.7, None, None], "not shown"),
        ([0.9, 0.93, 0.91], "not shown"),
        ([None, None, None], "not shown"),
    ],
)
def test_scale_asks_for_an_interval_seed_by_seed(double, verdict):
    quantity = "error / copying, 4 ticks"
    depths = {"3": [0.8, 0.82, 0.81], "1": [0.9, 0.9, 0.9], "6": double}
    table = {"predictor blocks": {depth: {quantity: errors} for depth, errors in depths.items()}}
    assert claims.judge_scale({"steps": 700, "table": table})[1] == verdict


def test_scale_is_not_shown_without_ablations():
    assert claims.judge_scale(None)[1] == "not shown"
    table = {"predictor blocks": {d: {"error / copying, 4 ticks": [0.8, 0.7]} for d in ("3", "1")}}
    evidence, verdict = claims.judge_scale({"steps": 3, "table": table})
    assert (evidence, verdict) == ("no run with more predictor blocks than 3", "not shown")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("sora", "{", "sora.json, line 1: not JSON"),
        ("agent", "{", "agent.json, line 1: not JSON"),
        ("planning", "[]", "planning.json, line 1: expected an object"),
        ("agent", '{"tasks": {}}', None),
    ],
)
def test_damaged_numbers_are_named(tmp_path, name, text, said):
    for kept in ("evaluate", "sora"):
        shutil.copy(FIGURES / f"{kept}.json", tmp_path)
    (tmp_path / f"{name}.json").write_text(text)
    if said is None:
        assert load_numbers(tmp_path)["agent"] is None
        return
    with pytest.raises(ValueError, match=said):
        load_numbers(tmp_path)
