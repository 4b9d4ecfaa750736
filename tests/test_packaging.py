"""What is given away: the package, and its source as one file."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = (
    "papermill",
    "nbclient",
    "nbformat",
    "ipykernel",
    "ipywidgets",
    "anywidget",
    "gymnasium",
    "Xlib",
    "s3fs",
    "tensorboard",
    "torchmetrics",
    "torch_fidelity",
    "nbdev",
    "fastcore",
    "pytest",
    "hypothesis",
    "webdataset",
    "moto",
)
ALONE = """
import importlib, importlib.machinery, sys
find, hidden = importlib.machinery.PathFinder.find_spec, set(sys.argv[1].split())
def without(name, path=None, target=None):
    return None if name.split(".")[0] in hidden else find(name, path, target)
importlib.machinery.PathFinder.find_spec = without
for module in sys.argv[2:]:
    try: importlib.import_module(f"minecraft_jepa.{module}")
    except ImportError as e: print(module, e)
"""  # what the extras bring is not found


def test_without_extras_a_module_is_imported_or_says_what_to_install():
    package = ROOT / "minecraft_jepa"
    paths = [p.relative_to(package).with_suffix("") for p in package.rglob("[a-z]*.py")]
    modules = sorted(".".join(path.parts) for path in paths)
    words = [sys.executable, "-c", ALONE, " ".join(EXTRAS), *modules]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stopped = [line.split(" ", 1) for line in done.stdout.splitlines()]
    game = {m for m in modules if m.startswith("game.")}
    assert "game.luanti" in game
    others = {m for m in modules if m.startswith("agent.")} | {"study", "play.widget"}
    assert game <= {module for module, _ in stopped} <= game | others
    for module, why in stopped:
        assert "pip install" in why, f"{module}: {why}"


def build(copy, call):
    """Copy what a package is built from, and call setuptools there; it writes into `dist`."""
    pytest.importorskip("setuptools", "77")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "minecraft_jepa", copy / "minecraft_jepa", ignore=ignore)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    words = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{call}('dist')"]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unpacked_source_has_no_tests_without_their_data(tmp_path):
    """Tests need recordings, weights and notebooks, which are not given away with the package."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    build(copy, "build_sdist")
    with tarfile.open(next((copy / "dist").glob("*.tar.gz"))) as tar:
        names = {n.partition("/")[2] for n in tar.getnames()}
    assert not [n for n in names if "test" in n]
    assert {f"minecraft_jepa/{p.name}" for p in (ROOT / "minecraft_jepa").glob("*.py")} <= names


def test_an_editable_install_is_found_beside_a_clone_of_the_same_name(tmp_path):
    """From the folder that holds the clone, a finder would find the clone's folder first."""
    build(tmp_path / "minecraft_jepa", "build_editable")
    site = tmp_path / "site"
    with zipfile.ZipFile(next((tmp_path / "minecraft_jepa/dist").glob("*.whl"))) as wheel:
        wheel.extractall(site)
    source = (
        f"import site; site.addsitedir({str(site)!r})\n"
        "import minecraft_jepa; print(minecraft_jepa.__file__)"
    )
    words = [sys.executable, "-E", "-S", "-c", source]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "minecraft_jepa/minecraft_jepa/__init__.py"


def test_wheel_holds_every_sub_package_and_the_command(tmp_path):
    """What pip installs: the modules of all folders, and `minecraft-jepa`."""
    copy = tmp_path / "copy"
    build(copy, "build_wheel")
    with zipfile.ZipFile(next((copy / "dist").glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        (entry_points,) = [n for n in names if n.endswith("entry_points.txt")]
        commands = wheel.read(entry_points).decode()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "minecraft_jepa").rglob("*.py")}
    assert "minecraft_jepa/training/trainer.py" in modules
    assert modules <= names
    assert "minecraft-jepa = minecraft_jepa.cli:main" in commands
    assert not [n for n in names if n.startswith(("tests/", "nbs/", "data/"))]


def test_the_installed_command_is_the_one_of_the_package():
    """`minecraft-jepa` beside this Python, and `python -m minecraft_jepa`, say the same."""
    script = Path(sys.executable).parent / "minecraft-jepa"
    if not script.is_file():
        pytest.skip("the package is not installed")
    said = []
    for program in ([script], [sys.executable, "-m", "minecraft_jepa"]):
        done = subprocess.run(
            [*program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]
    assert "minecraft-jepa COMMAND" in said[0]
