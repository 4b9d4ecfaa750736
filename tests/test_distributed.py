"""Several processes do what one does, also with shards and after a kill."""

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    HELD_OUT,
    SMALL,
    TINY,
    TRAIN,
    assert_same_weights,
    folder_of,
    losses,
    read_log,
    shards_fixture,  # noqa: F401
    start_processes,
    store_fixture,  # noqa: F401
    train_in_process,
    wait_for,
    weights,
)

from minecraft_jepa.config import preset
from minecraft_jepa.data.shard_reader import ShardWindows
from minecraft_jepa.training import distributed
from minecraft_jepa.training import train_world_model as world_model_training
from minecraft_jepa.training.checkpoints import find_checkpoint
from minecraft_jepa.training.train_world_model import train_world_model

VARIANTS = {
    "ema": {},
    "sigreg": {"anti_collapse": "sigreg", "sigreg_num_slices": 64},
    "vicreg": {"anti_collapse": "vicreg"},
    "chunks": {
        "inverse_dynamics_weight": 0.1,
        "gradient_accumulation_steps": 2,
        "variance_weight": 0.0,
    },
    "inverse dynamics without pitch loss": {"inverse_dynamics_weight": 0.1, "pitch_weight": 0.0},
}


@pytest.mark.parametrize("sharded", ["false", "true"], ids=["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(store, tmp_path, sharded):
    """The same global batch over gloo: losses and weights to float tolerance."""
    log = tmp_path / "log"
    shared = TINY | {"steps": 5, "decoder_steps": 3, "evaluate_every": 5, "ema_momentum_end": 0.9}
    variants = {name: shared | changes for name, changes in VARIANTS.items()}
    calls = [
        (train_in_process, folder_of(store), tmp_path / name, changes, name == "chunks", sharded)
        for name, changes in variants.items()
    ]
    two = start_processes(*calls, log=log, processes=2)
    for name, changes in variants.items():
        folder = tmp_path / f"one {name}"
        train_world_model(preset("tiny", **changes), store, TRAIN, HELD_OUT, folder=folder)
    wait_for(two, log)
    for name in variants:
        one_losses, two_losses = losses(tmp_path / f"one {name}"), losses(tmp_path / name)
        assert np.allclose(one_losses, two_losses, rtol=2e-4), name
        one = weights(tmp_path / f"one {name}")["world_model.safetensors"]
        two = weights(tmp_path / name)["world_model.safetensors"]
        assert one.keys() == two.keys()
        for key in one:
            # Adam's first steps are of size lr whatever the gradient: where that is next to
            # nothing, signs may differ.
            assert torch.allclose(one[key], two[key], atol=5e-4), (name, key)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_of_unequal_epochs_end_with_the_same_bits_after_a_kill_in_each(
    shards, tmp_path, world
):
    """Three epochs in real processes.

    A reader gave nothing for ever, or other batches after a kill.
    """
    log, batch = tmp_path / "log", 48 * world
    reader = ShardWindows(shards, 5, 2, batch // world, 0, TRAIN, rank=0, world=world)
    num_batches = []
    for epoch in range(3):
        reader.resume(epoch)
        num_batches += reader.batches()
    assert min(num_batches) > 1
    last_steps = np.cumsum(num_batches)
    num_steps = int(last_steps[-1]) + 2
    changes = TINY | {"inverse_dynamics_weight": 0.0, "batch_size": batch, "steps": num_steps}
    changes |= {"save_every": 3, "evaluate_every": 1000}

    def start(out, kill_at=None):
        call = train_in_process, shards, tmp_path / out, changes, False
        return start_processes(call, log=log, processes=world, kill_at=kill_at)

    wait_for(start("uninterrupted"), log)
    first_step = 0
    for last_step in last_steps:  # killed in the last step of each epoch
        killed = start("killed", kill_at=int(last_step) - first_step)
        for process in killed:
            process.join(900)
        exit_codes = {process.exitcode for process in killed}
        assert -signal.SIGKILL in exit_codes, Path(log).read_text()[-2000:]
        first_step = find_checkpoint(tmp_path / "killed/world_model_checkpoints", {})["step"]
    wait_for(start("killed"), log)
    assert_same_weights(weights(tmp_path / "killed"), weights(tmp_path / "uninterrupted"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "uninterrupted")
    assert len(losses(tmp_path / "killed")) == num_steps


def train_where_processes_disagree(store, out, changes):
    """Train with FSDP2; the second process finds other numbers at each evaluation."""
    validate = world_model_training.validate

    def validate_otherwise(*args):
        numbers, latents = validate(*args)
        if os.environ["RANK"] == "1":
            numbers = numbers | {"model": [math.nan] * 8, "rank": 0.0}  # no score, and an alarm
        return numbers, latents

    world_model_training.validate = validate_otherwise
    train_in_process(store, out, changes, False, "true")


def test_processes_save_and_stop_together_where_their_numbers_differ(store, tmp_path):
    """Each decided by its own numbers: one waited for ever for the weights of the other."""
    log = tmp_path / "log"
    changes = TINY | {"steps": 4, "evaluate_every": 2, "min_rank_fraction": 0.01}
    call = train_where_processes_disagree, folder_of(store), tmp_path / "run", changes
    wait_for(start_processes(call, log=log, processes=2), log)
    assert [row["step"] for row in read_log(tmp_path / "run") if "model" in row] == [2, 4]
    assert (tmp_path / "run/world_model.safetensors").is_file()


def test_checkpointed_activations_change_nothing(store):
    models, rows = [], []
    for checkpointing in (False, True):
        changes = {"steps": 3, "evaluate_every": 3, "activation_checkpointing": checkpointing}
        config = preset("tiny", **SMALL, **changes)
        model, history = train_world_model(config, store, TRAIN, HELD_OUT)
        models.append(model)
        rows.append([row["loss"] for row in history])
    assert np.allclose(*rows, rtol=1e-6)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_several_processes_that_end_up_as_one_are_told(monkeypatch):
    """What `accelerate launch --num_processes 2` sets where it finds no GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="can't be shared: start them with torchrun"):
        distributed.make_accelerator("cpu")
    monkeypatch.delenv("MASTER_ADDR")
    assert distributed.make_accelerator("cpu").num_processes == 1


def test_gradients_of_several_processes_are_kept_once():
    assert distributed.make_accelerator("cpu").ddp_handler.gradient_as_bucket_view
