"""The world model's training: collapse is stopped, the best model is kept, the log says why."""

import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import (
    DATA,
    HELD_OUT,
    SMALL,
    TINY,
    TRAIN,
    note_rollouts,
    read_log,
    shards_fixture,  # noqa: F401
    store_fixture,  # noqa: F401
    train_small,
    weights,
)

from minecraft_jepa.config import preset
from minecraft_jepa.data import loader
from minecraft_jepa.data.clip_store import ClipStore
from minecraft_jepa.data.splits import seen_recordings
from minecraft_jepa.model.collapse import ANTI_COLLAPSE
from minecraft_jepa.model.world_model import WorldModel
from minecraft_jepa.training import train_decoders as decoder_training
from minecraft_jepa.training import train_world_model as world_model_training
from minecraft_jepa.training.checkpoints import find_checkpoint
from minecraft_jepa.training.model_card import write_model_card
from minecraft_jepa.training.pipeline import run_training, split_stages
from minecraft_jepa.training.train_decoders import train_decoders
from minecraft_jepa.training.train_world_model import train_world_model
from minecraft_jepa.training.trainer import CollapseError
from minecraft_jepa.training.validation import error_ratio_to_copy


def train(data, folder=None, start=None, seed=0, **changes):
    """Train a world model with settings `SMALL | changes`."""
    config = preset("tiny", **SMALL | changes)
    return train_world_model(
        config, data, TRAIN, HELD_OUT, seed=seed, folder=folder, init_from=start
    )


def test_chunks_of_a_batch_give_the_same_step_as_the_batch(store):
    # The spread of a chunk is not that of the batch, so the variance hinge is left out.
    changes = {"steps": 3, "evaluate_every": 3, "variance_weight": 0.0}
    _, rows = train(store, **changes)
    _, rows_of_chunks = train(store, gradient_accumulation_steps=4, **changes)
    losses = [[row["loss"] for row in history] for history in (rows, rows_of_chunks)]
    assert np.allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({}, "variance_weight=0.3"),
        ({"anti_collapse": "sigreg"}, "sigreg"),
        ({"anti_collapse": "vicreg", "variance_weight": 0.0}, "vicreg"),
    ],
)
def test_chunks_of_a_batch_with_a_loss_on_its_spread_are_refused(store, changes, setting):
    message = f"gradient_accumulation_steps=2 .*{setting} looks at the spread of the whole batch"
    with pytest.raises(ValueError, match=message):
        train_small(store, gradient_accumulation_steps=2, **changes)


def test_collapse_stops_the_run_with_advice(store, tmp_path):
    message = r"step 4: the latent is collapsing: effective rank .* Try a smaller lr.*sigreg"
    with pytest.raises(CollapseError, match=message):
        train(store, tmp_path, steps=20, evaluate_every=4, min_rank_fraction=2.0)
    assert find_checkpoint(tmp_path / "world_model_checkpoints", {})["step"] == 4


def test_constant_encoder_is_kept_from_collapse_by_each_loss(store):
    """A few steps at a large rate empty the latents; each of these losses keeps them apart."""
    variants = {
        "none": {"anti_collapse": "vicreg", "vicreg_std_weight": 0.0, "vicreg_cov_weight": 0.0},
        "sigreg": {"anti_collapse": "sigreg", "sigreg_num_slices": 128, "sigreg_weight": 1.0},
        "vicreg": {"anti_collapse": "vicreg"},
        "variance hinge": {
            "variance_weight": 1.0,
            "ema_momentum_start": 0.0,
            "ema_momentum_end": 0.0,
        },
    }
    shared = {"steps": 60, "evaluate_every": 60, "lr": 3e-3, "encoder_lr_scale": 1.0}
    shared |= {"min_rank_fraction": 0.0, "min_latent_std": 0.0}
    std = {}
    for name, changes in variants.items():
        _, history = train(store, **shared, **changes)
        std[name] = history[-1]["std"]
    without = std.pop("none")
    assert without < 0.7 * min(std.values()), (without, std)


def test_a_run_may_start_from_the_weights_of_another(store, tmp_path):
    first_folder = tmp_path / "first"
    changes = {"steps": 2, "evaluate_every": 2, "min_rank_fraction": 0.0}
    # Without the inverse-dynamics head that the next one has.
    first, _ = train(store, first_folder, inverse_dynamics_weight=0.0, **changes)
    started, _ = train(store, tmp_path / "started", first_folder, lr=1e-12, **changes)
    random, _ = train(store, tmp_path / "random", seed=1, lr=1e-12, **changes)
    frames = torch.randint(0, 256, (2, *first.config.frame.shape), dtype=torch.uint8)
    z = first.encode(frames)
    assert torch.allclose(started.encode(frames), z, atol=1e-4)
    assert not torch.allclose(random.encode(frames), z, atol=1e-2)
    with pytest.raises(ValueError, match="no such folder"):
        train(store, start=tmp_path / "nowhere", **changes)


def test_a_start_with_another_predictor_is_another_run(store, tmp_path, monkeypatch):
    starts = []

    def note_start(task, *_):
        starts.append(task.run_identity["start"])
        raise KeyboardInterrupt

    monkeypatch.setattr(world_model_training, "fit", note_start)
    model = WorldModel(preset("tiny", **SMALL))
    for change in (0, 0, 1):
        with torch.no_grad():
            model.predictor.out.weight += change
        model.save_pretrained(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            train(store, start=tmp_path)
    assert starts[0] == starts[1] != starts[2]


def test_a_frozen_encoder_keeps_its_latents_while_the_prediction_improves(store, tmp_path):
    start = tmp_path / "start"
    changes = {"evaluate_every": 20, "min_rank_fraction": 0.0}
    first, _ = train(store, start, steps=20, **changes)
    frozen, history = train(store, start=start, steps=60, encoder_lr_scale=0, **changes)
    before = first.state_dict()
    for name, tensor in frozen.state_dict().items():
        if name.startswith(("encoder.", "target_encoder.", "inverse_dynamics.")):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(frozen.predictor.out.weight, first.predictor.out.weight)
    ratios = [error_ratio_to_copy(row) for row in history if "model" in row]
    assert min(ratios[1:]) < ratios[0]
    copy_errors = {tuple(row["copy_last"]) for row in history if "model" in row}
    assert len(copy_errors) == 1  # the latents stay what they are
    with pytest.raises(ValueError, match="freezes the encoder, and its weights are random"):
        train(store, steps=2, encoder_lr_scale=0)


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for path in itertools.chain.from_iterable(DATA.glob(f"{n}.*") for n in [*TRAIN, *HELD_OUT]):
        (folder / path.name).symlink_to(path)
    split = {"train": TRAIN, "validation": HELD_OUT, "test": []}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def test_with_a_frozen_encoder_the_decoders_are_taken_over(recordings, tmp_path, capsys):
    config = preset("tiny", **TINY | {"steps": 2, "evaluate_every": 2, "decoder_steps": 2})
    frozen = replace(config, train=replace(config.train, encoder_lr_scale=0.0, lr=1e-3))
    run_training(config, recordings, tmp_path / "first")
    report = run_training(frozen, recordings, tmp_path / "second", init_from=tmp_path / "first")
    assert report["decoder_steps"] == 0
    assert report["start"] == json.loads((tmp_path / "first" / "training.json").read_text())
    assert set(seen_recordings(report)) == {*TRAIN, *HELD_OUT}
    write_model_card(tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"started from a run of 2 steps on {len(TRAIN)} recordings" in card
    assert "it started from were made by" not in card  # nobody said how
    report["start"]["command"] = "minecraft-jepa train OPTIONS"
    (tmp_path / "second" / "training.json").write_text(json.dumps(report))
    write_model_card(tmp_path / "second")
    assert "minecraft-jepa train OPTIONS" in (tmp_path / "second" / "README.md").read_text()
    for file in ("head.safetensors", "dit.safetensors"):
        tensors = [load_file(tmp_path / run / file) for run in ("first", "second")]
        assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert WorldModel.from_pretrained(tmp_path / "second").config == frozen
    (tmp_path / "first" / "dit.safetensors").unlink()
    assert "to validate on" not in capsys.readouterr().err
    split = {"train": HELD_OUT, "validation": TRAIN, "test": []}
    (recordings / "split.json").write_text(json.dumps(split))
    report = run_training(frozen, recordings, tmp_path / "third", init_from=tmp_path / "first")
    assert report["decoder_steps"] == 2
    said = f"trained on {len(TRAIN)} of the {len(TRAIN)} recordings to validate on ({TRAIN[0]}"
    assert said in capsys.readouterr().err


def test_two_stages_are_two_runs(recordings, tmp_path, capsys, monkeypatch):
    few = {"steps": 2, "evaluate_every": 1, "decoder_steps": 2, "frozen_steps": 3}
    config = preset("tiny", **TINY | few)
    first, second = split_stages(config)
    assert (first.train.steps, first.train.frozen_steps) == (2, 0)
    assert (second.train.steps, second.train.lr) == (3, config.train.frozen_lr)
    assert second.train.freezes_encoder and not first.train.freezes_encoder
    report = run_training(config, recordings, tmp_path / "both")
    assert (report["steps"], report["decoder_steps"]) == (3, 0)
    assert (report["start"]["steps"], report["start"]["decoder_steps"]) == (2, 2)
    run_training(first, recordings, tmp_path / "one")
    run_training(second, recordings, tmp_path / "two", init_from=tmp_path / "one")
    with pytest.raises(ValueError, match=r"start was '\.\./one', is '\.\./both'"):
        run_training(second, recordings, tmp_path / "two", init_from=tmp_path / "both")
    for file in ("world_model.safetensors", "head.safetensors", "dit.safetensors"):
        tensors = [load_file(tmp_path / run / file) for run in ("both", "two")]
        assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    longer = replace(config, train=replace(config.train, steps=4))
    with pytest.raises(ValueError, match=r"first_stage holds another run .*steps was 2, is 4"):
        run_training(longer, recordings, tmp_path / "both")  # a finished run tells it too
    shutil.rmtree(tmp_path / "both" / "first_stage")  # a finished run does not need it
    assert run_training(config, recordings, tmp_path / "both") == report
    assert "trained already" in capsys.readouterr().out
    (tmp_path / "both").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert run_training(config, recordings, "moved") == report  # moved, and spelt otherwise
    path = tmp_path / "moved" / "run.json"
    run = json.loads(path.read_text())
    assert run["settings"]["start"] == "first_stage"
    run["settings"]["start"] = "somewhere/both/first_stage"  # as the version before wrote it
    path.write_text(json.dumps(run))
    assert run_training(config, recordings, "moved") == report
    (tmp_path / "moved").rename(tmp_path / "both")
    assert not (tmp_path / "both" / "first_stage").exists()
    other = replace(config, train=replace(config.train, frozen_lr=1e-4))
    assert split_stages(other)[0] == first  # its first stage can be used
    with pytest.raises(ValueError, match="holds another run"):  # before a first stage of hours
        run_training(other, recordings, tmp_path / "both")


def test_trains_from_shards(shards):
    _, history = train(shards, steps=4, evaluate_every=4)
    assert len(history) == 4
    assert history[-1]["loss"] < 1


def test_log_and_pictures_are_left(store, tmp_path):
    model, history = train(store, tmp_path, steps=6, evaluate_every=3)
    rows = read_log(tmp_path)
    assert rows == history
    assert {"step", "loss", "lr", "gradient_norm", "waited", "seconds"} <= rows[0].keys()
    assert {"rank", "std", "correlation"} <= rows[2].keys()
    assert list((tmp_path / "tensorboard/world_model").glob("events*"))
    assert Image.open(tmp_path / "world_model.png").size == (8 * 80, 2 * 48)
    train_decoders(model, store, TRAIN, steps=3, folder=tmp_path)
    assert Image.open(tmp_path / "decoders.png").size == (6 * 80, 3 * 48)


def test_log_tells_what_shapes_the_encoder(store):
    _, history = train(store, steps=4, evaluate_every=2)
    gradients = [row["encoder_gradients"] for row in history if "encoder_gradients" in row]
    assert len(gradients) == 2
    for norms in gradients:
        assert set(norms) == {"prediction", "anti_collapse", "inverse_dynamics", "pitch"}
        assert all(0 <= norm < math.inf for norm in norms.values())
        assert norms["pitch"] > 0


def test_last_third_feeds_more_ticks_back(store, monkeypatch):
    rollouts = note_rollouts(monkeypatch, WorldModel)
    train_small(store, steps=6, evaluate_every=6, rollout_steps=2, rollout_steps_late=5)
    assert rollouts == [2, 2, 2, 2, 5, 5]


def test_best_model_ships_the_ema_target_encoder(store, tmp_path):
    model, _ = train(store, tmp_path, steps=6, evaluate_every=3)
    pairs = zip(model.encoder.parameters(), model.target_encoder.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    names = weights(tmp_path)["world_model.safetensors"]
    assert not [name for name in names if name.startswith("target_encoder.")]


@pytest.mark.parametrize("with_folder", [True, False])
def test_the_best_model_is_given_with_a_folder_and_without(
    store, tmp_path, monkeypatch, with_folder
):
    # The first evaluation is the best.
    monkeypatch.setattr(world_model_training, "error_ratio_to_copy", lambda row: row["step"])
    folder = tmp_path if with_folder else None
    model, history = train_small(store, folder, steps=4, evaluate_every=2, lr=0.1)
    windows = loader.fixed_windows(store, HELD_OUT, 5, 8, 16, 0)
    errors = world_model_training.validate(model, *windows)[0]["model"]
    assert np.allclose(errors, history[1]["model"], rtol=1e-3)
    assert not np.allclose(errors, history[3]["model"], rtol=1e-2)


@pytest.mark.parametrize("with_folder", [True, False])
def test_latents_that_are_not_finite_end_the_run(store, tmp_path, monkeypatch, with_folder):
    def break_weights(model, momentum):
        for parameter in [*model.encoder.parameters(), *model.target_encoder.parameters()]:
            parameter.data.fill_(math.nan)

    monkeypatch.setattr(WorldModel, "update_target_encoder", break_weights)
    folder = tmp_path if with_folder else None
    with pytest.raises(FloatingPointError, match="lower the lr"):
        train_small(store, folder, steps=3, evaluate_every=1, min_latent_std=0.1)


def test_best_is_not_the_one_whose_latents_are_all_alike():
    """At the first evaluations of a run every error is tiny, that of copying too."""
    early = {"model": [0.01, 0.023], "copy_last": [0.012, 0.027]}
    late = {"model": [0.03, 0.072], "copy_last": [0.07, 0.126]}
    assert error_ratio_to_copy(late) < error_ratio_to_copy(early)


def test_error_relative_to_copying_where_it_is_not_defined():
    assert error_ratio_to_copy({"model": [0.1, 0.1], "copy_last": [0.0, 0.0]}) == math.inf
    assert math.isnan(error_ratio_to_copy({"model": [0.1, math.inf], "copy_last": [0.1, 0.1]}))


def test_equal_frames_in_validation_are_told_by_name(store):
    class BlackStore(ClipStore):
        def read_windows(self, *args, **kwargs):
            frames, actions = super().read_windows(*args, **kwargs)
            return torch.zeros_like(frames), actions

    black_store = BlackStore(store.folders, store.metadata)
    message = f"validation recordings {HELD_OUT[0]}: all windows begin with the same picture"
    with pytest.raises(ValueError, match=message):
        train_small(black_store)


def test_recordings_in_training_and_validation_are_refused(store):
    message = f"recordings in both training and validation: {HELD_OUT[0]}"
    with pytest.raises(ValueError, match=message):
        train_world_model(preset("tiny"), store, [*TRAIN, *HELD_OUT], HELD_OUT)


def test_whole_numbers_of_any_type_train(store):
    config = preset("tiny", **TINY)
    _, history = train_world_model(
        config, store, TRAIN, HELD_OUT, steps=np.int16(2), seed=np.uint8(3)
    )
    assert len(history) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 2.5),
        ("steps", 0),
        ("steps", True),
        ("seed", -1),
        ("seed", None),
        ("max_minutes", math.inf),
        ("max_minutes", "x"),
    ],
)
def test_numbers_that_cannot_be_are_refused(store, name, value):
    with pytest.raises(ValueError, match=f"{name.removeprefix('max_')}="):
        train_world_model(preset("tiny", **TINY), store, TRAIN, HELD_OUT, **{name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"inverse_dynamics_weight": 0.1, "pitch_weight": 0.0},
        {"inverse_dynamics_weight": 0.0},
        {"rollout_steps": 1},
        {"kind": "adaln"},
        {"anti_collapse": "sigreg", "sigreg_num_slices": 8},
        {"latent_drop_prob": 0.0},
    ],
    ids=json.dumps,
)
def test_every_parameter_that_learns_has_a_task(store, monkeypatch, changes):
    """Without one, several processes end at the second step."""
    without_gradient, trained = [], []

    def backward_once(task, *_):
        task.module(*next(task.make_batches(0, 0, 1)))["loss"].backward()
        parameters = task.module.named_parameters()
        without_gradient.extend(n for n, p in parameters if p.requires_grad and p.grad is None)
        trained.append(task.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(world_model_training, "fit", backward_once)
    monkeypatch.setattr(decoder_training, "fit", backward_once)
    config = preset("tiny", **TINY | changes)
    with pytest.raises(KeyboardInterrupt):
        train_world_model(config, store, TRAIN, HELD_OUT)
    with pytest.raises(KeyboardInterrupt):
        train_decoders(WorldModel(config), store, TRAIN)
    assert trained == ["world_model", "decoders"]
    assert not without_gradient


def test_every_kind_with_an_ema_target_has_one(store, monkeypatch):
    """The kind "ema" was compared by name, so any other kind's target was the encoder itself."""
    momenta, update = [], WorldModel.update_target_encoder

    def record(model, momentum):
        momenta.append(momentum)
        update(model, momentum)

    monkeypatch.setattr(WorldModel, "update_target_encoder", record)
    vicreg = ANTI_COLLAPSE["vicreg"]
    for uses_ema in (True, False):
        momenta.clear()
        monkeypatch.setitem(ANTI_COLLAPSE, "vicreg", replace(vicreg, uses_ema=uses_ema))
        train(store, steps=2, evaluate_every=2, anti_collapse="vicreg")
        assert momenta and all((momentum > 0.8) == uses_ema for momentum in momenta)


def test_a_new_network_of_the_world_model_is_trained():
    """Networks were listed by hand, so the weights of a new one never moved."""
    model = WorldModel(preset("tiny", **SMALL))
    model.new = torch.nn.Linear(2, 2)
    scales = world_model_training.lr_scales(model, 0.5)
    assert scales[model.encoder] == 0.5 and scales[model.new] == 1.0
    assert model.target_encoder not in scales


def test_color_jitter_changes_frames_alone_and_gives_the_same_batch_to_any_number_of_processes(
    store,
):
    def first_two(rank, num_processes, step=0, **changes):
        config = preset("tiny", **SMALL | changes)
        options = config, store, TRAIN, 3, step, rank, num_processes
        return list(itertools.islice(world_model_training.training_batches(*options), 2))

    plain, whole = first_two(0, 1), first_two(0, 1, color_jitter=1.0)
    halves = [first_two(rank, 2, color_jitter=1.0) for rank in range(2)]
    for step, (frames, actions) in enumerate(whole):
        assert torch.equal(actions, plain[step][1])
        change = (frames.float() - plain[step][0].float()).abs().mean((1, 2, 3, 4))
        assert (change > 1).all()
        for both, part in zip((frames, actions), zip(*(half[step] for half in halves))):
            assert torch.equal(torch.cat(part), both)
    # a run that resumes sees what it would have seen
    assert torch.equal(first_two(0, 1, step=1, color_jitter=1.0)[0][0], whole[1][0])
