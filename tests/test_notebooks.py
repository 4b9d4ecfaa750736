"""Every library notebook runs, each in a fresh process; torch is imported once for all of them."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUDY = ("study", "bench")  # run by papermill
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if p.parent.name not in STUDY)


def run(notebook, output, cache):
    """In a process of its own: run the cells that `nbdev_test` runs, and exit with 1 at a fault."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["MINECRAFT_JEPA_CACHE"] = cache
    multiprocessing.set_start_method("fork", force=True)  # Linux's own before Python 3.14
    from nbdev.config import get_config
    from nbdev.test import test_nb

    os.chdir(ROOT)
    skip = get_config().tst_flags.split()
    passed, _ = test_nb(notebook, skip_flags=skip, basepath=str(ROOT))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if passed else 1)  # threads that a notebook left must not keep the process


@pytest.fixture(scope="session")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nbdev.test", "minecraft_jepa.training.pipeline"])
    return context


@pytest.mark.parametrize(
    "notebook", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs"))
)
def test_notebook_runs(notebook, processes, tmp_path):
    output = tmp_path / "output.txt"
    process = processes.Process(target=run, args=(notebook, output, str(tmp_path / "cache")))
    process.start()
    process.join()
    assert process.exitcode == 0, output.read_text()
