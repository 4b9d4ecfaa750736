"Shared by all tests: no display, one thread, no time limits, and a clip store of their own."

import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile("study", deadline=None)
settings.load_profile("study")


@pytest.fixture(autouse=True, scope="session")
def clips_apart(tmp_path_factory):
    "Decode anew: a store filled by an earlier version must not hide a fault."
    patch = pytest.MonkeyPatch()
    patch.setenv("MINECRAFT_JEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
