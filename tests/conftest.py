"Shared by all tests: no display, one thread, no time limits, and a cache of their own."

import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile("study", deadline=None)
settings.load_profile("study")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    "Clips are decoded anew: a store of an earlier version must not hide a fault."
    patch = pytest.MonkeyPatch()
    patch.setenv("MINECRAFT_JEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
