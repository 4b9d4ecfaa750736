"""The memory plan: against a process that takes real steps, and what would fit."""

import json
from pathlib import Path

import pytest
import torch
from training_runs import start_processes, wait_for

from minecraft_jepa.config import preset
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.training import memory, optim
from minecraft_jepa.training.distributed import apply_compile_and_checkpointing


def read_status(field):
    """Bytes of this process, as /proc/self/status says: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_step(checkpointing, out, is_frozen=False):
    """Write peak of real steps above what the process held before, and the plan."""
    changes = {"batch_size": 6, "predictor_depth": 3, "activation_checkpointing": checkpointing}
    changes |= {"encoder_lr_scale": 0.0} if is_frozen else {}
    config = preset("small", **changes)
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = read_status("VmRSS")
    model = apply_compile_and_checkpointing(WorldModel(config).train(), config.train, "cpu")
    if is_frozen:
        model.freeze_encoder()
    optimizer = optim.make_optimizer({model: 1.0}, 1e-4, 0.0)
    for _ in range(2):
        frames = torch.randint(0, 255, (6, 5, 3, 128, 224), dtype=torch.uint8)
        model(frames, torch.randn(6, 28, 28))["loss"].backward()
        optimizer.step()
    planned = memory.plan_memory(config, "cpu")["total"]
    Path(out).write_text(json.dumps([read_status("VmHWM") - before, planned]))


def test_memory_plan_is_what_a_step_takes(tmp_path):
    """Peak above what the process held before the model, on a CPU in float32."""
    log, out, peaks = tmp_path / "log", tmp_path / "out", {}
    for checkpointing in (False, True):
        wait_for(start_processes((measure_step, checkpointing, out), log=log), log)
        peak, planned = json.loads(out.read_text())
        assert 0.6 < peak / planned < 1.25, (checkpointing, peak / 2**20, planned / 2**20)
        peaks[checkpointing] = peak
    assert peaks[True] < 0.7 * peaks[False]


def test_memory_plan_of_a_frozen_encoder_is_what_a_step_takes(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    wait_for(start_processes((measure_step, False, out, True), log=log), log)
    peak, planned = json.loads(out.read_text())
    assert 0.6 < peak / planned < 1.25, (peak / 2**20, planned / 2**20)


def test_memory_plan_counts_what_is_trained():
    config = preset("small", encoder_lr_scale=0.0)
    model = WorldModel(config)
    trained = [*model.conditioner.parameters(), *model.predictor.parameters()]
    plan = memory.plan_memory(config, "cpu")
    assert plan["gradients"] == 4 * sum(p.numel() for p in trained)
    assert plan["activations"] < memory.plan_memory(preset("small"), "cpu")["activations"]


def test_run_that_does_not_fit_is_told_what_would():
    problem = r"small with batch_size=64 needs .*, the device has 3.0 GiB; "
    remedy = r"activation_checkpointing=(True|False), gradient_accumulation_steps=\d+ needs"
    with pytest.raises(memory.MemoryPlanError, match=problem + remedy):
        memory.check_memory(preset("small", variance_weight=0), "cuda", 3 * 2**30)
    remedy = r"activation_checkpointing=(True|False), batch_size=\d+ needs"
    with pytest.raises(memory.MemoryPlanError, match=remedy):
        # The variance hinge depends on the whole batch, so it can't be cut.
        memory.check_memory(preset("small"), "cuda", 3 * 2**30)
    with pytest.raises(memory.MemoryPlanError, match="smaller preset"):
        memory.check_memory(preset("small"), "cuda", 2**28)


def test_processes_share_the_memory_of_the_machine():
    config, one = preset("small"), memory.plan_memory(preset("small"), "cpu", 4)["total"]
    assert memory.check_memory(config, "cpu", 5 * one, 4)["total"] == one
    with pytest.raises(memory.MemoryPlanError, match=r"GiB for each of 4 processes; "):
        memory.check_memory(config, "cpu", 4 * one, 4)


def test_of_a_gpu_that_others_use_only_what_is_free_counts(monkeypatch):
    one = memory.plan_memory(preset("small"), "cuda")["total"]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * one, 9 * one))
    assert memory.check_memory(preset("small"), "cuda")["total"] == one
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (one // 2, 9 * one))
    with pytest.raises(memory.MemoryPlanError):
        memory.check_memory(preset("small"), "cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: one)  # of this process
    assert memory.check_memory(preset("small"), "cuda")["total"] == one


def test_a_batch_may_be_cut_where_the_encoder_is_frozen():
    assert memory.uses_batch_statistics(preset("tiny"))
    assert not memory.uses_batch_statistics(preset("tiny", encoder_lr_scale=0.0))


def test_paper_preset_fits_the_gpu_of_the_original():
    plan = memory.check_memory(preset("paper"), "cuda", 12 * 2**30)
    assert plan["total"] < 0.9 * 12 * 2**30


def test_sharding_shares_optimizer_state_and_batch():
    single = memory.plan_memory(preset("small"), "cuda")
    sharded = memory.plan_memory(preset("small"), "cuda", processes=4, sharded=True)
    assert sharded["optimizer"] == single["optimizer"] // 4
    assert sharded["activations"] < 0.3 * single["activations"]
