"""What a module of this folder prints when it is run in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def printed(module, *arguments):
    here = Path(__file__).parents[1]
    path = os.pathsep.join(
        [str(here), str(here / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    result = subprocess.run(
        [sys.executable, "-m", f"hostile.{module}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return result.stdout
