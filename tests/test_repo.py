"Promises of the repository: floors, notebooks and modules in step, style, figures, size."

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minecraft_jepa
from minecraft_jepa.outputs import MAX_PICTURE_BYTES, source_hash

ROOT = Path(__file__).parent.parent
LIBRARY = sorted(
    path
    for path in (ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb")
    if path.parent.name not in ("study", "bench")
)
STUDY = sorted([*(ROOT / "nbs/study").glob("*.ipynb"), *(ROOT / "nbs/bench").glob("*.ipynb")])
NOTEBOOKS = [*LIBRARY, ROOT / "nbs/index.ipynb", *STUDY]
PACKAGE = ROOT / "minecraft_jepa"
BY_HAND = PACKAGE / "game" / "guard.py"  # a program of its own, run by path
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_") and p != BY_HAND)
# Imports go to packages further left only. Within a package the notebooks' numbers decide.
FLOORS = (
    "utils < folders < config_sections < config < data < viz model game < training evaluation "
    "< planning < play agent notebook_runner < study demo outputs < commands < cli"
)
FLOOR = {name: i for i, floor in enumerate(FLOORS.split(" < ")) for name in floor.split()}


def dotted(path):
    "Name of a module, or of a notebook's module, below the package: `data.actions`."
    base = PACKAGE if path.suffix == ".py" else ROOT / "nbs"
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(re.sub(r"^\d\d_", "", part) for part in parts)


NUMBERS = {dotted(p): int(p.stem[:2]) for p in LIBRARY}
MAX_MODULE_LINES = 345  # docstrings included; most have 250 at most
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini")


def each(paths):
    "A test for each of the files."
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def tracked():
    "Files that git tracks."
    try:
        command = ["git", "-C", ROOT, "ls-files", "-z"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [ROOT / name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def imported(path_or_text, package=("minecraft_jepa",)):
    "Dotted name of everything that Python source imports; relative imports are of `package`."
    for node in ast.walk(ast.parse(path_or_text)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*up, *([node.module] if node.module else [])])
            yield from (f"{base}.{a.name}" for a in node.names)


def imports_of(path):
    "What a module or a notebook imports, by full name."
    inside = path.is_relative_to(PACKAGE)
    package = path.relative_to(ROOT).parent.parts if inside else ("minecraft_jepa",)
    return imported(code(path), package)


def code(path):
    "Python source of a module or notebook, without IPython's own lines."
    if path.suffix == ".py":
        return path.read_text()
    return "\n".join(re.sub(r"^\s*[%!].*$", "", source(c), flags=re.MULTILINE) for c in cells(path))


@each(LIBRARY)
def test_notebook_is_named_after_its_module(path):
    assert re.search(r"^#\| default_exp ([\w.]+)$", code(path), re.MULTILINE)[1] == dotted(path)


def test_every_module_has_its_notebook():
    modules = {dotted(p) for p in MODULES}
    assert modules == set(NUMBERS), "delete a notebook and its module together"


def test_notebooks_have_names_of_their_own():
    stems = [p.stem for p in NOTEBOOKS]
    assert len(stems) == len(set(stems)), "nbdev_test lists failures by base name"


@each(MODULES)
def test_imports_go_down_the_floors_only(path):
    own = dotted(path)
    floor = FLOOR[own.split(".")[0]]
    wrong = []
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "minecraft_jepa" or len(parts) < 2 or parts[1] not in FLOOR:
            continue
        same = parts[1] == own.split(".")[0] and "." in own
        other = ".".join(parts[1:3])
        if same and NUMBERS.get(other, 99) >= NUMBERS[own]:
            wrong.append(name)
        if not same and FLOOR[parts[1]] >= floor:
            wrong.append(name)
    assert not wrong


@each(LIBRARY)
def test_notebook_opens_with_title_and_claim(path):
    first = json.loads(path.read_text())["cells"][0]
    title, claim = [line for line in source(first).splitlines() if line][:2]
    assert (
        first["cell_type"] == "markdown" and re.match(r"# \w", title) and re.match(r"> \S+ ", claim)
    )


@each(NOTEBOOKS)
def test_outputs_are_those_of_the_cell_as_it_is(path):
    for cell in cells(path):
        assert cell["execution_count"] is None, "run `make export`"
        if cell["outputs"]:
            key = cell["metadata"].get("source_hash")
            assert key == source_hash(source(cell)), f"run `make outputs`: {source(cell)[:60]}"
        for output in cell["outputs"]:
            picture = output.get("data", {}).get("image/png", "")
            assert len(picture) * 3 / 4 <= MAX_PICTURE_BYTES


def test_outputs_stay_small():
    outputs = [cell["outputs"] for path in NOTEBOOKS for cell in cells(path)]
    assert len(json.dumps(outputs)) < 4 * 2**20


def num_definitions(text):
    return sum(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.parse(text).body)


@each(LIBRARY)
def test_exported_cells_fit_a_screen(path):
    """Several definitions share 60 lines; one by itself, with its docstring, may be longer."""
    exported = [
        source(c) for c in cells(path) if re.search(r"^#\| *export", source(c), re.MULTILINE)
    ]
    limits = {text: 60 if num_definitions(text) > 1 else 128 for text in exported}
    assert exported
    assert not [t.splitlines()[1] for t in exported if len(t.splitlines()) > limits[t]]


@each(MODULES)
def test_modules_have_one_purpose(path):
    assert len(path.read_text().splitlines()) <= MAX_MODULE_LINES


@each(MODULES)
def test_public_names_are_explained(path):
    public = [
        n
        for n in ast.parse(code(path)).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
    ]
    assert not [n.name for n in public if not ast.get_docstring(n)]


@each(STUDY)
def test_study_notebook_takes_the_agreed_parameters(path):
    parameters, first, *_ = [
        c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])
    ] + cells(path)[1:]
    assert cells(path)[0] == parameters, "parameters come first"
    names = [n.targets[0].id for n in ast.parse(source(parameters)).body]
    parts = {
        "8_ablations": ["factors"],
        "10_agent": ["worlds", "tasks", "methods"],
        "14_variants": ["factors", "looks_dir"],
    }
    assert names == [
        "preset_name",
        "data_dir",
        "out_dir",
        "weights",
        "steps",
        "seed",
        "device",
        *parts.get(path.stem, []),  # what takes hours can be done in part
    ]
    assert "study_parameters(globals()" in source(first), (
        "parameters are checked before anything else is defined"
    )


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in Path(folder).rglob("*")
        if p.suffix in (".py", ".ipynb", ".toml")
        and not p.parent.name.startswith(".")
        and p.name != "_modidx.py"  # nbdev's index, which git ignores
    }


def test_export_and_clean_change_nothing(tmp_path):
    ignore = shutil.ignore_patterns("kernel-ipc-*", ".*", "__pycache__")
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=ignore)
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    by_hand = [*PACKAGE.rglob("__*__.py"), PACKAGE / "game/guard.py"]
    for written in by_hand:  # but for the version
        copy = tmp_path / written.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(written, copy)
    clean = {
        k: v for k, v in os.environ.items() if k != "IN_TEST"
    }  # set, it makes nbdev_export do nothing
    for tool in ("nbdev_export", "nbdev_clean"):
        subprocess.run(
            [Path(sys.executable).parent / tool],
            cwd=tmp_path,
            env=clean,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    made, committed = files(tmp_path), {}
    for folder in ("nbs", "minecraft_jepa"):
        committed |= {f"{folder}/{k}": v for k, v in files(ROOT / folder).items()}
    committed["pyproject.toml"] = (ROOT / "pyproject.toml").read_bytes()
    changed = sorted(n for n in made | committed if made.get(n) != committed.get(n))
    assert not changed, (
        f"edit the notebook, not the module, and run `make export`: {', '.join(changed)}"
    )


def test_version_is_the_same_everywhere():
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert minecraft_jepa.__version__ == SETTINGS["DEFAULT"]["version"] == citation


def packages(requirements):
    return {re.match(r"[\w.-]+", r)[0].replace("_", "-").lower() for r in requirements}


def needed(paths):
    "Packages, as pip names them, that files import and Python does not bring."
    pip_name = {
        "PIL": "pillow",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "IPython": "ipykernel",
        "Xlib": "python-xlib",
        "nbclient": "papermill",
        "nbformat": "papermill",
        "traitlets": "papermill",
    }
    tops = (
        {name.split(".")[0] for p in paths for name in imports_of(p)}
        - set(sys.stdlib_module_names)
        - {"minecraft_jepa"}
    )
    tops -= {p.stem for p in (ROOT / "tests").glob("*.py")}  # what tests share
    return {pip_name.get(top, top).replace("_", "-").lower() for top in tops}


def test_dependencies_are_those_imported():
    runtime, dev = (
        packages(PROJECT["dependencies"]),
        packages(PROJECT["optional-dependencies"]["dev"]),
    )
    game = [*(PACKAGE / "game").glob("*.py")]
    # the runner needs papermill, and is for a clone with `dev`
    in_a_clone = ("study", "notebook_runner", "outputs", "widget")
    modules = [p for p in MODULES if p.stem not in in_a_clone and p not in game]
    assert needed(game) - runtime == packages(PROJECT["optional-dependencies"]["luanti"])
    shown = {"ipykernel"}  # IPython shows a figure where a notebook runs, and nowhere else
    assert not needed(modules) - runtime - shown, "imported, not declared"
    assert not runtime - needed(modules), "declared, imported nowhere"
    assert not needed([*NOTEBOOKS, *MODULES, *(ROOT / "tests").glob("*.py")]) - runtime - dev, (
        "imported, not declared"
    )


FIGURES = sorted(p for p in (ROOT / "figures").glob("*") if p.suffix in (".png", ".gif"))


@each(FIGURES)
def test_figure_has_its_numbers(path):
    assert json.loads(path.with_suffix(".json").read_text())


def test_repository_stays_small():
    assert sum(p.stat().st_size for p in tracked()) < 44 * 2**20


def test_no_file_names_a_private_folder():
    private = re.compile(r"(?<![\w.-])/(?:home|root|work|Users)/|\.\./shared\b")
    found = {}
    for p in tracked():
        try:
            hit = private.search(p.read_text())
        except UnicodeDecodeError:
            continue
        if hit:
            found[str(p.relative_to(ROOT))] = hit[0]
    assert not found


@each([*ROOT.glob("*.md"), *ROOT.glob("data/*.md")])
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|href)=\"([^\"#]+)\"", path.read_text())
    links = [a or b for a, b in links if not re.match(r"\w+:", a or b)]
    assert not [link for link in links if not (path.parent / link).exists()]


@each([*ROOT.glob("*.md"), *ROOT.glob("data/*.md"), *NOTEBOOKS])
def test_no_placeholder_is_left(path):
    text = (
        path.read_text()
        if path.suffix == ".md"
        else "\n".join(source(c) for c in cells(path, "markdown"))
    )
    assert not re.findall(r"@[A-Z_]+@|\b(?:COST|EXPECT|TODO|FIXME)\d?\b", text)


@each(STUDY)
def test_study_notebook_opens_with_a_command_for_the_root(path):
    opening = source(cells(path, "markdown")[0])
    # papermill does not make the folder of its output
    command = re.search(r"^mkdir -p _runs\n(papermill .*)$", opening, re.MULTILINE)[1]
    folder = f"nbs/{path.parent.name}"
    assert f"--cwd {folder} {folder}/{path.name} _runs/{path.name}" in command, (
        "its paths are relative to its own folder"
    )


@pytest.fixture
def make(tmp_path):
    "Runs make on a copy of the Makefile, with a Python that fails where it is asked for `breaks`."
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*words, breaks):
        python = tmp_path / "fake-python"
        python.write_text(
            f'#!/bin/sh\ncase "$2" in *{breaks}*) exit 1;; esac\nexec "{sys.executable}" "$@"\n'
        )
        python.chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        return subprocess.run(
            ["make", *words, f"PYTHON={python}"],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("breaks", "remedy"),
    [
        ("version_info", "Python 3.11 or newer"),
        ("ensurepip", f"apt install python3.{sys.version_info.minor}-venv"),
    ],
)
def test_make_names_the_remedy(make, tmp_path, breaks, remedy):
    done = make("study", breaks=breaks)
    assert done.returncode and remedy in done.stderr and not (tmp_path / ".venv").exists()


def test_make_refuses_a_misspelt_variable(make):
    done = make("study", "PRSET=small", breaks="nothing")
    assert done.returncode and "PRSET" in done.stderr and "PRESET" in done.stderr


@pytest.mark.parametrize("target", ["play", "demo"])
def test_make_hands_on_what_was_chosen(make, target):
    recipe = make("-n", target, "DATA=my videos", "OUT=mine", breaks="nothing").stdout
    assert f"{target} --data 'my videos'" in recipe and "--out 'mine'" in recipe
    assert "--out" not in make("-n", target, breaks="nothing").stdout


def test_a_study_leaves_the_tracked_figures_alone(make):
    recipe = make("-n", "study", breaks="nothing").stdout
    out = re.search(r"--out '([^']+)'", recipe)[1]
    ignored = subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", out], check=False)
    assert out == "_runs/figures"
    if (ROOT / ".git").exists():
        assert ignored.returncode == 0


@pytest.mark.parametrize("uv", ["works", "is missing", "fails"])
def test_pip_installs_where_uv_does_not(make, tmp_path, uv):
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    programs = {
        "pip": "exit 0",
        "python": 'echo "python $*" >> calls; case "$*" in *uv) exit '
        f"{int(uv == 'is missing')};; esac",
        "uv": f'echo "uv $*" >> calls; exit {int(uv == "fails")}',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    done = make(".venv/installed", breaks="nothing")
    calls = (tmp_path / "calls").read_text().splitlines()
    by_pip = [call for call in calls if call.startswith("python -m pip") and ".[dev]" in call]
    assert done.returncode == 0 and (tmp_path / ".venv/installed").is_file()
    assert bool(by_pip) == (uv != "works")
    assert any(call.startswith("uv") for call in calls) == (uv != "is missing")
    assert len(done.stdout.splitlines()) <= 2, "installing is told in a line"


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_style_is_what_ruff_asks_for(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "--quiet", str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_no_line_is_longer_than_a_screen():
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*LIBRARY, *STUDY, *(ROOT / "tests").glob("*.py")]
        for number, line in enumerate(code(path).splitlines(), 1)
        if len(line) > 100
    ]
    assert not long
