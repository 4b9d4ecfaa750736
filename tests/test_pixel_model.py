"""The pixel model: what it draws, its training, and how it is set beside the world model."""

import numpy as np
import pytest
import torch
from test_evaluation import CONFIG, Deaf, Knows, Panoramas
from training_runs import (
    HELD_OUT,
    SMALL,
    TINY,
    TRAIN,
    note_rollouts,
    store_fixture,  # noqa: F401
)

from minecraft_jepa.config import preset
from minecraft_jepa.evaluation.pixel_baseline import SeenBy, judge_frames, judge_imagination
from minecraft_jepa.model.pixel_model import PixelModel
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.training import train_pixel_model as pixel_training
from minecraft_jepa.training.train_pixel_model import train_pixel_model, training_flops
from minecraft_jepa.training.validation import error_ratio_to_copy
from minecraft_jepa.utils import count_flops


def train(store, **changes):
    return train_pixel_model(preset("tiny", **TINY | changes), store, TRAIN, HELD_OUT)


def test_imagined_frames_go_in_again():
    torch.manual_seed(0)
    model = PixelModel(preset("tiny", **SMALL)).eval()
    torch.nn.init.normal_(model.predictor.out.weight, std=0.05)
    z = model.encode(torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8))
    actions = torch.randn(2, 27, 28)
    with torch.no_grad():
        future = model.imagine(z, actions)
        by_steps = z
        for k in range(3):
            by_steps = model.step(by_steps, actions[:, k : k + 25])
            assert torch.allclose(future[:, k], by_steps, atol=1e-5)
    assert (future[:, 0] - z).abs().max() > 0.01


def test_frames_become_latents_of_the_weights_type_on_their_device():
    frames = torch.zeros(1, 3, 48, 80, dtype=torch.uint8)
    model = PixelModel(preset("tiny", **SMALL))
    assert model.encode(frames).dtype == torch.float32
    assert model.half().encode(frames).dtype == torch.float16
    assert model.to("meta").encode(frames).device.type == "meta"


def test_weights_come_back_as_they_were_kept(tmp_path):
    torch.manual_seed(0)
    model = PixelModel(preset("tiny", **SMALL)).eval()
    torch.nn.init.normal_(model.predictor.out.weight, std=0.05)
    model.save_pretrained(tmp_path)
    again = PixelModel.from_pretrained(tmp_path)
    z = model.encode(torch.randint(0, 256, (1, 3, 48, 80), dtype=torch.uint8))
    actions = torch.randn(1, 26, 28)
    with torch.no_grad():
        future = model.imagine(z, actions)
        assert (future - z[:, None]).abs().max() > 0.01
        assert torch.equal(again.imagine(z, actions), future)


def test_a_step_learns_from_as_many_ticks_as_the_schedule_says(store, monkeypatch):
    seen = note_rollouts(monkeypatch, PixelModel)
    train(store, steps=6, evaluate_every=6, rollout_steps=2, rollout_steps_late=5)
    assert seen == [2, 2, 2, 2, 5, 5]


def test_the_best_evaluation_is_what_comes_back(store, monkeypatch):
    numbers, states = iter([0.5, 0.2, 0.9]), []

    def evaluate(model, frames, actions):
        states.append({name: t.clone() for name, t in model.state_dict().items()})
        return {"model": [next(numbers)] * 2, "copy_last": [1.0] * 2}, None

    monkeypatch.setattr(pixel_training, "validate", evaluate)
    model, rows = train(store, steps=3, evaluate_every=1)
    assert [error_ratio_to_copy(row) for row in rows] == [0.5, 0.2, 0.9]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, states[1][name])


def test_training_learns_more_than_to_copy_and_is_repeatable(store):
    options = {"steps": 60, "evaluate_every": 60, "batch_size": 8, "lr": 3e-3}
    (model, rows), (again, _) = train(store, **options), train(store, **options)
    assert error_ratio_to_copy(rows[-1]) < 0.97
    for first, second in zip(model.parameters(), again.parameters()):
        assert torch.equal(first, second)


def test_operations_of_a_step_grow_with_rollouts_and_batch():
    model = PixelModel(preset("tiny", **SMALL))
    one = training_flops(model, 2)
    assert training_flops(model, 4) == 2 * one
    model.rollout = 4  # of two; each imagined frame is encoded again
    assert training_flops(model, 2) == pytest.approx(2 * one, rel=0.01)
    assert all(p.grad is None for p in model.parameters())


def test_who_knows_the_future_is_seen_to_know_it():
    store = Panoramas()
    knows, deaf, judge = Knows(store), Deaf(store), WorldModel(CONFIG).eval()
    own = judge_imagination(knows, store, store.names, 6)
    seen = judge_imagination(SeenBy(judge, knows, knows.decode), store, store.names, 6)
    for best in (own, seen):
        assert max(best["error_over_copying"].values()) < 1e-6
        assert min(best["action_sensitivity"].values()) > 100
        for measure in ("top1", "top1_without_given_frame"):
            assert np.allclose(list(best[measure].values()), 1), measure
    frames = judge_frames(knows, knows.decode, store, store.names, 6)
    assert min(frames["psnr"].values()) == min(frames["psnr_of_truth"].values()) == 60
    assert np.allclose(list(frames["ssim"].values()), 1)
    assert max(frames["psnr_of_copy"].values()) < 12

    own = judge_imagination(deaf, store, store.names, 6)
    seen = judge_imagination(SeenBy(judge, deaf, deaf.decode), store, store.names, 6)
    for worst in (own, seen):
        for measure in ("error_over_copying", "action_sensitivity"):
            assert np.allclose(list(worst[measure].values()), 1), measure
        assert worst["top1"] == {"4": 0.0, "8": 0.0}
    frames = judge_frames(deaf, deaf.decode, store, store.names, 6)
    assert frames["psnr"] == frames["psnr_of_copy"] and frames["ssim"] == frames["ssim_of_copy"]


def test_operations_are_counted_whatever_computes_them():
    """With 512 rows and more, a CPU computes layers without a gradient in another way."""
    model, frames = WorldModel(preset("tiny")), torch.zeros(16, 3, 72, 132)
    with_gradient = count_flops(lambda: model.encode(frames), with_gradient=True)
    assert count_flops(lambda: model.target(frames)) == with_gradient
