"""What the README says of the committed figures, held against the numbers beside them."""

import bisect
import json
import re
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from minecraft_jepa.data.splits import load_split
from minecraft_jepa.evaluation.report import check_criteria, key_quantities
from minecraft_jepa.evaluation.tables import STUDY_NUMBERS

ROOT = Path(__file__).parent.parent


def numbers(name):
    path = ROOT / "figures" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: run make study")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def evaluate():
    return numbers("evaluate")


def test_judged_on_worlds_not_trained_on(evaluate):
    split = load_split(ROOT / "data")
    assert sorted(evaluate["recordings"]) == sorted(split["test"])


@pytest.mark.parametrize("ticks", ["1", "2", "4", "8", "15"])
def test_model_beats_every_rival_by_pairs(evaluate, ticks):
    baselines = {"copy_last", "linear", "shrunk_copy", "shifted_copy", "no_op", "shuffled_future"}
    assert baselines <= set(evaluate["paired_by_baseline"])
    for baseline in baselines:
        row = evaluate["paired_by_baseline"][baseline][ticks]
        assert row["interval"][1] < 1 and row["sign_test"] < 0.05, baseline


def test_nothing_collapsed(evaluate):
    train = numbers("train")
    assert train["alarms"] == [] and evaluate["collapse"]["alarm"] is None
    assert len(train["evaluations"]) >= 5  # it was looked at


def test_sizes_are_those_of_the_original():
    sora = numbers("sora")
    assert sora["params"]["encoder"] == 113_998_080
    for name, budget in (
        ("conditioner", 42_696_960),
        ("predictor", 213_282_816),
        ("dit", 141_838_848),
    ):
        assert abs(sora["params"][name] / budget - 1) <= 0.01
    assert round(sora["sora_over_original"]["with_decoder"], 2) == 1.17
    assert round(sora["sora_over_original"]["without_decoder"], 2) == 1.62


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rollouts_see_one_frame_and_imagine_fifteen_or_more(n):
    row = numbers(f"rollout_{n}")
    assert row["frames_seen"] == 1 and row["ticks_imagined"] >= 15
    assert row["recording"] in load_split(ROOT / "data")["test"]
    gif = ROOT / "figures" / f"rollout_{n}.gif"
    with imageio.imopen(gif, "r") as f:
        pictures = list(f.iter(mode="RGB"))
    assert len(pictures) == row["ticks_imagined"] + 1
    assert len({p.tobytes() for p in pictures}) == len(pictures)  # it moves


def test_table_in_the_readme_is_that_of_the_run(evaluate):
    readme = (ROOT / "README.md").read_text()
    for ticks in ("1", "4", "8", "30"):
        row, best = evaluate["horizons"][ticks], evaluate["relative_to_best_baseline"][ticks]
        line = re.search(rf"^\| {ticks} \|.*$", readme, re.MULTILINE)[0]
        model = row["model"]
        low, high = model["interval"]
        assert f"{model['mean']:.3f} [{low:.3f}, {high:.3f}]" in line
        for method in ("copy_last", "shrunk_copy", "shifted_copy", "no_op", "shuffled_future"):
            assert f"| {row[method]['mean']:.3f} |" in line
        low, high = best["interval"]
        assert f"{best['ratio']:.2f} [{low:.2f}, {high:.2f}]" in line
        assert f"{best['better']} of {best['of']} |" in line


def test_shipped_weights_are_what_their_card_says():
    """They load as float16 and were not trained on the worlds that they are judged on.

    The figures, and so the README's table, are those of the evaluation beside them.
    """
    from minecraft_jepa.data.recording_files import session_of
    from minecraft_jepa.data.splits import seen_recordings
    from minecraft_jepa.model.world_model import WorldModel

    folder = ROOT / "data/weights/tiny"
    WorldModel.from_pretrained(folder)
    training = json.loads((folder / "training.json").read_text())
    report = json.loads((folder / "evaluate.json").read_text())
    seen = {session_of(name) for name in seen_recordings(training)}
    assert {"world-366", "world-450", "world-531"} < seen  # decoders, first stage, varied looks
    assert not seen & {session_of(name) for name in report["recordings"]}
    assert report["horizons"] == numbers("evaluate")["horizons"]


def test_headline_of_the_readme_is_that_of_the_shipped_weights():
    report = json.loads((ROOT / "data/weights/tiny/evaluate.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    probes, worlds = report["probes"], report["probes_by_world"]
    best = report["relative_to_best_baseline"]["8"]
    low, high = best["interval"]
    probed = [
        "{:.2f} [{:.2f}, {:.2f}]".format(probes["model"][label], *worlds[label]["interval"])
        for label in ("pitch", "yaw_change")
    ]
    untrained = [f"{probes['untrained'][label]:.2f}" for label in ("pitch", "yaw_change")]
    rows = {
        "diffusion transformer": "dit",
        "regression head": "head",
        "the given frame, kept": "copy_last",
        "the given frame, shifted as the mouse turns, blurred": "shifted_copy",
    }
    values = {
        key: [f"{report['psnr'][ticks][key]['mean']:.1f}" for ticks in ("1", "8", "15")]
        for key in rows.values()
    }
    psnr = [f"| {name} | {' | '.join(values[key])} |" for name, key in rows.items()]
    decoded = report["action_decoding"]["decoder_4_ticks"]
    mean_f1 = {kind: decoded[kind]["8"]["mean_f1"] for kind in ("real", "imagined")}
    gradients, of_study = report["encoder_gradients"], STUDY_NUMBERS
    inverse, pitch = (
        f"{gradients[part] / gradients['prediction']:.1f}" for part in ("inverse_dynamics", "pitch")
    )

    def with_interval(row):
        low, high = row["interval"]
        return f"| {row['mean']:.2f} [{low:.2f}, {high:.2f}] |"

    for words in (
        f"| {best['ratio']:.2f} [{low:.2f}, {high:.2f}] |",
        with_interval(report["action_sensitivity_ratio"]["8"]),
        with_interval(report["retrieval"]["top1"]["4"]["model"]),
        f"past and future, {report['retrieval']['top1']['4']['shuffled_actions']['mean']:.2f};",
        f"| {'; '.join(probed)} | random weights {'; '.join(untrained)}; pixels",
        f"(R2 {probes['model']['speed']:.2f})",
        f"much weaker model: {of_study['error relative to the best baseline at 8 ticks']:.2f}",
        f"retrieval {of_study['true future first of 256 at 4 ticks']:.2f}.",
        with_interval(report["retrieval"]["top1_without_given_frame"]["4"]["model"]),
        *psnr,
        f"latents 4 ticks apart {mean_f1['imagined']:.2f}, of real ones {mean_f1['real']:.2f}, ",
        f"*Attack* has {decoded['imagined']['8']['f1']['attack']:.2f} (always on",
        f"are {inverse} and {pitch} times as large as the prediction's",
    ):
        assert words in readme, words
    assert report["effect_of_later_frames"] == 0
    assert check_criteria(report) == report["criteria"]


def test_what_the_ablations_notebook_says_was_found():
    found = numbers("ablations")
    assert len(found["seeds"]) >= 2
    assert not set(found["validation_recordings"]) & set(load_split(ROOT / "data")["test"])
    cells = json.loads((ROOT / "nbs/study/8_ablations.ipynb").read_text())["cells"]
    text = "".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "markdown")
    lines = text.split("## What was found")[1].splitlines()

    def mean(factor, variant, quantity):
        values = [v for v in found["table"][factor][variant][quantity] if v is not None]
        return sum(values) / len(values)

    error = "error / copying, 4 ticks"
    for factor, variants in found["comparisons"].items():
        (line,) = (k for k in lines if k.lower().startswith(f"- **{factor}"))
        own = next(iter(found["table"][factor]))
        assert f"{mean(factor, own, error):.3f}" in line, factor
        for variant, comparison in variants.items():
            low, high = comparison[error]["interval"]
            words = f"{mean(factor, variant, error):.3f} ({low:+.3f} to {high:+.3f})"
            assert words in line, (factor, variant, words)
    verdicts = [
        row[q]["verdict"] for v in found["comparisons"].values() for row in v.values() for q in row
    ]
    readme = " ".join((ROOT / "README.md").read_text().split())
    paragraph = readme.split("**Ablations**")[1].split("- **")[0]
    clear = sum(verdict in ("better", "worse") for verdict in verdicts)
    assert f"{clear} of {len(verdicts)} comparisons are clear" in paragraph
    shown = re.findall(r"\d\.\d{3}", paragraph)
    numbers_of = [mean(f, v, error) for f, row in found["table"].items() for v in row]
    (at_equal_time,) = found["equal_time"]["table"].values()
    longer, large = (sum(row[error]) / len(row[error]) for row in at_equal_time.values())
    words = f"steps ({large:.3f}), but a step takes 2.7 times as long, and in as much time"
    assert f"{words} frames of 72 x 132 reach {longer:.3f}, clearly better" in paragraph
    (at_equal_time,) = found["equal_time"]["comparisons"]["equal time"].values()
    assert at_equal_time[error]["verdict"] == "worse"
    low, high = at_equal_time[error]["interval"]
    (line,) = (k for k in lines if k.startswith("- **Pixels"))
    assert f"reaches {longer:.3f}" in line and f"({low:+.3f} to {high:+.3f})" in line
    numbers_of.append(longer)
    numbers_of += [
        abs(end)
        for v in found["comparisons"].values()
        for r in v.values()
        for end in r[error]["interval"]
    ]
    assert shown and set(shown) <= {f"{number:.3f}" for number in numbers_of}


def test_frames_and_actions_of_the_game_are_in_step():
    found = numbers("luanti_lag")
    now, late = found["lag_ticks"].index(0), found["correlation_shifted_by_one_tick"]
    assert found["source"] == "recorded here" and len(found["correlation_by_lag"]) >= 3
    for world, r in found["correlation_by_lag"].items():
        assert r[now] == max(r) >= 0.9 and late[world][now] < max(late[world])


# computed in the cell from numbers of the figure, and in no file
DERIVED = {
    "1_data": {"213.23", "37.08"},
    "3_evaluate": {"11.263"},
    "5_sora": {"114.22", "55.10", "5.47", "1.957", "1.051", "7.638"},
}


def numbers_in(value):
    "All numbers of a JSON value, those in its texts too."
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {number for part in value for number in numbers_in(part)}
    if isinstance(value, str):
        return {float(number) for number in re.findall(r"-?\d+\.\d+", value)}
    return {float(value)} if isinstance(value, (int, float)) else set()


def printed_in_tables(notebook):
    "Numbers with two decimals or more, as text, in the tables of a notebook's outputs."
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            html = "".join(output.get("data", {}).get("text/html", ""))
            html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
            text = re.sub(r"<[^>]+>", " ", html)
            yield from re.findall(r"(?<![\w.])-?\d+\.\d{2,}(?![\w.])", text)


@pytest.fixture(scope="module")
def shipped_numbers():
    paths = (ROOT / "figures").glob("*.json")
    return sorted({n for path in paths for n in numbers_in(json.loads(path.read_text()))})


@pytest.mark.parametrize("name", ["1_data", "2_train", "3_evaluate", "5_sora", "9_claims"])
def test_numbers_in_a_notebooks_outputs_are_those_of_the_figures(name, shipped_numbers):
    printed = list(printed_in_tables(ROOT / f"nbs/study/{name}.ipynb"))
    assert len(printed) >= 10

    def is_shipped(text):
        "Whether a number of the figures is rounded to this one, as it is, in % or in thousandths."
        value, rounding = float(text), 0.5001 * 10.0 ** -len(text.split(".")[1])
        for scale in (1, 0.01, 1e3, 1e-3):
            low, high = (value - rounding) * scale, (value + rounding) * scale
            at = bisect.bisect_left(shipped_numbers, low)
            if at < len(shipped_numbers) and shipped_numbers[at] <= high:
                return True
        return False

    unknown = {text for text in printed if not is_shipped(text)}
    assert unknown <= DERIVED.get(name, set())


@pytest.mark.parametrize("task", ["turn", "walk", "turn and walk", "tool"])
def test_episodes_in_the_readme_are_those_of_the_run(task):
    rows, readme = numbers("agent")["tasks"][task], (ROOT / "README.md").read_text()
    line = re.search(rf"^ *\| {task}[:,].*$", readme, re.MULTILINE)[0]
    low, high = rows["planner"]["interval"]
    cells = {name: f"{row['successes']} of {row['episodes']}" for name, row in rows.items()}
    imagines_nothing = f"| {cells['trying_and_guess']} " if "trying_and_guess" in cells else "| "
    shown = f"| {cells['planner']} [{low:.2f}, {high:.2f}] {imagines_nothing}"
    assert f"{shown}| {cells['inverse_model']} | {cells['random']} |" in line
    if "straight" in rows:
        assert f"{rows['straight']['successes']} of the same {rows['straight']['episodes']}" in line


@pytest.mark.parametrize("task", ["turn", "turn and walk"])
def test_what_imagining_adds_in_the_readme_is_that_of_the_run(task):
    row = numbers("agent")["paired"][task]["trying_and_guess"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    paragraph = re.search(r"\*Imagining nothing\*, .*? In \*walk\*", readme)[0]
    sentence = re.search(rf"In \*{task}\* (?!and).*?(?= In \*|$)", paragraph)[0]
    low, high = row["interval"]
    assert all(re.search(rf"\b{count}\b", sentence) for count in row["only_one"])
    assert f"(p {row['p_value']:.2g}; " in sentence
    assert f"{row['difference']:.2f}, {low:.2f} to {high:.2f} over" in sentence


def test_plans_in_the_readme_are_those_of_the_run():
    rows = numbers("planning")["horizons"]["8"]
    readme = (ROOT / "README.md").read_text()
    paragraph = re.search(r"- \*\*Plans\*\*.*?(?=\n- |\n\n)", readme, re.DOTALL)[0]
    shown = [float(x) for x in re.findall(r"(?<![\w.])-?\d+\.\d+", paragraph)]
    simple = ("no_op", "inverse_model", "continue", "guess_and_habit")
    for name in (*simple, "planner", "swm_cem", "planner_goal_alone"):
        assert round(rows[name]["camera_error_degrees"], 1) in shown
    intervals = [rows[name]["error_beyond_planner"] for name in simple]
    for low, high in (*intervals, rows["swm_cem"]["error_beyond_goal_alone"]):
        assert f"[{low:.1f}, {high:.1f}]" in paragraph
    for key in ("yaw_correlation", "pitch_correlation"):
        assert round(rows["planner"][key], 2) in shown


def verdicts_of(found):
    """Verdicts of a study of variants, {(factor, variant): {quantity: verdict}}."""
    return {
        (factor, variant): {name: row["verdict"] for name, row in rows.items()}
        for factor, variants in found["comparisons"].items()
        for variant, rows in variants.items()
    }


def test_what_is_said_of_sharper_pictures():
    found = numbers("decoders")
    readme = " ".join((ROOT / "README.md").read_text().split())
    true, tick, sharp = "true latents, dB", "8 ticks, dB", "8 ticks, sharpness"

    def mean(factor, variant, quantity):
        values = found["table"][factor][variant][quantity]
        return sum(values) / len(values)

    own, frame = ("loss", "velocity"), ("loss", "frame")
    imagined = "latents", "half imagined"
    words = [
        f"true latents with {mean(*frame, true):.1f} dB for {mean(*own, true):.1f} and imagined",
        f"no worse ({mean(*frame, tick):.2f} for {mean(*own, tick):.2f})",
        f"({mean(*imagined, sharp):.2f} of the real mean square step between pixels, for "
        f"{mean(*own, sharp):.2f}), but {mean(*own, tick) - mean(*imagined, tick):.1f} dB worse",
    ]
    assert [part for part in words if part not in readme] == []

    verdicts = verdicts_of(found)
    assert verdicts[frame][true] == "better" and "worse" not in verdicts[frame].values()
    assert verdicts[imagined][sharp] == "better"
    assert verdicts[imagined][true] == verdicts[imagined][tick] == "worse"
    assert "better" not in (verdicts["given frame", "seen"][name] for name in (true, tick))


def test_what_is_said_of_the_ideas_without_a_setting():
    found = numbers("variants")
    error, first, shifted = "error / copying, 4 ticks", "error / copying, 1 tick", "/ shifted copy"

    def mean(factor, variant, quantity):
        row = found["table"][factor][variant]
        (values,) = [row[name] for name in row if name.startswith(quantity)]
        return f"{sum(values) / len(values):.3f}"

    colours, straight = ("augmentation", "colours"), ("straightening", "0.1")
    own = "straightening", "0"
    readme = " ".join((ROOT / "README.md").read_text().split())
    words = [
        f"error over copying at 4 ticks {mean(*colours, error)} for {mean(*own, error)}",
        f"over a shifted copy at 8 ticks {mean(*colours, shifted)} for {mean(*own, shifted)}",
        f"after one tick ({mean(*straight, first)} for {mean(*own, first)} with the weight 0.1)",
        f"for one tick ({mean('frames given', '2', first)} for {mean(*own, first)})",
    ]
    assert [part for part in words if part not in readme] == []

    verdicts = verdicts_of(found)
    assert verdicts[colours][error] == verdicts[colours]["/ shifted copy, 8 ticks"] == "better"
    never_worse = {v for v, row in verdicts.items() if "worse" not in row.values()}
    clearly_better = {v for v, row in verdicts.items() if row[error] == "better"}
    assert clearly_better & never_worse == {colours}
    assert verdicts[straight][first] == "better"
    assert verdicts[straight]["/ shifted copy, 8 ticks"] == "worse"
    assert verdicts["action-free", "first half"][error] == "worse"
    assert verdicts["augmentation", "crop"]["/ shifted copy, 8 ticks"] == "worse"


def test_what_is_said_of_the_random_seeds():
    found = numbers("seeds")
    values = {
        quantity: [f"{found['runs'][seed][quantity]['value']:.2f}" for seed in ("0", "1", "2")]
        for quantity in found["shipped"]
    }
    error = values["error over best baseline, 8 ticks"]
    retrieval = values["retrieval, 4 ticks"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "{}, {} and {} of the error of the best baseline at 0.4 s".format(*error) in readme
    assert "retrieval {}, {} and {}: less apart".format(*retrieval) in readme
    notebook = (ROOT / "nbs/study/13_seeds.ipynb").read_text()
    assert "where the three have {}, {} and {}".format(*error) in notebook
    report = key_quantities(numbers("evaluate"))
    assert (
        found["shipped"] == report and found["weights"] == numbers("evaluate")["weights_identity"]
    )


def test_what_is_said_of_the_pixel_model():
    found = numbers("pixel_model")
    assert len(found["seeds"]) == 3 and found["recordings"] == numbers("evaluate")["recordings"]
    cells = json.loads((ROOT / "nbs/study/12_pixel_model.ipynb").read_text())["cells"]
    text = "".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "markdown")
    text = text.split("## What was found")[1]
    readme = " ".join((ROOT / "README.md").read_text().split())
    paragraph = readme.split("**A pixel model** (")[1].split("- **")[0]
    of = {
        name: {kind: sum(v) / len(v) for kind, v in row["values"].items() if None not in v}
        for name, row in found["compared"].items()
    }
    against = {name: row["against"]["world_model"] for name, row in found["compared"].items()}
    for name, digits in (
        ("PSNR in dB", 2),
        ("SSIM", 3),
        ("error over copying (third encoder)", 3),
        ("retrieval (third encoder)", 3),
        ("shuffled / true actions (third encoder)", 2),
        ("shuffled / true actions (own space)", 2),
        ("retrieval (own space)", 3),
        ("camera error of plans in degrees (own space)", 1),
    ):
        for kind, mean in of[name].items():
            assert f"{mean:.{digits}f}" in text, (name, kind)
    for name, digits in (
        ("PSNR in dB", 2),
        ("SSIM", 3),
        ("error over copying (third encoder)", 3),
        ("shuffled / true actions (own space)", 2),
    ):
        low, high = (f"{end:+.{digits}f}" for end in against[name]["interval"])
        assert f"{low} to {high}" in text, name
    psnr, ssim, seen = (of[name] for name in list(of)[:3])
    sensitivity = of["shuffled / true actions (own space)"]
    retrieval, plans = (of[name] for name in list(of)[-2:])
    steps = [run[kind]["flops_per_tick"] for run in found["runs"][:1] for kind in psnr]
    ends = {name: row["interval"] for name, row in against.items()}
    nothing = found["compared"]["camera error of plans in degrees (own space)"]["reference"]
    by_world = numbers("evaluate")["by_recording"]
    errors = {method: np.array(list(by_world[method].values()))[:, 7] for method in by_world}
    shifted = np.exp(np.log(errors["shifted_copy"] / errors["copy_last"]).mean())
    assert f"a shifted copy has {shifted:.2f} of it through the shipped one" in text
    for words in (
        f"dB | {psnr['pixel_model']:.1f} | {psnr['world_model']:.1f} |",
        "[{:.2f}, {:.2f}]".format(*ends["PSNR in dB"]),
        f"SSIM | {ssim['pixel_model']:.3f} | {ssim['world_model']:.3f} |",
        "[{:.3f}, {:.3f}]".format(*ends["SSIM"]),
        f"(earlier weights) | {seen['pixel_model']:.2f} | {seen['world_model']:.2f} |",
        "[{:.3f}, {:.3f}] | a shifted copy {:.2f}, ".format(
            *ends["error over copying (third encoder)"], shifted
        )
        + "seen by the shipped one, on more windows |",
        f"given frame | {retrieval['pixel_model']:.2f} | {retrieval['world_model']:.2f} |",
        "[{:.2f}, {:.2f}]".format(*ends["retrieval (own space)"]),
        f"own space | {sensitivity['pixel_model']:.2f} | {sensitivity['world_model']:.2f} |",
        "[{:.2f}, {:.2f}]".format(*ends["shuffled / true actions (own space)"]),
        f"action losses {sensitivity['without_heads']:.2f} |",
        f"goal alone | {plans['pixel_model']:.1f} | {plans['world_model']:.1f} |",
        "[{:.1f}, {:.1f}]".format(*ends["camera error of plans in degrees (own space)"]),
        f"action losses {plans['without_heads']:.1f}; doing nothing {nothing:.1f} |",
        f"{steps[1] / steps[0]:.1f} times the operations",
    ):
        assert words in paragraph, words
    verdicts = {name: row["verdict"] for name, row in against.items()}
    in_table = [v for name, v in verdicts.items() if name not in list(of)[3:5]]
    assert len(in_table) == 6
    for shown in (in_table, list(verdicts.values())):
        assert (shown.count("better"), shown.count("worse")) == (2, 2)
    assert len(verdicts) == 8
    assert "is better by two of eight measures, worse by two" in readme
    assert [name for name in verdicts if verdicts[name] == "better"] == list(of)[0:3:2]
    assert [verdicts[name] for name in ("SSIM", "shuffled / true actions (own space)")] == [
        "worse"
    ] * 2
