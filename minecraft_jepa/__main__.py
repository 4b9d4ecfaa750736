"""`python -m minecraft_jepa COMMAND`, where no script `minecraft-jepa` is installed."""

import sys

from .cli import main

sys.exit(main())
