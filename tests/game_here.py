"""Whether the game can be started here."""

import pytest

from minecraft_jepa.game.luanti import LuantiError, find_programs

try:
    find_programs()
    missing = ""
except LuantiError as error:
    missing = str(error)
needs_game = pytest.mark.skipif(bool(missing), reason=missing)
