"The study end to end, in small: every notebook in order with two steps, and what the runner does when one fails."
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from minecraft_jepa.evaluation import read_report
from minecraft_jepa.study import HOURS, main, run_notebook, study_notebooks

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("study")


def nothing_but_numbers(name): pytest.fail(f"{name} in the numbers of a figure")


@pytest.mark.parametrize("notebook", [*study_notebooks(ROOT / "nbs/study"), *(ROOT / "nbs/study" / f"{n}.ipynb" for n in HOURS), *study_notebooks(ROOT / "nbs/bench")], ids=lambda p: p.stem)
def test_notebook_runs_and_leaves_its_numbers(notebook, folder):
    out, copy = folder / "figures", folder / notebook.name
    before = set(out.rglob("*"))
    run_notebook(notebook, copy, {"preset_name": "tiny", "data_dir": DATA, "out_dir": out, "weights": folder / "weights", "steps": 2, "seed": 0, "device": "cpu"})
    made = set(out.rglob("*")) - before
    numbers = [p for p in made if p.suffix == ".json"]
    assert numbers
    for p in numbers: assert json.loads(p.read_text(), parse_constant=nothing_but_numbers)
    for p in made:
        if p.suffix in (".png", ".gif"):
            Image.open(p).verify()
            assert p.with_suffix(".json") in numbers
        assert p.suffix != ".part"


@pytest.mark.parametrize("wrong, told", [
    ({"stpes": 3}, "unknown parameter 'stpes': did you mean 'steps'"), ({"preset_name": "tinny"}, "unknown preset 'tinny': did you mean 'tiny'"),
    ({"data_dir": "nowhere"}, "no such folder"), ({"weights": "nowhere"}, "train first"), ({"preset_name": "small"}, "weights of another preset")])
def test_wrong_parameter_is_told_with_its_remedy(wrong, told, folder, tmp_path):
    values = {"preset_name": "tiny", "data_dir": DATA, "out_dir": tmp_path / "out", "weights": folder / "weights", "steps": 2, "seed": 0, "device": "cpu"}
    with pytest.raises(PapermillExecutionError) as stop: run_notebook(ROOT / "nbs/study/3_evaluate.ipynb", tmp_path / "copy.ipynb", values | wrong)
    assert told in str(stop.value)


@pytest.mark.parametrize("pieces, judged", [(("321", "345"), False), (("321", "321", "322", "322"), True)], ids=["two recordings", "two worlds"])
def test_a_folder_of_few_worlds_is_judged_as_far_as_it_goes(pieces, judged, folder, tmp_path):
    "No split.json; with fewer than three recordings nothing is left to learn probes from."
    for i, world in enumerate(pieces):
        for suffix in (".mp4", ".jsonl"): shutil.copy(next(DATA.glob(f"world-{world}_*{suffix}")), tmp_path / f"world-{world}_{i}{suffix}")
    run_notebook(ROOT / "nbs/study/3_evaluate.ipynb", tmp_path / "copy.ipynb", {"preset_name": "tiny", "data_dir": tmp_path, "out_dir": tmp_path / "out", "weights": folder / "weights", "steps": 1, "seed": 0, "device": "cpu"})
    found = read_report(tmp_path / "out/evaluate.json")
    assert len(found["recordings"]) == len(pieces) and bool(found["probes"]["model"]) == bool(found["actions"]) == judged
    assert [b["number"] is not None for b in found["bars"] if b["bar"].endswith("_r2")] == [judged] * 2


def toy(folder, name, source):
    "A notebook of one cell that takes the study's parameters."
    names = ("preset_name", "data_dir", "out_dir", "weights", "steps", "seed", "device")
    parameters = nbformat.v4.new_code_cell("\n".join(f"{n} = None" for n in names), metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)]), folder / name)


def test_failure_ends_the_study(tmp_path, capfd):
    toy(tmp_path, "1_first.ipynb", "print('weights in', weights)")
    toy(tmp_path, "2_broken.ipynb", "print('so far')\nraise ValueError('no such recording')")
    toy(tmp_path, "3_after.ipynb", "print('never')")
    words = ["--notebooks", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "figures")]
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert "[1/3] 1_first" in out and "weights in runs/weights/tiny" in out and "so far" in out and "never" not in out
    assert "ValueError: no such recording" in err and "line 2" in err
    assert [p.name for p in sorted((tmp_path / "runs").iterdir())] == ["1_first.ipynb", "2_broken.ipynb"]
    assert not (tmp_path / "figures/study.json").exists()  # half a study is no record of how long one takes


@pytest.mark.parametrize("words, named", [(["--stpes", "3"], "--stpes"), (["--preset", "tinny"], "tiny"), (["--notebooks", "nowhere"], "nowhere")])
def test_wrong_command_line_names_what_is_wrong(words, named, capsys):
    with pytest.raises(SystemExit) as stop: main(words)
    assert stop.value.code == 2 and named in capsys.readouterr().err
