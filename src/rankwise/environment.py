"""What a run was made with, for its config.json."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rankwise import __version__


def environment(names: Sequence[str]) -> dict[str, Any]:
    """Versions, of the packages named too, and git revision; nothing from the environment's variables."""
    packages: dict[str, str | None] = {}
    for name in names:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "rankwise": __version__,
        "python": platform.python_version(),
        "platform": platform.system(),
        "packages": packages,
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    """Commit of the checkout that rankwise runs from; None for an installed wheel or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "src" / "rankwise").is_dir():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
