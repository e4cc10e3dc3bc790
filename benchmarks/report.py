"""Where do the numbers of a benchmark go: a JSON file, and its own section of RESULTS.md."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("RESULTS.md")


def machine() -> str:
    """The processor, how many cores this process may use, and how busy they were."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"


def commit() -> str:
    """The revision that was measured, marked when files differ from it."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def write_json(path: Path, metrics: dict[str, float], details: dict[str, Any]) -> None:
    """Metrics at the top level under their names; everything measured below ``details``."""
    context = {"machine": machine(), "commit": commit()}
    path.write_text(json.dumps({**metrics, "details": details, **context}, indent=1) + "\n")


def write_section(name: str, command: str, text: str) -> None:
    """Replace a section of RESULTS.md, or add it at the end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{begin}\n## {name}\n\n`{command}` at commit {commit()} on {machine()}\n\n{text.strip()}\n{end}\n"
    old = RESULTS.read_text() if RESULTS.exists() else "# Measured\n\nEach section is written by its own command.\n"
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2].lstrip("\n") if found else ""
    RESULTS.write_text(before.rstrip() + "\n\n" + section + ("\n" + after if after else ""))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
