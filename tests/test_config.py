"Settings: a wrong value is refused where the tree is made, for every setting and every entrance."

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minecraft_jepa import utils
from minecraft_jepa.config import Config, load_config, preset
from minecraft_jepa.config_sections import Train
from minecraft_jepa.study import study_parameters
from minecraft_jepa.utils import cores_allowed, seed_everything, whole_number

ROOT = Path(__file__).parent.parent
SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.name != "name"}
LEAVES = [(s, f) for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
NUMBERS = [(s, f) for s, f in LEAVES if f.type in (int, float)]


def ids(settings):
    return [f"{section}.{f.name}" for section, f in settings]


def out_of_range(setting):
    "Values on the wrong side of each bound of a setting."
    limits = setting.metadata
    if "least" in limits:
        yield limits["least"] - 1
    if "above" in limits:
        yield limits["above"]
    yield limits["most"] + 1


@pytest.mark.parametrize(("section", "leaf"), NUMBERS, ids=ids(NUMBERS))
def test_a_number_that_cannot_be_is_refused_for_every_leaf(section, leaf):
    assert "most" in leaf.metadata and {"least", "above"} & set(leaf.metadata)
    for wrong in (*out_of_range(leaf), math.nan, math.inf, -math.inf, True, None, "1", 1j):
        with pytest.raises(ValueError, match=rf"^{section}\.{leaf.name}="):
            preset("tiny", **{f"{section}_{leaf.name}": wrong})
        with pytest.raises(ValueError, match=rf"^{section}\.{leaf.name}="):
            SECTIONS[section](**{leaf.name: wrong})


@pytest.mark.parametrize(("section", "leaf"), LEAVES, ids=ids(LEAVES))
def test_a_file_with_a_leaf_that_cannot_be_names_its_line(section, leaf, tmp_path):
    tree = json.loads(preset("tiny").to_json())
    is_positive = leaf.type in (int, float) and leaf.name != "time_logit_mean"
    tree[section][leaf.name] = -1 if is_positive else None
    (tmp_path / "config.json").write_text(json.dumps(tree, indent=1))
    with pytest.raises(ValueError, match=rf"line \d+: {section}\.{leaf.name}=") as e:
        load_config(tmp_path / "config.json")
    number = int(str(e.value).split("line ")[1].split(":")[0])
    assert f'"{leaf.name}"' in (tmp_path / "config.json").read_text().splitlines()[number - 1]


def test_a_whole_float_stands_for_no_whole_number_and_a_whole_number_for_a_float():
    with pytest.raises(ValueError, match=r"train\.batch_size=8\.0 must be a whole number"):
        preset("tiny", batch_size=8.0)
    assert type(preset("tiny", lr=1).train.lr) is float


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.int16, torch.tensor])
def test_whole_numbers_of_any_type_are_taken(kind):
    config = preset("tiny", steps=kind(5), lr=np.float32(0.5))
    assert type(config.train.steps) is int and type(config.train.lr) is float
    assert json.loads(config.to_json())["train"]["steps"] == 5
    seed_everything(kind(3))
    first = torch.rand(1)
    seed_everything(3)
    assert torch.equal(first, torch.rand(1))


@pytest.mark.parametrize("wrong", [True, np.True_, 1.0, "1", None, -1, [1]])
def test_a_seed_that_is_no_whole_number_is_refused(wrong):
    with pytest.raises(ValueError, match="seed="):
        seed_everything(wrong)
    with pytest.raises(ValueError, match="n="):
        whole_number(wrong, "n", 0)


def test_leaves_that_do_not_go_together_are_refused():
    with pytest.raises(
        ValueError, match="decoder_batch_size=2 can't be cut into gradient_accumulation_steps=4"
    ):
        preset("tiny", decoder_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(
        ValueError, match="batch_size=16 can't be cut into gradient_accumulation_steps=3"
    ):
        preset("tiny", gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="is not a whole number of patches"):
        preset("tiny", height=50)
    # one at a time they do not fit
    assert preset("tiny", height=64, frame_width=64, patch_size=32).frame.patches == 4
    with pytest.raises(ValueError, match="is given twice"):
        preset("tiny", batch_size=8, train_batch_size=8)
    with pytest.raises(ValueError, match="train="):
        Config(train={"steps": 3})


def parameters(tmp_path, **overrides):
    "What the kernel of a study holds."
    defaults = {
        "preset_name": "tiny",
        "data_dir": ".",
        "out_dir": str(tmp_path / "out"),
        "weights": "",
        "steps": 3,
        "seed": 0,
        "device": "cpu",
    }
    return defaults | overrides


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("steps", None),
        ("steps", True),
        ("steps", "5"),
        ("steps", 2.5),
        ("steps", -1),
        ("seed", "null"),
        ("seed", None),
        ("data_dir", None),
        ("data_dir", ""),
        ("data_dir", 3),
        ("out_dir", None),
        ("out_dir", " "),
        ("weights", True),
        ("preset_name", None),
        ("preset_name", ["tiny"]),
        ("device", None),
        ("device", "tpu"),
    ],
)
def test_a_parameter_of_an_odd_kind_is_named(tmp_path, name, wrong):
    with pytest.raises(ValueError, match=f"^{name}="):
        study_parameters(parameters(tmp_path, **{name: wrong}))


def test_other_names_in_the_kernel_do_not_stop_a_study(tmp_path):
    others = {
        "Path": Path,
        "np": np,
        "display": print,
        "my_note": "first try",
        "data": {"a": 1},
        "out": [1],
        "n": 3,
        "ClipStore": dict,
    }
    others["In"] = ["", "from pathlib import Path"]
    assert study_parameters(parameters(tmp_path, **others)).steps == 3


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"stpes": 3}, "steps"),
        ({"seeds": 1}, "seed"),
        ({"data_dri": "x"}, "data_dir"),
        ({"weigths": "x"}, "weights"),
        ({"epochs": 3, "In": ["", "# Parameters\nepochs = 3\nsteps = 2\n"]}, "Known"),
    ],
)
def test_a_misspelt_parameter_is_refused(tmp_path, more, named):
    with pytest.raises(ValueError, match=f"unknown parameter '{next(iter(more))}'.*{named}"):
        study_parameters(parameters(tmp_path, **more))


def test_a_parameter_that_is_not_set_is_named(tmp_path):
    names = parameters(tmp_path)
    del names["seed"]
    with pytest.raises(ValueError, match="parameter 'seed' is not set"):
        study_parameters(names)


def test_an_out_dir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out_dir=.*can't be made"):
        study_parameters(parameters(tmp_path, out_dir=str(tmp_path / "file" / "in")))


def test_cores_are_those_allowed(monkeypatch):
    monkeypatch.setattr(utils, "_quota", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert cores_allowed() == 3
    for quota, allowed in ((0.5, 1), (1.5, 2), (2.0, 2), (64.0, 3)):
        monkeypatch.setattr(utils, "_quota", lambda quota=quota: quota)
        assert cores_allowed() == allowed


def test_memory_is_that_allowed(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limits, allowed in (
        ([], whole),
        ([["max"]], whole),
        ([["1048576"], ["max"], ["2097152"]], 2**20),
    ):
        monkeypatch.setattr(utils, "_group_limits", lambda _, limits=limits: limits)
        assert utils.memory_allowed() == allowed


@pytest.mark.parametrize(
    ("variables", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")]
)
def test_threads_do_not_spin_whatever_is_imported(variables, policy):
    "The package sets it before a module loads torch, and with it OpenMP, which reads it once."
    without = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    source = (
        "import minecraft_jepa, os, sys; "
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=without | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.split() == [policy, "False"], process.stderr


def test_whole_numbers_of_any_library_are_taken_or_refused():
    for kind in (np.uint8, np.int8, np.int16, np.uint64, torch.tensor, np.array):
        assert type(whole_number(kind(60))) is int and whole_number(kind(60)) == 60
    for wrong in (
        60.0,
        np.float32(60),
        torch.tensor(60.0),
        True,
        np.True_,
        torch.tensor(True),
        "60",
        None,
        [60],
        np.array([6, 0]),
    ):
        with pytest.raises(ValueError, match=r"batch=.* must be a whole number"):
            whole_number(wrong, "batch")
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        whole_number(np.uint8(0), "batch", 1)


def test_names_of_one_section_or_of_several_are_told_apart():
    with pytest.raises(ValueError, match="encoder_depth"):
        preset("tiny", encoder_dept=2)
    with pytest.raises(ValueError, match="encoder_depth"):
        preset("tiny", depth=2)
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        preset("tinny")


def test_a_word_that_is_no_choice_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="adaln"):
        preset("tiny", kind="film")
    with pytest.raises(ValueError, match="sigreg"):
        preset("tiny", anti_collapse="hope")
    with pytest.raises(ValueError, match=r"train\.warmup_fraction=2\.0 must be at most 1"):
        Train(warmup_fraction=2)
    with pytest.raises(ValueError, match=r"train\.lr=nan must be a finite"):
        preset("tiny", lr=math.nan)


@pytest.mark.parametrize(
    ("inverse", "pitch", "ticks"), [(0.1, 0.1, 9), (0.1, 0.0, 0), (0.0, 0.1, 0)]
)
def test_a_window_holds_the_frame_of_the_pitch_loss_only_where_there_is_one(inverse, pitch, ticks):
    assert (
        preset(
            "tiny",
            inverse_dynamics_weight=inverse,
            pitch_weight=pitch,
            rollout_steps=2,
            pitch_horizon=9,
        ).jepa.extra_frame_offset
        == ticks
    )


def test_architecture_is_what_shapes_a_tensor():
    shape = preset("tiny").architecture()
    assert (
        shape
        == preset(
            "tiny", batch_size=4, dropout=0.5, guidance_scale=2, rollout_steps=3
        ).architecture()
    )
    for change in (
        {"regression_depth": 1},
        {"encoder_depth": 1},
        {"history_ticks": 5},
        {"kind": "adaln"},
        {"overlap": 0},
    ):
        assert preset("tiny", **change).architecture() != shape
    assert shape["frame.height"] == 72 and shape["dit.bottleneck_dim"] == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "name": "tiny",\n oops', "line 3: not JSON"),
        ('{"name": "tiny"}', "not a configuration"),
        ("[]", "line 1: expected an object"),
        (None, "no such file"),
    ],
)
def test_a_file_that_holds_no_tree_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        load_config(path)


def test_a_saved_tree_is_read_back(tmp_path):
    config = preset("small", batch_size=8)
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path / "config.json") == config
