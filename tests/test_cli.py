"""The command `minecraft-jepa`: its help, its words, its exit status, a line for what is wrong."""

import inspect
import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import fsspec
import pairs
import pytest
from commands import refused

from minecraft_jepa import notebook_runner
from minecraft_jepa.cli import COMMANDS, main, read_command
from minecraft_jepa.commands.game_commands import read_seeds
from minecraft_jepa.commands.model_commands import DemoCommand
from minecraft_jepa.commands.study_commands import StudyCommand
from minecraft_jepa.commands.training_commands import TrainCommand
from minecraft_jepa.config import PRESETS, Config, preset
from minecraft_jepa.data.clip_store import ClipStore

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
WEIGHTS = DATA / "weights/tiny"
SECTIONS = [f.name for f in fields(Config) if f.name != "name"]
LEAVES = [(s, f.name) for s in SECTIONS for f in fields(getattr(PRESETS["tiny"], s))]
FEW = ["train", "--data", "d", "--out", "o"]


def in_a_process(*words, source=None):
    """What `python -m minecraft_jepa` does with the words, or Python with `source`."""
    words = ["-c", source] if source else ["-m", "minecraft_jepa", *words]
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_help_names_every_command_and_loads_neither_torch_nor_numpy():
    source = (
        "import sys; from minecraft_jepa.cli import main; code = main(['--help']); "
        "print([m for m in ('torch', 'numpy', 'av', 'httpx', 'gymnasium') if m in sys.modules]); "
        "sys.exit(code)"
    )
    done = in_a_process(source=source)
    assert done.returncode == 0, done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    for name in COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in lines), name


def test_help_of_training_loads_no_torch():
    source = (
        "import sys; from minecraft_jepa.cli import main; code = main(['train', '--help']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = in_a_process(source=source)
    assert done.returncode == 0, done.stderr
    assert "--jepa.rollout-steps" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_that_can_be_read(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    help_text = capsys.readouterr().out
    example = inspect.getdoc(COMMANDS[name]).partition("For example: ")[2].strip()
    assert " ".join(example.split()) in " ".join(help_text.split())
    program, *words = shlex.split(example)
    assert program == "minecraft-jepa"
    assert words[: len(name.split())] == name.split()
    read_command(name, words[len(name.split()) :])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    main([*name.split(), "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    options = [i for i, line in enumerate(lines) if line.startswith("--")]
    for i in options:
        text = lines[i] + " " + lines[i + 1] * (len(lines[i].split("  ")) == 1)
        explained = text.partition("  ")[2].strip() or lines[i + 1]
        assert not explained.startswith("(default"), lines[i]


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a command: download, store"),
        (["trian"], "unknown command 'trian': did you mean 'train'"),
        (["remote"], "give one of remote pack, remote train, remote bring"),
        (["remote", "pak"], "did you mean 'remote pack'"),
        (["--data", "x"], "unknown command '--data'"),
        (["store", "data"], "STORE"),
        ([*FEW, "--train.stpes", "4"], "train.stpes.*--train.steps"),
        ([*FEW, "--steps", "4"], "--train.steps"),
        ([*FEW, "--preset", "tinny"], "tinny.*tiny"),
        ([*FEW, "--jepa.anti-collapse", "sigrge"], "jepa.anti_collapse='sigrge'.*'sigreg'"),
        ([*FEW, "--frame.height", "50"], "multiple of 12"),
        (["train", "--data", "d"], "--out"),
        ([*FEW, "--minutes", "soon"], "--minutes"),
        ([*FEW, "--device", "tpu"], "--device"),
        (["study", "--stpes", "3"], "--stpes"),
        (["study", "--preset", "tinny"], "tiny"),
        (["study", "--notebooks", "nowhere"], "nowhere"),
        (["demo", "--data", "nowhere"], "nowhere: no such folder.*check the path"),
        (["demo", "--weights", "nowhere"], "nowhere: no such folder"),
        (["demo", "--sed", "1"], "--sed"),
        (["evaluate", "--weights", "nowhere"], "nowhere: no such folder"),
        (["study", "--data", "nowhere"], "nowhere: no such folder"),
        (["store", "nowhere", "s"], "nowhere: no such folder"),
        (["shards", "nowhere", "s"], "nowhere: no such folder"),
        (["train", "--data", "nowhere", "--out", "o"], "nowhere: no such folder"),
        (
            ["train", "--data", "data", "--out", "o", "--start", "nowhere"],
            "nowhere: no such folder",
        ),
        (["remote", "pack", "nowhere", "p"], "nowhere: no such folder"),
        (["remote", "train", "nowhere", "r"], "nowhere: no such folder"),
        (["remote", "bring", "nowhere", "w"], "nowhere: no such folder"),
        (["imagine", "nowhere.mp4"], "nowhere.mp4: no such recording"),
        (
            ["imagine", "data/world-321_0740.mp4", "--out", "a.png"],
            "a.png: it becomes a GIF; give a name that ends in .gif",
        ),
        (["record", "out", "--seeds", "9-7"], "'9-7'"),
        (["record", "out", "--biome", "moon"], "moon"),
        (["record", "out", "--minuts", "1"], "--minutes"),
        (["download", "vpt", "--by", "plyer"], "plyer"),
        (["download", "vpt", "--hour", "1"], "--hours"),
        (["download", "vpt", "--again", "everything"], "everything"),
        (["download", "vpt", "--hours", "1"], "name the index too"),
        (["download", "vpt", "--by", "session"], "--by chooses from an index"),
        (["download", "vpt", "--seed", "0"], "--seed chooses from an index"),
    ],
)
def test_wrong_command_line_names_what_is_wrong(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    refused(capsys, words, said, 2)


def test_a_default_folder_that_is_missing_is_the_repositorys(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["demo"], "data: no such folder.*run from the root of the repository", 2)


def test_a_wrong_command_line_is_a_status_of_the_process():
    done = in_a_process("train", "--data", "d")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("minecraft-jepa train: ")


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_of_a_training_are_the_presets(name):
    for words in (["--preset", name], [f"--preset={name}"]):
        assert read_command("train", [*FEW[1:], *words]).config() == PRESETS[name]


@pytest.mark.parametrize(("section", "leaf"), LEAVES)
def test_every_leaf_of_the_config_is_an_option(section, leaf):
    value = getattr(getattr(PRESETS["small"], section), leaf)
    option = f"--{section}.{leaf}".replace("_", "-")
    words = [option] if isinstance(value, bool) else [option, str(value)]
    command = read_command("train", [*FEW[1:], *words])
    read = getattr(getattr(command, section), leaf)
    assert read == (value if not isinstance(value, bool) else True)
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--train.lr 1e-4", "train.lr", 1e-4),
        ("--train.lr .001", "train.lr", 1e-3),
        ("--train.lr +1e-4", "train.lr", 1e-4),
        ("--train.lr=1e-4", "train.lr", 1e-4),
        ("--train.steps 1_000", "train.steps", 1000),
        ("--train.steps 1e3", "train.steps", 1000),
        ("--train.activation-checkpointing", "train.activation_checkpointing", True),
        ("--train.activation_checkpointing", "train.activation_checkpointing", True),
        ("--preset paper --train.no-compile", "train.compile", False),
        ("--dit.time-logit-mean -0.5", "dit.time_logit_mean", -0.5),
        ("--conditioner.kind adaln", "conditioner.kind", "adaln"),
    ],
)
def test_settings_are_read_as_people_write_them(words, name, value):
    section, leaf = name.split(".")
    read = getattr(getattr(read_command("train", [*FEW[1:], *words.split()]), section), leaf)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "words",
    [
        "--train.batch-size 16,",
        "--train.batch-size=",
        "--train.batch-size",
        "--train.lr 1,5",
        "--train.lr fast",
        "--train.steps 1.5",
        "--train.steps inf",
        "--train.compile 2",
        "--train.steps 0",
        "--dit.min-one-minus-t 0",
        "--encoder.num-heads 5",
        "--train.stpes 4",
    ],
)
def test_a_setting_that_cannot_be_read_is_named(words, capsys):
    name = words.replace("=", " ").split()[0].removeprefix("--").split(".")[0]
    refused(capsys, [*FEW, *words.split()], name, 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batch_size=64", "--train.batch-size 64"),
        ("encoder_depth=2", "--encoder.depth 2"),
        ("anti_collapse=sigreg", "--jepa.anti-collapse sigreg"),
        ("activation_checkpointing=true", "--train.activation-checkpointing$"),
    ],
)
def test_settings_of_an_earlier_version_are_answered_with_their_option(old, new, capsys):
    refused(capsys, [*FEW, old], f"{old}: settings are options now, write {new}", 2)


def test_a_stop_by_the_user_is_told_in_a_line(capsys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainCommand, "run", stop)
    refused(capsys, FEW, "stopped; the same command goes on", 1)
    monkeypatch.setattr(DemoCommand, "run", stop)
    assert refused(capsys, ["demo"], "stopped", 1).strip() == "minecraft-jepa demo: stopped"
    monkeypatch.setattr(StudyCommand, "run", stop)
    refused(capsys, ["study"], "the same command begins again; trainings", 1)


def test_a_full_memory_is_told_with_a_remedy(capsys, monkeypatch):
    def grow(self):
        raise MemoryError

    monkeypatch.setattr(TrainCommand, "run", grow)
    refused(capsys, FEW, "out of memory.*--train.activation-checkpointing", 1)
    monkeypatch.setattr(DemoCommand, "run", grow)
    told = refused(capsys, ["demo"], "out of memory", 1)
    assert "--train" not in told


def test_a_reader_that_leaves_early_is_no_fault():
    source = (
        "import os, subprocess, sys; r, w = os.pipe(); os.close(r); "
        "words = [sys.executable, '-m', 'minecraft_jepa', 'train', '--help']; "
        "print(subprocess.run(words, stdout=w, stderr=subprocess.PIPE).stderr.decode())"
    )
    assert in_a_process(source=source).stdout.strip() == ""


def test_a_fault_of_the_code_keeps_its_traceback(monkeypatch):
    def fail(self):
        raise KeyError("typo")

    monkeypatch.setattr(TrainCommand, "run", fail)
    with pytest.raises(KeyError):
        main(FEW)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["v", "v/toy.mp4"], "File exists"),
        (["v", "s", "--workers", "0"], "workers=0 must be at least 1"),
        (["v", "s", "--height", "0"], "height"),
        (["store", "s"], "is a clip store already"),
        (["empty", "s"], "no recordings"),
    ],
)
def test_errors_of_the_store_are_a_line(tmp_path, monkeypatch, capsys, words, said):
    pairs.make_pair(tmp_path / "v", "toy", 40)
    frame = preset("tiny").frame
    ClipStore.build(tmp_path / "v", frame, tmp_path / "store", progress=False, workers=1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, ["store", *words], said)
    assert line.startswith("minecraft-jepa store: ")


def test_from_recordings_to_a_store_to_shards(tmp_path, monkeypatch, capsys):
    pairs.make_pair(tmp_path / "v", "toy", 60)
    monkeypatch.chdir(tmp_path)
    sides = ["--height", "24", "--width", "36", "--workers", "1", "--no-progress"]
    assert main(["store", "v", "s", *sides]) == 0
    assert "1 clips" in capsys.readouterr().out
    words = ["shards", "s", "tars", "--length", "10", "--history", "5", "--reach", "2"]
    assert main([*words, "--no-progress", "--workers", "1"]) == 0
    about = json.loads((tmp_path / "tars/shards.json").read_text())
    assert (about["height"], about["history"], about["quality"]) == (24, 5, 95)
    said = capsys.readouterr()
    assert f"{len(about['shards'])} tars" in said.out
    assert "the shards hold no split, and training on them is refused" in said.err
    refused(capsys, ["shards", "v", "more"], "not a clip store")


def test_a_storage_that_refuses_shards_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    class NoCredentialsError(Exception):
        """As botocore raises it."""

    def refuse(url, **storage):
        raise NoCredentialsError("Unable to locate credentials")

    pairs.make_pair(tmp_path / "v", "toy", 60)
    ClipStore.build(tmp_path / "v", preset("tiny").frame, tmp_path / "s", progress=False, workers=1)
    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    words = ["shards", tmp_path / "s", "s3://bucket/shards", "--no-progress"]
    line = refused(capsys, words, "s3://bucket/shards can.t be written: NoCredentialsError: Unable")
    assert line.endswith("check the address, and the credentials of the storage")


def test_weights_that_do_not_say_what_they_saw_are_told(tmp_path, capsys):
    words = ["demo", "--data", DATA, "--weights", tmp_path, "--out", tmp_path / "out"]
    refused(capsys, words, "training.json")
    assert not (tmp_path / "out").exists()


def test_faults_of_parts_are_told_in_a_line(tmp_path, capsys):
    (tmp_path / "part-000-of-001.tar").write_bytes(b"no tar")
    for words in (
        ["pack", tmp_path, tmp_path / "out"],
        ["train", tmp_path, tmp_path / "run"],
        ["bring", tmp_path, tmp_path / "weights"],
    ):
        line = refused(capsys, ["remote", *words], ".")
        assert line.startswith(f"minecraft-jepa remote {words[0]}: ")


def test_seeds_are_numbers_and_ranges():
    assert read_seeds("301-303,7") == [301, 302, 303, 7]
    assert read_seeds("5,7,4-6,7") == [5, 7, 4, 6]  # each world once
    for wrong in ("", "seven", "9-7", "5,9-7", "1,,2"):
        with pytest.raises(ValueError, match=repr(wrong)):
            read_seeds(wrong)


def test_an_evaluation_runs_the_notebook_of_the_study(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(notebook_runner, "run_notebook", lambda *words: asked.append(words))
    monkeypatch.chdir(tmp_path)  # the notebook is found from elsewhere too
    words = ["--data", str(DATA), "--weights", str(WEIGHTS), "--out", "judged", "--windows", "3"]
    assert main(["evaluate", *words]) == 0
    ((notebook, copy, parameters),) = asked
    assert notebook.resolve() == (ROOT / "nbs/study/3_evaluate.ipynb").resolve()
    assert copy == Path("judged/3_evaluate.ipynb")
    assert parameters["weights"] == WEIGHTS.resolve()
    assert (parameters["preset_name"], parameters["steps"], parameters["seed"]) == ("tiny", 3, 0)
    assert parameters["out_dir"] == tmp_path / "judged"
    assert "judged/evaluate.json" in capsys.readouterr().out


def test_an_evaluation_that_fails_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "minecraft_jepa.commands.study_commands._notebook", lambda path: tmp_path / "none.ipynb"
    )
    words = ["--data", str(DATA), "--weights", str(WEIGHTS), "--out", str(tmp_path / "out")]
    refused(capsys, ["evaluate", *words], "none.ipynb")


@pytest.mark.parametrize("command", ["evaluate", "study"])
def test_a_clip_store_is_refused_before_a_notebook_starts(tmp_path, capsys, monkeypatch, command):
    (tmp_path / "store.json").write_text("{}")
    monkeypatch.chdir(ROOT)
    refused(capsys, [command, "--data", tmp_path], "a clip store, not recordings; give the folder")


def test_a_future_is_drawn_as_a_gif(tmp_path, capsys):
    recording = DATA / "world-321_0740.mp4"
    words = ["imagine", str(recording), "--weights", str(WEIGHTS), "--ticks", "2", "--steps", "1"]
    out = ["--out", str(tmp_path / "real.gif"), "--device", "cpu"]
    assert main([*words, *out, "--tick", "100"]) == 0
    said = capsys.readouterr().out
    assert "tick 100: one frame is given, 2 ticks are imagined" in said
    assert "PSNR" in said
    assert (tmp_path / "real.gif").read_bytes().startswith(b"GIF")
    held = ["--out", str(tmp_path / "held.gif"), "--device", "cpu", "--hold"]
    assert main([*words, *held, "left"]) == 0
    assert "PSNR" not in capsys.readouterr().out  # what was recorded is another future
    assert (tmp_path / "held.gif").read_bytes() != (tmp_path / "real.gif").read_bytes()
    refused(capsys, [*words, *held, "lfet"], "did you mean 'left'", 2)
    line = refused(capsys, [*words, *held, "dx"], "unknown action to hold 'dx'", 2)
    assert line.endswith("8, 9, attack, use, pick")
    refused(capsys, [*words, *out, "--tick", "5"], "no window at tick 5", 2)
    refused(capsys, [*words, *out, "--ticks", "0"], "ticks=0 must be at least 1")
