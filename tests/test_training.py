"""Training by the command line: what it leaves, resumes and refuses."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from commands import refused
<<<<<<< HEAD
from safetensors.torch import load_file, save_file
from soak import repeats
=======
from minecraft_jepa.cli import _option_of, main
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
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2

from minecraft_jepa.cli import _option_of, main
from minecraft_jepa.config import preset
<<<<<<< HEAD
from minecraft_jepa.data import loader
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.shard_reader import ShardWindows, deal_evenly
from minecraft_jepa.data.shards import write_shards
from minecraft_jepa.data.splits import split_recordings
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.training import checkpoints, distributed, memory, optim, pipeline, trainer
from minecraft_jepa.training import train_decoders as decoder_training
from minecraft_jepa.training import train_world_model as world_model_training
from minecraft_jepa.training.checkpoints import find_checkpoint
from minecraft_jepa.training.distributed import lighten
from minecraft_jepa.training.train_decoders import train_decoders
from minecraft_jepa.training.train_world_model import error_over_copying, train_world_model
from minecraft_jepa.training.trainer import CollapseError

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
SPLIT = split_recordings(DATA)
TRAIN, HELD_OUT = SPLIT["train"][:2], SPLIT["validation"][:1]
SMALL = dict(
    encoder_depth=1,
    conditioner_depth=1,
    predictor_depth=1,
    encoder_width=32,
    dit_width=32,
    dit_depth=1,
    head_depth=1,
    batch=8,
    decoder_batch=8,
    dropout=0.0,
)
TINY = SMALL | dict(
    patch=16,
    ticks=5,
    encoder_width=16,
    dit_width=16,
    bottleneck=8,
    batch=4,
    decoder_batch=4,
    rank_alarm=0.0,
    std_alarm=0.0,
)
loader._LOOK = 16  # fewer windows to validate on

# Processes are forked from one that has imported torch: a start costs tenths of a second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["minecraft_jepa.training.pipeline", "pytest"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ClipStore.build(
        DATA,
        preset("tiny").frame,
        tmp_path_factory.mktemp("store"),
        names=[*TRAIN, *HELD_OUT],
        progress=False,
    )


@pytest.fixture(scope="module")
def shards(store, tmp_path_factory):
    "Segments of few windows: epochs of two or more processes are short."
    folder = tmp_path_factory.mktemp("shards")
    write_shards(store, folder, length=100, progress=False)
    return str(folder)


def training_of(store, out, changes, decoders, sharded="false"):
    "What a process trains. `store` is a folder, or a URL of shards."
    data, config = (
        store if (Path(store) / "shards.json").is_file() else ClipStore.open(store),
        preset("tiny", **changes),
    )
    os.environ["ACCELERATE_USE_FSDP"] = sharded
    model, _ = train_world_model(config, data, TRAIN, HELD_OUT, folder=out)
    if decoders:
        train_decoders(model, data, TRAIN, folder=out)


def in_a_process(call, said, environment, kill_at):
    "Run by the fork server: `call` is a function and its words, or several; killed after a step."
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    real, count = optim.descend, itertools.count(1)

    def descend(*words):
        if next(count) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*words)

    optim.descend = descend
    for function, *words in call:
        function(*words)
    distributed.leave_processes()


def run(*calls, said, processes=1, kill_at=None):
    "Start a training in a process of its own, or in several."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(processes):
        places = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
            "MASTER_PORT": port,
        }
        environment = (
            {k: str(v) for k, v in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
            if processes > 1
            else {}
        )
        started.append(FORKS.Process(target=in_a_process, args=(calls, said, environment, kill_at)))
        started[-1].start()
    return started


def end(processes, said):
    "Wait; all must have come to their end."
    for process in processes:
        process.join(900)
    assert [p.exitcode for p in processes] == [0] * len(processes), Path(said).read_text()[-4000:]


def weights(folder):
    return {f.name: load_file(f) for f in Path(folder).glob("*.safetensors")}


def losses(folder, name="world_model"):
    return [
        json.loads(line)["loss"]
        for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()
    ]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for k in a[name]:
            assert torch.equal(a[name][k], b[name][k]), (name, k)


def test_killed_again_and_again_it_ends_with_the_same_bits(store, tmp_path):
    "Kill -9 at random moments, every third time while a checkpoint is being written."
    folder, wanted = next(iter(store.folders.values())).parent, repeats(6, 20)
    changes = TINY | {
        "steps": 12 * wanted,
        "decoder_steps": 4 * wanted,
        "save_every": 5,
        "evaluate_every": 4 * wanted,
        "encoder_lr": 1.0,
    }
    end(
        run((training_of, folder, tmp_path / "whole", changes, True), said=tmp_path / "said"),
        tmp_path / "said",
    )
    random, out, kills, while_writing = np.random.default_rng(0), tmp_path / "killed", 0, 0
    count = lambda: sum(len(p.read_text().splitlines()) for p in out.glob("*.jsonl"))
    while kills < wanted:
        (process,), seen = (
            run((training_of, folder, out, changes, True), said=tmp_path / "said"),
            count() if out.exists() else 0,
        )
        while process.is_alive() and count() <= seen:
            time.sleep(0.01)
        if kills % 3 == 0:
            while process.is_alive() and not list(out.glob("*_checkpoints/.step_*.part")):
                time.sleep(0.0005)
        else:
            time.sleep(random.uniform(0, 0.15))
        if not process.is_alive():
            break
        while_writing += bool(list(out.glob("*_checkpoints/.step_*.part")))
        process.kill()
        process.join()
        kills += 1
    end(run((training_of, folder, out, changes, True), said=tmp_path / "said"), tmp_path / "said")
    assert kills == wanted and while_writing >= repeats(1, 3)
    same(weights(out), weights(tmp_path / "whole"))
    assert sorted(weights(out)) == [
        "dit.safetensors",
        "head.safetensors",
        "world_model.safetensors",
    ]
    for name in ("world_model", "decoders"):
        assert losses(out, name) == losses(tmp_path / "whole", name)
    assert not list(out.glob("*_checkpoints")) and not (out / ".running").exists()


VARIANTS = {
    "ema": {},
    "sigreg": {"anti_collapse": "sigreg", "slices": 64},
    "vicreg": {"anti_collapse": "vicreg"},
    "parts": {"inverse": 0.1, "accumulate": 2, "floor": 0.0},
    "inverse dynamics without tilt": {"inverse": 0.1, "tilt": 0.0},
}


@pytest.mark.parametrize("sharded", ["false", "true"], ids=["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(store, tmp_path, sharded):
    "The same global batch over gloo: losses and weights to float tolerance."
    folder = next(iter(store.folders.values())).parent
    configs = {
        n: TINY | {"steps": 5, "decoder_steps": 3, "evaluate_every": 5, "ema_end": 0.9} | v
        for n, v in VARIANTS.items()
    }
    two = run(
        *[
            (training_of, folder, tmp_path / n, c, n == "parts", sharded)
            for n, c in configs.items()
        ],
        said=tmp_path / "said",
        processes=2,
    )
    one = {
        n: train_world_model(
            preset("tiny", **c), store, TRAIN, HELD_OUT, folder=tmp_path / f"one {n}"
        )
        for n, c in configs.items()
    }
    end(two, tmp_path / "said")
    for name in one:
        assert np.allclose(losses(tmp_path / f"one {name}"), losses(tmp_path / name), rtol=2e-4), (
            name
        )
        a, b = (weights(tmp_path / n)["world_model.safetensors"] for n in (f"one {name}", name))
        assert a.keys() == b.keys()
        for k in a:
            assert torch.allclose(a[k], b[k], atol=5e-4), (
                name,
                k,
            )  # Adam's first steps are of size lr whatever the gradient: where that is next to nothing, signs may differ


@pytest.mark.parametrize("world", [2, 3])
def test_shards_of_unequal_epochs_end_with_the_same_bits_after_a_kill_in_each(
    shards, tmp_path, world
):
    "Real processes, three epochs: a reader that gave nothing for ever, or other batches after a kill."
    batch = 48 * world
    plan = ShardWindows(shards, 5, 2, batch // world, 0, TRAIN, rank=0, world=world)
    many = []
    for epoch in range(3):
        plan.resume(epoch)
        many += plan.batches()
    assert min(many) > 1
    ends = np.cumsum(many)
    changes = TINY | {
        "inverse": 0.0,
        "batch": batch,
        "steps": int(ends[-1]) + 2,
        "save_every": 3,
        "evaluate_every": 1000,
    }
    words = lambda out: (training_of, shards, tmp_path / out, changes, False)
    end(run(words("whole"), said=tmp_path / "said", processes=world), tmp_path / "said")
    done = 0
    for last in ends:  # killed in the last step of each epoch
        killed = run(
            words("killed"), said=tmp_path / "said", processes=world, kill_at=int(last) - done
        )
        for process in killed:
            process.join(900)
        assert {p.exitcode for p in killed} & {-signal.SIGKILL}, Path(
            tmp_path / "said"
        ).read_text()[-2000:]
        done = find_checkpoint(tmp_path / "killed/world_model_checkpoints", {})["step"]
    end(run(words("killed"), said=tmp_path / "said", processes=world), tmp_path / "said")
    same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert (
        losses(tmp_path / "killed") == losses(tmp_path / "whole")
        and len(losses(tmp_path / "whole")) == ends[-1] + 2
    )


def test_parts_of_a_batch_give_the_whole_batchs_step(store):
    config = preset(
        "tiny", **SMALL, steps=3, evaluate_every=3, floor=0.0
    )  # the spread of a part is not that of the batch
    parts = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=4))
    whole, cut = (train_world_model(c, store, TRAIN, HELD_OUT)[1] for c in (config, parts))
    assert np.allclose([r["loss"] for r in whole], [r["loss"] for r in cut], rtol=1e-4)


def test_checkpointed_activations_change_nothing(store):
    config = preset("tiny", **SMALL, steps=3, evaluate_every=3)
    light = dataclasses.replace(
        config, train=dataclasses.replace(config.train, checkpoint_activations=True)
    )
    (a, plain), (b, lighter) = (
        train_world_model(c, store, TRAIN, HELD_OUT) for c in (config, light)
    )
    assert (
        np.allclose([r["loss"] for r in plain], [r["loss"] for r in lighter], rtol=1e-6)
        and a.state_dict().keys() == b.state_dict().keys()
    )


def test_collapse_stops_the_run_with_advice(store, tmp_path):
    config = preset("tiny", **SMALL, steps=20, evaluate_every=4, rank_alarm=2.0)
    with pytest.raises(
        CollapseError,
        match=r"step 4: the latent is collapsing: effective rank .* Try a smaller lr.*sigreg",
    ):
        train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path)
    assert find_checkpoint(tmp_path / "world_model_checkpoints", {})["step"] == 4


def test_constant_encoder_is_kept_from_collapse_by_each_loss(store):
    "Without slow copy and without any of these losses, a few steps at a large rate empty the latents; each loss keeps them apart."
    std = {}
    for name, change in {
        "none": {"anti_collapse": "vicreg", "vicreg_std": 0.0, "vicreg_cov": 0.0},
        "sigreg": {"anti_collapse": "sigreg", "slices": 128, "sigreg": 1.0},
        "vicreg": {"anti_collapse": "vicreg"},
        "floor": {"floor": 1.0, "ema_start": 0.0, "ema_end": 0.0},
    }.items():
        config = preset(
            "tiny",
            **SMALL,
            steps=60,
            evaluate_every=60,
            lr=3e-3,
            encoder_lr=1.0,
            rank_alarm=0.0,
            std_alarm=0.0,
            **change,
        )
        std[name] = train_world_model(config, store, TRAIN, HELD_OUT)[1][-1]["std"]
    assert std["none"] < 0.7 * min(std["sigreg"], std["vicreg"], std["floor"]), std


def test_checkpoint_of_another_run_is_refused(store, tmp_path):
    config = preset("tiny", **SMALL, steps=20, evaluate_every=4, save_every=4, rank_alarm=2.0)
    with pytest.raises(CollapseError):
        train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path)
    with pytest.raises(
        ValueError, match="another run .*train.lr was 0.0008, is 0.001.*give another folder"
    ):
        train_world_model(
            preset("tiny", **SMALL, steps=20, evaluate_every=4, rank_alarm=2.0, lr=1e-3),
            store,
            TRAIN,
            HELD_OUT,
            folder=tmp_path,
        )
    with pytest.raises(ValueError, match="recordings was"):
        train_world_model(config, store, TRAIN[:1], HELD_OUT, folder=tmp_path)


def test_a_run_may_start_from_the_weights_of_another(store, tmp_path):
    changes = SMALL | {"steps": 2, "evaluate_every": 2, "rank_alarm": 0.0}
    first, _ = train_world_model(
        preset("tiny", **changes, inverse=0.0), store, TRAIN, HELD_OUT, folder=tmp_path / "first"
    )  # without the head that the next one has
    frames = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8)
    still = preset("tiny", **changes, lr=1e-12)
    second, _ = train_world_model(
        still, store, TRAIN, HELD_OUT, folder=tmp_path / "second", start=tmp_path / "first"
    )
    anew, _ = train_world_model(still, store, TRAIN, HELD_OUT, seed=1, folder=tmp_path / "anew")
    assert torch.allclose(
        second.encode(frames), first.encode(frames), atol=1e-4
    ) and not torch.allclose(anew.encode(frames), first.encode(frames), atol=1e-2)
    with pytest.raises(ValueError, match="no such folder"):
        train_world_model(still, store, TRAIN, HELD_OUT, start=tmp_path / "nowhere")


def test_half_written_checkpoints_are_passed_over(store, tmp_path):
    config = preset("tiny", **SMALL, steps=20, evaluate_every=5, save_every=2, rank_alarm=2.0)
    with pytest.raises(CollapseError):
        train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path)
    place = tmp_path / "world_model_checkpoints"
    assert sorted(p.name for p in place.iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]  # two are kept
    (place / ".step_00000009.part").mkdir()
    (place / ".step_00000009.part/rank_00000.safetensors").write_bytes(b"half")
    (place / "step_00000010").mkdir()  # without about.json, as a tool that copies might leave it
    assert find_checkpoint(place, {})["step"] == 5


def test_time_limit_fits_the_schedule(store, tmp_path):
    config = preset("tiny", **TINY, steps=99_000, evaluate_every=1000)
    begin = time.monotonic()
    _, history = train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path, minutes=0.15)
    assert 5 < len(history) < 100_000 and time.monotonic() - begin < 60
    assert history[-1]["lr"] < 0.05 * max(r["lr"] for r in history)  # the cosine came to its end
    assert (tmp_path / "world_model.safetensors").is_file()


def test_trains_from_shards(shards):
    config = preset("tiny", **SMALL, steps=4, evaluate_every=4)
    _, history = train_world_model(config, shards, TRAIN, HELD_OUT)
    assert len(history) == 4 and history[-1]["loss"] < 1


def test_log_and_pictures_are_left(store, tmp_path):
    config = preset("tiny", **SMALL, steps=6, evaluate_every=3)
    model, history = train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "world_model.jsonl").read_text().splitlines()]
    assert (
        rows == history
        and {"step", "loss", "lr", "gradient_norm", "waited", "seconds"} <= rows[0].keys()
        and {"rank", "std", "correlation"} <= rows[2].keys()
    )
    assert list((tmp_path / "tensorboard/world_model").glob("events*"))
    from PIL import Image

    assert Image.open(tmp_path / "world_model.png").size == (8 * 80, 2 * 48)
    train_decoders(model, store, TRAIN, steps=3, folder=tmp_path)
    assert Image.open(tmp_path / "decoders.png").size == (6 * 80, 3 * 48)


def test_log_tells_what_shapes_the_encoder(store):
    config = preset("tiny", **SMALL, steps=4, evaluate_every=2)
    _, history = train_world_model(config, store, TRAIN, HELD_OUT)
    told = [row["encoder_gradients"] for row in history if "encoder_gradients" in row]
    assert len(told) == 2
    for norms in told:
        assert set(norms) == {"prediction", "spread", "inverse_dynamics", "pitch"}
        assert all(0 <= norm < math.inf for norm in norms.values()) and norms["pitch"] > 0


def test_last_third_feeds_more_ticks_back(store, monkeypatch):
    ticks, forward = [], WorldModel.forward

    def watched(self, *args, **more):
        out = forward(self, *args, **more)
        ticks.append(len(out["errors"]))
        return out

    monkeypatch.setattr(WorldModel, "forward", watched)
    config = preset("tiny", **TINY, steps=6, evaluate_every=6, rollout=2, rollout_late=5)
    train_world_model(config, store, TRAIN, HELD_OUT)
    assert ticks == [2, 2, 2, 2, 5, 5]


def test_best_model_ships_the_teacher(store, tmp_path):
    config = preset("tiny", **SMALL, steps=6, evaluate_every=3)
    model, _ = train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.encoder.parameters(), model.teacher.parameters())
    )
    assert not [k for k in weights(tmp_path)["world_model.safetensors"] if k.startswith("teacher.")]


def test_error_in_the_reader_reaches_the_loop(store, monkeypatch):
    def broken(*_):
        yield from ()
        raise OSError("the disk is gone")

    real = loader._windows
    monkeypatch.setattr(
        world_model_training,
        "_windows",
        lambda data, names, *a: broken() if names == TRAIN else real(data, names, *a),
    )
    with pytest.raises(OSError, match="the disk is gone"):
        train_world_model(preset("tiny", **SMALL, steps=3), store, TRAIN, HELD_OUT)


def test_batch_that_cannot_be_cut_is_refused(store):
    with pytest.raises(
        ValueError, match="batch=8 can't be cut into accumulate=3 parts; choose a multiple of 3"
    ):
        preset("tiny", **SMALL, steps=3, accumulate=3)

    class Three:
        num_processes = 3

    with pytest.raises(
        ValueError, match="batch=8 can't be cut into 3 processes x 1 parts; choose a multiple of 3"
    ):
        trainer._check_parts("batch=8", 8, preset("tiny").train, Three)


def measure_step(light, out):
    "Peak of real steps above what the process held before, and the plan."
    config = preset("small", batch=6, checkpoint_activations=light, predictor_depth=3)
    now = lambda k: (
        int(
            [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(k)][
                0
            ].split()[1]
        )
        * 1024
    )
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = now("VmRSS")
    model = lighten(WorldModel(config).train(), config.train, "cpu")
    optimizer = optim.make_optimizer({model: 1.0}, 1e-4, 0.0)
    for _ in range(2):
        model(
            torch.randint(0, 255, (6, 5, 3, 128, 224), dtype=torch.uint8), torch.randn(6, 28, 28)
        )["loss"].backward()
        optimizer.step()
    Path(out).write_text(
        json.dumps([now("VmHWM") - before, memory.plan_memory(config, "cpu")["total"]])
    )


def test_memory_plan_is_what_a_step_takes(tmp_path):
    "Against a process that takes real steps: peak above what it held before the model, on a CPU in float32."
    taken = {}
    for light in (False, True):
        end(
            run((measure_step, light, tmp_path / "found"), said=tmp_path / "said"),
            tmp_path / "said",
        )
        measured, planned = json.loads((tmp_path / "found").read_text())
        assert 0.6 < measured / planned < 1.25, (light, measured / 2**20, planned / 2**20)
        taken[light] = measured
    assert taken[True] < 0.7 * taken[False]


def test_run_that_does_not_fit_is_told_what_would():
    with pytest.raises(
        memory.MemoryPlanError,
        match=r"small with batch=64 needs .*, the device has 3.0 GiB; checkpoint_activations=(True|False), accumulate=\d+ needs",
    ):
        memory.check_memory(preset("small", floor=0), "cuda", 3 * 2**30)
    with pytest.raises(
        memory.MemoryPlanError, match=r"checkpoint_activations=(True|False), batch=\d+ needs"
    ):
        memory.check_memory(preset("small"), "cuda", 3 * 2**30)  # a floor sees the whole batch
    with pytest.raises(memory.MemoryPlanError, match="smaller preset"):
        memory.check_memory(preset("small"), "cuda", 2**28)
    assert (
        memory.check_memory(preset("paper"), "cuda", 12 * 2**30)["total"] < 0.9 * 12 * 2**30
    )  # the seed's card
    alone, shared = (
        memory.plan_memory(preset("small"), "cuda"),
        memory.plan_memory(preset("small"), "cuda", processes=4, sharded=True),
    )
    assert (
        shared["optimizer"] == alone["optimizer"] // 4
        and shared["activations"] < 0.3 * alone["activations"]
    )
=======
from minecraft_jepa.training import checkpoints, pipeline
from minecraft_jepa.training.train_world_model import train_world_model
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2


@pytest.fixture
def few(store, tmp_path):
    """A store of its own with a split, which may be changed."""
    folder = tmp_path / "few"
    shutil.copytree(folder_of(store), folder)
    split = {"train": TRAIN, "validation": HELD_OUT, "test": []}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def command(data, out, *more, **changes):
<<<<<<< HEAD
    "Words of the command line; `changes` are settings by their short names."
    settings = (
        TINY | {"steps": 4, "decoder_steps": 3, "evaluate_every": 2, "save_every": 2} | changes
    )
    options = [word for k, v in settings.items() for word in _option_of(f"{k}={v}").split()]
    return ["train", "--data", str(data), "--out", str(out), "--device", "cpu", *more, *options]


def test_command_line_trains_and_goes_on(few, tmp_path, capsys):
    words = command(few, tmp_path / "run")
    done = subprocess.run(
=======
    """Words of the command line; `changes` are settings by their short names."""
    settings = TINY | {"steps": 4, "decoder_steps": 3, "evaluate_every": 2, "save_every": 2}
    options = []
    for name, value in (settings | changes).items():
        options += _option_of(f"{name}={value}").split()
    return ["train", "--data", str(data), "--out", str(out), "--device", "cpu", *more, *options]


def read_summary(out):
    return json.loads((out / "training.json").read_text())


def test_command_line_trains_and_goes_on(few, tmp_path, capsys):
    out, words = tmp_path / "run", command(few, tmp_path / "run")
    result = subprocess.run(
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2
        [sys.executable, "-m", "minecraft_jepa", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
<<<<<<< HEAD
    assert done.returncode == 0 and '"steps": 4' in done.stdout, done.stderr[-2000:]
    told = json.loads((tmp_path / "run/training.json").read_text())
    assert (told["train"], told["validation"]) == (TRAIN, HELD_OUT) and set(
        weights(tmp_path / "run")
    ) == {"dit.safetensors", "head.safetensors", "world_model.safetensors"}
    assert main(words) == 0
    assert "trained already" in capsys.readouterr().out
    refused(capsys, [*words, "--train.stpes", "4"], "stpes.*meant: --train.steps", 2)


def test_best_is_not_the_one_whose_latents_are_all_alike():
    "The first evaluations of a run with a slow teacher: every error is tiny, copying's too."
    early, late = (
        {"model": [0, e], "copy_last": [0, c]} for e, c in ((0.023, 0.027), (0.072, 0.126))
    )
    assert min((early, late), key=error_over_copying) is late


@pytest.mark.parametrize(
    ("more", "said", "status"),
=======
    assert result.returncode == 0, result.stderr[-2000:]
    assert '"steps": 4' in result.stdout, result.stderr[-2000:]
    summary = read_summary(out)
    assert (summary["train"], summary["validation"]) == (TRAIN, HELD_OUT)
    files = {"dit.safetensors", "head.safetensors", "world_model.safetensors"}
    assert set(weights(out)) == files
    assert main(words) == 0
    assert "trained already" in capsys.readouterr().out
    refused(capsys, [*words, "--train.stpes", "4"], "stpes.*meant: --train.steps", 2)


@pytest.mark.parametrize(
    ("options", "message", "status"),
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2
    [
        (["--train.lr", "nan"], "train: train.lr=nan must be a finite", 2),
        (["batch", "64"], "batch", 2),
        (["--seed", "-1"], "seed=-1", 1),
        (["--minutes", "0"], "minutes=0.0 must be", 1),
        (["--minutes", "nan"], "minutes=nan", 1),
        (["--train.decoder-batch", "3", "--train.accumulate", "2"], "multiple of 2", 2),
        (["--start", "/nonexistent"], "/nonexistent: no such folder", 1),
    ],
)
<<<<<<< HEAD
def test_what_cannot_be_is_told_in_a_line(few, tmp_path, capsys, more, said, status):
    words = ["train", "--data", few, "--out", tmp_path / "out", "--device", "cpu", *more]
    refused(capsys, words, said, status)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))
=======
def test_what_cannot_be_is_told_in_a_line(few, tmp_path, capsys, options, message, status):
    words = ["train", "--data", few, "--out", tmp_path / "out", "--device", "cpu", *options]
    refused(capsys, words, message, status)
    assert not list((tmp_path / "out").glob("*.safetensors"))
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2


def test_a_folder_that_cannot_be_written_is_told_in_a_line(few, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/in"):
        refused(capsys, command(few, out), "can't be written .*give another folder")
    refused(capsys, command("/nonexistent", tmp_path / "out"), "/nonexistent")
    assert not (tmp_path / "out").exists()


def test_cuda_without_a_gpu_is_told_as_the_notebooks_tell_it(
    store, few, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda', but torch sees no GPU here"):
        train_world_model(preset("tiny"), store, TRAIN, HELD_OUT, device="cuda")
<<<<<<< HEAD
    refused(
        capsys,
        ["train", "--data", few, "--out", tmp_path / "out", "--device", "cuda"],
        "torch sees no GPU here: take --device cpu",
    )


def test_several_processes_that_end_up_as_one_are_told(monkeypatch):
    "What `accelerate launch --num_processes 2` sets where it finds no GPU."
    for name, value in {
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_MIXED_PRECISION": "no",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="can't be shared: start them with torchrun"):
        distributed.make_accelerator("cpu")
    monkeypatch.delenv("MASTER_ADDR")
    assert distributed.make_accelerator("cpu").num_processes == 1


def test_whole_numbers_of_any_type_train(store):
    _, history = train_world_model(
        preset("tiny", **TINY), store, TRAIN, HELD_OUT, steps=np.int16(2), seed=np.uint8(3)
    )
    assert len(history) == 2
    for name, wrong in (
        ("steps", 2.5),
        ("steps", 0),
        ("steps", True),
        ("seed", -1),
        ("seed", None),
        ("minutes", math.inf),
        ("minutes", "x"),
    ):
        with pytest.raises(ValueError, match=f"{name}="):
            train_world_model(preset("tiny", **TINY), store, TRAIN, HELD_OUT, **{name: wrong})


def spoil(monkeypatch, at, value=float("inf")):
    "One element of a gradient, in the backward passes `at`."
    real, count = trainer._backward, itertools.count(1)

    def backward(engine, model, *words):
        numbers = real(engine, model, *words)
        if next(count) in at:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return numbers

    monkeypatch.setattr(trainer, "_backward", backward)


def finite(folder):
    return all(
        torch.isfinite(v).all()
        for f in Path(folder).rglob("*.safetensors")
        for v in load_file(f).values()
        if v.is_floating_point()
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(store, tmp_path, monkeypatch, value):
    net = torch.nn.Linear(2, 2)
    optimizer, before = (
        optim.make_optimizer({net: 1.0}, 0.1, 0.1),
        [p.detach().clone() for p in net.parameters()],
    )
    net(torch.ones(1, 2)).sum().backward()
    net.weight.grad[0, 0] = value
    assert not math.isfinite(optim.descend(0.5, optimizer, 0.1, 1.0))
    assert (
        all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
        and not optimizer.state
        and net.weight.grad is None
    )
    spoil(monkeypatch, {3, 4, 9})
    model, history = train_world_model(
        preset("tiny", **TINY, steps=10, save_every=1, evaluate_every=5),
        store,
        TRAIN,
        HELD_OUT,
        folder=tmp_path,
    )
    assert (
        [r["step"] for r in history if r.get("skipped")] == [3, 4, 9]
        and len(history) == 10
        and finite(tmp_path)
    )
    train_decoders(model, store, TRAIN, steps=3, folder=tmp_path)
    assert finite(tmp_path)


def test_steps_in_a_row_that_are_not_finite_end_the_run_and_it_can_go_on(
    store, tmp_path, monkeypatch, capsys
):
    config = preset("tiny", **TINY, steps=12, save_every=2, evaluate_every=6)
    with monkeypatch.context() as m:
        spoil(m, set(range(6, 99)))
        with pytest.raises(
            FloatingPointError,
            match="step 10: the gradient's norm is inf, for the 5th time in a row: lower the lr, .*the same command goes on",
        ):
            train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path)
    assert finite(tmp_path) and "this step changes nothing" in capsys.readouterr().out
    _, history = train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path)
    assert [r["step"] for r in history] == list(range(1, 13))


def test_a_loss_that_is_not_finite_changes_nothing(store, tmp_path, monkeypatch):
    real, count = trainer._backward, itertools.count(1)

    def backward(*words):
        numbers = real(*words)
        return numbers | {"loss": math.nan} if next(count) == 2 else numbers

    monkeypatch.setattr(trainer, "_backward", backward)
    _, history = train_world_model(
        preset("tiny", **TINY, steps=4, evaluate_every=4), store, TRAIN, HELD_OUT, folder=tmp_path
    )
    assert (
        [r["step"] for r in history] == [1, 3, 4]
        and all(math.isfinite(r["loss"]) for r in history)
        and finite(tmp_path)
    )


def test_no_checkpoint_holds_a_number_that_is_not_finite(tmp_path):
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="step 3: a weight is not finite"):
        checkpoints.save_checkpoint(
            tmp_path, 3, net, optim.make_optimizer({net: 1.0}, 1.0, 0.0), {}
        )
    assert not any(tmp_path.iterdir())


def stopped(store, folder, config, at, monkeypatch, minutes=None):
    "A training that is interrupted in a step."
    real, count = optim.descend, itertools.count(1)

    def descend(*words):
        if next(count) == at:
            raise KeyboardInterrupt
        return real(*words)

    with monkeypatch.context() as m:
        m.setattr(trainer, "descend", descend)
        with pytest.raises(KeyboardInterrupt):
            train_world_model(config, store, TRAIN, HELD_OUT, folder=folder, minutes=minutes)


@pytest.mark.parametrize("fault", ["nan", "cut short", "no about"])
def test_a_checkpoint_that_is_not_sound_is_passed_over(store, tmp_path, monkeypatch, fault, capsys):
    config = preset("tiny", **TINY, steps=8, save_every=2, evaluate_every=4)
    train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path / "whole")
    stopped(store, tmp_path / "run", config, 8, monkeypatch)
    newest = sorted((tmp_path / "run/world_model_checkpoints").glob("step_*"))[-1]
    file = newest / "rank_00000.safetensors"
    if fault == "nan":
        tensors = load_file(file)
        next(v for k, v in tensors.items() if k.startswith("module/")).view(-1)[0] = math.nan
        save_file(tensors, file)
    elif fault == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (newest / "about.json").write_text("{")
    train_world_model(config, store, TRAIN, HELD_OUT, folder=tmp_path / "run")
    assert (
        fault == "no about"
        or f"{newest}: not readable or not finite; going back" in capsys.readouterr().out
    )
    same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_same_run_started_twice_is_told(store, few, tmp_path, capsys):
    hold = checkpoints._Hold(tmp_path / "out")
    with pytest.raises(checkpoints.InUseError, match="a run is at work here already .process"):
        train_world_model(preset("tiny", **TINY), store, TRAIN, HELD_OUT, folder=tmp_path / "out")
    words = command(few, tmp_path / "out")
    refused(capsys, words, f"a run is at work here already .process {os.getpid()} on ")
    hold.release()
    train_world_model(
        preset("tiny", **TINY), store, TRAIN, HELD_OUT, steps=1, folder=tmp_path / "out"
    )
    assert not (tmp_path / "out/.running").exists()


def test_the_same_run_started_twice_is_told_on_a_disk_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_flock", lambda file: None)
    hold = checkpoints._Hold(tmp_path)
    with pytest.raises(checkpoints.InUseError):
        checkpoints._Hold(tmp_path)
    hold.release()
    mine = checkpoints._this_process()
    gone = FORKS.Process(target=int)
    gone.start(), gone.join()
    (tmp_path / ".running").write_text(
        json.dumps(mine | {"pid": gone.pid})
    )  # killed, and left its mark
    checkpoints._Hold(tmp_path).release()
    (tmp_path / ".running").write_text(
        json.dumps(mine | {"started": "1"})
    )  # its number is another process's now
    checkpoints._Hold(tmp_path).release()


def test_a_run_on_another_machine_is_told_while_its_mark_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints._Hold, "beat", 0.1)
    monkeypatch.setattr(checkpoints._Hold, "watch", 20.0)
    real = checkpoints._this_process
    monkeypatch.setattr(
        checkpoints, "_flock", lambda file: True
    )  # a lock that holds on one machine alone
    with monkeypatch.context() as m:
        m.setattr(
            checkpoints, "_this_process", lambda: real() | {"host": "elsewhere", "boot": "another"}
        )
        hold = checkpoints._Hold(tmp_path)
    with pytest.raises(checkpoints.InUseError, match="on elsewhere"):
        checkpoints._Hold(tmp_path)
    hold.stop.set(), hold.thread.join()
    monkeypatch.setattr(checkpoints._Hold, "watch", 0.6)
    checkpoints._Hold(tmp_path).release()  # it moves no longer


def interrupt(monkeypatch, module, name):
    "A function of a module is stopped when it is called."

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, stop)
=======
    words = ["train", "--data", few, "--out", tmp_path / "out", "--device", "cuda"]
    refused(capsys, words, "torch sees no GPU here: take --device cpu")


def test_the_same_run_started_twice_is_told(few, tmp_path, capsys):
    lock = checkpoints._FolderLock(tmp_path / "out")
    words = command(few, tmp_path / "out")
    refused(capsys, words, f"a run is at work here already .process {os.getpid()} on ")
    lock.release()
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2


def test_a_run_goes_on_with_the_recordings_it_began_with(few, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "out", command(few, tmp_path / "out")
    with monkeypatch.context() as m:
        interrupt(m, pipeline, "_train_decoders")
        assert main(words) == 1
        assert "stopped; the same command goes on" in capsys.readouterr().err
<<<<<<< HEAD
    assert (out / "world_model.done").is_file() and not (out / "training.json").exists()
    shutil.copytree(
        few / TRAIN[0], few / "later"
    )  # a recording is added, and the sides are dealt anew
    (few / "later/clip.json").write_text(
        (few / TRAIN[0] / "clip.json").read_text().replace(TRAIN[0], "later")
    )
    (few / "split.json").write_text(
        json.dumps({"train": ["later"], "validation": HELD_OUT, "test": TRAIN})
    )
    assert main(words) == 0
    told = json.loads((out / "training.json").read_text())
    assert (told["train"], told["validation"]) == (
        TRAIN,
        HELD_OUT,
    ) and "that the run began with" in capsys.readouterr().out
=======
    assert (out / "world_model.done").is_file()
    assert not (out / "training.json").exists()

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
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2


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
            interrupt(m, pipeline, "_train_decoders")
        assert main(words) == (0 if when.startswith("all done") else 1)
    if when.endswith("version"):
        (out / "run.json").unlink()
        (out / "world_model.done").unlink()
<<<<<<< HEAD
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    refused(
        capsys,
        [*words, "--seed", "7"],
        "holds another run .seed was 0, is 7.; run with those settings, or give another folder",
    )
    refused(
        capsys,
        [*words, "--train.batch", "8", "--train.lr", "1e-5"],
        "train.batch was 4, is 8; train.lr was 0.0008, is 1e-05",
    )
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert main(words) == 0  # its own settings go on, and are what training.json tells
    assert json.loads((out / "training.json").read_text())["seed"] == 0


def test_accumulate_is_part_of_what_a_run_is(store, tmp_path, monkeypatch):
    config = preset("tiny", **TINY, floor=0.0, steps=6, save_every=2, evaluate_every=6)
    stopped(store, tmp_path, config, 5, monkeypatch)
    with pytest.raises(ValueError, match="train.accumulate was 1, is 2"):
        train_world_model(
            dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=2)),
            store,
            TRAIN,
            HELD_OUT,
            folder=tmp_path,
        )


@pytest.mark.parametrize(
    "changes,named",
    [
        ({}, "floor=0.3"),
        ({"anti_collapse": "sigreg"}, "sigreg"),
        ({"anti_collapse": "vicreg", "floor": 0.0}, "vicreg"),
    ],
)
def test_parts_of_a_batch_with_a_loss_on_its_spread_are_refused(store, changes, named):
    with pytest.raises(
        ValueError, match=f"accumulate=2 .*{named} looks at the spread of the whole batch"
    ):
        train_world_model(preset("tiny", **TINY, accumulate=2, **changes), store, TRAIN, HELD_OUT)


def test_other_recordings_under_the_same_names_are_another_run(store, tmp_path, monkeypatch):
    config = preset("tiny", **TINY, steps=6, save_every=2, evaluate_every=6)
    stopped(store, tmp_path, config, 5, monkeypatch)
    about = store.about | {
        TRAIN[0]: store.about[TRAIN[0]] | {"source": {"mp4": {"sha256": "other"}}}
    }
    with pytest.raises(ValueError, match="contents was"):
        train_world_model(config, ClipStore(store.folders, about), TRAIN, HELD_OUT, folder=tmp_path)


def test_killed_between_the_last_step_and_the_final_files_no_step_is_done_again(
    store, tmp_path, monkeypatch
):
    model, _ = train_world_model(
        preset("tiny", **TINY, steps=2, evaluate_every=2), store, TRAIN, HELD_OUT
    )
    with monkeypatch.context() as m:
        interrupt(m, decoder_training, "_save_on_main")
        with pytest.raises(KeyboardInterrupt):
            train_decoders(model, store, TRAIN, steps=5, folder=tmp_path)
    interrupt(monkeypatch, trainer, "descend")  # no step is taken any more
    _, _, history = train_decoders(model, store, TRAIN, steps=5, folder=tmp_path)
    assert (
        len(history) == 5
        and set(weights(tmp_path)) == {"dit.safetensors", "head.safetensors"}
        and not list(tmp_path.glob("*_checkpoints"))
    )
=======
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    message = "holds another run .seed was 0, is 7.; run with those settings, or give another"
    refused(capsys, [*words, "--seed", "7"], message + " folder")
    message = "train.batch was 4, is 8; train.lr was 0.0008, is 1e-05"
    refused(capsys, [*words, "--train.batch", "8", "--train.lr", "1e-5"], message)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert main(words) == 0  # its own settings go on, and are what training.json tells
    assert read_summary(out)["seed"] == 0
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2


def test_the_same_command_after_a_collapse_alarm_says_so_and_goes_on_only_when_told_to(
    few, tmp_path, capsys
):
    words = command(few, tmp_path / "out", rank_alarm=2.0, steps=6)
<<<<<<< HEAD
    refused(capsys, words, "step 2: the latent is collapsing")
    refused(
        capsys,
        words,
        "was stopped at step 2: the latent is collapsing.*To go on all the same: --go-on",
    )
    assert main([*words, "--go-on"]) == 0
    assert json.loads((tmp_path / "out/training.json").read_text())["steps"] == 6


def test_time_is_counted_over_a_kill(store, tmp_path, monkeypatch):
    "The time that a run spent before it was killed is gone, whether a checkpoint was left or not."
    config = preset("tiny", **TINY, steps=99_000, evaluate_every=99_000, save_every=99_000)
    stopped(store, tmp_path, config, 6, monkeypatch, minutes=5)
    stopped(store, tmp_path, config, 4, monkeypatch, minutes=5)
    rows = [json.loads(line) for line in (tmp_path / "world_model.jsonl").read_text().splitlines()]
    before = json.loads((tmp_path / "world_model_checkpoints/spent.json").read_text())["seconds"]
    assert 0 < before < rows[0]["elapsed"] and [r["step"] for r in rows] == [1, 2, 3]
    assert [r["elapsed"] for r in rows] == sorted(r["elapsed"] for r in rows)
    used, asked = [], trainer._Clock.fits
    monkeypatch.setattr(
        trainer._Clock,
        "fits",
        lambda self, *words: used.append(self.spent()) or asked(self, *words),
    )
    train_world_model(
        config, store, TRAIN, HELD_OUT, folder=tmp_path, minutes=rows[-1]["elapsed"] / 60
    )  # all is spent: it ends
    assert used[0] > rows[-1]["elapsed"]


def test_the_learning_rate_does_not_jump_when_the_end_is_moved():
    schedule, rates = optim.Schedule(1000, 1000), []
    ends = {50: 200, 60: 150, 70: 5000, 400: 420}
    for step in range(10_000):
        if step >= schedule.steps:
            break
        rates.append(optim.lr_at(schedule.position(step), schedule.plan, 1.0, 0.05))
        if step + 1 in ends:
            schedule.move(step + 1, ends[step + 1])
    assert len(rates) == 420 and rates[-1] < 0.02
    assert all(
        b > 0.9 * a and b < 1.1 * a + 0.02 for a, b in zip(rates, rates[1:-15])
    )  # each is the next of the one before
    whole = optim.Schedule(7, 7)
    assert [whole.position(s) for s in range(7)] == list(
        range(7)
    )  # a run without a time limit has its own steps


@pytest.mark.parametrize("folder", [True, False])
def test_the_best_model_is_given_with_a_folder_and_without(store, tmp_path, monkeypatch, folder):
    monkeypatch.setattr(
        world_model_training, "error_over_copying", lambda row: row["step"]
    )  # the first evaluation is the best
    config = preset("tiny", **TINY, steps=4, evaluate_every=2, lr=0.1)
    model, history = train_world_model(
        config, store, TRAIN, HELD_OUT, folder=tmp_path if folder else None
    )
    errors = world_model_training.validate(
        model, *loader._to_look_at(store, HELD_OUT, 5, 8, 16, 0)
    )[0]["model"]
    assert np.allclose(errors, history[1]["model"], rtol=1e-3) and not np.allclose(
        errors, history[3]["model"], rtol=1e-2
    )


def test_equal_frames_in_validation_are_told_by_name(store):
    class Still(ClipStore):
        def read(self, picks, *words, **more):
            frames, actions = super().read(picks, *words, **more)
            return torch.zeros_like(frames), actions

    still = Still(store.folders, store.about)
    with pytest.raises(
        ValueError,
        match=f"validation recordings {HELD_OUT[0]}: all windows begin with the same picture",
    ):
        train_world_model(preset("tiny", **TINY), still, TRAIN, HELD_OUT)
    assert error_over_copying({"model": [0.1, 0.1], "copy_last": [0.0, 0.0]}) == math.inf
    assert math.isnan(error_over_copying({"model": [0.1, math.inf], "copy_last": [0.1, 0.1]}))


@pytest.mark.parametrize("broken", ["import", "made", "used"])
def test_a_broken_tensorboard_does_not_end_a_training(store, tmp_path, monkeypatch, capsys, broken):
    def fail(*_, **__):
        raise RuntimeError("of another build")

    class Module:
        def __getattr__(self, name):
            if broken == "import" or name != "SummaryWriter":
                fail()
            return (
                fail
                if broken == "made"
                else lambda *_, **__: type(
                    "Board", (), dict.fromkeys(("add_scalar", "add_image", "close"), fail)
                )()
            )

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Module())
    train_world_model(
        preset("tiny", **TINY, steps=2, evaluate_every=2), store, TRAIN, HELD_OUT, folder=tmp_path
    )
    assert (
        capsys.readouterr().out.count(
            "TensorBoard does not work here (RuntimeError: of another build); the log goes on"
        )
        == 1
    )
    assert len(losses(tmp_path)) == 2


def test_few_windows_to_validate_on_serve_from_shards_as_from_a_store(shards, store):
    "Fewer than are looked at: from a store some are drawn twice."
    few = ShardWindows(shards, 25, 16, 128, 0, HELD_OUT, even=False, rank=0, world=1)
    frames, actions = loader._to_look_at(shards, HELD_OUT, 25, 8, 5000, 0)
    assert len(frames) == len(actions) == 5000 > sum(map(len, few.starts))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_position_in_shards_is_carried_through_epochs(shards, world):
    "At any step the reader gives what it gives without a stop."
    words = lambda step, rank: (shards, TRAIN, 25, 2, 40 * world, 0, step, rank, world)
    whole = [x[1] for x in itertools.islice(loader._windows(*words(0, world - 1)), 14)]
    for step in (1, 3, 6, 9, 13):
        assert torch.equal(next(loader._windows(*words(step, world - 1)))[1], whole[step])


def test_eight_ranks_see_nearly_every_window_in_an_epoch():
    "Dealt out by turns, segments left a rank with far fewer windows than another, and every rank gives as few."
    rng = np.random.default_rng(0)
    for _ in range(5):
        counts, order = rng.integers(0, 201, 200).tolist(), rng.permutation(200).tolist()
        dealt = deal_evenly(order, counts, 8)
        shares = [sum(counts[s] for s in mine) for mine in dealt]
        assert sorted(sum(dealt, [])) == sorted(order) and 8 * min(shares) > 0.98 * sum(counts)
        assert all(
            mine == sorted(mine, key=order.index) for mine in dealt
        )  # read in the epoch's order


def test_an_epoch_without_a_batch_is_an_error(shards):
    with pytest.raises(
        shards.ShardError, match="no batch of 5000 for each of 2 readers; take a smaller batch"
    ):
        next(loader._windows(shards, TRAIN, 25, 2, 10_000, 0, 0, 0, 2))


def test_every_parameter_that_learns_has_a_task(store):
    "Without one, several processes end at the second step."
    for changes in (
        {},
        {"inverse": 0.1, "tilt": 0.0},
        {"inverse": 0.0},
        {"rollout": 1},
        {"kind": "adaln"},
        {"anti_collapse": "sigreg", "slices": 8},
        {"drop_latent": 0.0},
    ):
        seen = []

        def look(job, *_):
            batch = next(job.batches(0, 0, 1))
            job.module(*batch)["loss"].backward()
            seen.extend(
                n for n, p in job.module.named_parameters() if p.requires_grad and p.grad is None
            )
            raise KeyboardInterrupt

        config = preset("tiny", **TINY, **changes)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(world_model_training, "fit", look)
            m.setattr(decoder_training, "fit", look)
            with pytest.raises(KeyboardInterrupt):
                train_world_model(config, store, TRAIN, HELD_OUT)
            with pytest.raises(KeyboardInterrupt):
                train_decoders(WorldModel(config), store, TRAIN)
        assert not seen, (changes, seen)


def test_gradients_of_several_processes_are_kept_once():
    assert distributed.make_accelerator("cpu").ddp_handler.gradient_as_bucket_view
=======
    message = "step 2: the latent is collapsing"
    refused(capsys, words, message)
    refused(capsys, words, f"was stopped at {message}.*To go on all the same: --go-on")
    assert main([*words, "--go-on"]) == 0
    assert read_summary(tmp_path / "out")["steps"] == 6
>>>>>>> d5389816651e3593dbc3315416d642030dc712e2
