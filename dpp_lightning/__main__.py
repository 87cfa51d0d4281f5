"""``python -m dpp_lightning`` is the console command ``dpp``."""

import sys

from dpp_lightning.cli.commands import main

sys.exit(main())
