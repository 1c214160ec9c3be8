"""All benchmarks: small for CI, or at full size into results.json, from which README's table is made.

python benchmarks/run.py --small                         seconds each; nothing but agreement is asserted
python benchmarks/run.py --out benchmarks/results.json   full size; with --only NAME the other entries stay
python benchmarks/run.py --readme [check]                write README's table, or fail if it is another
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from result import NotHere, Result, in_own_process

NAMES = ("training_step", "harvest", "shared_harvest", "memory", "attribution", "k_curve")
NAMES += ("top_examples", "full_graph", "large_models", "interop", "scaling", "authors")
ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks/results.json"
MARKERS = ("<!-- by benchmarks/run.py --readme -->\n", "<!-- end -->\n")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=NAMES, action="append", help="may be given several times")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--readme", nargs="?", const="write", choices=("write", "check"))
    given = parser.parse_args()
    if given.small and given.out:
        parser.error("--small with --out: figures of the small size are not kept, leave out one")
    if given.readme:
        sys.exit(readme(given.readme == "check"))
    document = opened(given.out)
    failed = []
    for name in given.only or NAMES:
        try:
            entry = measured(name, given.small)
        except NotHere as reason:
            print(f"{name}: not measured, {reason}")
            continue
        document["benchmarks"][name] = entry
        pairs = entry["agreements"].items()
        failed += [f"{name}: {what}" for what, (apart, most) in pairs if not apart <= most]
        if given.out:
            given.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    sys.exit(f"further apart than allowed: {'; '.join(failed)}" if failed else None)


def opened(out: Path | None) -> dict[str, Any]:
    """The document to fill: a new one, or what `out` holds of this machine."""
    own: dict[str, Any] = {"machine": machine(), "benchmarks": {}}
    held = json.loads(out.read_text()) if out and out.exists() else own
    if held["machine"] != own["machine"]:
        sys.exit(f"{out} is of {held['machine']}, this is {own['machine']}: give another --out")
    return held


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "n_cores": os.cpu_count(),
        "n_torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def measured(name: str, small: bool) -> dict[str, Any]:
    """Run one benchmark, print what it found, and return its entry."""
    began, load = time.perf_counter(), os.getloadavg()[0]  # of what else runs here
    result = run(name, True) if small else in_own_process(run, name, False)
    seconds = round(time.perf_counter() - began, 1)
    print(f"{name}: {seconds} s")
    for what, measure in result.measures.items():
        print(f"    {what}: {shown(*measure)}")
    for what, (apart, most) in result.agreements.items():
        print(f"    {what}: {apart:.1e} apart, at most {most:g}", flush=True)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    told = {"commit": commit, "date": str(date.today()), "load": round(load, 1), "wall_s": seconds}
    return told | asdict(result)


def run(name: str, small: bool) -> Result:
    return importlib.import_module(name).run(small)


def shown(value: float, unit: str) -> str:
    """Three digits, two where noise leaves no more."""
    return f"{float(f'{value:.{3 if not unit else 2}g}'):,.12g} {unit}".strip()


def readme(check: bool) -> str | None:
    """Write README's table; with `check`, only say whether it is another."""
    before, rest = README.read_text().split(MARKERS[0])
    held, after = rest.split(MARKERS[1])
    new = table(json.loads(RESULTS.read_text()))
    if check and held != new:
        return "README's table is not that of results.json: python benchmarks/run.py --readme"
    if not check:
        README.write_text(before + new.join(MARKERS) + after)
    return None


def table(document: dict[str, Any]) -> str:
    entries = document["benchmarks"]
    measures = [entries[name]["measures"].items() for name in NAMES if name in entries]
    lines = [f"| {what} | {shown(*found)} |" for one in measures for what, found in one]
    where = "{cpu}, {n_cores} cores, Python {python}, torch {torch}.".format(**document["machine"])
    return "\n".join(["| what | measured |", "|---|---|", *lines, "", where, ""])


if __name__ == "__main__":
    os.environ.setdefault("TCLIB_QUIET", "1")
    main()
