"The verdicts on the seed's claims, held against the numbers beside them."

import json
from pathlib import Path

import pytest

FIGURES = Path(__file__).parent.parent / "figures"


def numbers(name):
    path = FIGURES / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there: run make study")
    return json.loads(path.read_text())


def test_claims_are_judged_by_the_numbers_beside_them():
    claims, evaluate = numbers("claims"), numbers("evaluate")
    assert len(claims["claims"]) == 6 and all(
        c["verdict"] in ("held", "partly", "not shown") for c in claims["claims"]
    )
    assert (
        claims["recordings"] == evaluate["recordings"] and claims["weights"] == evaluate["weights"]
    )
    predicts, keeps = claims["claims"][:2]
    better = {r: set(t) for r, t in evaluate["ticks_better"].items()}
    everywhere = set.intersection(
        *(t for r, t in better.items() if r not in ("other_future", "no_history"))
    )
    assert predicts["verdict"] == (
        "held" if len(everywhere) == 15 else "partly" if everywhere else "not shown"
    )
    assert f"{evaluate['retrieval']['top1']['4']['model']['mean']:.2f}" in keeps["evidence"]
    for c in claims["claims"]:
        if c["figure"] != "ablations.png" or claims["ablations"]:
            assert (FIGURES / c["figure"]).is_file()
