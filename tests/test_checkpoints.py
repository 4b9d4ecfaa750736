"""Checkpoints are whole, finite and of their own run; a folder belongs to one run at a time."""

import importlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import (
    HELD_OUT,
    SMALL,
    TRAIN,
    assert_same_weights,
    losses,
    store_fixture,  # noqa: F401
    train_small,
    train_until,
    weights,
)

from minecraft_jepa.config import preset
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.training import checkpoints, optim
from minecraft_jepa.training.checkpoints import find_checkpoint, save_checkpoint
from minecraft_jepa.training.learner import Learner
from minecraft_jepa.training.train_world_model import train_world_model
from minecraft_jepa.training.trainer import CollapseError
from minecraft_jepa.utils import write_json


def collapse(store, folder, **changes):
    """A run that stops with a collapse alarm at its first evaluation."""
    config = preset("tiny", **SMALL, steps=20, min_rank_fraction=2.0, **changes)
    with pytest.raises(CollapseError):
        train_world_model(config, store, TRAIN, HELD_OUT, folder=folder)
    return config


def test_checkpoint_of_another_run_is_refused(store, tmp_path):
    config = collapse(store, tmp_path, evaluate_every=4, save_every=4)
    other = preset("tiny", **SMALL, steps=20, evaluate_every=4, min_rank_fraction=2.0, lr=1e-3)
    message = r"another run .*train.lr was 0.0008, is 0.001.*give another folder"
    with pytest.raises(ValueError, match=message):
        train_world_model(other, store, TRAIN, HELD_OUT, folder=tmp_path)
    with pytest.raises(ValueError, match="recordings was"):
        train_world_model(config, store, TRAIN[:1], HELD_OUT, folder=tmp_path)


def test_accumulate_is_part_of_what_a_run_is(store, tmp_path, monkeypatch):
    changes = {"variance_weight": 0.0, "steps": 6, "save_every": 2, "evaluate_every": 6}
    train_until(store, tmp_path, 5, monkeypatch, **changes)
    with pytest.raises(ValueError, match=r"train.gradient_accumulation_steps was 1, is 2"):
        train_small(store, tmp_path, gradient_accumulation_steps=2, **changes)


def test_a_setting_that_the_run_did_not_know_yet_is_compared_with_its_default(store, tmp_path):
    config = collapse(store, tmp_path, evaluate_every=4, save_every=4)
    for path in tmp_path.glob("**/step_*/about.json"):
        metadata = json.loads(path.read_text())
        del metadata["run"]["train.color_jitter"]
        write_json(path, metadata)
    other = replace(config, train=replace(config.train, color_jitter=0.4))
    with pytest.raises(ValueError, match=r"another run .train.color_jitter was 0.0, is 0.4."):
        train_world_model(other, store, TRAIN, HELD_OUT, folder=tmp_path)
    with pytest.raises(CollapseError):  # goes on
        train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path)


def test_nothing_is_made_up_of_a_run_that_told_no_settings():
    settings = preset("small").settings()
    assert checkpoints.describe_differences({}, settings) == ""
    assert checkpoints.describe_differences({"seed": 1}, settings | {"seed": 1}) == ""


def test_other_recordings_under_the_same_names_are_another_run(store, tmp_path, monkeypatch):
    changes = {"steps": 6, "save_every": 2, "evaluate_every": 6}
    train_until(store, tmp_path, 5, monkeypatch, **changes)
    other_source = {"source": {"mp4": {"sha256": "other"}}}
    about = store.metadata | {TRAIN[0]: store.metadata[TRAIN[0]] | other_source}
    with pytest.raises(ValueError, match="contents was"):
        train_small(ClipStore(store.folders, about), tmp_path, **changes)


def test_another_number_of_sharded_processes_is_told_and_nothing_is_called_unreadable(tmp_path):
    "Those that come on top have no file of their own; the checkpoints are sound all the same."
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    save_checkpoint(tmp_path, 1, layer, optimizer, {"run": {}}, world=2, sharded=True)
    metadata = find_checkpoint(tmp_path, {})
    four = SimpleNamespace(rank=3, num_processes=4, sharded=True)
    with pytest.raises(ValueError, match="written by 2 sharded processes, this run has 4"):
        Learner.can_load(four, metadata)


def test_an_evaluation_holds_no_more_windows_at_once_than_a_step(store, tmp_path, monkeypatch):
    seen = []
    module = importlib.import_module("minecraft_jepa.training.train_world_model")

    def measure(model, frames, actions, seed):
        seen.append(len(frames))
        return {}

    monkeypatch.setattr(module, "encoder_gradients", measure)
    changes = {"variance_weight": 0.0, "steps": 2, "batch_size": 4}
    train_small(store, tmp_path, gradient_accumulation_steps=2, **changes)
    assert set(seen) == {2}


def test_half_written_checkpoints_are_passed_over(store, tmp_path):
    collapse(store, tmp_path, evaluate_every=5, save_every=2)
    folder = tmp_path / "world_model_checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_00000004", "step_00000005"]  # two are kept
    (folder / ".step_00000009.part").mkdir()
    (folder / ".step_00000009.part/rank_00000.safetensors").write_bytes(b"half")
    (folder / "step_00000010").mkdir()  # without about.json, as a tool that copies might leave it
    assert find_checkpoint(folder, {})["step"] == 5


def test_no_checkpoint_holds_a_number_that_is_not_finite(tmp_path):
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = math.inf
    optimizer = optim.make_optimizer({layer: 1.0}, 1.0, 0.0)
    with pytest.raises(FloatingPointError, match="step 3: a weight is not finite"):
        checkpoints.save_checkpoint(tmp_path, 3, layer, optimizer, {})
    assert not any(tmp_path.iterdir())


def test_the_checkpoint_just_saved_stays_beside_a_later_one_that_is_damaged(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())

    def save(step, keep):
        save_checkpoint(tmp_path, step, layer, optimizer, {"run": {}}, keep=keep)
        return sorted(int(path.name[5:]) for path in tmp_path.glob("step_*"))

    assert [save(step, 3) for step in (1, 2, 4)][-1] == [1, 2, 4]
    assert save(3, 2) == [2, 3]  # step 4 was damaged, so the run went on from 2
    save(4, 2)
    assert save(3, 1) == [3]


def spoil(checkpoint, fault):
    """Damage a checkpoint."""
    path = checkpoint / "rank_00000.safetensors"
    if fault == "nan":
        tensors = load_file(path)
        weight = next(t for name, t in tensors.items() if name.startswith("module/"))
        weight.view(-1)[0] = math.nan
        save_file(tensors, path)
    elif fault == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        (checkpoint / "about.json").write_text("{")


@pytest.mark.parametrize("fault", ["nan", "cut short", "no about"])
def test_a_checkpoint_that_is_not_sound_is_passed_over(store, tmp_path, monkeypatch, fault, capsys):
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    changes = {"steps": 8, "save_every": 2, "evaluate_every": 4}
    train_small(store, uninterrupted, **changes)
    train_until(store, run, 8, monkeypatch, **changes)
    newest = max((run / "world_model_checkpoints").glob("step_*"))
    spoil(newest, fault)
    capsys.readouterr()
    train_small(store, run, **changes)
    message = f"{newest}: not readable or not finite; going back"
    assert (message in capsys.readouterr().out) == (fault != "no about")
    assert_same_weights(weights(run), weights(uninterrupted))
    assert losses(run) == losses(uninterrupted)
