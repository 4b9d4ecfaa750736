"""What tests ask of `minecraft-jepa`."""

import re

from minecraft_jepa.cli import main


def refused(capsys, words, match, status=1):
    """The command ends with `status`, and on stderr with a line of its own in which `match` is."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    text = capsys.readouterr().err
    assert "Traceback" not in text
    line = text.splitlines()[-1]
    assert line.startswith("minecraft-jepa"), text
    assert re.search(match, line), line
    return line
