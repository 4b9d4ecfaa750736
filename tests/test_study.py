"""The study end to end, in small.

Every notebook in order with two steps in a clone, and what the runner does when one fails.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import nbformat
import numpy as np
import pytest
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from minecraft_jepa import study
from minecraft_jepa.cli import main
from minecraft_jepa.config import preset
from minecraft_jepa.evaluation.report import load_report
from minecraft_jepa.notebook_runner import run_notebook
from minecraft_jepa.study import study_notebooks
from minecraft_jepa.utils import write_json

ROOT = Path(__file__).parent.parent
DATA, WEIGHTS = ROOT / "data", ROOT / "data/weights/tiny"
STUDY = study_notebooks(ROOT / "nbs/study")
PARAMETERS = ("preset_name", "data_dir", "out_dir", "weights", "steps", "seed", "device")


def copy_recording(name, folder, new_name=None):
    """Copy one of the repository's recordings, perhaps under another name."""
    for suffix in (".mp4", ".jsonl"):
        shutil.copy(DATA / f"{name}{suffix}", folder / f"{new_name or name}{suffix}")


def make_recording(folder, name, ticks, moving=True):
    """Write a recording of noise that moves by three pixels a tick, or of a black screen."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    scene = noise.repeat(4, 0).repeat(4, 1) * np.uint8(moving)
    with av.open(str(folder / f"{name}.mp4"), "w") as video:
        stream = video.add_stream(
            "libx264", rate=20, options={"crf": "18", "preset": "ultrafast", "g": "20"}
        )
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        for t in range(ticks):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(scene, 3 * t * moving, 1))))
        video.mux(stream.encode())
    mouse = {"x": 640.0, "y": 360.0, "dx": 0.0, "dy": 0.0, "dwheel": 0.0}
    mouse |= {"buttons": [], "newButtons": []}
    keyboard = {"keys": [], "newKeys": [], "chars": ""}
    state = {"isGuiOpen": False, "hotbar": 0, "yaw": 0.0, "pitch": 0.0}
    state |= {"xpos": 0.0, "ypos": 64.0, "zpos": 0.0}
    line = {"mouse": mouse, "keyboard": keyboard} | state
    rows = [line | {"tick": t, "milli": 50 * t} for t in range(ticks)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Three worlds to train on, two to validate, three to judge."""
    folder = tmp_path_factory.mktemp("sample")
    split = json.loads((DATA / "split.json").read_text())
    subset = {
        "train": split["train"][:3],
        "validation": split["validation"][1:3],
        "test": split["test"][:3],
    }
    for names in subset.values():
        for name in names:
            copy_recording(name, folder)
    write_json(folder / "split.json", subset)
    return folder


def values(data, out, **changes):
    return {
        "preset_name": "tiny",
        "data_dir": data,
        "out_dir": out,
        "weights": WEIGHTS,
        "steps": 2,
        "seed": 0,
        "device": "cpu",
    } | changes


def nothing_but_numbers(name):
    pytest.fail(f"{name} in the numbers of a figure")


def check_numbers(made):
    """Each picture is complete and has its numbers, which are JSON."""
    numbers = [path for path in made if path.suffix == ".json"]
    assert numbers
    for path in numbers:
        assert json.loads(path.read_text(), parse_constant=nothing_but_numbers)
    for path in made:
        if path.suffix in (".png", ".gif"):
            Image.open(path).verify()
            assert path.with_suffix(".json") in numbers
        assert path.suffix != ".part"


# The whole study, in a clone


def git(folder, *words):
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True
    ).stdout


def make_clone(folder):
    """Clone this working tree, with what is not committed yet."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    for name in git(ROOT, "ls-files", "-m", "-o", "--exclude-standard").split("\n"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        elif name:
            (folder / name).unlink(missing_ok=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "as it is here")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, sample):
    """A clone, and what a study of two steps in it printed.

    It is run once, by whichever process of pytest-xdist comes first.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository, nothing to clone")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, said = base / "study-in-a-clone", base / "study-in-a-clone.txt"
    with open(base / "study-in-a-clone.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make_clone(folder)
            words = [
                sys.executable,
                "-m",
                "minecraft_jepa",
                "study",
                "--steps",
                "2",
                "--data",
                str(sample),
            ]
            done = subprocess.run(
                words,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(folder)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
            said.write_text(done.stdout)
    return folder, said.read_text()


in_a_clone = pytest.mark.xdist_group("clone")


@in_a_clone
def test_a_study_leaves_the_repository_as_it_was(clone):
    folder, _ = clone
    assert git(folder, "status", "--porcelain") == ""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/test_{n}.py" for n in ("figures", "claims", "bench")),
    ]
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@in_a_clone
def test_every_notebook_leaves_its_numbers(clone):
    folder, _ = clone
    made = {p for p in (folder / "_runs/figures").rglob("*") if p.is_file()}
    check_numbers(made)
    names = {p.stem for p in made}
    assert names >= {
        "data",
        "train",
        "evaluate",
        "actions",
        "knows",
        "rollout_1",
        "filmstrip",
        "sora",
        "luanti_lag",
        "claims",
        "compare",
        "study",
    }


@in_a_clone
def test_a_study_ends_with_yours_beside_the_shipped(clone):
    folder, printed = clone
    assert "yours beside the shipped weights" in printed
    assert "error over copying, 15 ticks" in printed and "rollout_1.gif" in printed
    assert "not comparable" in printed  # three of the eight worlds
    compared, claims = (
        json.loads((folder / f"_runs/figures/{name}.json").read_text())
        for name in ("compare", "claims")
    )
    identity = compared["about"]["yours"]["weights_identity"]
    assert not compared["comparable"] and identity["steps"] == 2
    assert identity["sha256"] == claims["weights_identity"]["sha256"]


@in_a_clone
def test_executed_notebooks_show_their_pictures_and_no_path_bar_or_warning(clone):
    folder, _ = clone
    for notebook in STUDY:
        executed = nbformat.read(folder / "_runs" / notebook.name, 4)
        outputs = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]
        data = [o["data"] for o in outputs if "data" in o]
        assert any("image/png" in d or "image/gif" in d for d in data), notebook.stem
        text = "".join(o["text"] for o in outputs if o.output_type == "stream") + "".join(
            d.get("text/plain", "") for d in data
        )
        for unwanted in ("PosixPath", "\r", "UserWarning"):
            assert unwanted not in text, (notebook.stem, unwanted)


@pytest.mark.parametrize(
    "notebook",
    [
        # of those that take hours, the ones without the game
        ROOT / "nbs/study/8_ablations.ipynb",
        ROOT / "nbs/study/12_pixel_model.ipynb",
        ROOT / "nbs/study/13_seeds.ipynb",
        ROOT / "nbs/study/14_variants.ipynb",
        ROOT / "nbs/study/15_decoders.ipynb",
        *study_notebooks(ROOT / "nbs/bench"),
    ],
    ids=lambda p: p.stem,
)
def test_notebook_runs_and_leaves_its_numbers(notebook, sample, tmp_path):
    run_notebook(notebook, tmp_path / notebook.name, values(sample, tmp_path / "out"))
    made = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    check_numbers({p for p in made if p.parent.name != "weights"})  # where training keeps a picture


@pytest.mark.parametrize(
    ("name", "factors", "row"),
    [
        ("8_ablations", "pixels", "108 x 192"),
        ("14_variants", "frames given, augmentation", "crop"),
        ("14_variants", "recordings", "half of each"),
    ],
    ids=["equal time", "batches", "recordings"],
)
def test_factors_that_a_trial_leaves_out_run_when_they_are_chosen(
    name, factors, row, sample, tmp_path
):
    parameters = values(sample, tmp_path / "out") | {"factors": factors}
    run_notebook(ROOT / f"nbs/study/{name}.ipynb", tmp_path / "copy.ipynb", parameters)
    (path,) = (tmp_path / "out").glob("*.json")
    made = json.loads(path.read_text())
    assert row in made["table"][factors.split(", ")[-1]]
    if name == "8_ablations":
        (longer, large) = made["equal_time"]["table"]["equal time"]
        assert (longer, large) == ("72 x 132, 5 steps", row)


@pytest.mark.parametrize("name", ["1_data", "9_claims"])
def test_every_cell_can_be_run_twice(name, sample, tmp_path):
    (tmp_path / "out").mkdir()
    for f in ("evaluate", "sora", "ablations"):
        shutil.copy(ROOT / f"figures/{f}.json", tmp_path / "out")
    notebook = nbformat.read(ROOT / f"nbs/study/{name}.ipynb", 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    again = [nbformat.v4.new_code_cell(c.source) for c in code[1:]]
    notebook.cells = code[:1] + [cell for pair in zip(code[1:], again) for cell in pair]
    nbformat.write(notebook, tmp_path / "twice.ipynb")
    run_notebook(
        tmp_path / "twice.ipynb",
        tmp_path / "copy.ipynb",
        values(sample, tmp_path / "out", weights=""),
    )


# Parameters, and recordings that are few, short or still


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stpes": 3}, "unknown parameter 'stpes': did you mean 'steps'"),
        ({"preset_name": "tinny"}, "unknown preset 'tinny': did you mean 'tiny'"),
        ({"data_dir": "nowhere"}, "no such folder"),
        ({"weights": "nowhere"}, "train first"),
        ({"preset_name": "small"}, "weights of another preset"),
    ],
)
def test_wrong_parameter_is_told_with_its_remedy(wrong, message, sample, tmp_path):
    with pytest.raises(PapermillExecutionError) as stop:
        run_notebook(
            ROOT / "nbs/study/3_evaluate.ipynb",
            tmp_path / "copy.ipynb",
            values(sample, tmp_path / "out") | wrong,
        )
    assert message in str(stop.value)


def test_a_notebook_that_judges_weights_has_their_config(sample, tmp_path):
    smaller = preset("tiny", height=36, width=60)
    (tmp_path / "config.json").write_text(smaller.to_json())
    given = values(sample, tmp_path / "out", weights=str(tmp_path))
    assert study.study_parameters(given, of_weights=True).config == smaller
    assert study.study_parameters(given).config == preset("tiny")  # one that trains
    of_another_preset = given | {"preset_name": "small"}
    assert study.study_parameters(of_another_preset, of_weights=True).config == preset("small")


@pytest.mark.parametrize(
    ("pieces", "judged"),
    [(("321", "345"), False), (("321", "321", "322", "322"), True)],
    ids=["two recordings", "two worlds"],
)
def test_a_folder_of_few_worlds_is_judged_as_far_as_it_goes(pieces, judged, tmp_path, capsys):
    """Without a split.json; of fewer than three recordings nothing is left to learn probes from.

    One that is too short and one in which nothing moves are named.
    """
    data = tmp_path / "data"
    data.mkdir()
    for i, world in enumerate(pieces):
        copy_recording(next(DATA.glob(f"world-{world}_*.mp4")).stem, data, f"world-{world}_{i}")
    if judged:
        make_recording(data, "world-901_0", 26)
        make_recording(data, "world-902_0", 60, moving=False)
        make_recording(data, "world-903_0", 45)  # long enough for 15 ticks, not for 30 and 60
    run_notebook(
        ROOT / "nbs/study/3_evaluate.ipynb",
        tmp_path / "copy.ipynb",
        values(data, tmp_path / "out", steps=1),
    )
    report = load_report(tmp_path / "out/evaluate.json")
    assert len(report["recordings"]) == len(pieces) + judged
    assert bool(report["probes"]["model"]) == bool(report["action_decoding"]) == judged
    probes = [b for b in report["criteria"] if b["criterion"].endswith("_r2")]
    assert [b["number"] is not None for b in probes] == [judged] * 2
    printed = capsys.readouterr().out
    assert "they were not made for each other" in printed
    assert report["weights_identity"]["preset"] == "tiny"
    if not judged:
        return
    assert list(report["left_out"]) == ["world-901_0", "world-902_0"]
    assert "too short for 30 60 ticks, and empty there: world-903_0" in printed
    assert "left out: world-901_0: too short" in printed
    assert "left out: world-902_0: nothing moves" in printed
    short = report["by_recording"]["model"]["world-903_0"]
    assert None not in short[:15] and short[15:] == [None, None]
    for table in ("horizons", "relative_to_copy", "action_sensitivity_ratio"):
        for row in report[table].values():
            assert "model" not in row or row["model"]["mean"] is not None


def test_recordings_without_movement_or_window_can_be_looked_at(tmp_path):
    for i, ticks in enumerate((60, 60, 20)):
        make_recording(tmp_path, f"world-91{i}_0", ticks, moving=False)
    run_notebook(
        ROOT / "nbs/study/1_data.ipynb", tmp_path / "copy.ipynb", values(tmp_path, tmp_path / "out")
    )
    text = (tmp_path / "out/data.json").read_text()
    numbers = json.loads(text, parse_constant=nothing_but_numbers)
    assert numbers["camera"]["largest_degrees"] == 0
    assert not any(any(change) for change in numbers["mean_change_of_a_pixel"].values())


def cell_of(name, words):
    """Source of the cell of a study notebook that holds these words."""
    cells = nbformat.read(ROOT / f"nbs/study/{name}.ipynb", 4).cells
    (found,) = (c.source for c in cells if c.cell_type == "code" and words in c.source)
    return found


def test_recording_without_a_turn_has_no_lag():
    """Its correlation is no number, and would make the mean over the recordings none."""
    names = {"np": np}
    exec(cell_of("6_luanti", "def correlate("), names)
    turn = np.random.default_rng(0).normal(size=200)
    still, sure = np.zeros(200), np.ones(199, bool)
    assert names["in_step"](names["correlate"](turn[:-1], sure, turn))
    assert names["correlate"](turn[:-1], sure, still) is None
    assert names["correlate"](still[:-1], sure, turn) is None
    once = still.copy()
    once[100] = 1
    late = np.arange(199) > 97  # at some of the lags no turn is left
    assert names["correlate"](turn[:-1], late, once) is None


def test_recordings_of_another_length_are_refused(tmp_path):
    """Recordings that are there are not made again, whatever their length."""
    path = tmp_path / "recordings/standard/world-1.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(400 * "{}\n")

    def check(steps, missing=None):
        given = SimpleNamespace(steps=steps, out_dir=tmp_path)
        exec(cell_of("11_appearance", "expected_ticks ="), {"study": given, "missing": missing})

    check(0)
    check(400)
    check(40, missing="not installed")
    with pytest.raises(ValueError, match=r"world-1.jsonl has 400 ticks, not 40: .*another out_dir"):
        check(40)


# The runner


def toy(folder, name, source):
    """Write a notebook of one cell that takes the study's parameters."""
    parameters = nbformat.v4.new_code_cell(
        "\n".join(f"{n} = None" for n in PARAMETERS), metadata={"tags": ["parameters"]}
    )
    nbformat.write(
        nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)]),
        folder / name,
    )


def test_a_kernel_is_this_python_with_files_of_its_own(tmp_path, monkeypatch):
    """Whatever kernels are registered, and whatever starts with IPython.

    Nothing is written beside the notebook.
    """
    kernels = tmp_path / "jupyter/kernels/python3"
    startup = tmp_path / "ipython/profile_default/startup"
    for folder in (kernels, startup, tmp_path / "nbs"):
        folder.mkdir(parents=True)
    (kernels / "kernel.json").write_text(
        json.dumps(
            {
                "argv": ["/gone/python", "{connection_file}"],
                "display_name": "Python 3",
                "language": "python",
            }
        )
    )
    (startup / "00.py").write_text("from_startup = 1")
    for name, value in (
        ("JUPYTER_PATH", tmp_path / "jupyter"),
        ("IPYTHONDIR", tmp_path / "ipython"),
        ("PYTHONSTARTUP", startup / "00.py"),
        ("MPLBACKEND", "gtk4agg"),
    ):
        monkeypatch.setenv(name, str(value))
    toy(
        tmp_path / "nbs",
        "1_a.ipynb",
        "import json, os, sys\n"
        "file = get_ipython().config.IPKernelApp.connection_file\n"
        "started = 'from_startup' in globals()\n"
        "places = [sys.executable, os.listdir(), file, os.path.isfile(file)]\n"
        "print(json.dumps([*places, started, os.environ['MPLBACKEND']]))",
    )
    run_notebook(tmp_path / "nbs/1_a.ipynb", tmp_path / "copy.ipynb", dict.fromkeys(PARAMETERS, 0))
    python, beside, file, there, started, backend = json.loads(
        nbformat.read(tmp_path / "copy.ipynb", 4).cells[-1].outputs[0].text
    )
    assert (python, beside, there, started, backend) == (
        sys.executable,
        ["1_a.ipynb"],
        True,
        False,
        "agg",
    )
    assert not Path(file).parent.exists() and tmp_path / "nbs" not in Path(file).parents


def test_a_progress_bar_leaves_one_line_in_the_executed_notebook(tmp_path):
    source = (
        "import sys\n"
        "for i in range(30):\n"
        "    print(f'\\r{i}', end='', file=sys.stderr, flush=True)\n"
        "print(file=sys.stderr)\n"
        "print('done')"
    )
    toy(tmp_path, "1_a.ipynb", source)
    run_notebook(tmp_path / "1_a.ipynb", tmp_path / "copy.ipynb", dict.fromkeys(PARAMETERS, 0))
    outputs = nbformat.read(tmp_path / "copy.ipynb", 4).cells[-1].outputs
    assert sorted(output.text for output in outputs) == ["29\n", "done\n"]


def test_last_line_is_shown_where_nothing_ends_it(tmp_path, capsys):
    toy(tmp_path, "1_a.ipynb", "print('first\\n 10%\\rlast', end='')")
    run_notebook(tmp_path / "1_a.ipynb", tmp_path / "copy.ipynb", dict.fromkeys(PARAMETERS, 0))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-2:] == ["first", "last"]


@pytest.mark.parametrize("lacking", ["papermill", "jupyter_client", "ipykernel"])
def test_without_the_dev_extra_the_command_names_the_line_that_installs_it(
    lacking, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, lacking, None)
    assert main(["study", "--help"]) == 0
    toy(tmp_path, "1_a.ipynb", "1")
    assert (
        main(
            [
                "study",
                "--notebooks",
                str(tmp_path),
                "--runs",
                str(tmp_path / "runs"),
                "--out",
                str(tmp_path / "figures"),
            ]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert "pip install -e '.[dev]'" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_failure_ends_the_study(tmp_path, capfd):
    toy(tmp_path, "1_first.ipynb", "print('weights in', weights)")
    toy(tmp_path, "2_broken.ipynb", "print('so far')\nraise ValueError('no such recording')")
    toy(tmp_path, "3_after.ipynb", "print('never')")
    words = [
        "study",
        "--notebooks",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "figures"),
    ]
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert (
        "[1/3] 1_first" in out
        and "weights in runs/weights/tiny" in out
        and "so far" in out
        and "never" not in out
    )
    assert "ValueError: no such recording" in err and "line 2" in err
    assert [p.name for p in sorted((tmp_path / "runs").iterdir())] == [
        "1_first.ipynb",
        "2_broken.ipynb",
    ]
    assert not (
        tmp_path / "figures/study.json"
    ).exists()  # half a study is no record of how long one takes


def test_the_first_study_takes_its_time_left_from_the_shipped_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "run_notebook", lambda notebook, copy, parameters: None)
    for data, told in ((tmp_path, "no record"), (DATA, "left")):
        study.run_study(
            data_dir=data,
            out_dir=tmp_path / "out",
            notebooks=ROOT / "nbs/study",
            runs=tmp_path / "runs",
        )
        first = capsys.readouterr().out.splitlines()[0]
        assert told in first, first
        shutil.rmtree(tmp_path / "out")
