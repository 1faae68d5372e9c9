"""What every test shares: where helpers are, also for the processes that tests start."""

import os
import sys
from pathlib import Path

HOME = Path(__file__).parent
PATHS = [str(path) for path in (HOME, *sorted(HOME.iterdir())) if path.is_dir() and path.name != "__pycache__"]
PATHS.append(str(HOME.parent / "docs" / "results"))

sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
