"""What is given away: the package, and its source as one file."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = (
    "papermill",
    "nbclient",
    "nbformat",
    "ipykernel",
    "ipywidgets",
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
    modules = sorted(p.stem for p in (ROOT / "minecraft_jepa").glob("[a-z]*.py"))
    words = [sys.executable, "-c", ALONE, " ".join(EXTRAS), *modules]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stopped = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert (
        {"luanti", "recorder"}
        <= {module for module, _ in stopped}
        <= {"luanti", "recorder", "study"}
    )
    for module, why in stopped:
        assert "pip install" in why, f"{module}: {why}"


def test_unpacked_source_has_no_tests_without_their_data(tmp_path):
    """Tests need recordings, weights and notebooks, which are not given away with the package."""
    pytest.importorskip("setuptools", "77")
    copy = tmp_path / "copy"
    for name in ("minecraft_jepa", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((copy / "dist").glob("*.tar.gz"))) as tar:
        names = {n.partition("/")[2] for n in tar.getnames()}
    assert not [n for n in names if "test" in n]
    assert {f"minecraft_jepa/{p.name}" for p in (ROOT / "minecraft_jepa").glob("*.py")} <= names
