"""jobs.jsonl: what was handed in for a run, and what became of each start, one JSON object a line.

Written by launch/submit.py on the login node ("submit") and by the jobs themselves ("start", "end").
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from diffcap_dist.run_dir import RunDir


def add_record(run: RunDir, record: dict[str, Any]) -> None:
    """One line, in one write: a login node and a job may append at the same time."""
    run.root.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **record}) + "\n"
    descriptor = os.open(run.jobs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_records(run: RunDir) -> list[dict[str, Any]]:
    """All records, oldest first; a line that a kill cut short is passed over."""
    records = []
    for line in run.jobs.read_text(encoding="utf-8").splitlines() if run.jobs.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
