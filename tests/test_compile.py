"""What a GPU compiles, with a backend that needs no compiler: nothing changes but the speed."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from training_runs import TINY

from minecraft_jepa.config import preset
from minecraft_jepa.model.world_model import WorldModel, encoder_gradients
from minecraft_jepa.training.distributed import apply_compile_and_checkpointing


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    config = preset("tiny", **TINY)
    ticks = config.conditioner.history_ticks - 1 + config.jepa.rollout_steps
    shape = (4, 1 + config.jepa.rollout_steps, *config.frame.shape)
    frames = torch.randint(0, 255, shape, generator=random, dtype=torch.uint8)
    return frames, torch.randn(4, ticks, 28, generator=random)


def make_model(device, checkpointing):
    torch.manual_seed(0)
    changes = {"compile": True, "activation_checkpointing": checkpointing}
    config = preset("tiny", **TINY | changes)
    return apply_compile_and_checkpointing(WorldModel(config).train(), config.train, device)


def gradients(model, batch):
    model(*batch)["loss"].backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_are_compiled_and_learn_the_same(batch, monkeypatch, checkpointing):
    plain = make_model("cpu", False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    torch._dynamo.reset()
    counters.clear()
    model = make_model("cuda", checkpointing)  # as for a GPU; it stays on the CPU
    assert [*model.state_dict()] == [*plain.state_dict()]
    for ours, theirs in zip(gradients(model, batch), gradients(plain, batch), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counters["frames"]["ok"] > 0
    measured = encoder_gradients(model, *batch)  # each part of the loss by itself
    assert measured == pytest.approx(encoder_gradients(plain, *batch), rel=1e-4)
    assert max(measured.values()) > 0


def test_a_missing_c_compiler_is_told_before_the_first_step(monkeypatch):
    """Triton raised in the middle of the first step, a hundred lines long."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"apt install gcc; or .* --train\.no-compile"):
        make_model("cuda", False)
    make_model("cpu", False)
