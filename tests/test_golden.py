"""Outputs, losses, gradients and one optimizer step, held against numbers kept in golden.json.

The inputs are made here; the weights are the shipped ones, or filled by a formula. A change that
is meant to be quicker, or only to read better, leaves all of them as they are. Where results are
meant to change, `python tests/test_golden.py` writes the file anew, and the commit says why.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from minecraft_jepa.config import preset
from minecraft_jepa.model.decoders import DiT, RegressionHead
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.training.optim import make_optimizer, optimizer_step

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "data" / "weights" / "tiny"
KEPT = Path(__file__).with_name("golden.json")
RELATIVE = 1e-4  # of a tensor's size: rounding differs between machines, and by the order of sums
GRADIENTS = 1e-3  # of the norm of a gradient or of an update
SMALL = {
    "height": 24,
    "frame_width": 40,
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
    "adaln, slow copy alone": {
        "kind": "adaln",
        "inverse_dynamics_weight": 0.0,
        "variance_weight": 0.0,
        "rollout_steps": 3,
    },
}


def windows(config, batch, frames, ticks):
    "Frames with slopes and noise in them, and actions of all kinds, from numpy's fixed stream."
    rng, f = np.random.default_rng(7), config.frame
    slope = np.linspace(0, 1, f.width) * np.linspace(0.3, 1, f.height)[:, None]
    tint = rng.uniform(40, 200, (batch, frames, 3, 1, 1))
    noise = rng.normal(0, 12, (batch, frames, 3, f.height, f.width))
    pixels = np.clip(tint * slope + 30 + noise, 0, 255).astype(np.uint8)
    length = config.conditioner.history_ticks - 1 + ticks
    actions = (rng.random((batch, length, 28)) < 0.2).astype(np.float32)
    actions[..., 20:22] = 0.5
    actions[..., 22:24] = rng.normal(0, 3, (batch, length, 2))
    return torch.from_numpy(pixels), torch.from_numpy(actions)


def filled(module):
    "Weights from numpy's fixed stream, none of them at its special start."
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.from_numpy(rng.normal(0, 0.1, tuple(p.shape)).astype(np.float32)))
    return module


def summary(x):
    "Mean, root mean square and a few values of a tensor."
    x = x.detach().double().flatten()
    at = torch.linspace(0, len(x) - 1, 7).long()
    return {"mean": float(x.mean()), "rms": float(x.square().mean().sqrt()), "at": x[at].tolist()}


def norms(model):
    "Norm of the gradient of each part."
    parts = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            part = name.split(".")[0]
            parts[part] = parts.get(part, 0) + float(p.grad.double().square().sum())
    return {part: square**0.5 for part, square in parts.items()}


@lru_cache
def outputs():
    "What the shipped networks say."
    model = WorldModel.from_pretrained(WEIGHTS)
    dit, head = DiT.from_pretrained(WEIGHTS), RegressionHead.from_pretrained(WEIGHTS)
    frames, actions = windows(model.config, 3, 1, 4)
    with torch.no_grad():
        z = model.encode(frames[:, 0])
        future = model.imagine(z, actions)
        found = {
            "encode": z,
            "target": model.target(frames[:, 0]),
            "imagine": future,
            "step": model.step(z, actions[:, :25]),
            "dit": dit.decode(z, steps=4, seed=5),
            "dit, imagined and guided": dit.decode(future[:, 3], steps=3, guidance=1.5),
            "head": head.decode(future[:, 1]),
        }
        if hasattr(model, "inverse_dynamics"):
            found["predicted action"] = model.inverse_dynamics.predict(z, future[:, 0])
    return {name: summary(x) for name, x in found.items()}


@lru_cache
def training_step():
    "Loss, gradients and one step of the optimizer, from the shipped weights."
    model = WorldModel(preset("tiny"))
    model.init_from_pretrained(WEIGHTS)
    model.train()
    j = model.config.jepa
    frames, actions = windows(model.config, 4, 2 + j.rollout_steps, j.far)
    optimizer = make_optimizer({model: 1.0}, 1e-3, 0.05)
    before = [p.detach().clone() for p in model.parameters()]
    out = model(frames, actions)
    out["loss"].backward()
    found = {
        "loss": out["loss"].item(),
        "errors": out["errors"].tolist(),
        "gradients": norms(model),
    }
    for p, old in zip(model.parameters(), before):
        assert torch.equal(p, old)
    found["norm"] = optimizer_step(found["loss"], optimizer, 1e-4, 1.0)
    pairs = zip(model.parameters(), before)
    found["moved"] = (
        float(sum((p.detach() - old).double().square().sum() for p, old in pairs)) ** 0.5
    )
    model.update_target_encoder(0.9)
    found["loss afterwards"] = model(frames, actions)["loss"].item()
    return found


@lru_cache
def decoders_losses():
    "Losses and gradients of the decoders, from the shipped weights; noise is left out."
    dit, head = DiT.from_pretrained(WEIGHTS), RegressionHead.from_pretrained(WEIGHTS)
    frames, _ = windows(dit.config, 3, 1, 1)
    rng = np.random.default_rng(1)
    shape = 3, dit.config.frame.patches, dit.config.encoder.embed_dim
    z = torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32))
    x = torch.from_numpy(rng.normal(0, 1, (*shape[:2], dit.out.out_features)).astype(np.float32))
    seen = dit.denoise(x, torch.tensor([0.1, 0.5, 0.9]), z)
    drawn = head._predict_patches(z)
    (seen.square().mean() + drawn.square().mean()).backward()
    return {
        "denoised": summary(seen),
        "drawn": summary(drawn),
        "dit": norms(dit),
        "head": norms(head),
    }


@lru_cache
def variant(name):
    "Loss and gradients of one way of training, weights from a formula."
    model = filled(WorldModel(preset("tiny", **SMALL | VARIANTS[name]))).train()
    j = model.config.jepa
    frames, actions = windows(
        model.config, 4, 1 + j.rollout_steps + (j.far > 0), max(j.rollout_steps, j.far)
    )
    out = model(frames, actions, seed=11)
    out["loss"].backward()
    return {
        "loss": out["loss"].item(),
        "errors": out["errors"].tolist(),
        "z": summary(out["z"]),
        "gradients": norms(model),
    }


def everything():
    return {
        "outputs": outputs(),
        "training_step": training_step(),
        "decoders": decoders_losses(),
        "variants": {name: variant(name) for name in VARIANTS},
    }


def kept():
    return json.loads(KEPT.read_text())


def same(found, wanted, relative=RELATIVE):
    "Each number of a tree, the keys of both trees being the same."
    if isinstance(wanted, dict) and "rms" in wanted:
        size = relative * wanted["rms"]
        assert found["mean"] == pytest.approx(wanted["mean"], rel=0, abs=size)
        assert found["rms"] == pytest.approx(wanted["rms"], rel=relative)
        assert found["at"] == pytest.approx(wanted["at"], rel=0, abs=10 * size)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            same(found[key], wanted[key], relative)
    else:
        assert found == pytest.approx(wanted, rel=relative)


@pytest.mark.parametrize("what", ["encode", "target", "step", "imagine", "predicted action"])
def test_latents_of_the_shipped_weights_stay(what):
    if what not in kept()["outputs"]:
        pytest.skip("the shipped weights have no such head")
    same(outputs()[what], kept()["outputs"][what])


@pytest.mark.parametrize("what", ["dit", "dit, imagined and guided", "head"])
def test_pictures_of_the_shipped_weights_stay_within_a_grey_level(what):
    found, wanted = outputs()[what], kept()["outputs"][what]
    assert found["at"] == pytest.approx(wanted["at"], abs=1)
    assert found["mean"] == pytest.approx(wanted["mean"], abs=0.05)
    assert found["rms"] == pytest.approx(wanted["rms"], abs=0.05)


def test_a_step_of_training_stays():
    found, wanted = training_step(), kept()["training_step"]
    for key in ("loss", "errors", "loss afterwards"):
        same(found[key], wanted[key])
    for key in ("gradients", "norm", "moved"):
        same(found[key], wanted[key], GRADIENTS)


def test_losses_of_the_decoders_stay():
    found, wanted = decoders_losses(), kept()["decoders"]
    for key in ("denoised", "drawn"):
        same(found[key], wanted[key])
    for key in ("dit", "head"):
        same(found[key], wanted[key], GRADIENTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_other_ways_of_training_stay(name):
    found, wanted = variant(name), kept()["variants"][name]
    for key in ("loss", "errors", "z"):
        same(found[key], wanted[key])
    same(found["gradients"], wanted["gradients"], GRADIENTS)


if __name__ == "__main__":
    KEPT.write_text(json.dumps(everything(), indent=1) + "\n")
