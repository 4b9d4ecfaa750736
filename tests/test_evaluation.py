"""Are the metrics right? A world whose future is known by rule.

A model that knows the rule must score perfectly; one that cheats or sees nothing must be caught.
"""

import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minecraft_jepa.config import preset
from minecraft_jepa.data.actions import CAMERA, NOOP
from minecraft_jepa.evaluation import pixels
from minecraft_jepa.evaluation.action_decoding import (
    ActionDecoder,
    action_metrics,
    decode_rollout_actions,
)
from minecraft_jepa.evaluation.baselines import CopyFit, copy_baseline_errors, fit_copy_baselines
from minecraft_jepa.evaluation.cached_model import CachedModel
from minecraft_jepa.evaluation.drift import rollout_drift
from minecraft_jepa.evaluation.horizon import (
    confidence_interval,
    error_ratio,
    horizon_errors,
    predict_futures,
    summarize_by_horizon,
)
from minecraft_jepa.evaluation.pair_features import pixel_pair_features, pixel_tokens
from minecraft_jepa.evaluation.paired_comparison import paired_table, ticks_better
from minecraft_jepa.evaluation.pixels import pixel_metrics, psnr, ssim
from minecraft_jepa.evaluation.probes import linear_probe, probe_by_world
from minecraft_jepa.evaluation.report import (
    SCHEMA,
    check_criteria,
    compare_with_shipped,
    load_report,
)
from minecraft_jepa.evaluation.report_comparison import compare_reports
from minecraft_jepa.evaluation.retrieval import rank_of_target, retrieval
from minecraft_jepa.evaluation.ridge import fit_ridge, fit_ridges
from minecraft_jepa.evaluation.rollouts import action_sensitivity, future_leakage
from minecraft_jepa.evaluation.unseen import unseen_recordings
from minecraft_jepa.evaluation.windows import (
    evaluation_windows,
    excluded_recordings,
    recordings_with_window,
    usable_recordings,
    window_starts,
)
from minecraft_jepa.model.collapse import collapse_alarm, collapse_metrics
from minecraft_jepa.model.inverse_dynamics import row_correlation
from minecraft_jepa.planning.networks import training_sides
from minecraft_jepa.viz.plots import plot_comparison

CONFIG = preset("tiny", height=48, frame_width=80, patch_size=8)
GRID, HORIZONS, DEGREES = (6, 10), [1, 2, 4, 8, 15], 5.0


class Panoramas:
    """Three recordings, each a view of 80 columns into a strip of noise.

    Five degrees of the mouse move the view by 8 columns.
    """

    def __init__(self, ticks=300):
        random = np.random.default_rng(0)
        self.names = ["a_0", "b_0", "c_0"]
        self.strips, self.clips, self.columns = {}, {}, {}
        for name in self.names:
            strip = random.integers(0, 256, (3, 48, 12000), dtype=np.uint8)
            turns = random.choice([1, 2, 3], ticks)  # never back, so that no view comes twice
            columns = 2000 + 8 * np.concatenate([[0], np.cumsum(turns)[:-1]])
            actions = np.tile(NOOP, (ticks, 1))
            actions[:, CAMERA.start] = DEGREES * turns
            frames = np.stack([strip[:, :, x : x + 80] for x in columns])
            self.strips[name], self.columns[name] = strip, columns
            self.clips[name] = SimpleNamespace(frames=frames, actions=actions, state={})

    def __getitem__(self, name):
        return self.clips[name]

    def window_starts(self, name, ticks=25, rollout=1):
        return np.arange(ticks - 1, len(self.clips[name].frames) - rollout)


class Knows(nn.Module):
    """Latents are the pixels of each patch.

    It knows the strips, so it finds where a view is, and where the mouse takes it.
    """

    scale = 1.0

    def __init__(self, store):
        super().__init__()
        self.config, self.strips = CONFIG, store.strips
        self.nothing = nn.Parameter(torch.zeros(1))  # tells the device
        self.place_of = {}  # corner of a view -> recording and column
        for name in store.names:
            for frame, x in zip(store[name].frames, store.columns[name]):
                self.place_of[frame[:, :4, :8].tobytes()] = (name, int(x))

    def target(self, frames):
        return self.scale * F.unfold(frames.float() / 255, 8, stride=8).transpose(1, 2)

    def encode(self, frames):
        return self.target(frames)

    def view(self, name, x):
        return torch.from_numpy(self.strips[name][:, :, x : x + 80].copy())

    def find(self, z):
        for frame in self.decode(z):
            yield self.place_of[frame[:, :4, :8].numpy().tobytes()]

    def decode(self, z):
        pixels = F.fold(z.transpose(1, 2) / self.scale, (48, 80), 8, stride=8)
        return (pixels * 255).round().to(torch.uint8)

    def columns_moved(self, actions):
        return (actions[..., CAMERA.start] / DEGREES).round().long() * 8

    def imagine(self, z, actions):
        futures = []
        for (name, x), moved in zip(self.find(z), self.columns_moved(actions[:, 24:]).cumsum(1)):
            views = torch.stack([self.view(name, x + int(k)) for k in moved])
            futures.append(self.target(views))
        return torch.stack(futures)

    def step(self, z, actions):
        z_next = self.imagine(z, actions)[:, 0]
        # A view that no recording has shown is remembered, so that `find` finds it.
        for (name, x), moved in zip(self.find(z), self.columns_moved(actions[:, -1])):
            x_next = x + int(moved)
            corner = self.view(name, x_next)[:, :4, :8]
            self.place_of[corner.numpy().tobytes()] = (name, x_next)
        return z_next


class Deaf(Knows):
    """Ignores the actions: the future is the present."""

    def imagine(self, z, actions):
        return z[:, None].expand(-1, actions.shape[1] - 24, -1, -1)

    def step(self, z, actions):
        return z


class Blind(Deaf):
    """Gives every frame the same latent."""

    def target(self, frames):
        return torch.ones(len(frames), 60, 192)

    def encode(self, frames):
        return self.target(frames)


class Small(Knows):
    """The same latents, a hundred times smaller."""

    scale = 0.01


@pytest.fixture(scope="module")
def store():
    return Panoramas()


def errors_of(model, store, count=12):
    return horizon_errors(model, store, store.names, HORIZONS, count)[0]


# Latent error


def test_who_knows_the_future_has_no_error(store):
    errors = errors_of(Knows(store), store)
    assert errors["model"].shape == (len(store.names), len(HORIZONS))
    assert errors["model"].max() < 1e-9
    assert np.abs(errors["without_history"]).max() < 1e-9  # this world has no memory
    for baseline in ("copy_last", "no_op", "shuffled_actions"):
        assert errors[baseline].min() > 0.5
    # Nothing is pressed, so nothing turns.
    assert np.allclose(errors["copy_last"], errors["no_op"], rtol=1e-5)


def test_one_is_the_best_constant_answer():
    """Of unrelated frames the mean has the error of the variance, and a copy twice that."""
    store = Panoramas()
    random = np.random.default_rng(1)
    for clip in store.clips.values():
        clip.frames = random.integers(0, 256, clip.frames.shape, dtype=np.uint8)
    errors = errors_of(Deaf(store), store, 60)
    assert np.allclose(errors["copy_last"], 2, atol=0.05)
    assert np.allclose(errors["linear"][:, 0], 6, atol=0.2)  # (2a - b - c)^2


def test_small_latents_gain_nothing(store):
    errors, errors_of_small = errors_of(Knows(store), store), errors_of(Small(store), store)
    for method in ("copy_last", "no_op", "shuffled_actions", "linear"):
        assert np.allclose(errors[method], errors_of_small[method], rtol=1e-3)


def test_memory_does_not_grow_with_the_recordings(store):
    class Repeated:
        def __getitem__(self, name):
            return store["a_0"]

        def window_starts(self, name, ticks=25, rollout=1):
            return store.window_starts("a_0", ticks, rollout)

    def peak(count):
        tracemalloc.start()
        horizon_errors(Deaf(store), Repeated(), [f"r_{i}" for i in range(count)], [1, 15], 12)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    window_bytes = 12 * 17 * 3 * 48 * 80
    assert peak(8) < peak(3) + window_bytes


def test_who_heeds_no_action_is_caught(store):
    errors = errors_of(Deaf(store), store)
    table = paired_table(errors, HORIZONS, ("copy_last", "no_op", "shuffled_actions"))
    assert all(np.isclose(row["mean"], 1) for row in error_ratio(errors, HORIZONS).values())
    assert not any(ticks_better(row, HORIZONS) for row in table.values())


def test_a_guess_that_saw_the_future_is_caught(store):
    frames, actions = evaluation_windows(store, "a_0", 25, 4, 5)
    model = Knows(store)

    def predict(frames, actions):  # the evaluation's own path
        return predict_futures(model, frames, actions, actions, [1, 2, 4])[1]["model"]

    def predict_with_leak(frames, actions):
        return predict(frames, actions) + 0.001 * model.target(frames[:, 4])[:, None]

    def targets(frames, actions):  # the target itself, given away
        return predict_futures(model, frames, actions, actions, [1])[0][:, 1:]

    assert future_leakage(predict, frames, actions) == 0
    assert future_leakage(predict_with_leak, frames, actions) > 1e-5
    assert future_leakage(targets, frames, actions) > 0.1


# Intervals


def test_recordings_are_the_unit_of_the_interval(store):
    """More frames of the same recordings do not make it narrower by themselves."""
    values = np.random.default_rng(0).normal(size=8)

    def width(values):
        low, high = confidence_interval(values)["interval"]
        return high - low

    # Were frames the unit, it would seem sure.
    assert width(np.repeat(values, 100)) < 0.2 * width(values)
    for count in (4, 40):
        assert len(errors_of(Deaf(store), store, count)["model"]) == 3


def test_interval_covers_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [confidence_interval(random.normal(size=8))["interval"] for _ in range(1000)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.93 < covered < 0.97  # a percentile bootstrap of eight: 0.85


def test_copies_shrink_and_shift_as_well_as_a_rule_allows(store):
    """In a world that only turns, the shifted copy is better than the shrunk one."""
    model, horizons = Deaf(store), [1, 4]
    fit = fit_copy_baselines(model, store, store.names, horizons, windows_per_recording=6)
    errors, variance = horizon_errors(model, store, store.names, horizons, 6)
    errors |= copy_baseline_errors(model, store, store.names, horizons, fit, variance, 6)
    assert errors["shrunk_copy"].mean() < errors["copy_last"].mean()
    assert errors["shifted_copy"][:, 0].mean() < errors["shrunk_copy"][:, 0].mean()


@pytest.mark.parametrize(("moves", "width"), [(True, 10 * DEGREES), (False, np.inf)])
def test_the_view_is_found_and_a_shift_that_serves_nothing_is_left_out(moves, width):
    """80 columns are 50 degrees; where the mouse moves no picture, none is shifted."""
    store = Panoramas()
    for clip in store.clips.values():
        clip.frames = clip.frames if moves else np.broadcast_to(clip.frames[0], clip.frames.shape)
    views = [(w, 60.0) for w in (30.0, 10 * DEGREES, 85.0, np.inf)]
    fit = fit_copy_baselines(Deaf(store), store, store.names, [1, 4], 6, views=views)
    assert fit.view == {1: (width, 60.0), 4: (width, 60.0)}


# Retrieval


def test_the_true_future_is_found_by_who_knows_it(store):
    scores = retrieval(Knows(store), store, store.names, [1, 4], windows_per_recording=6)
    assert np.allclose(scores["top1"]["model"], 1) and np.allclose(scores["mrr"]["model"], 1)
    assert scores["top1"]["shuffled_actions"].mean() < 0.5


def test_the_blind_find_nothing(store):
    scores = retrieval(Blind(store), store, store.names, [1, 4], windows_per_recording=6)
    assert (scores["top1"]["model"] == 0).all()
    assert np.allclose(scores["mrr"]["model"], 1 / 256)


class Clock(Deaf):
    """The latent is the number of the frame; it expects one of long after, or before."""

    jump = 1000

    def target(self, frames):
        return frames[:, :1, :1, 0].float()

    def imagine(self, z, actions):
        return super().imagine(z + self.jump, actions)


@pytest.mark.parametrize("near", [16, 5])
def test_near_frames_end_so_many_ticks_from_the_true_one(near):
    store = Panoramas(ticks=100)
    model = Clock(store)
    for clip in store.clips.values():
        clip.frames = clip.frames.copy()
        clip.frames[:] = np.arange(100, dtype=np.uint8)[:, None, None, None]
    scores = retrieval(model, store, store.names, [1, 4], 200, candidates=16, near=near)
    starts = window_starts(store, "a_0", 25, 4, 200)
    assert len(starts) > 20 and starts[-1] > 90  # to the end of the recording
    for i, h in enumerate((1, 4)):
        ends = [min(near, 99 - t - h) for t in starts]
        assert np.allclose(scores["mean_tick_error"]["model"][:, i], np.mean(ends))
        assert np.allclose(scores["mean_tick_error"]["copy_last"][:, i], h)
    model.jump = -1000
    scores = retrieval(model, store, store.names, [1, 4], 200, candidates=16, near=near)
    assert np.allclose(scores["mean_tick_error"]["model"], near)


def test_chance_is_one_in_all_candidates():
    z, guess = torch.randn(256, 4, 8), torch.randn(2000, 4, 8)
    rank = rank_of_target(guess, z, torch.randint(0, 256, (2000,))).float()
    assert abs(float(rank.mean()) - 128.5) < 6 and float((rank == 1).float().mean()) < 0.02


# Probes


def made_examples(num_examples, num_recordings, seed=0, max_shift=3, grain=10):
    """Examples for `probe` whose labels are in the picture.

    Pitch is the brightness, and the turn is by how many pixels the view moved, at most
    `max_shift`. What is to be seen is `grain` pixels wide.
    """
    random = np.random.default_rng(seed)
    shape = (num_examples, 3, 12, 160 // grain)
    coarse = torch.from_numpy(random.integers(0, 200, shape)).float()
    # Smooth, as flow by gradients needs it.
    scenes = F.interpolate(coarse, (48, 160), mode="bilinear").to(torch.uint8).numpy()
    pitch = random.integers(0, 50, num_examples)
    turn = random.integers(-max_shift, max_shift + 1, num_examples)
    brightness = pitch[:, None, None, None].astype(np.uint8)

    def view(shift):
        views = [scene[:, :, 40 + x : 120 + x] for scene, x in zip(scenes, shift)]
        return torch.from_numpy(np.stack(views) + brightness)

    labels = {"pitch": pitch.astype(float), "yaw_change": turn.astype(float)}
    return view(0 * turn), view(turn), labels, np.arange(num_examples) % num_recordings


def probed(encode, examples=None, unseen=None, compare=None):
    if examples is None:
        examples = made_examples(240, 4)
    if unseen is None:
        unseen = made_examples(80, 4, seed=1)
    return linear_probe(encode, examples, unseen, np.arange(240) % 4 == 3, GRID, compare)


def test_probes_find_what_is_in_the_picture():
    assert min(probed(pixel_tokens(8)).values()) > 0.8


def test_a_turn_of_more_than_half_a_patch_is_found_by_matching():
    large_turns = {"max_shift": 10, "grain": 5}
    examples = made_examples(240, 4, **large_turns), made_examples(80, 4, seed=1, **large_turns)
    flow = probed(pixel_tokens(8), *examples)["yaw_change"]
    matched = probed(pixel_tokens(8), *examples, pixel_pair_features(8, GRID))["yaw_change"]
    assert matched > 0.8 and flow < matched - 0.05, (flow, matched)

    def noise(z, later):
        random = np.random.default_rng(len(z))
        return torch.from_numpy(random.standard_normal((len(z), 500)).astype(np.float32))

    # A comparison that tells nothing is not chosen.
    assert abs(probed(pixel_tokens(8), *examples, noise)["yaw_change"] - flow) < 1e-9


def shuffled(examples, random):
    frames, later_frames, labels, owner = examples
    labels = {label: random.permutation(values) for label, values in labels.items()}
    return frames, later_frames, labels, owner


def test_worlds_without_a_change_of_the_label_are_no_worlds_without_skill():
    worlds = np.repeat([f"world-{i}" for i in range(8)], 20)
    truth = np.zeros(160)
    truth[:10] = 1  # a screen is open in one world of eight
    found = probe_by_world({"gui_open": (truth.copy(), truth)}, worlds, 200)["gui_open"]
    assert found["worlds"]["world-0"] == 1 and found["worlds"]["world-1"] is None
    assert found["interval"] == [1, 1]
    never = probe_by_world({"gui_open": (truth[20:], truth[20:])}, worlds[20:], 200)["gui_open"]
    assert never["interval"] == [0, 0]


def test_shuffled_labels_take_probes_to_chance():
    random = np.random.default_rng(0)

    def shuffled_pair():
        return (
            shuffled(made_examples(240, 4), random),
            shuffled(made_examples(80, 4, seed=1), random),
        )

    assert max(probed(pixel_tokens(8), *shuffled_pair()).values()) < 0.1
    # Judged on true labels; a shuffle keeps some order by luck.
    scores = [probed(pixel_tokens(8), shuffled(made_examples(240, 4), random)) for _ in range(6)]
    for label in ("pitch", "yaw_change"):
        assert np.mean([row[label] for row in scores]) < 0.15
    matched = probed(pixel_tokens(8), *shuffled_pair(), pixel_pair_features(8, GRID))
    assert matched["yaw_change"] < 0.15


def test_a_constant_encoder_is_caught():
    def constant(frames):
        return torch.ones(len(frames), 60, 128)

    def compare(z, later):
        z, later = (tokens.unflatten(1, GRID).unsqueeze(3) for tokens in (z, later))
        return row_correlation(z, later, 6)

    assert max(probed(constant).values()) < 0.05
    assert probed(constant, compare=compare)["yaw_change"] < 0.05
    collapsed = collapse_metrics(constant(torch.zeros(64, 3, 48, 80)))
    assert "collapsing" in collapse_alarm(collapsed, CONFIG)
    assert collapse_alarm(collapse_metrics(torch.randn(64, 60, 128)), CONFIG) is None


# Actions


class Exact(ActionDecoder):
    """Finds the turn between the pixels of two views by trying all turns."""

    def __init__(self):
        super().__init__(GRID, 192, 4, 1, 1)

    def forward(self, z, later):
        a, b = (tokens.unflatten(1, GRID) for tokens in (z, later))
        shifted = [(a[:, :, k:], b[:, :, : 10 - k]) for k in range(4)]
        errors = [(x - y).square().mean((1, 2, 3)) for x, y in shifted]
        turn = torch.stack(errors, 1).argmin(1) * DEGREES
        return torch.full((len(z), 9), -1.0), torch.stack([turn, 0 * turn], 1)


def test_actions_are_read_back_from_who_follows_them(store):
    with torch.no_grad():
        follows, ignores = (
            decode_rollout_actions(
                Exact(), model, store, store.names, [1, 4], windows_per_recording=6
            )
            for model in (Knows(store), Deaf(store))
        )
    for h in ("1", "4"):
        assert follows["real"][h]["camera_mae"] == 0
        assert follows["imagined"][h]["camera_mae"] == 0
        assert follows["imagined"][h]["yaw_r2"] == 1
        assert ignores["imagined"][h]["camera_mae"] > 3
        assert ignores["imagined"][h]["yaw_r2"] < 0.1


def test_f1_and_degrees_of_a_known_answer():
    actions = torch.as_tensor(NOOP).repeat(4, 2, 1)
    actions[:2, :, 0] = 1  # w in the first two
    actions[:, 0, CAMERA.start] = 3
    actions[:, 1, CAMERA.start] = 1  # 4 degrees in all, at every pair
    logits = torch.full((4, 9), -1.0)
    logits[1:3, 0] = 1  # w: one true positive, one false positive, one false negative
    scores = action_metrics((logits, torch.tensor([[1.0, 0.0]] * 4)), actions)
    assert scores["f1"]["w"] == 0.5 and scores["f1"]["space"] is None
    assert scores["mean_f1"] == 0.5 and scores["camera_mae"] == 1.5


def test_only_what_moves_the_view_moves_the_latent(store):
    frames, actions = evaluation_windows(store, "b_0", 25, 1, 4)
    distances = action_sensitivity(Knows(store), frames[:, 1], actions[:, :24], 4)
    assert distances["left"] > 0.5 and distances["right"] > 0.5
    assert distances["w"] == distances["attack"] == distances["up"] == 0


# Drift


def test_who_knows_the_world_does_not_drift(store):
    measured = rollout_drift(
        Knows(store), store, store.names, ticks=40, every=20, windows_per_recording=2
    )
    imagined, real = measured["imagined"], measured["real"]
    assert all(0.7 < spread < 1.3 for spread in imagined["spread"])
    assert all(distance < 1.3 * real["nearest"] for distance in imagined["nearest"])


def test_latents_that_grow_are_seen_to_leave(store):
    class Grows(Deaf):
        def step(self, z, actions):
            return 1.2 * z

    measured = rollout_drift(
        Grows(store), store, store.names, ticks=20, every=10, windows_per_recording=2
    )
    assert measured["imagined"]["nearest"][-1] > 10 * measured["real"]["nearest"]
    assert measured["imagined"]["spread"][-1] > 10


def test_long_rollouts_follow_actions_that_were_recorded(store):
    class Listens(Deaf):
        def step(self, z, actions):
            self.heard.append(actions[:, -1])
            return z

        def encode(self, frames):
            self.given = frames.numpy()
            return super().encode(frames)

    model, ticks = Listens(store), 30
    model.heard = []
    measured = rollout_drift(model, store, store.names, ticks, 10, windows_per_recording=3)
    assert (measured["recordings"], measured["repeated"]) == (len(store.names), False)
    heard = torch.stack(model.heard, 1).numpy()  # (b, ticks, 28)
    recorded = [store[name].actions for name in store.names]
    starts = [(n, t) for n in store.names for t in window_starts(store, n, 25, ticks, 3)]
    assert np.array_equal(heard, [store[n].actions[t : t + ticks] for n, t in starts])
    assert np.array_equal(model.given, [store[n].frames[t] for n, t in starts])
    longest = max(map(len, recorded))
    model.heard = []
    measured = rollout_drift(model, store, store.names, longest, 1000, windows_per_recording=1)
    assert measured["repeated"]
    heard = torch.stack(model.heard, 1).numpy()  # (recordings, longest, 28)
    for name, actions, of_recording in zip(store.names, heard, recorded, strict=True):
        (t,) = window_starts(store, name, 25, 1, 1)
        window = of_recording[t - 24 :]  # from the first tick of the history to the end, and again
        assert np.array_equal(actions, np.resize(window, (24 + longest, 28))[24:])


# Pixels


def test_who_knows_the_future_draws_it_perfectly(store):
    model = Knows(store)

    def draw_black(z):
        return torch.zeros(len(z), 3, 48, 80, dtype=torch.uint8)

    decoders = {"fold": model.decode, "black": draw_black}
    scores = pixel_metrics(model, decoders, store, store.names, [1, 4], windows_per_recording=3)
    assert (scores["psnr"]["fold"] == 60).all() and np.allclose(scores["ssim"]["fold"], 1)
    assert (scores["psnr"]["black"] < 10).all()
    assert (scores["psnr"]["copy_last"] < 15).all()


def test_a_shifted_frame_is_the_picture_after_the_turn(store):
    """Half the view to the right: what was in the right half stands on the left."""
    frames = torch.from_numpy(store[store.names[0]].frames[:2].copy())
    height, width = frames.shape[-2:]
    mean = torch.full((height * width, 3), 99.0)
    fit = CopyFit(mean, {8: 1.0}, {8: (80, 60)}, {8: "mean"}, {8: 0}, {8: 1.0}, 1)
    same = pixels._shift_frames(frames, torch.zeros(2, 2), 8, fit)
    assert torch.equal(same, frames)
    turned = pixels._shift_frames(frames, torch.tensor([[40.0, 0.0]] * 2), 8, fit)
    assert torch.equal(turned[..., : width // 2], frames[..., width // 2 :])
    assert (turned[..., width // 2 + 1 :] == 99).all()
    faded = pixels._shift_frames(frames, torch.zeros(2, 2), 8, replace(fit, shifted_gain={8: 0.0}))
    assert (faded == 99).all()
    to_edge = replace(fit, edge={8: "repeat"})
    repeated = pixels._shift_frames(frames, torch.tensor([[40.0, 0.0]] * 2), 8, to_edge)
    assert torch.equal(repeated[..., : width // 2], frames[..., width // 2 :])
    assert (repeated[..., width // 2 :] == frames[..., -1:]).all()
    blurred = pixels._shift_frames(frames, torch.zeros(2, 2), 8, replace(fit, blur={8: 2}))
    assert blurred.float().diff(dim=-1).abs().mean() < frames.float().diff(dim=-1).abs().mean()


def test_a_copy_that_moves_with_the_mouse_finds_what_a_copy_does_not(store):
    """In the panoramas 80 columns are the view, and a turn of `DEGREES` moves 8 of them."""
    mean = Knows(store).target(torch.from_numpy(store["b_0"].frames.copy())).mean(0)
    values = 1.0, (10 * DEGREES, 60.0), "mean", 0, 1.0
    fit = CopyFit(mean, *(dict.fromkeys([1, 4], value) for value in values), 1)
    scores = retrieval(Knows(store), store, store.names, [1, 4], 4, candidates=16, fit=fit)
    found = scores["top1_without_given_frame"]
    assert set(found) == {"model", "copy_last", "shuffled_actions", "shifted_copy"}
    assert found["model"].mean() == 1
    assert (found["shifted_copy"][:, 0] == 1).all()
    assert found["shifted_copy"].mean() > found["copy_last"].mean()
    plain = retrieval(Knows(store), store, store.names, [1, 4], 4, candidates=16)
    assert "shifted_copy" not in plain["top1"]
    assert np.array_equal(plain["top1"]["model"], scores["top1"]["model"])


def test_psnr_and_ssim_of_known_answers():
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert abs(psnr(grey, grey + 10).item() - 20 * np.log10(255 / 10)) < 1e-4
    # Wang et al. 2004, eq. 6: of two flat pictures the brightness alone is compared.
    constant = (0.01 * 255) ** 2
    expected = (2 * 100 * 110 + constant) / (100**2 + 110**2 + constant)
    assert abs(ssim(grey, grey + 10).item() - expected) < 1e-5


# Two runs


def exactly(value):
    return {"mean": value, "interval": [value, value]}


def a_report(error=0.8, other=1.4, top1=0.6, pitch=0.9, recordings=("a", "b")):
    by_world = {"interval": [pitch - 0.05, pitch + 0.05]}
    return {
        "schema": SCHEMA,
        "recordings": list(recordings),
        "relative_to_copy": {h: {"model": exactly(error)} for h in ("1", "4", "8")},
        "action_sensitivity_ratio": {"8": exactly(other)},
        "retrieval": {"top1": {"4": {"model": exactly(top1)}}},
        "probes": {"model": {"pitch": pitch, "yaw_change": pitch}},
        "ticks_better": {"copy_last": list(range(1, 16)), "no_op": [1, 2]},
        "probes_by_world": {"pitch": by_world, "yaw_change": by_world},
    }


def test_bars_are_met_or_not():
    met = {b["criterion"]: b["passed"] for b in check_criteria(a_report())}
    assert sorted(met.values()) == [False, True, True, True, True, True]
    # What a blind encoder leaves.
    nothing = a_report(other=float("nan"), top1=0.0, pitch=float("nan"))
    assert [b["passed"] for b in check_criteria(nothing)] == [
        True,
        False,
        False,
        False,
        False,
        False,
    ]


def a_paired_report(error=0.8, other=1.4, recordings=("a", "b", "c", "d")):
    """Each recording's own numbers differ more than the reports do."""
    scale = dict(zip(recordings, (1.0, 3.0, 0.2, 0.7)))
    ticks = ("1", "4", "8")
    by_method = {"copy_last": 1.0, "model": error, "shuffled_future": error * other}
    report = a_report(error, other, recordings=recordings)
    worlds = {name: 1 - error * s / 10 for name, s in scale.items()}
    return report | {
        "horizons": {h: {} for h in ticks},
        "windows_per_recording": 24,
        "seed": 0,
        "relative_to_best_baseline": {h: {"baseline": "copy_last", "ratio": error} for h in ticks},
        "by_recording": {
            method: {name: [value * s + 0.01 * s**2] * len(ticks) for name, s in scale.items()}
            for method, value in by_method.items()
        },
        "probes_by_world": {"pitch": {"worlds": worlds}, "yaw_change": {"worlds": worlds}},
    }


def test_two_reports_are_compared_by_pairs_and_drawn():
    first, second = a_paired_report(), a_paired_report(error=0.7, other=1.2)
    compared = compare_reports(first, second)
    error = compared["error over copying, 4 ticks"]
    assert (error["first"], error["second"], error["verdict"]) == (0.8, 0.7, "better")
    assert 0.87 < error["interval"][0] < error["ratio"] < error["interval"][1] < 0.89
    followed = compared["shuffled over true future actions, 8 ticks"]
    assert (followed["first"], followed["second"], followed["verdict"]) == (1.4, 1.2, "worse")
    assert compared["R2 of pitch"]["ratio"] == pytest.approx(7 / 8)
    assert compared["top-1 retrieval, 4 ticks"]["verdict"] == "not paired"
    fig, axes = plot_comparison(compared, ("old", "new"))
    labels = [label.get_text() for ax in axes for label in ax.get_yticklabels()]
    assert len(labels) == len(compared)
    plt.close(fig)


def test_a_difference_in_one_recording_of_four_is_not_clear():
    second = a_paired_report()
    second["by_recording"]["model"]["b"] = [0.5 * e for e in second["by_recording"]["model"]["b"]]
    row = compare_reports(a_paired_report(), second)["error over copying, 8 ticks"]
    assert row["ratio"] == pytest.approx(0.5**0.25)
    assert row["verdict"] == "no clear difference"


def test_reports_on_other_recordings_or_windows_are_not_compared():
    with pytest.raises(ValueError, match=r"different recordings.*same data_dir"):
        compare_reports(a_paired_report(), a_paired_report(recordings=("a", "b", "c", "e")))
    with pytest.raises(ValueError, match=r"different windows_per_recording.*24 and 8.*steps"):
        compare_reports(a_paired_report(), a_paired_report() | {"windows_per_recording": 8})


def test_a_report_of_another_version_is_refused(tmp_path):
    path = Path(tmp_path) / "evaluate.json"
    path.write_text(json.dumps(a_report() | {"schema": SCHEMA - 1}))
    with pytest.raises(ValueError, match="evaluate again"):
        load_report(path)


def test_learned_metrics_where_their_networks_are(tmp_path, monkeypatch):
    """With networks of random weights: equal pictures are at no distance, others are."""
    pytest.importorskip("torchmetrics")
    torchvision = pytest.importorskip("torchvision")
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(pixels, "_hash_matches_name", lambda path: True)
    (tmp_path / "checkpoints").mkdir()
    path_of = {
        name: tmp_path / "checkpoints" / file for name, file in pixels.METRIC_WEIGHTS.items()
    }
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path_of["lpips"])
    with monkeypatch.context() as m:
        extractor = inception.FeatureExtractorInceptionV3
        m.setattr(extractor, "load_state_dict", lambda self, state: None)
        m.setattr(inception, "load_state_dict_from_url", lambda *a, **k: None)
        torch.save(extractor("x", ["2048"]).state_dict(), path_of["fid"])
    metrics, unavailable = pixels.perceptual_metrics()
    assert set(metrics) == {"lpips", "fid"} and set(unavailable) == {"fvd"}
    noise = torch.randint(0, 256, (4, 3, 48, 80), dtype=torch.uint8)
    flat = torch.full((4, 3, 48, 80), 100, dtype=torch.uint8)
    assert metrics["lpips"](noise, noise).tolist() == [0] * 4
    assert metrics["lpips"](noise, flat).shape == (4,)
    assert (metrics["lpips"](noise, flat) > 0).all()
    assert metrics["fid"](noise, flat) > 10 * abs(metrics["fid"](noise, noise))


# Recordings that nothing can be judged on


class Odd(Panoramas):
    """One recording is too short for a window, in another nothing moves."""

    def __init__(self):
        super().__init__(60)
        for field in ("frames", "actions"):
            setattr(self.clips["a_0"], field, getattr(self.clips["a_0"], field)[:30])
        self.clips["b_0"].frames = self.clips["b_0"].frames[:1].repeat(60, 0)


def test_a_recording_without_window_or_movement_is_left_out_by_name(capsys):
    store = Odd()
    reasons = excluded_recordings(store, store.names, 25, 15)
    first_words = {name: reason.split(" ")[0] for name, reason in reasons.items()}
    assert first_words == {"a_0": "too", "b_0": "nothing"}
    assert usable_recordings(store, store.names, 25, 15, least=1) == ["c_0"]
    assert "left out: a_0: too short" in capsys.readouterr().out
    message = "1 recording(s) can be judged, at least 2 are needed (a_0: too short"
    with pytest.raises(ValueError, match=re.escape(message)):
        usable_recordings(store, store.names, 25, 15)


def test_one_movement_late_in_a_recording_is_seen():
    store = Panoramas()
    store.clips["a_0"].frames = store.clips["a_0"].frames[:1].repeat(300, 0)
    assert list(excluded_recordings(store, store.names, 25, 15)) == ["a_0"]
    store.clips["a_0"].frames[299, 0, 0, 0] ^= 1
    assert excluded_recordings(store, store.names, 25, 15) == {}


def test_a_new_session_of_a_player_trained_on_is_not_judged(tmp_path):
    sides = {"ann": "train", "cy": "validation", "dee": "test", "eve": "test"}
    rows = {}
    for player, side in sides.items():
        for session in range(2):
            name = f"{player}-{session:012x}-20220101-000000"
            rows[name] = {"url": "x", "side": side}
            for suffix in (".mp4", ".jsonl"):
                (tmp_path / f"{name}{suffix}").touch()
    (tmp_path / "manifest.json").write_text(json.dumps({"split_by": "player", "recordings": rows}))
    names = sorted(rows)  # the weights saw the first session of Ann and of Cy
    training = {"train": names[:1], "validation": names[2:3]}
    (tmp_path / "training.json").write_text(json.dumps(training))
    assert unseen_recordings(tmp_path, tmp_path) == names[4:]
    sides = training_sides(tmp_path, tmp_path, SimpleNamespace(names=names))
    assert sides == {"train": names[:2], "validation": names[2:4]}
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training.json, line 1: not JSON.*copy the whole"):
        unseen_recordings(tmp_path, tmp_path)


def test_latents_that_are_all_alike_are_told_and_no_nan(store):
    with pytest.raises(ValueError, match=r"latents of a_0, b_0, c_0\.\. are all alike"):
        errors_of(Blind(store), store)


def test_a_recording_that_was_not_measured_at_a_horizon_is_left_out_there_alone():
    random = np.random.default_rng(0)
    methods = ("model", "copy_last", "no_op", "shuffled_future")
    complete = {method: random.uniform(0.2, 1, (5, 3)) for method in methods}
    with_gap = {method: errors.copy() for method, errors in complete.items()}
    for errors in with_gap.values():
        errors[3, 2] = np.nan
    without = {method: np.delete(errors, 3, 0) for method, errors in complete.items()}
    table = summarize_by_horizon(with_gap, [1, 2, 4])
    assert table["1"] == summarize_by_horizon(complete, [1, 2, 4])["1"]
    assert table["4"] == summarize_by_horizon(without, [1, 2, 4])["4"]
    assert error_ratio(with_gap, [1, 2, 4])["4"] == error_ratio(without, [1, 2, 4])["4"]


def test_an_error_of_nothing_gives_no_nan():
    errors = {m: np.ones((3, 2)) for m in ("model", "copy_last", "no_op", "shuffled_future")}
    errors["copy_last"][1] = 0
    perfect_model = errors | {"model": errors["copy_last"]}
    rows = [*summarize_by_horizon(errors, [1, 2]).values(), error_ratio(perfect_model, [1, 2])]
    for row in rows:
        for value in row.values():
            assert np.isfinite([value["mean"], *value["interval"]]).all()


# What is computed once


def test_who_remembers_scores_as_the_model_itself(store):
    model = Knows(store)
    cached, kept = CachedModel(model), []
    for _ in range(2):
        errors, variance = horizon_errors(cached, store, store.names, HORIZONS, 6)
        kept.append(list(cached.kept))
    true_errors, true_variance = horizon_errors(model, store, store.names, HORIZONS, 6)
    for method in true_errors:
        assert np.allclose(true_errors[method], errors[method], atol=1e-7)
    assert np.isclose(true_variance, variance)
    # Nothing was encoded again.
    assert set(kept[0]) == set(kept[1])
    assert sum(key[0] == "target" for key in kept[0]) <= 3 * 6 * 17
    scores, cached_scores = (
        retrieval(m, store, store.names, [1, 4], windows_per_recording=4) for m in (model, cached)
    )
    for measure, by_method in scores.items():
        for method, values in by_method.items():
            assert (values == cached_scores[measure][method]).all()


@pytest.mark.parametrize("num_features", [20, 300])
def test_ridges_are_ridge_for_each_answer(num_features):
    random = np.random.default_rng(0)
    x, unseen = random.normal(size=(120, num_features)), random.normal(size=(9, num_features))
    validation = np.arange(120) % 3 == 0
    answers = [
        x[:, :1] + 0.01 * random.normal(size=(120, 1)),
        random.normal(size=(120, 2)),
        x[:, 1:2] ** 2,
    ]
    for y, fit in zip(answers, fit_ridges(x, answers, validation)):
        alone = fit_ridge(x, y, validation)
        assert np.isclose(fit.error, alone.error, rtol=1e-9)
        assert np.allclose(fit(unseen), alone(unseen), rtol=1e-9, atol=1e-9)


def test_recordings_are_filtered_by_length_in_one_place():
    """What is fitted and what is reported of the fit are the same recordings."""
    store = Odd()
    assert recordings_with_window(store, store.names, 25, 15) == ["b_0", "c_0"]
    fit = fit_copy_baselines(Knows(store), store, store.names, [1, 15], windows_per_recording=2)
    assert fit.recordings == 2


def test_other_recordings_are_not_comparable_and_say_so():
    row = {"mean": 0.5, "interval": [0.4, 0.6]}
    report = {
        "preset": "tiny",
        "recordings": ["a", "b"],
        "criteria": [{"criterion": "pitch_r2", "number": 0.7, "threshold": 0.8, "passed": False}],
        "relative_to_copy": {h: {"model": row} for h in ("1", "2", "4", "8", "15")},
    }
    same = compare_with_shipped(report, report)
    assert same["comparable"] and "ratios can" in same["summary"]
    different = compare_with_shipped(report | {"recordings": ["mine"], "preset": "small"}, report)
    assert not different["comparable"] and "not comparable" in different["summary"]
    assert "preset small, the shipped of tiny" in different["summary"]
    first = different["rows"][0]
    assert first == {"what": "pitch_r2", "threshold": 0.8, "yours": 0.7, "shipped": 0.7}
    report["criteria"][0] |= {"number": 0.85, "interval": [0.75, 0.9]}
    first = compare_with_shipped(report, report)["rows"][0]
    assert first["what"] == "pitch_r2, lower end of the interval"
    assert first["yours"] == 0.75 < first["threshold"]
    without = dict(report["criteria"][0], interval=None)
    first = compare_with_shipped(report, report | {"criteria": [without]})["rows"][0]
    assert (first["yours"], first["shipped"]) == (0.75, None), "a bound beside a value"
