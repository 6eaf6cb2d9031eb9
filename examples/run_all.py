"""Runs every example at small size, each in a process of its own; exits with 1 if one fails."""

import os
import subprocess
import sys
from pathlib import Path

here = Path(__file__).parent
quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "error"}
failed = []
showcases = sorted(here.glob("*/run.py"))  # a folder each
for path in [*(path for path in sorted(here.glob("*.py")) if path.name != "run_all.py"), *showcases]:
    name = str(path.relative_to(here))
    done = subprocess.run([sys.executable, path, "--small"], capture_output=True, text=True, env=quiet, check=False)
    print(f"{name}: {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
    if done.returncode:
        failed.append(name)
        print(done.stdout, done.stderr, sep="\n")
sys.exit(1 if failed else 0)
