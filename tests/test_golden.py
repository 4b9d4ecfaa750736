"""Outputs, losses, gradients, one optimizer step and a clip store, compared with golden.json.

The inputs are made here; the weights are the shipped ones, or filled from a fixed stream. A change
that is meant to be faster, or only to read better, leaves all numbers as they are. Where results
are meant to change, `python tests/test_golden.py` writes the file anew, and the commit says why.
"""

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pairs
import pytest
import torch

from minecraft_jepa.config import preset
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.recordings import open_recording
from minecraft_jepa.model.decoders import DiT, RegressionHead
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.training.optim import make_optimizer, optimizer_step

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "data" / "weights" / "tiny"
GOLDEN = Path(__file__).with_name("golden.json")
# relative to a tensor's rms: rounding differs between machines, and with the order of sums
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # relative to the norm of a gradient or of an update
GREY_LEVELS = 2  # decoded video differs this much between versions of libav
SMALL = {
    "height": 24,
    "frame_width": 40,
    "patch_size": 8,
    "encoder_embed_dim": 32,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "conditioner_depth": 2,
    "conditioner_num_heads": 2,
    "predictor_depth": 2,
    "predictor_num_heads": 2,
}
VARIANTS = {
    "cross attention, vicreg": {
        "anti_collapse": "vicreg",
        "inverse_dynamics_weight": 0.3,
        "pitch_weight": 0.2,
    },
    "adaln, sigreg": {
        "kind": "adaln",
        "anti_collapse": "sigreg",
        "sigreg_num_slices": 64,
        "inverse_dynamics_weight": 0.3,
        "pitch_weight": 0.0,
    },
    "adaln, EMA target alone": {
        "kind": "adaln",
        "inverse_dynamics_weight": 0.0,
        "variance_weight": 0.0,
        "rollout_steps": 3,
    },
}


def windows(config, batch, num_frames, ticks):
    "Frames with slopes and noise in them, and actions of all kinds, from NumPy's fixed stream."
    rng, frame = np.random.default_rng(7), config.frame
    slope = np.linspace(0, 1, frame.width) * np.linspace(0.3, 1, frame.height)[:, None]
    tint = rng.uniform(40, 200, (batch, num_frames, 3, 1, 1))
    noise = rng.normal(0, 12, (batch, num_frames, 3, frame.height, frame.width))
    pixels = np.clip(tint * slope + 30 + noise, 0, 255).astype(np.uint8)
    length = config.conditioner.history_ticks - 1 + ticks
    actions = (rng.random((batch, length, 28)) < 0.2).astype(np.float32)
    actions[..., 20:22] = 0.5
    actions[..., 22:24] = rng.normal(0, 3, (batch, length, 2))
    return torch.from_numpy(pixels), torch.from_numpy(actions)


def filled(module):
    "Weights from NumPy's fixed stream, none of them at its initial value."
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.from_numpy(rng.normal(0, 0.1, tuple(p.shape)).astype(np.float32)))
    return module


def summary(x):
    "Mean, root mean square and a few values of a tensor."
    x = x.detach().double().flatten()
    chosen = x[torch.linspace(0, len(x) - 1, 7).long()].tolist()
    return {"mean": float(x.mean()), "rms": float(x.square().mean().sqrt()), "at": chosen}


def norms(model):
    "Norm of the gradient of each submodule."
    squares = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            submodule = name.split(".")[0]
            squares.setdefault(submodule, 0.0)
            squares[submodule] += float(p.grad.double().square().sum())
    return {submodule: square**0.5 for submodule, square in squares.items()}


@lru_cache
def outputs():
    "What the shipped networks compute."
    model = WorldModel.from_pretrained(WEIGHTS)
    dit, head = DiT.from_pretrained(WEIGHTS), RegressionHead.from_pretrained(WEIGHTS)
    frames, actions = windows(model.config, 3, 1, 4)
    with torch.no_grad():
        z = model.encode(frames[:, 0])
        future = model.imagine(z, actions)
        tensors = {
            "encode": z,
            "target": model.target(frames[:, 0]),
            "imagine": future,
            "step": model.step(z, actions[:, :25]),
            "dit": dit.decode(z, steps=4, seed=5),
            "dit, imagined and guided": dit.decode(future[:, 3], steps=3, guidance=1.5),
            "head": head.decode(future[:, 1]),
        }
        if hasattr(model, "inverse_dynamics"):
            tensors["predicted action"] = model.inverse_dynamics.predict(z, future[:, 0])
    return {name: summary(x) for name, x in tensors.items()}


@lru_cache
def training_step():
    "Loss, gradients and one step of the optimizer, from the shipped weights."
    model = WorldModel(preset("tiny"))
    model.init_from_pretrained(WEIGHTS)
    model.train()
    settings = model.config.jepa
    frames, actions = windows(
        model.config, 4, 2 + settings.rollout_steps, settings.extra_frame_offset
    )
    optimizer = make_optimizer({model: 1.0}, 1e-3, 0.05)
    before = [p.detach().clone() for p in model.parameters()]
    out = model(frames, actions)
    out["loss"].backward()
    numbers = {
        "loss": out["loss"].item(),
        "errors": out["errors"].tolist(),
        "gradients": norms(model),
    }
    for p, old in zip(model.parameters(), before):
        assert torch.equal(p, old)
    numbers["norm"] = optimizer_step(numbers["loss"], optimizer, 1e-4, 1.0)
    updates = [p.detach() - old for p, old in zip(model.parameters(), before)]
    numbers["moved"] = float(sum(u.double().square().sum() for u in updates)) ** 0.5
    model.update_target_encoder(0.9)
    numbers["loss afterwards"] = model(frames, actions)["loss"].item()
    return numbers


@lru_cache
def decoders_losses():
    "Losses and gradients of the decoders, from the shipped weights; noise is left out."
    dit, head = DiT.from_pretrained(WEIGHTS), RegressionHead.from_pretrained(WEIGHTS)
    rng = np.random.default_rng(1)
    shape = 3, dit.config.frame.patches, dit.config.encoder.embed_dim
    z = torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32))
    x = torch.from_numpy(
        rng.normal(0, 1, (*shape[:2], dit.embed[0].in_features)).astype(np.float32)
    )
    denoised = dit.denoise(x, torch.tensor([0.1, 0.5, 0.9]), z)
    drawn = head._predict_patches(z)
    (denoised.square().mean() + drawn.square().mean()).backward()
    return {
        "denoised": summary(denoised),
        "drawn": summary(drawn),
        "dit": norms(dit),
        "head": norms(head),
    }


@lru_cache
def variant(name):
    "Loss and gradients of one way of training, with weights from a fixed stream."
    model = filled(WorldModel(preset("tiny", **SMALL | VARIANTS[name]))).train()
    settings = model.config.jepa
    num_frames = 1 + settings.rollout_steps + (settings.extra_frame_offset > 0)
    ticks = max(settings.rollout_steps, settings.extra_frame_offset)
    frames, actions = windows(model.config, 4, num_frames, ticks)
    out = model(frames, actions, seed=11)
    out["loss"].backward()
    return {
        "loss": out["loss"].item(),
        "errors": out["errors"].tolist(),
        "z": summary(out["z"]),
        "gradients": norms(model),
    }


@lru_cache
def data():
    "A clip store of a small made recording, and the encoded actions of three sample recordings."
    name, frame = "world-1_0100", preset("tiny").frame
    with tempfile.TemporaryDirectory() as folder:
        pairs.make_pair(Path(folder) / "recordings", name, frames=40)
        store = ClipStore.build(
            Path(folder) / "recordings", frame, Path(folder) / "store", progress=False, workers=1
        )
        arrays = sorted((Path(folder) / "store" / name).glob("*.npy"))
        frames, actions = (torch.as_tensor(x) for x in store.window(name, 24, rollout=3))
        numbers = {
            "bytes": {path.name: path.stat().st_size for path in arrays},
            "clip": summary(torch.from_numpy(np.array(store[name].frames))),
            "window": summary(frames),
            "window, actions": summary(actions),
        }
    samples = sorted((ROOT / "data").glob("*.mp4"))[:3]
    numbers["sample"] = {
        path.stem: summary(torch.from_numpy(np.asarray(open_recording(path).actions)))
        for path in samples
    }
    return numbers


def everything():
    return {
        "outputs": outputs(),
        "training_step": training_step(),
        "decoders": decoders_losses(),
        "variants": {name: variant(name) for name in VARIANTS},
        "data": data(),
    }


def golden():
    return json.loads(GOLDEN.read_text())


def check(numbers, expected, tolerance=TOLERANCE):
    "Compare two trees of numbers, which have to have the same keys."
    if isinstance(expected, dict) and "rms" in expected:
        size = tolerance * expected["rms"]
        assert numbers["mean"] == pytest.approx(expected["mean"], rel=0, abs=size)
        assert numbers["rms"] == pytest.approx(expected["rms"], rel=tolerance)
        assert numbers["at"] == pytest.approx(expected["at"], rel=0, abs=10 * size)
    elif isinstance(expected, dict):
        assert numbers.keys() == expected.keys()
        for key in expected:
            check(numbers[key], expected[key], tolerance)
    else:
        assert numbers == pytest.approx(expected, rel=tolerance)


def check_pixels(numbers, expected, levels, mean):
    "Compare summaries of pixels: single ones within `levels`, mean and rms within `mean`."
    assert numbers["at"] == pytest.approx(expected["at"], abs=levels)
    assert numbers["mean"] == pytest.approx(expected["mean"], abs=mean)
    assert numbers["rms"] == pytest.approx(expected["rms"], abs=mean)


@pytest.mark.parametrize("name", ["encode", "target", "step", "imagine", "predicted action"])
def test_latents_of_the_shipped_weights_stay(name):
    if name not in golden()["outputs"]:
        pytest.skip("the shipped weights have no such head")
    check(outputs()[name], golden()["outputs"][name])


@pytest.mark.parametrize("name", ["dit", "dit, imagined and guided", "head"])
def test_pictures_of_the_shipped_weights_stay_within_a_grey_level(name):
    check_pixels(outputs()[name], golden()["outputs"][name], levels=1, mean=0.05)


def test_a_training_step_stays():
    numbers, expected = training_step(), golden()["training_step"]
    for key in ("loss", "errors", "loss afterwards"):
        check(numbers[key], expected[key])
    for key in ("gradients", "norm", "moved"):
        check(numbers[key], expected[key], GRADIENT_TOLERANCE)


def test_losses_of_the_decoders_stay():
    numbers, expected = decoders_losses(), golden()["decoders"]
    for key in ("denoised", "drawn"):
        check(numbers[key], expected[key])
    for key in ("dit", "head"):
        check(numbers[key], expected[key], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_other_ways_of_training_stay(name):
    numbers, expected = variant(name), golden()["variants"][name]
    for key in ("loss", "errors", "z"):
        check(numbers[key], expected[key])
    check(numbers["gradients"], expected["gradients"], GRADIENT_TOLERANCE)


def test_a_clip_store_stays():
    numbers, expected = data(), golden()["data"]
    assert numbers["bytes"] == expected["bytes"]
    for key in ("clip", "window"):
        check_pixels(numbers[key], expected[key], GREY_LEVELS, mean=0.5)
    check(numbers["window, actions"], expected["window, actions"], 1e-6)


def test_encoded_actions_of_the_sample_stay():
    check(data()["sample"], golden()["data"]["sample"], 1e-6)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(everything(), indent=1) + "\n")
