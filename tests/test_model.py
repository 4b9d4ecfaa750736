"""The mathematics of the networks, against formulas written out."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minecraft_jepa.config import PRESETS, preset
from minecraft_jepa.data.actions import CURSOR
from minecraft_jepa.model.attention import Attention
from minecraft_jepa.model.blocks import layer_norm
from minecraft_jepa.model.collapse import (
    ANTI_COLLAPSE,
    collapse_alarm,
    collapse_metrics,
    rankme,
    sigreg,
    vicreg_terms,
)
from minecraft_jepa.model.conditioner import CONDITIONERS
from minecraft_jepa.model.decoders import DiT, RegressionHead
from minecraft_jepa.model.ema import ema_momentum, ema_update, frozen_copy
from minecraft_jepa.model.inverse_dynamics import InverseDynamicsHead
from minecraft_jepa.model.patches import patchify, unpatchify
from minecraft_jepa.model.positions import apply_rope, rope_angles_2d
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.utils import count_parameters

SMALLEST = {
    "height": 16,
    "width": 24,
    "patch_size": 8,
    "encoder_embed_dim": 32,
    "encoder_depth": 1,
    "conditioner_depth": 1,
    "predictor_depth": 1,
    "dit_embed_dim": 32,
    "dit_depth": 1,
    "encoder_num_heads": 2,
    "conditioner_num_heads": 2,
    "predictor_num_heads": 2,
    "dit_num_heads": 2,
}


def smallest(**changes):
    changes = SMALLEST | changes
    changes["frame_width"] = changes.pop("width")
    return preset("tiny", **changes)


def windows(config, batch=2, ticks=3):
    f = config.frame
    return (
        torch.randint(0, 256, (batch, 1 + ticks, 3, f.height, f.width), dtype=torch.uint8),
        torch.randn(batch, config.conditioner.history_ticks - 1 + ticks, 28),
    )


def perturbed(model):
    "Weights that are not at their special start, so that nothing is zero by construction."
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 1e6, 4e6), ("small", 13.5e6, 16.5e6)])
def test_small_presets_have_the_promised_size(name, low, high):
    with torch.device("meta"):
        model, dit = WorldModel(preset(name)), DiT(preset(name))
    trained = (
        count_parameters(model) - count_parameters(model.target_encoder) + count_parameters(dit)
    )
    assert low < trained < high


def test_paper_has_the_parameter_counts_of_the_original():
    with torch.device("meta"):
        model, dit = WorldModel(preset("paper")), DiT(preset("paper"))
    assert count_parameters(model.encoder) == 113_998_080
    for net, budget in (
        (model.conditioner, 42_696_960),
        (model.predictor, 213_282_816),
        (dit, 141_838_848),
    ):
        assert abs(count_parameters(net) / budget - 1) <= 0.01


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_agrees_on_shapes(name):
    config = preset(name)
    with torch.device("meta"):
        model, dit, head = WorldModel(config), DiT(config), RegressionHead(config)
        f, n, d = config.frame, config.frame.patches, config.encoder.embed_dim
        patches_shape = 2, n, 3 * f.patch_size**2
        z = model.encode(torch.empty(2, 3, f.height, f.width))
        assert z.shape == (2, n, d)
        assert model.step(z, torch.empty(2, 25, 28)).shape == (2, n, d)
        assert model.imagine(z, torch.empty(2, 24 + 4, 28)).shape == (2, 4, n, d)
        assert dit.denoise(torch.empty(patches_shape), torch.empty(2), z).shape == patches_shape
        assert head._predict_patches(z).shape == patches_shape


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attend, x, context = perturbed(Attention(32, 2)), torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    bias = torch.randn(2, 1, 7)
    q, (k, v) = attend.q(x), attend.kv(context).chunk(2, -1)
    heads = []
    for h in range(2):
        columns = slice(16 * h, 16 * h + 16)
        scores = q[..., columns] @ k[..., columns].mT / math.sqrt(16) + bias[h]
        heads.append(scores.softmax(-1) @ v[..., columns])
    expected = attend.proj(torch.cat(heads, -1))
    assert torch.allclose(attend(x, context, bias=bias), expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 5))
def test_rotary_scores_depend_on_the_offset_alone(seed, rows, columns):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, 1, 1, 16, generator=g), torch.randn(1, 1, 1, 16, generator=g)
    turns, n = rope_angles_2d((rows, columns), 16), rows * columns
    q_rotated, k_rotated = (apply_rope(x.expand(1, 1, n, 16), turns) for x in (q, k))
    score = (q_rotated @ k_rotated.mT).view(rows, columns, rows, columns)
    last_score = score[rows - 2, columns - 2, rows - 1, columns - 1]
    assert torch.allclose(score[0, 0, 1, 1], last_score, atol=1e-4)
    assert torch.allclose(apply_rope(q, turns[:1]), q)  # the first patch is not rotated
    norm = q.norm(dim=-1).expand(1, 1, n)
    assert torch.allclose(q_rotated.norm(dim=-1), norm, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(1, 6))
def test_ema_is_the_closed_form(momentum, times):
    fast = torch.nn.Linear(3, 3)
    slow = frozen_copy(fast)
    torch.nn.init.zeros_(slow.weight)
    for _ in range(times):
        ema_update(slow, fast, momentum)
    assert torch.allclose(slow.weight, fast.weight * (1 - momentum**times), atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_momentum_runs_from_start_to_end(steps, start, end):
    assert ema_momentum(0, steps, start, end) == pytest.approx(start)
    assert ema_momentum(steps, steps, start, end) == pytest.approx(end)
    low, high = sorted((start, end))
    assert low - 1e-9 <= ema_momentum(steps // 2, steps, start, end) <= high + 1e-9


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_imagine_is_step_repeated_and_causal(kind):
    model = perturbed(WorldModel(smallest(kind=kind))).eval()
    frames, actions = windows(model.config)
    with torch.no_grad():
        z = model.encode(frames[:, 0])
        future, state = model.imagine(z, actions), z
        for k in range(3):
            state = model.step(state, actions[:, k : k + 25])
            assert torch.allclose(future[:, k], state, atol=1e-4)  # summed in another order
        changed = actions.clone()
        changed[:, 25] += 1  # acts between frames t+1 and t+2
        other_future = model.imagine(z, changed)
    assert torch.equal(other_future[:, 0], future[:, 0])
    assert not torch.allclose(other_future[:, 1], future[:, 1])


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_order_of_the_ticks_matters(kind):
    model = perturbed(WorldModel(smallest(kind=kind))).eval()
    frames, actions = windows(model.config, ticks=1)
    with torch.no_grad():
        z = model.encode(frames[:, 0]).double()
        # in double precision an old tick's small effect stands out from rounding
        actions, model = actions.double(), model.double()
        swapped = actions[:, [1, 0, *range(2, 25)]]
        assert not torch.allclose(model.step(z, actions), model.step(z, swapped), rtol=0, atol=1e-9)


def test_loss_is_the_mean_smooth_l1_of_the_rollout():
    model = perturbed(
        WorldModel(smallest(dropout=0.0, inverse_dynamics_weight=0.0, variance_weight=0.0))
    )
    perturbed(model.target_encoder)
    frames, actions = windows(model.config, ticks=2)
    z, base, losses = model.encode(frames[:, 0]), model.target(frames[:, 0]), []
    for k in range(2):
        change = model.predictor(*model.conditioner(z, actions[:, k : k + 25]))
        base = layer_norm(base + change)
        z = base
        losses.append(F.smooth_l1_loss(z, model.target(frames[:, k + 1])))
    assert torch.allclose(model(frames, actions)["loss"], sum(losses) / 2, atol=1e-6)


def test_inverse_dynamics_loss_is_the_mean_over_two_pairs():
    model = perturbed(
        WorldModel(smallest(dropout=0.0, inverse_dynamics_weight=0.5, pitch_weight=0.0))
    )
    perturbed(model.target_encoder)
    frames, actions = windows(model.config, ticks=2)
    loss = model(frames, actions)["loss"]
    z, z_next = model.encode(frames[:, 0]), model.encode(frames[:, 1])
    first = model.inverse_dynamics(z, z_next, actions[:, 24])
    second = model.inverse_dynamics(z_next, model.target(frames[:, 2]), actions[:, 25])
    model.config = smallest(dropout=0.0, inverse_dynamics_weight=0.0, pitch_weight=0.0)
    loss_of_head = loss - model(frames, actions)["loss"]
    assert torch.allclose(loss_of_head, 0.5 * (first + second) / 2, atol=1e-6)
    assert first != second


def test_gradients_reach_all_but_the_target_encoder():
    model = perturbed(WorldModel(smallest())).train()
    model(*windows(model.config))["loss"].backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert not model.target_encoder.training and model.encoder.training
    for network in (model.encoder, model.conditioner, model.predictor):
        for p in network.parameters():
            assert p.grad is not None
            assert torch.isfinite(p.grad).all()


def test_no_pixel_gradient_reaches_the_world_model():
    model = perturbed(WorldModel(smallest()))
    dit, head = perturbed(DiT(model.config)), perturbed(RegressionHead(model.config))
    frames, _ = windows(model.config)
    z = model.encode(frames[:, 0])
    (dit(z, frames[:, 0]) + head(z, frames[:, 0])).backward()
    assert all(p.grad is None for p in model.parameters())
    for decoder in (dit, head):
        assert any(p.grad.abs().sum() > 0 for p in decoder.parameters())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4, 8]))
def test_patchify_loses_nothing(rows, columns, patch):
    frames = torch.randint(0, 256, (2, 3, rows * patch, columns * patch), dtype=torch.uint8)
    patches = patchify(frames, patch)
    assert patches.shape == (2, rows * columns, 3 * patch**2)
    assert torch.equal(unpatchify(patches, (rows, columns), patch), frames)
    corner = patches[0, columns - 1].view(patch, patch, 3)  # last patch of the first row, y x c
    expected = frames[0, :, :patch, -patch:].permute(1, 2, 0) / 127.5 - 1
    assert torch.allclose(corner, expected, atol=1e-6)


def test_dit_loss_is_zero_for_the_clean_patches_and_the_velocity_error_else():
    config = smallest(latent_drop_prob=0.0)
    frames = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    z = torch.randn(4, 6, 32)

    class Oracle(DiT):
        offset = 0.0

        def denoise(self, x, s, z):
            self.s = s
            return patchify(frames, 8) + self.offset

    dit = Oracle(config)
    assert dit(z, frames) == 0
    dit.offset = 0.5
    torch.manual_seed(1)
    loss = dit(z, frames)
    expected = (0.25 / (1 - dit.s).clamp_min(0.05) ** 2).mean()
    assert torch.allclose(loss, expected, rtol=1e-4)


def test_one_noise_for_all_frames_of_a_clip():
    dit = perturbed(DiT(smallest())).eval()
    z = torch.randn(1, 6, 32)
    frames = dit.decode(z.expand(3, -1, -1), steps=3, seed=4)
    assert torch.equal(frames[0], frames[2])
    assert not torch.equal(frames, dit.decode(z.expand(3, -1, -1), steps=3, seed=5))


def test_rankme_counts_directions():
    torch.manual_seed(0)
    for rank in (1, 3, 8):
        basis = torch.linalg.qr(torch.randn(16, 16))[0][:rank]
        rows = torch.linalg.qr(torch.randn(64, rank))[0] @ basis  # `rank` equal singular values
        assert rankme(rows) == pytest.approx(rank, rel=1e-3)
        assert rankme(7 * rows) == pytest.approx(rank, rel=1e-3)


def test_alarm_rings_for_each_kind_of_collapse_and_not_for_health():
    config = preset("tiny")
    torch.manual_seed(0)
    # equal frames of different patches: the raw latents have full rank
    equal_frames = torch.randn(1, 60, 128).expand(32, 60, 128)
    assert "std" in collapse_alarm(collapse_metrics(equal_frames), config)
    low_rank = torch.randn(32, 60, 4) @ torch.randn(4, 128)
    assert "rank" in collapse_alarm(collapse_metrics(low_rank), config)
    assert collapse_alarm(collapse_metrics(torch.randn(32, 60, 128)), config) is None
    broken = torch.randn(32, 60, 128)
    broken[3, 5, 7] = torch.inf
    metrics = collapse_metrics(broken)
    assert all(np.isnan(value) for value in metrics.values())
    assert "not finite" in collapse_alarm(metrics, config)


def test_weights_of_another_preset_name_file_line_and_remedy(tmp_path):
    WorldModel(smallest()).save_pretrained(tmp_path)
    lines = (tmp_path / "config.json").read_text().splitlines()
    section = next(i for i, line in enumerate(lines, 1) if '"predictor"' in line)
    with pytest.raises(ValueError, match=r"config\.json, line") as error:
        WorldModel.from_pretrained(tmp_path, smallest(predictor_depth=2))
    message = str(error.value)
    assert f"config.json, line {section + 1}:" in message
    assert "predictor.depth=1 (expected 2)" in message
    assert "preset_name" in message


def test_a_cut_or_foreign_weights_file_is_refused(tmp_path):
    WorldModel(smallest()).save_pretrained(tmp_path)
    file = tmp_path / "world_model.safetensors"
    weights = file.read_bytes()
    for broken in (weights[: len(weights) // 2], b"", b"PK\x03\x04 a pickle in a zip"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"world_model\.safetensors.*train it again"):
            WorldModel.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no such file"):
        WorldModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"name": "tiny"}))
    with pytest.raises(ValueError, match=r"config\.json"):
        WorldModel.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_weights(tmp_path, monkeypatch):
    model = WorldModel(smallest())
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(path, data):
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        perturbed(model).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_half_precision_halves_the_file_and_keeps_the_latents(tmp_path):
    model = WorldModel(smallest()).eval()
    frames, _ = windows(model.config)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    full, half = (
        (tmp_path / name / "world_model.safetensors").stat().st_size for name in ("full", "half")
    )
    assert half < 0.6 * full
    loaded = WorldModel.from_pretrained(tmp_path / "half")
    expected = model.encode(frames[:, 0])
    assert torch.allclose(loaded.encode(frames[:, 0]), expected, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    model = perturbed(WorldModel(smallest())).eval()
    frames, actions = windows(model.config)
    with torch.no_grad():
        on_cpu = model.imagine(model.encode(frames[:, 0]), actions)
        on_gpu = model.cuda().imagine(model.encode(frames[:, 0].cuda()), actions.cuda()).cpu()
    assert (on_cpu - on_gpu).norm() / on_cpu.norm() < 1e-3


def saved(folder, model=None):
    "A small world model in a folder."
    model = model or perturbed(WorldModel(smallest()))
    model.save_pretrained(folder)
    return model.eval()


def renamed(folder, rename):
    "The same weights under other names."
    path = folder / "world_model.safetensors"
    save_file({rename(k): v for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: f"_orig_mod.{k}",
        lambda k: f"module.{k}",
        lambda k: f"module._orig_mod.{k}",
        lambda k: f"model.{k}",
        lambda k: k.replace("encoder.", "encoder._orig_mod."),
        lambda k: k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    ],
)
def test_names_that_wrappers_left_are_read(tmp_path, rename):
    model = saved(tmp_path)
    renamed(tmp_path, rename)
    frames, _ = windows(model.config)
    again = WorldModel.from_pretrained(tmp_path)
    assert torch.equal(again.encode(frames[:, 0]), model.encode(frames[:, 0]))


def test_a_name_that_is_there_with_and_without_its_wrapper_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "world_model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    save_file(state | {f"module.{name}": state[name].clone()}, path)
    with pytest.raises(ValueError, match=r"world_model\.safetensors: .* twice"):
        WorldModel.from_pretrained(tmp_path)


def test_pickled_weights_are_named_and_not_read(tmp_path):
    saved(tmp_path)
    (tmp_path / "world_model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not read"):
        WorldModel.from_pretrained(tmp_path)


def test_a_compiled_encoder_is_saved_with_clean_names(tmp_path):
    model = perturbed(WorldModel(smallest())).eval()
    model.encoder = torch.compile(model.encoder, backend="eager")
    model.save_pretrained(tmp_path)
    assert not [k for k in load_file(tmp_path / "world_model.safetensors") if "_orig_mod" in k]
    model.init_from_pretrained(tmp_path)
    frames, _ = windows(model.config)
    again = WorldModel.from_pretrained(tmp_path)
    assert torch.allclose(again.encode(frames[:, 0]), model.encode(frames[:, 0]), atol=1e-5)


def test_loading_neither_moves_random_numbers_nor_uses_the_callers_defaults(tmp_path):
    model = saved(tmp_path)
    frames, actions = windows(model.config)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = WorldModel.from_pretrained(tmp_path)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = dict(again.named_parameters()) | dict(again.named_buffers())
    assert {(t.device.type, t.dtype) for t in tensors.values()} == {("cpu", torch.float32)}
    buffers = dict(model.named_buffers())
    assert all(torch.equal(b, buffers[k]) for k, b in again.named_buffers())
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    z = model.encode(frames[:, 0])
    assert torch.equal(again.imagine(z, actions), model.imagine(z, actions))
    again.copy_target_to_encoder()
    apart = zip(again.target_encoder.parameters(), again.encoder.parameters())
    assert all(a.data_ptr() != b.data_ptr() for a, b in apart)  # one is not a view of the other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_another_precision_predict_much_the_same(dtype):
    config = smallest()
    model, dit = perturbed(WorldModel(config)).eval(), perturbed(DiT(config)).eval()
    frames, actions = windows(config)
    other, drawn = copy.deepcopy(model).to(dtype), copy.deepcopy(dit).to(dtype)
    with torch.no_grad():
        z = model.encode(frames[:, 0])
        future = model.imagine(z, actions)
        assert (other.encode(frames[:, 0]).float() - z).abs().mean() < 0.1
        assert (other.imagine(z, actions).float() - future).abs().mean() < 0.1
        assert (other.step(z, actions[:, :25]).float() - future[:, 0]).abs().mean() < 0.1
        logits = other.inverse_dynamics.predict(z.to(dtype), future[:, 0].to(dtype))
        assert (logits - model.inverse_dynamics.predict(z, future[:, 0])).abs().mean() < 0.1
        assert (drawn.decode(z, steps=2).float() - dit.decode(z, steps=2)).abs().mean() < 5


def test_arrays_and_other_types_are_cast():
    model = perturbed(WorldModel(smallest())).eval()
    head, dit = perturbed(RegressionHead(model.config)), perturbed(DiT(model.config))
    frames, actions = windows(model.config)
    frames = frames[:, 0]
    with torch.no_grad():
        z = model.encode(frames)
        future = model.imagine(z, actions)
        pixels = frames.numpy(), frames.float(), frames.numpy() / 255, frames.double() / 255
        for other_frames in pixels:
            assert torch.allclose(model.encode(other_frames), z, atol=1e-4)
        for other_actions in (actions.double(), actions.numpy().astype(float)):
            assert torch.allclose(model.imagine(z.numpy(), other_actions), future, atol=1e-4)
        integers = torch.ones(2, 27, 28, dtype=torch.int64)
        assert torch.equal(model.imagine(z, integers), model.imagine(z, integers.float()))
        for decode in (head.decode, lambda z: dit.decode(z, steps=np.int64(2), seed=np.uint8(3))):
            clips = decode(future)
            assert clips.shape[:2] == future.shape[:2]
            assert torch.equal(clips[:, 1], decode(future[:, 1].numpy()))


def test_one_latent_is_used_for_many_action_sequences():
    model = perturbed(WorldModel(smallest())).eval()
    frames, actions = windows(model.config, batch=3)
    with torch.no_grad():
        z = model.encode(frames[:1, 0])
        expected = model.imagine(z.expand(3, -1, -1), actions)
        assert torch.equal(model.imagine(z, actions), expected)
        assert torch.allclose(model.step(z, actions[:, :25]), expected[:, 0], atol=1e-4)


def test_what_does_not_fit_is_named_with_the_remedy():
    model = WorldModel(smallest()).eval()
    dit, head = DiT(model.config), RegressionHead(model.config)
    frames, actions = windows(model.config)
    frames, z = frames[:, 0], torch.randn(2, 6, 32)
    nan = torch.full((1, 3, 16, 24), float("nan"))
    for call, message in (
        (lambda: model.encode(frames.float() * 0.99), "frames hold .* divide by 255"),
        (lambda: model.encode(frames / 127.5 - 1), "frames hold .* 0..1"),
        (lambda: model.encode(nan), "frames hold nan"),
        (lambda: model.encode(frames.int()), "frames are torch.int32, expected uint8"),
        (lambda: model.encode(frames.permute(0, 2, 3, 1)), r"frames.permute\(0, 3, 1, 2\)"),
        (lambda: model.encode(frames[0]), r"frames\[None\]"),
        (lambda: model.encode(frames[:, None]), r"flatten\(0, 1\)"),
        (lambda: model.encode([1, 2]), "frames is of type list"),
        (lambda: model.imagine(z, actions[..., :27]), "actions are .*27.*28"),
        (lambda: model.imagine(z, actions[:, :24]), "actions are .*24.*24 . K"),
        (lambda: model.imagine(z, actions[0]), "actions are"),
        (lambda: model.step(z, actions), "actions are .*expected .2, 25, 28"),
        (lambda: model.imagine(z[:, :5], actions), "z is .*expected latents"),
        (lambda: model.step(z[0], actions[:, :25]), "z is .*expected latents"),
        (lambda: model.imagine(z, actions.repeat(2, 1, 1)), "actions are"),
        (lambda: dit.decode(z[..., :31]), "z is .*expected latents"),
        (lambda: head.decode(z[:, :5]), "z is .*expected latents"),
        (lambda: dit.decode(z, steps=0), "steps=0 must be at least 1"),
        (lambda: dit.decode(z, steps=2.5), "steps=2.5 must be a whole number"),
        (lambda: dit.decode(z, seed="a"), "seed='a' must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_with_and_without_gradients_the_same_is_imagined(kind):
    model = perturbed(WorldModel(smallest(kind=kind))).eval()
    frames, actions = windows(model.config, batch=90)  # enough rows for layers in one pass
    z = model.encode(frames[:, 0]).detach().requires_grad_()
    future = model.imagine(z, actions)
    future[:, -1].square().sum().backward()
    assert z.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.allclose(model.imagine(z, actions), future, atol=1e-4)
        assert torch.allclose(model.encode(frames[:, 0]), z, atol=1e-4)


def test_a_moving_cursor_in_an_open_gui_is_no_turn():
    torch.manual_seed(0)
    head = perturbed(InverseDynamicsHead((2, 3), 32))
    z, z_next = torch.randn(2, 4, 6, 32)
    still = torch.zeros(4, 28)
    still[:, CURSOR] = 0.5
    turned, gui_open, dragged = still.clone(), still.clone(), still.clone()
    turned[:, 22] = 30
    gui_open[:, 20] = 0.1
    dragged[:, 20], dragged[:, 22] = 0.1, 30
    assert head(z, z_next, gui_open) == head(z, z_next, dragged)
    assert head(z, z_next, still) != head(z, z_next, turned)


def test_anti_collapse_losses_are_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    z = 100 + torch.randn(64, 6, 32)
    for measure in (lambda z: torch.stack(vicreg_terms(z, 2)), lambda z: sigreg(z, 16)):
        exact = measure(z - z.mean(0))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(measure(z - z.mean(0)), exact)


def test_the_sampler_ends_on_the_frame_however_many_steps():
    frames = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)

    class Oracle(DiT):
        def denoise(self, x, s, z):
            return patchify(frames, 8).to(x)

    for steps in (1, 2, 40):
        assert torch.equal(Oracle(smallest()).decode(torch.randn(2, 6, 32), steps=steps), frames)


def test_registries_have_what_the_config_allows():
    for kind in CONDITIONERS:
        preset("tiny", kind=kind)
    for kind in ANTI_COLLAPSE:
        preset("tiny", anti_collapse=kind)
    for name, kinds in (("kind", CONDITIONERS), ("anti_collapse", ANTI_COLLAPSE)):
        with pytest.raises(ValueError, match=name) as error:
            preset("tiny", **{name: "none"})
        assert all(kind in str(error.value) for kind in kinds)


def test_predictor_asks_the_conditioner_whether_it_modulates(monkeypatch):
    "A new kind that returns a condition was ignored in silence."

    class Renamed(CONDITIONERS["adaln"]):
        pass

    monkeypatch.setitem(CONDITIONERS, "cross_attention", Renamed)
    model = perturbed(WorldModel(smallest(kind="cross_attention"))).eval()
    assert model.predictor.modulated
    frames, actions = windows(model.config, ticks=1)
    with torch.no_grad():
        z = model.encode(frames[:, 0])
        assert not torch.allclose(model.step(z, actions), model.step(z, 2 * actions), atol=1e-4)


def test_equal_encoders_are_saved_once(tmp_path):
    model = perturbed(WorldModel(smallest())).eval()
    model.copy_target_to_encoder()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / model.file)
    assert not [name for name in names if name.startswith("target_encoder.")]
    frames, _ = windows(model.config)
    loaded = WorldModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.target(frames[:, 0]), loaded.encode(frames[:, 0]))
    assert torch.equal(loaded.encode(frames[:, 0]), model.encode(frames[:, 0]))
    with pytest.raises(ValueError, match="another preset"):
        WorldModel.from_pretrained(tmp_path, preset("small"))


def test_save_with_target_encoder_writes_what_copying_it_would_leave(tmp_path):
    model = perturbed(WorldModel(smallest())).eval()
    before = copy.deepcopy(model.state_dict())
    model.save_with_target_encoder(tmp_path / "adopted")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.copy_target_to_encoder()
    model.save_pretrained(tmp_path / "expected")
    saved_files = [tmp_path / name / model.file for name in ("adopted", "expected")]
    assert saved_files[0].read_bytes() == saved_files[1].read_bytes()


def test_a_run_may_start_from_weights_with_another_head(tmp_path):
    model = perturbed(WorldModel(smallest())).eval()
    model.save_pretrained(tmp_path)
    other = WorldModel(smallest(inverse_dynamics_weight=0.0, lr=1e-4))
    other.init_from_pretrained(tmp_path)
    frames, _ = windows(model.config)
    assert torch.equal(other.encode(frames[:, 0]), model.encode(frames[:, 0]))
    assert torch.equal(other.target(frames[:, 0]), model.target(frames[:, 0]))
    with pytest.raises(ValueError, match="another preset"):
        WorldModel(smallest(encoder_depth=2)).init_from_pretrained(tmp_path)
