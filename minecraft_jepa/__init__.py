__version__ = "0.1.0"

import os

# Threads that spin at a barrier make torch several times slower when another process wants the
# core (LOG.md). OpenMP reads this once, as torch is imported: import this package before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
