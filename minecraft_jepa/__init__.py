"""A JEPA image world model for Minecraft."""

__version__ = "0.2.0"

import importlib
import os

# Threads that spin at a barrier make torch several times slower when another process wants the
# core (LOG.md). OpenMP reads this once, as torch is imported: import this package before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_EXPORTS = {
    "ClipStore": "data.clip_store",
    "DiT": "model.decoders",
    "LuantiEnv": "game.env",
    "RegressionHead": "model.decoders",
    "WorldModel": "model.world_model",
    "compare_reports": "evaluation.report_comparison",
    "load_config": "config",
    "load_report": "evaluation.report",
    "load_split": "data.splits",
    "open_recording": "data.recordings",
    "preset": "config",
    "run_training": "training.pipeline",
    "sample_windows": "data.loader",
}
_PACKAGES = ("config", "data", "evaluation", "game", "model", "study", "training", "utils", "viz")
__all__ = [*_EXPORTS, *_PACKAGES]


def __getattr__(name):
    """Import on first use: the package alone takes milliseconds and loads no torch."""
    if name in _EXPORTS:
        module = importlib.import_module(f".{_EXPORTS[name]}", __name__)
        value = getattr(module, name)
    elif name in _PACKAGES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
