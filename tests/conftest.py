"""Before torch is imported: OpenMP's threads sleep while they wait, as in ``dpp``; spinning ones starve each other."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
