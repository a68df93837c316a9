"""Libraries of another version, in a folder of their own: the environment stays as it is."""

import subprocess
import sys
from pathlib import Path


def install(folder: Path, *packages: str) -> str:
    """Install packages into `folder`, without dependencies. Returns what went wrong, or ""."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, *packages], capture_output=True, text=True)
    return (
        done.stderr.strip() or f"pip ended with code {done.returncode}" if done.returncode else ""
    )
