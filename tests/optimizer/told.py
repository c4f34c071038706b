"""What a test in a process of its own says: kernels stay loaded where they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def told(module: str, *arguments: Path) -> Any:
    command = [sys.executable, "-m", f"tests.optimizer.{module}", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
