"""The committed benchmarks: their numbers, and what the README says of them."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def numbers(name):
    path = ROOT / "figures" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: run make bench")
    return json.loads(path.read_text())


def test_loader():
    found = numbers("bench_loader")
    windows, frames = found["windows_per_second"], found["build_frames_per_second"]
    assert (
        windows["ours"] > 100 * windows["original_way"]
        and windows["ours"] > 0.5 * windows["memory_copy"]
    )
    assert frames["ours"] > 0.8 * frames["decode"]
    peak = {int(n): b for n, b in found["peak_bytes_by_recordings"].items()}
    assert max(peak) >= 100 * min(peak) and max(peak.values()) < 1.1 * peak[min(peak)]


def test_training():
    found = numbers("bench_training")
    assert set(found["step_seconds"]) >= {"original_way", "ours"} and set(found["peak_bytes"]) >= {
        "original_way",
        "ours",
    }
    if found["device"] == "cpu":
        assert found["peak_share"] is None and found["paper_peak_bytes_gpu"] is None
    assert found["share_of_time_waiting_for_data"] < 0.05
    seed, ours = (
        [found[k][who] for k in ("step_seconds", "peak_bytes")] for who in ("original_way", "ours")
    )
    if found["preset"] == "paper":
        assert seed[0] >= 2 * ours[0] and 2 * ours[1] <= seed[1]
    for what in (
        "attention written out",
        "optimizer and EMA one by one",
        "other precision",
        "activations computed twice",
        "batch in two parts",
    ):
        assert found["ablation"]["runs"][what]["step_seconds"] > 0
    for value in (found["step_seconds"]["original_way"], found["step_seconds"]["ours"]):
        assert f"{value:.1f} s" in README
