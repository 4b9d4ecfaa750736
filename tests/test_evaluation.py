"Are the metrics right? A world whose future is known by rule: a model that knows the rule must score perfectly, one that cheats or sees nothing must be caught."

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minecraft_jepa.config import preset
from minecraft_jepa.data.actions import NOOP
from minecraft_jepa.evaluation import pixels
from minecraft_jepa.evaluation.action_decoding import ActionReader, read_back, reading_scores
from minecraft_jepa.evaluation.baselines import copy_errors, fit_copies, paired_table, ticks_better
from minecraft_jepa.evaluation.horizon import (
    by_horizon,
    horizon_errors,
    interval,
    latent_futures,
    ratio,
)
from minecraft_jepa.evaluation.pixels import pixel_scores, psnr, ssim
from minecraft_jepa.evaluation.probes import pixels_compare, pixels_of, probe, ridge, ridges
from minecraft_jepa.evaluation.report import SCHEMA, bars, beside, compare, read_report
from minecraft_jepa.evaluation.retrieval import rank_of_truth, retrieval
from minecraft_jepa.evaluation.rollouts import drift, future_leak, sensitivity
from minecraft_jepa.evaluation.windows import Remembers, evaluation_windows, left_out, usable
from minecraft_jepa.model.collapse import collapse_alarm, collapse_metrics
from minecraft_jepa.model.inverse_dynamics import rows_alike
from minecraft_jepa.viz.plots import compare_plot

CONFIG, GRID, HORIZONS, DEGREES = preset("tiny"), (6, 10), [1, 2, 4, 8, 15], 5.0


class Panoramas:
    "A store of three recordings, each a view of 80 columns into a strip of noise that five degrees of the mouse move by 8 columns."

    def __init__(self, ticks=300):
        random = np.random.default_rng(0)
        self.names, self.strips, self.clips, self.places = ["a_0", "b_0", "c_0"], {}, {}, {}
        for name in self.names:
            strip = random.integers(0, 256, (3, 48, 12000), dtype=np.uint8)
            turns = random.choice([1, 2, 3], ticks)  # never back, so that no view comes twice
            at = 2000 + 8 * np.concatenate([[0], np.cumsum(turns)[:-1]])
            actions = np.tile(NOOP, (ticks, 1))
            actions[:, 22] = DEGREES * turns
            self.strips[name], self.places[name] = strip, at
            self.clips[name] = SimpleNamespace(
                frames=np.stack([strip[:, :, x : x + 80] for x in at]), actions=actions, state={}
            )

    def __getitem__(self, name):
        return self.clips[name]

    def starts(self, name, ticks=25, rollout=1):
        return np.arange(ticks - 1, len(self.clips[name].frames) - rollout)


class Knows(nn.Module):
    "Latents are the pixels of each patch. It knows the strips, so it finds where a view is, and where the mouse takes it."

    scale = 1.0

    def __init__(self, store):
        super().__init__()
        self.config, self.nothing, self.strips = CONFIG, nn.Parameter(torch.zeros(1)), store.strips
        self.corner = {
            store[n].frames[i, :, :4, :8].tobytes(): (n, int(x))
            for n in store.names
            for i, x in enumerate(store.places[n])
        }

    def target(self, frames):
        return self.scale * F.unfold(frames.float() / 255, 8, stride=8).transpose(1, 2)

    def encode(self, frames):
        return self.target(frames)

    def view(self, name, x):
        return torch.from_numpy(self.strips[name][:, :, x : x + 80].copy())

    def find(self, z):
        for one in self.decode(z):
            yield self.corner[one[:, :4, :8].numpy().tobytes()]

    def decode(self, z):
        return (
            (F.fold(z.transpose(1, 2) / self.scale, (48, 80), 8, stride=8) * 255)
            .round()
            .to(torch.uint8)
        )

    def imagine(self, z, actions):
        places = list(self.find(z))
        turned = (actions[:, 24:, 22] / DEGREES).round().long().cumsum(1) * 8
        return torch.stack(
            [
                self.target(torch.stack([self.view(n, x + int(k)) for k in by]))
                for (n, x), by in zip(places, turned)
            ]
        )

    def step(
        self, z, actions
    ):  # remembers where it was told to go: a view that no recording has shown is entered too
        ahead = self.imagine(z, actions)[:, 0]
        for (n, x), by in zip(self.find(z), (actions[:, -1, 22] / DEGREES).round().long() * 8):
            self.corner[self.view(n, x + int(by))[:, :4, :8].numpy().tobytes()] = (n, x + int(by))
        return ahead


class Deaf(Knows):
    "Heeds no action: the future is the present."

    def imagine(self, z, actions):
        return z[:, None].expand(-1, actions.shape[1] - 24, -1, -1)

    def step(self, z, actions):
        return z


class Blind(Deaf):
    "Gives every frame the same latent."

    def target(self, frames):
        return torch.ones(len(frames), 60, 192)

    def encode(self, frames):
        return self.target(frames)


class Small(Knows):
    "The same latents, a hundred times smaller."

    scale = 0.01


@pytest.fixture(scope="module")
def store():
    return Panoramas()


def errors_of(model, store, count=12):
    return horizon_errors(model, store, store.names, HORIZONS, count)[0]


# Latent error


def test_who_knows_the_future_has_no_error(store):
    errors = errors_of(Knows(store), store)
    assert (
        errors["model"].shape == (len(store.names), len(HORIZONS)) and errors["model"].max() < 1e-9
    )
    assert np.abs(errors["no_history"]).max() < 1e-9  # this world has no memory
    for rival in ("copy_last", "noop", "other_actions"):
        assert errors[rival].min() > 0.5
    assert np.allclose(
        errors["copy_last"], errors["noop"], rtol=1e-5
    )  # nothing pressed, nothing turns


def test_one_is_the_best_constant_answer():
    "Unrelated frames: the mean has the error of the variance, so copying an unrelated one has twice that."
    store = Panoramas()
    random = np.random.default_rng(1)
    for clip in store.clips.values():
        clip.frames = random.integers(0, 256, clip.frames.shape, dtype=np.uint8)
    errors = errors_of(Deaf(store), store, 60)
    assert np.allclose(errors["copy_last"], 2, atol=0.05) and np.allclose(
        errors["linear"][:, 0], 6, atol=0.2
    )  # (2a - b - c)^2


def test_small_latents_gain_nothing(store):
    one, other = errors_of(Knows(store), store), errors_of(Small(store), store)
    for m in ("copy_last", "noop", "other_actions", "linear"):
        assert np.allclose(one[m], other[m], rtol=1e-3)


def test_who_heeds_no_action_is_caught(store):
    errors = errors_of(Deaf(store), store)
    table = paired_table(errors, HORIZONS, ("copy_last", "noop", "other_actions"))
    assert all(np.isclose(r["mean"], 1) for r in ratio(errors, HORIZONS).values())
    assert not any(ticks_better(row, HORIZONS) for row in table.values())


def test_a_guess_that_saw_the_future_is_caught(store):
    frames, actions = evaluation_windows(store, "a_0", 25, 4, 5)
    guess = lambda m: (
        lambda f, a: latent_futures(m, f, a, a, [1, 2, 4])[1]["model"]
    )  # the evaluation's own path
    assert future_leak(guess(Knows(store)), frames, actions) == 0
    leaky = Knows(store)
    assert (
        future_leak(
            lambda f, a: guess(leaky)(f, a) + 0.001 * leaky.target(f[:, 4])[:, None],
            frames,
            actions,
        )
        > 1e-5
    )
    truth = lambda f, a: latent_futures(leaky, f, a, a, [1])[0][:, 1:]
    assert future_leak(truth, frames, actions) > 0.1  # the target itself, given away


# Intervals


def test_recordings_are_the_unit_of_the_interval(store):
    "More frames of the same recordings do not make it narrower by themselves."
    values = np.random.default_rng(0).normal(size=8)
    width = lambda v: np.diff(interval(v)["interval"])[0]
    assert width(np.repeat(values, 100)) < 0.2 * width(
        values
    )  # were frames the unit, it would seem sure
    assert (
        len(errors_of(Deaf(store), store, 4)["model"])
        == len(errors_of(Deaf(store), store, 40)["model"])
        == 3
    )


def test_interval_covers_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hit = [
        low <= 0 <= high
        for low, high in (interval(random.normal(size=8))["interval"] for _ in range(1000))
    ]
    assert 0.93 < np.mean(hit) < 0.97  # a percentile bootstrap of eight: 0.85


def test_copies_shrink_and_shift_as_well_as_a_rule_allows(store):
    "In a world that only turns, the shifted copy is nearly right, and the shrunk one nearly the mean."
    model, horizons = Deaf(store), [1, 4]
    fit = fit_copies(model, store, store.names, horizons, count=6)
    errors, variance = horizon_errors(model, store, store.names, horizons, 6)
    errors |= copy_errors(model, store, store.names, horizons, fit, variance, 6)
    assert errors["shrunk_copy"].mean() < errors["copy_last"].mean()
    assert errors["shifted_copy"][:, 0].mean() < errors["shrunk_copy"][:, 0].mean()


# Retrieval


def test_the_true_future_is_found_by_who_knows_it(store):
    found = retrieval(Knows(store), store, store.names, [1, 4], count=6)
    assert np.allclose(found["top1"]["model"], 1) and np.allclose(found["mrr"]["model"], 1)
    assert found["top1"]["other_actions"].mean() < 0.5


def test_the_blind_find_nothing(store):
    found = retrieval(Blind(store), store, store.names, [1, 4], count=6)
    assert (found["top1"]["model"] == 0).all() and np.allclose(found["mrr"]["model"], 1 / 256)


def test_chance_is_one_in_all_candidates():
    z, guess = torch.randn(256, 4, 8), torch.randn(2000, 4, 8)
    rank = rank_of_truth(guess, z, torch.randint(0, 256, (2000,))).float()
    assert abs(float(rank.mean()) - 128.5) < 6 and float((rank == 1).float().mean()) < 0.02


# Probes


def told(frames, later, seed=0, far=3, grain=10):
    "Examples for `probe` whose labels are in the picture: the brightness, and by how many pixels the view moved, `far` at most; what is to be seen is `grain` pixels wide."
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.integers(0, 200, (frames, 3, 12, 160 // grain))).float()
    scene = (
        F.interpolate(coarse, (48, 160), mode="bilinear").to(torch.uint8).numpy()
    )  # smooth, as flow by gradients needs it
    pitch, turn = random.integers(0, 50, frames), random.integers(-far, far + 1, frames)
    crop = lambda k: (
        np.stack([s[:, :, 40 + x : 120 + x] for s, x in zip(scene, k)])
        + pitch[:, None, None, None].astype(np.uint8)
    )
    return (
        torch.from_numpy(crop(0 * turn)),
        torch.from_numpy(crop(turn)),
        {"pitch": pitch.astype(float), "yaw_change": turn.astype(float)},
        np.arange(frames) % later,
    )


def probed(look, examples=None, unseen=None, compare=None):
    return probe(
        look,
        examples or told(240, 4),
        unseen or told(80, 4, seed=1),
        np.arange(240) % 4 == 3,
        GRID,
        compare,
    )


def test_probes_find_what_is_in_the_picture():
    assert min(probed(pixels_of(8)).values()) > 0.8


def test_a_turn_of_more_than_half_a_patch_is_found_by_matching():
    far = told(240, 4, far=10, grain=5), told(80, 4, seed=1, far=10, grain=5)
    flow, matched = (
        probed(pixels_of(8), *far, compare)["yaw_change"]
        for compare in (None, pixels_compare(8, GRID))
    )
    assert matched > 0.8 and flow < matched - 0.05, (flow, matched)
    noise = lambda z, w: torch.from_numpy(
        np.random.default_rng(len(z)).standard_normal((len(z), 500)).astype(np.float32)
    )
    assert (
        abs(probed(pixels_of(8), *far, noise)["yaw_change"] - flow) < 1e-9
    )  # a comparison that tells nothing is not chosen


def shuffled(examples, random):
    return (*examples[:2], {k: random.permutation(v) for k, v in examples[2].items()}, examples[3])


def test_shuffled_labels_take_probes_to_chance():
    random = np.random.default_rng(0)
    assert (
        max(
            probed(
                pixels_of(8), shuffled(told(240, 4), random), shuffled(told(80, 4, seed=1), random)
            ).values()
        )
        < 0.1
    )
    learned = [
        probed(pixels_of(8), shuffled(told(240, 4), random)) for _ in range(6)
    ]  # judged on true labels; a shuffle keeps some order by luck
    for label in ("pitch", "yaw_change"):
        assert np.mean([r[label] for r in learned]) < 0.15
    assert (
        probed(
            pixels_of(8),
            shuffled(told(240, 4), random),
            shuffled(told(80, 4, seed=1), random),
            pixels_compare(8, GRID),
        )["yaw_change"]
        < 0.15
    )


def test_a_constant_encoder_is_caught():
    blind = lambda frames: torch.ones(len(frames), 60, 128)
    assert (
        max(probed(blind).values()) < 0.05
        and probed(
            blind,
            compare=lambda z, w: rows_alike(
                *(x.unflatten(1, GRID).unsqueeze(3) for x in (z, w)), 6
            ),
        )["yaw_change"]
        < 0.05
    )
    assert "collapsing" in collapse_alarm(
        collapse_metrics(blind(torch.zeros(64, 3, 48, 80))), CONFIG
    )
    assert collapse_alarm(collapse_metrics(torch.randn(64, 60, 128)), CONFIG) is None


# Actions


class Exact(ActionReader):
    "Reads the turn off the pixels of two views, by trying all of them."

    def __init__(self):
        super().__init__(GRID, 192, 4, 1, 1)

    def forward(self, z, later):
        a, b = (x.unflatten(1, GRID) for x in (z, later))
        miss = torch.stack(
            [(a[:, :, k:] - b[:, :, : 10 - k]).square().mean((1, 2, 3)) for k in range(4)], 1
        )
        turn = miss.argmin(1) * DEGREES
        return torch.full((len(z), 9), -1.0), torch.stack([turn, 0 * turn], 1)


def test_actions_are_read_back_from_who_follows_them(store):
    with torch.no_grad():
        knows, deaf = (
            read_back(Exact(), m, store, store.names, [1, 4], count=6)
            for m in (Knows(store), Deaf(store))
        )
    for h in ("1", "4"):
        assert (
            knows["real"][h]["camera_degrees"] == knows["imagined"][h]["camera_degrees"] == 0
            and knows["imagined"][h]["turn_r2"] == 1
        )
        assert deaf["imagined"][h]["camera_degrees"] > 3 and deaf["imagined"][h]["turn_r2"] < 0.1


def test_f1_and_degrees_of_a_known_answer():
    done = torch.zeros(4, 2, 28)
    done[0, :, 0] = done[1, :, 0] = 1  # w in the first two
    done[:, 0, 22] = 3
    done[:, 1, 22] = 1  # 4 degrees in all, at every pair
    said = torch.full((4, 9), -1.0)
    said[1:3, 0] = 1  # w: one hit, one wrong, one missed
    scores = reading_scores((said, torch.tensor([[1.0, 0.0]] * 4)), done)
    assert (
        scores["f1"]["w"] == 0.5
        and scores["f1"]["space"] is None
        and scores["mean_f1"] == 0.5
        and scores["camera_degrees"] == 1.5
    )


def test_only_what_moves_the_view_moves_the_latent(store):
    frames, actions = evaluation_windows(store, "b_0", 25, 1, 4)
    moves = sensitivity(Knows(store), frames[:, 1], actions[:, :24], 4)
    assert (
        moves["left"] > 0.5
        and moves["right"] > 0.5
        and moves["w"] == moves["attack"] == moves["up"] == 0
    )


# Drift


def test_who_knows_the_world_does_not_drift(store):
    wander = drift(Knows(store), store, store.names, ticks=40, every=20, count=2)
    assert all(0.7 < s < 1.3 for s in wander["imagined"]["spread"]) and all(
        n < 1.3 * wander["real"]["nearest"] for n in wander["imagined"]["nearest"]
    )


def test_latents_that_grow_are_seen_to_leave(store):
    class Grows(Deaf):
        def step(self, z, actions):
            return 1.2 * z

    wander = drift(Grows(store), store, store.names, ticks=20, every=10, count=2)
    assert (
        wander["imagined"]["nearest"][-1] > 10 * wander["real"]["nearest"]
        and wander["imagined"]["spread"][-1] > 10
    )


# Pixels


def test_who_knows_the_future_draws_it_perfectly(store):
    model = Knows(store)
    scores = pixel_scores(
        model,
        {
            "fold": model.decode,
            "black": lambda z: torch.zeros(len(z), 3, 48, 80, dtype=torch.uint8),
        },
        store,
        store.names,
        [1, 4],
        count=3,
    )
    assert (
        (scores["psnr"]["fold"] == 60).all()
        and np.allclose(scores["ssim"]["fold"], 1)
        and (scores["psnr"]["black"] < 10).all()
    )
    assert (scores["psnr"]["copy_last"] < 15).all()


def test_psnr_and_ssim_of_known_answers():
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert abs(psnr(grey, grey + 10).item() - 20 * np.log10(255 / 10)) < 1e-4
    constant = (
        0.01 * 255
    ) ** 2  # Wang et al. 2004, eq. 6: of two flat pictures the brightness alone is compared
    assert (
        abs(
            ssim(grey, grey + 10).item() - (2 * 100 * 110 + constant) / (100**2 + 110**2 + constant)
        )
        < 1e-5
    )


# Two runs


def a_report(error=0.8, other=1.4, top1=0.6, pitch=0.9, recordings=("a", "b")):
    one = lambda v: {"mean": v, "interval": [v, v]}
    return {
        "schema": SCHEMA,
        "recordings": list(recordings),
        "share_of_copying": {h: {"model": one(error)} for h in ("1", "4", "8")},
        "ratio": {"8": one(other)},
        "retrieval": {"top1": {"4": {"model": one(top1)}}},
        "probes": {"model": {"pitch": pitch, "yaw_change": pitch}},
        "ticks_better": {"copy_last": list(range(1, 16)), "noop": [1, 2]},
        "probes_by_world": {
            k: {"interval": [pitch - 0.05, pitch + 0.05]} for k in ("pitch", "yaw_change")
        },
    }


def test_bars_are_met_or_not():
    met = {b["bar"]: b["met"] for b in bars(a_report())}
    assert sorted(met.values()) == [False, True, True, True, True, True]
    nothing = a_report(
        other=float("nan"), top1=0.0, pitch=float("nan")
    )  # what a blind encoder leaves
    assert [b["met"] for b in bars(nothing)] == [True, False, False, False, False, False]


def test_compare_says_which_is_better_and_draws_it():
    found = compare(a_report(), a_report(error=0.7, other=1.2))
    assert found["error over copying, 4 ticks"] == (0.8, 0.7, True) and found[
        "other over true future actions, 8 ticks"
    ] == (1.4, 1.2, False)
    fig, axes = compare_plot(found, ("old", "new"))
    texts = [t.get_text() for ax in axes for t in ax.get_yticklabels()]
    assert len(texts) == len(found)
    plt.close(fig)
    with pytest.raises(ValueError, match="different recordings"):
        compare(a_report(), a_report(recordings=("a", "c")))


def test_a_report_of_another_version_is_refused(tmp_path):
    path = Path(tmp_path) / "evaluate.json"
    path.write_text(json.dumps(a_report() | {"schema": SCHEMA - 1}))
    with pytest.raises(ValueError, match="evaluate again"):
        read_report(path)


def test_learned_metrics_where_their_networks_are(tmp_path, monkeypatch):
    "With networks of random weights in torch's cache: equal pictures are at no distance, others are."
    pytest.importorskip("torchmetrics")
    torchvision, inception = (
        pytest.importorskip("torchvision"),
        pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3"),
    )
    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(pixels, "_hash_matches_name", lambda path: True)
    (tmp_path / "checkpoints").mkdir()
    torch.save(
        torchvision.models.alexnet(weights=None).state_dict(),
        tmp_path / "checkpoints" / pixels.LEARNED["lpips"],
    )
    with monkeypatch.context() as m:
        m.setattr(
            inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None
        )
        m.setattr(inception, "load_state_dict_from_url", lambda *a, **k: None)
        torch.save(
            inception.FeatureExtractorInceptionV3("x", ["2048"]).state_dict(),
            tmp_path / "checkpoints" / pixels.LEARNED["fid"],
        )
    found, lacking = pixels.learned_metrics()
    assert set(found) == {"lpips", "fid"} and set(lacking) == {"fvd"}
    a, b = (
        torch.randint(0, 256, (4, 3, 48, 80), dtype=torch.uint8),
        torch.full((4, 3, 48, 80), 100, dtype=torch.uint8),
    )
    assert (
        found["lpips"](a, a).tolist() == [0] * 4
        and found["lpips"](a, b).shape == (4,)
        and (found["lpips"](a, b) > 0).all()
    )
    assert found["fid"](a, b) > 10 * abs(found["fid"](a, a))


# Recordings that nothing can be judged on


class Odd(Panoramas):
    "One recording is too short for a window, in another nothing moves."

    def __init__(self):
        super().__init__(60)
        for field in ("frames", "actions"):
            setattr(self.clips["a_0"], field, getattr(self.clips["a_0"], field)[:30])
        self.clips["b_0"].frames = self.clips["b_0"].frames[:1].repeat(60, 0)


def test_a_recording_without_window_or_movement_is_left_out_by_name(capsys):
    store = Odd()
    assert {n: why.split(" ")[0] for n, why in left_out(store, store.names, 25, 15).items()} == {
        "a_0": "too",
        "b_0": "nothing",
    }
    assert usable(store, store.names, 25, 15, least=1) == ["c_0"]
    assert "left out: a_0: too short" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="1 recording.s. can be judged, at least 2 are needed .a_0: too short"
    ):
        usable(store, store.names, 25, 15)


def test_one_movement_late_in_a_recording_is_seen():
    store = Panoramas()
    store.clips["a_0"].frames = store.clips["a_0"].frames[:1].repeat(300, 0)
    assert list(left_out(store, store.names, 25, 15)) == ["a_0"]
    store.clips["a_0"].frames[299, 0, 0, 0] ^= 1
    assert left_out(store, store.names, 25, 15) == {}


def test_latents_that_are_all_alike_are_told_and_no_nan(store):
    with pytest.raises(ValueError, match="latents of a_0, b_0, c_0.. are all alike"):
        errors_of(Blind(store), store)


def test_a_recording_that_was_not_measured_at_a_horizon_is_left_out_there_alone():
    random = np.random.default_rng(0)
    errors = {
        m: random.uniform(0.2, 1, (5, 3)) for m in ("model", "copy_last", "noop", "other_future")
    }
    holes = {m: e.copy() for m, e in errors.items()}
    for e in holes.values():
        e[3, 2] = np.nan
    fewer = {m: np.delete(e, 3, 0) for m, e in errors.items()}
    whole, some, rest = (by_horizon(e, [1, 2, 4]) for e in (errors, holes, fewer))
    assert some["1"] == whole["1"] and some["4"] == rest["4"]
    assert ratio(holes, [1, 2, 4])["4"] == ratio(fewer, [1, 2, 4])["4"]


def test_an_error_of_nothing_gives_no_nan():
    errors = {m: np.ones((3, 2)) for m in ("model", "copy_last", "noop", "other_future")}
    errors["copy_last"][1] = 0
    for found in (
        by_horizon(errors, [1, 2]),
        {"r": ratio(errors | {"model": errors["copy_last"]}, [1, 2])},
    ):
        for row in found.values():
            for value in row.values():
                assert np.isfinite([value["mean"], *value["interval"]]).all()


# What is computed once


def test_who_remembers_scores_as_the_model_itself(store):
    model = Knows(store)
    remembers, kept = Remembers(model), []
    for _ in range(2):
        again = horizon_errors(remembers, store, store.names, HORIZONS, 6)
        kept.append(list(remembers.kept))
    first = horizon_errors(model, store, store.names, HORIZONS, 6)
    assert all(np.allclose(first[0][m], again[0][m], atol=1e-7) for m in first[0]) and np.isclose(
        first[1], again[1]
    )
    assert (
        set(kept[0]) == set(kept[1]) and sum(key[0] == "target" for key in kept[0]) <= 3 * 6 * 17
    )  # nothing was looked at again
    found = [retrieval(m, store, store.names, [1, 4], count=4) for m in (model, remembers)]
    assert all((found[0][s][m] == found[1][s][m]).all() for s in found[0] for m in found[0][s])


def test_ridges_are_ridge_for_each_answer():
    random = np.random.default_rng(0)
    for wide in (20, 300):
        x, new, validation = (
            random.normal(size=(120, wide)),
            random.normal(size=(9, wide)),
            np.arange(120) % 3 == 0,
        )
        answers = [
            x[:, :1] + 0.01 * random.normal(size=(120, 1)),
            random.normal(size=(120, 2)),
            x[:, 1:2] ** 2,
        ]
        for y, fit in zip(answers, ridges(x, answers, validation)):
            one = ridge(x, y, validation)
            assert fit.error == one.error and torch.equal(fit(new), one(new))


# Two runs


def test_other_recordings_are_not_comparable_and_say_so():
    one = {"mean": 0.5, "interval": [0.4, 0.6]}
    report = {
        "preset": "tiny",
        "recordings": ["a", "b"],
        "bars": [{"bar": "pitch_r2", "number": 0.7, "wanted": 0.8, "met": False}],
        "share_of_copying": {h: {"model": one} for h in ("1", "2", "4", "8", "15")},
    }
    assert beside(report, report)["comparable"] and "ratios can" in beside(report, report)["told"]
    found = beside(report | {"recordings": ["mine"], "preset": "small"}, report)
    assert (
        not found["comparable"]
        and "not comparable" in found["told"]
        and "preset small, the shipped of tiny" in found["told"]
    )
    assert found["rows"][0] == {"what": "pitch_r2", "wanted": 0.8, "yours": 0.7, "shipped": 0.7}
