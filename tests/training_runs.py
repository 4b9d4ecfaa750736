"""What tests of the training share: a store of three recordings, small settings, and processes.

Processes are forked from one that has imported torch: a start costs tenths of a second.
"""

import itertools
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minecraft_jepa.config import preset
from minecraft_jepa.data.clip_store import ClipStore, cache_dir
from minecraft_jepa.data.shards import write_shards
from minecraft_jepa.data.splits import load_split
from minecraft_jepa.training import distributed, learner
from minecraft_jepa.training import train_world_model as world_model_training
from minecraft_jepa.training.train_decoders import train_decoders
from minecraft_jepa.training.train_world_model import train_world_model

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
SPLIT = load_split(DATA)
TRAIN, HELD_OUT = SPLIT["train"][:2], SPLIT["validation"][:1]
FRAME = {"height": 48, "frame_width": 80, "patch_size": 8}
SMALL = {
    **FRAME,
    "encoder_depth": 1,
    "conditioner_depth": 1,
    "predictor_depth": 1,
    "encoder_embed_dim": 32,
    "dit_embed_dim": 32,
    "dit_depth": 1,
    "regression_depth": 1,
    "batch_size": 8,
    "decoder_batch_size": 8,
    "dropout": 0.0,
}
TINY = SMALL | {
    "patch_size": 16,
    "history_ticks": 5,
    "encoder_embed_dim": 16,
    "dit_embed_dim": 16,
    "bottleneck_dim": 8,
    "batch_size": 4,
    "decoder_batch_size": 4,
    "min_rank_fraction": 0.0,
    "min_latent_std": 0.0,
}
world_model_training.NUM_VALIDATION_WINDOWS = 16  # fewer, so that an evaluation is quick

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["minecraft_jepa.training.pipeline", "pytest"])


def make_store():
    """A store of two recordings to train on and one to validate on, decoded once a session."""
    names = [*TRAIN, *HELD_OUT]
    store_dir = cache_dir() / "training"
    return ClipStore.build(
        DATA, preset("tiny", **FRAME).frame, store_dir, names=names, progress=False
    )


@pytest.fixture(name="store", scope="module")
def store_fixture():
    return make_store()


@pytest.fixture(name="shards", scope="module")
def shards_fixture():
    """Segments of few windows: epochs of two or more processes are short."""
    folder = cache_dir() / "training-shards"
    write_shards(make_store(), folder, length=100, progress=False)
    return str(folder)


def folder_of(store):
    return next(iter(store.folders.values())).parent


def train_small(store, folder=None, minutes=None, **changes):
    """Train a world model with settings `TINY | changes`."""
    config = preset("tiny", **TINY | changes)
    return train_world_model(config, store, TRAIN, HELD_OUT, folder=folder, max_minutes=minutes)


def train_in_process(store, out, changes, with_decoders, sharded="false"):
    """What a process trains. `store` is a folder, or a URL of shards."""
    is_shards = (Path(store) / "shards.json").is_file()
    data, config = store if is_shards else ClipStore.open(store), preset("tiny", **changes)
    os.environ["ACCELERATE_USE_FSDP"] = sharded
    model, _ = train_world_model(config, data, TRAIN, HELD_OUT, folder=out)
    if with_decoders:
        train_decoders(model, data, TRAIN, folder=out)


def run_calls(calls, log, environment, kill_at):
    """Run calls (function, *arguments) in a forked process; killed in step `kill_at`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    descend, num_calls = learner.optimizer_step, itertools.count(1)

    def descend_or_die(*args):
        if next(num_calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return descend(*args)

    learner.optimizer_step = descend_or_die
    for function, *args in calls:
        function(*args)
    distributed.shutdown_distributed()


def start_processes(*calls, log, processes=1, kill_at=None):
    """Start a training in a process of its own, or in several."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
            "MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1",
        }
        environment = {name: str(value) for name, value in environment.items()}
        args = calls, log, environment if processes > 1 else {}, kill_at
        process = FORKS.Process(target=run_calls, args=args)
        process.start()
        started.append(process)
    return started


def wait_for(processes, log):
    """Wait; all must come to their end."""
    for process in processes:
        process.join(900)
    exit_codes = [process.exitcode for process in processes]
    assert exit_codes == [0] * len(processes), Path(log).read_text()[-4000:]


def weights(folder):
    """{file: {name: tensor}} of a folder."""
    return {path.name: load_file(path) for path in Path(folder).glob("*.safetensors")}


def read_log(folder, name="world_model"):
    return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]


def losses(folder, name="world_model"):
    return [row["loss"] for row in read_log(folder, name)]


def assert_same_weights(weights_a, weights_b):
    assert weights_a.keys() == weights_b.keys()
    for file in weights_a:
        for name in weights_a[file]:
            assert torch.equal(weights_a[file][name], weights_b[file][name]), (file, name)


def all_finite(folder):
    """Whether all numbers in the safetensors files below a folder are finite."""
    tensors = (t for path in Path(folder).rglob("*.safetensors") for t in load_file(path).values())
    return all(torch.isfinite(t).all() for t in tensors if t.is_floating_point())


def spoil_gradients(monkeypatch, calls, value=float("inf")):
    """One element of a gradient gets `value`, in these calls of the backward pass."""
    backward, num_calls = learner._backward, itertools.count(1)

    def backward_and_spoil(accelerator, model, *args):
        numbers = backward(accelerator, model, *args)
        if next(num_calls) in calls:
            parameter = next(p for p in model.parameters() if p.grad is not None)
            parameter.grad.view(-1)[0] = value
        return numbers

    monkeypatch.setattr(learner, "_backward", backward_and_spoil)


def interrupt(monkeypatch, module, name):
    """A function of a module is interrupted when it is called."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, stop)


def train_until(store, folder, step, monkeypatch, minutes=None, **changes):
    """Train with `TINY | changes`, interrupted in a step."""
    descend, num_calls = learner.optimizer_step, itertools.count(1)

    def descend_or_stop(*args):
        if next(num_calls) == step:
            raise KeyboardInterrupt
        return descend(*args)

    with monkeypatch.context() as m:
        m.setattr(learner, "optimizer_step", descend_or_stop)
        with pytest.raises(KeyboardInterrupt):
            train_small(store, folder, minutes, **changes)


def note_rollouts(monkeypatch, network):
    """List that grows by the number of imagined ticks with each forward pass of a class."""
    rollouts, forward = [], network.forward

    def forward_and_note(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        rollouts.append(len(out["errors"]))
        return out

    monkeypatch.setattr(network, "forward", forward_and_note)
    return rollouts
