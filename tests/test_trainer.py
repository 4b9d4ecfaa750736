"""The training loop: killed at any moment it ends with the same bits, and it ends in time."""

import itertools
import json
import math
import time

import numpy as np
import pytest
from soak import repeats
from training_runs import (
    TINY,
    TRAIN,
    all_finite,
    assert_same_weights,
    folder_of,
    interrupt,
    losses,
    read_log,
    spoil_gradients,
    start_processes,
    store_fixture,  # noqa: F401
    train_in_process,
    train_small,
    train_until,
    wait_for,
    weights,
)

from minecraft_jepa.config import preset
from minecraft_jepa.data import loader
from minecraft_jepa.data.splits import read_training, seen_recordings
from minecraft_jepa.training import learner, run_identity, run_lock, time_budget
from minecraft_jepa.training import train_decoders as decoder_training
from minecraft_jepa.training import train_world_model as world_model_training
from minecraft_jepa.training.run_lock import InUseError
from minecraft_jepa.training.train_decoders import train_decoders


def kill_after_a_step(process, out, random, while_writing):
    """Kill a training after a step: at random, or while a checkpoint is written.

    Returns None where it ended before, or whether a checkpoint was being written.
    """

    def count_rows():
        return sum(len(path.read_text().splitlines()) for path in out.glob("*.jsonl"))

    def is_writing():
        return bool(list(out.glob("*_checkpoints/.step_*.part")))

    num_rows = count_rows() if out.exists() else 0
    while process.is_alive() and count_rows() <= num_rows:
        time.sleep(0.01)
    if while_writing:
        while process.is_alive() and not is_writing():
            time.sleep(0.0005)
    else:
        time.sleep(random.uniform(0, 0.15))
    if not process.is_alive():
        return None
    was_writing = is_writing()
    process.kill()
    process.join()
    return was_writing


def test_killed_again_and_again_it_ends_with_the_same_bits(store, tmp_path):
    """Kill -9 at random moments, every third time while a checkpoint is being written."""
    log, out, uninterrupted = tmp_path / "log", tmp_path / "killed", tmp_path / "uninterrupted"
    num_kills = repeats(6, 20)
    changes = TINY | {"steps": 12 * num_kills, "decoder_steps": 4 * num_kills}
    changes |= {"save_every": 5, "evaluate_every": 4 * num_kills, "encoder_lr_scale": 1.0}

    def start(folder):
        call = train_in_process, folder_of(store), folder, changes, True
        return start_processes(call, log=log)

    wait_for(start(uninterrupted), log)
    random, kills = np.random.default_rng(0), []
    for kill in range(num_kills):
        (process,) = start(out)
        was_writing = kill_after_a_step(process, out, random, while_writing=kill % 3 == 0)
        if was_writing is None:
            break
        kills.append(was_writing)
    wait_for(start(out), log)
    assert len(kills) == num_kills
    assert sum(kills) >= repeats(1, 3)
    assert_same_weights(weights(out), weights(uninterrupted))
    files = ["dit.safetensors", "head.safetensors", "world_model.safetensors"]
    assert sorted(weights(out)) == files
    for name in ("world_model", "decoders"):
        assert losses(out, name) == losses(uninterrupted, name)
    assert not list(out.glob("*_checkpoints"))
    assert not (out / ".running").exists()


def test_killed_between_the_last_step_and_the_final_files_no_step_is_done_again(
    store, tmp_path, monkeypatch
):
    model, _ = train_small(store, steps=2, evaluate_every=2)
    with monkeypatch.context() as m:
        interrupt(m, decoder_training, "save_on_main_process")
        with pytest.raises(KeyboardInterrupt):
            train_decoders(model, store, TRAIN, steps=5, folder=tmp_path)
    interrupt(monkeypatch, learner, "optimizer_step")  # no step is taken any more
    earlier = {"train": ["other"], "validation": [], "steps": 2, "seconds": {"world_model": 1.0}}
    (tmp_path / "training.json").write_text(json.dumps(earlier | {"decoder_steps": 0}))
    _, _, history = train_decoders(model, store, TRAIN, steps=5, folder=tmp_path)
    assert len(history) == 5
    training = read_training(tmp_path)
    assert seen_recordings(training) == ["other", *TRAIN]
    assert training["decoder_steps"] == 5
    assert training["seconds"].keys() == {"world_model", "decoders"}
    assert set(weights(tmp_path)) == {"dit.safetensors", "head.safetensors"}
    assert not list(tmp_path.glob("*_checkpoints"))


def test_decoders_that_cannot_be_trained_change_no_training_json(store, tmp_path):
    model, _ = train_small(store, steps=2, evaluate_every=2)
    told = json.dumps({"train": ["other"], "validation": [], "steps": 2, "seconds": {}})
    (tmp_path / "training.json").write_text(told)
    for names, options, message in (
        (TRAIN, {"steps": 0}, "steps"),
        (TRAIN, {"device": "tpu"}, "tpu"),
        ([*TRAIN, "typo"], {}, "no recording typo in the store"),
    ):
        with pytest.raises(ValueError, match=message):
            train_decoders(model, store, names, folder=tmp_path, **options)
    lock = run_lock.FolderLock(tmp_path)
    with pytest.raises(InUseError):
        train_decoders(model, store, TRAIN, steps=1, folder=tmp_path)
    lock.release()
    assert (tmp_path / "training.json").read_text() == told


def test_world_model_whose_decoders_were_killed_is_not_trained_again(store, tmp_path, monkeypatch):
    model, history = train_small(store, tmp_path, steps=2, evaluate_every=2)
    with monkeypatch.context() as m:
        interrupt(m, learner, "optimizer_step")  # no step is taken any more
        again, rows = train_small(store, tmp_path, steps=2, evaluate_every=2)
    assert [row["step"] for row in rows] == [row["step"] for row in history]
    assert_same_weights({"world_model": model.state_dict()}, {"world_model": again.state_dict()})
    done = json.loads((tmp_path / "world_model.done").read_text())
    assert run_identity.read_trained(tmp_path, done["run"] | {"processes": 8})
    assert not run_identity.read_trained(tmp_path, done["run"] | {"seed": 1})
    assert run_identity.read_trained(tmp_path)
    (tmp_path / "training.json").write_text("{}")  # its decoders are trained too
    interrupt(monkeypatch, learner, "optimizer_step")
    with pytest.raises(KeyboardInterrupt):
        train_small(store, tmp_path, steps=2, evaluate_every=2)


def test_batch_that_cannot_be_cut_is_refused():
    remedy = "gradient_accumulation_steps=3 parts; choose a multiple of 3"
    with pytest.raises(ValueError, match=f"batch_size=4 can't be cut into {remedy}"):
        preset("tiny", **TINY, steps=3, gradient_accumulation_steps=3)

    class ThreeProcesses:
        num_processes = 3

    problem = "batch=8 can't be cut into 3 processes x 1 parts; choose a multiple of 3"
    with pytest.raises(ValueError, match=problem):
        learner.check_batch_size("batch=8", 8, preset("tiny").train, ThreeProcesses)


def test_error_in_the_reader_reaches_the_loop(store, monkeypatch):
    def broken_batches():
        yield from ()
        raise OSError("the disk is gone")

    def window_batches(data, names, *args):
        return broken_batches() if names == TRAIN else loader.window_batches(data, names, *args)

    monkeypatch.setattr(world_model_training, "window_batches", window_batches)
    with pytest.raises(OSError, match="the disk is gone"):
        train_small(store, steps=3)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(store, tmp_path, monkeypatch, value):
    spoil_gradients(monkeypatch, {3, 4, 9}, value)
    model, history = train_small(store, tmp_path, steps=10, save_every=1, evaluate_every=5)
    assert [row["step"] for row in history if row.get("skipped")] == [3, 4, 9]
    assert len(history) == 10
    assert all_finite(tmp_path)
    train_decoders(model, store, TRAIN, steps=3, folder=tmp_path)
    assert all_finite(tmp_path)


def test_a_loss_that_is_not_finite_changes_nothing(store, tmp_path, monkeypatch):
    backward, num_calls = learner._backward, itertools.count(1)

    def backward_with_nan(*args):
        numbers = backward(*args)
        return numbers | {"loss": math.nan} if next(num_calls) == 2 else numbers

    monkeypatch.setattr(learner, "_backward", backward_with_nan)
    _, history = train_small(store, tmp_path, steps=4, evaluate_every=4)
    assert [row["step"] for row in history] == [1, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in history)
    assert all_finite(tmp_path)


def test_steps_in_a_row_that_are_not_finite_end_the_run_and_it_can_go_on(
    store, tmp_path, monkeypatch, capsys
):
    changes = {"steps": 12, "save_every": 2, "evaluate_every": 6}
    message = "step 10: the gradient's norm is inf, for the 5th time in a row: lower the lr, "
    with monkeypatch.context() as m:
        spoil_gradients(m, set(range(6, 99)))
        with pytest.raises(FloatingPointError, match=message + ".*the same command goes on"):
            train_small(store, tmp_path, **changes)
    assert all_finite(tmp_path)
    assert "this step changes nothing" in capsys.readouterr().out
    _, history = train_small(store, tmp_path, **changes)
    assert [row["step"] for row in history] == list(range(1, 13))


def test_time_limit_fits_the_schedule(store, tmp_path):
    start_time = time.monotonic()
    _, history = train_small(store, tmp_path, minutes=0.15, steps=99_000, evaluate_every=1000)
    assert 5 < len(history) < 100_000
    assert time.monotonic() - start_time < 60
    # The cosine came to its end.
    assert history[-1]["lr"] < 0.05 * max(row["lr"] for row in history)
    assert (tmp_path / "world_model.safetensors").is_file()


def test_time_is_counted_over_a_kill(store, tmp_path, monkeypatch):
    """What a run spent before a kill is gone, whether a checkpoint was left or not."""
    changes = {"steps": 99_000, "evaluate_every": 99_000, "save_every": 99_000}
    train_until(store, tmp_path, 6, monkeypatch, minutes=5, **changes)
    train_until(store, tmp_path, 4, monkeypatch, minutes=5, **changes)
    rows = read_log(tmp_path)
    spent_path = tmp_path / "world_model_checkpoints/spent.json"
    spent_before = json.loads(spent_path.read_text())["seconds"]
    assert 0 < spent_before < rows[0]["elapsed"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    elapsed = [row["elapsed"] for row in rows]
    assert elapsed == sorted(elapsed)

    spent, last_step = [], time_budget.TimeBudget.last_step

    def last_step_and_note(self, *args):
        spent.append(self.spent())
        return last_step(self, *args)

    monkeypatch.setattr(time_budget.TimeBudget, "last_step", last_step_and_note)
    train_small(store, tmp_path, minutes=elapsed[-1] / 60, **changes)  # all is spent: it ends
    assert spent[0] > elapsed[-1]


def test_without_its_time_limit_a_run_goes_on_to_the_full_number_of_steps(
    store, tmp_path, monkeypatch
):
    changes = {"steps": 12, "save_every": 2, "evaluate_every": 12}
    with monkeypatch.context() as m:
        m.setattr(time_budget.TimeBudget, "last_step", lambda self, step, seconds: 6)
        train_until(store, tmp_path, 5, m, minutes=5, **changes)
    _, history = train_small(store, tmp_path, **changes)
    assert [row["step"] for row in history] == list(range(1, 13))
    # The rest of the schedule is stretched over the steps that are left.
    rates = [row["lr"] for row in history[4:]]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.1 * rates[0]
