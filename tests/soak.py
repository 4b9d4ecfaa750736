"""How often a repeated test repeats: a few times in `make test`, its full count in `make soak`."""

import os

SOAK = os.environ.get("SOAK") == "1"


def repeats(few: int, many: int) -> int:
    """Give `few`, and `many` in `make soak`, which sets SOAK=1."""
    return many if SOAK else few
