"""Training by the command line: what it leaves, resumes and refuses."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from commands import refused
from training_runs import (
    HELD_OUT,
    ROOT,
    TINY,
    TRAIN,
    folder_of,
    interrupt,
    spoil_gradients,
    store_fixture,  # noqa: F401
    weights,
)

from minecraft_jepa.cli import main, option_of
from minecraft_jepa.config import preset
from minecraft_jepa.training import pipeline, run_lock
from minecraft_jepa.training.run_identity import PLANNING_FILES
from minecraft_jepa.training.train_world_model import train_world_model


@pytest.fixture
def few(store, tmp_path):
    """A store of its own with a split, which may be changed."""
    folder = tmp_path / "few"
    shutil.copytree(folder_of(store), folder)
    split = {"train": TRAIN, "validation": HELD_OUT, "test": []}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def command(data, out, *more, **changes):
    """Words of the command line; `changes` are settings by their short names."""
    settings = TINY | {"steps": 4, "decoder_steps": 3, "evaluate_every": 2, "save_every": 2}
    options = []
    for name, value in (settings | changes).items():
        options += option_of(f"{name}={value}").split()
    return ["train", "--data", str(data), "--out", str(out), "--device", "cpu", *more, *options]


def read_summary(out):
    return json.loads((out / "training.json").read_text())


def test_command_line_trains_and_goes_on(few, tmp_path, capsys):
    out, words = tmp_path / "run", command(few, tmp_path / "run")
    result = subprocess.run(
        [sys.executable, "-m", "minecraft_jepa", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert '"steps": 4' in result.stdout, result.stderr[-2000:]
    assert f" s: {few}\n" in result.stdout  # where the store is
    summary = read_summary(out)
    assert (summary["train"], summary["validation"]) == (TRAIN, HELD_OUT)
    files = {"dit.safetensors", "head.safetensors", "world_model.safetensors"}
    assert set(weights(out)) == files
    assert main(words) == 0
    assert "trained already" in capsys.readouterr().out
    refused(capsys, [*words, "--train.stpes", "4"], "stpes.*meant: --train.steps", 2)


# of the store
FRAME_OPTIONS = ["--frame.height", "48", "--frame.width", "80", "--frame.patch-size", "8"]


@pytest.mark.parametrize(
    ("options", "message", "status"),
    [
        (["--train.lr", "nan"], "train: train.lr=nan must be a finite", 2),
        (["batch", "64"], "batch", 2),
        (["--seed", "-1"], "seed=-1", 1),
        (["--minutes", "0"], "minutes=0.0 must be", 1),
        (["--minutes", "nan"], "minutes=nan", 1),
        (
            ["--train.decoder-batch-size", "3", "--train.gradient-accumulation-steps", "2"],
            "multiple of 2",
            2,
        ),
        (["--start", "/nonexistent", *FRAME_OPTIONS], "/nonexistent: no such folder", 2),
    ],
)
def test_what_cannot_be_is_told_in_a_line(few, tmp_path, capsys, options, message, status):
    words = ["train", "--data", few, "--out", tmp_path / "out", "--device", "cpu", *options]
    refused(capsys, words, message, status)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_told_in_a_line(few, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/in"):
        refused(capsys, command(few, out), "can't be written .*give another folder")
    refused(capsys, command("/nonexistent", tmp_path / "out"), "/nonexistent", 2)
    assert not (tmp_path / "out").exists()


def test_cuda_without_a_gpu_is_told_as_the_notebooks_tell_it(
    store, few, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda', but torch sees no GPU here"):
        train_world_model(preset("tiny"), store, TRAIN, HELD_OUT, device="cuda")
    words = ["train", "--data", few, "--out", tmp_path / "out", "--device", "cuda"]
    refused(capsys, words, "torch sees no GPU here: take --device cpu")


def test_the_same_run_started_twice_is_told(few, tmp_path, capsys):
    lock = run_lock.FolderLock(tmp_path / "out")
    words = command(few, tmp_path / "out")
    refused(capsys, words, f"a run is at work here already .process {os.getpid()} on ")
    lock.release()


def test_a_run_goes_on_with_the_recordings_it_began_with(few, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "out", command(few, tmp_path / "out")
    out.mkdir()
    for name in PLANNING_FILES:  # of other weights that were here
        (out / name).write_bytes(b"learned from other latents")
    with monkeypatch.context() as m:
        interrupt(m, pipeline, "train_decoders_and_keep_checkpoint")
        assert main(words) == 1
        assert "stopped; the same command goes on" in capsys.readouterr().err
    assert (out / "world_model.done").is_file()
    assert not (out / "training.json").exists()
    assert not any((out / name).exists() for name in PLANNING_FILES)

    # A recording is added, and the recordings are split anew.
    shutil.copytree(few / TRAIN[0], few / "later")
    clip = few / "later/clip.json"
    clip.write_text(clip.read_text().replace(TRAIN[0], "later"))
    split = {"train": ["later"], "validation": HELD_OUT, "test": TRAIN}
    (few / "split.json").write_text(json.dumps(split))
    assert main(words) == 0
    summary = read_summary(out)
    assert (summary["train"], summary["validation"]) == (TRAIN, HELD_OUT)
    assert "that the run began with" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["begun", "half done", "all done", "all done by an older version"])
def test_another_seed_or_recipe_in_the_same_folder_is_refused_by_name(
    few, tmp_path, monkeypatch, capsys, when
):
    out, words = tmp_path / "out", command(few, tmp_path / "out")
    with monkeypatch.context() as m:
        if when == "begun":
            spoil_gradients(m, {3, 4, 5, 6, 7, 8})
            words = command(few, out, steps=9)
        if when == "half done":
            interrupt(m, pipeline, "train_decoders_and_keep_checkpoint")
        assert main(words) == (0 if when.startswith("all done") else 1)
    if when.endswith("version"):
        (out / "run.json").unlink()
        (out / "world_model.done").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    message = "holds another run .seed was 0, is 7.; run with those settings, or give another"
    refused(capsys, [*words, "--seed", "7"], message + " folder")
    message = "train.batch_size was 4, is 8; train.lr was 0.0008, is 1e-05"
    refused(capsys, [*words, "--train.batch-size", "8", "--train.lr", "1e-5"], message)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert main(words) == 0  # its own settings go on, and are what training.json tells
    assert read_summary(out)["seed"] == 0


def test_the_same_command_after_a_collapse_alarm_says_so_and_goes_on_only_when_told_to(
    few, tmp_path, capsys
):
    words = command(few, tmp_path / "out", min_rank_fraction=2.0, steps=6)
    message = "step 2: the latent is collapsing"
    refused(capsys, words, message)
    refused(capsys, words, f"was stopped at {message}.*To go on all the same: --go-on")
    assert main([*words, "--go-on"]) == 0
    assert read_summary(tmp_path / "out")["steps"] == 6
