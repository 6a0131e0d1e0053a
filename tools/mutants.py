"""`make mutants`: break the package in small ways, one at a time, and see whether a test notices.

A seeded sample of all mutants of `mixconv/**/*.py` (`tools/mutate.py`) is judged by the tests
(`tools/judge.py`). What came of it goes into `tests/data/mutants.json`. Why a survivor lives is
written there by hand, "why" and "because", and stays when the same one survives again.

Ours, for lack of a library that fits: mutmut leaves out decorated functions and what a module does
when it is imported, where defaults and frozen records are; cosmic-ray changes no texts, drops no
arguments, and makes eleven mutants of each `+`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.judge import Judge
from tools.mutate import OPERATORS, Mutant, all_mutants, draw
from tools.notebooks import ROOT, write_atomically

REPORT = ROOT / "tests" / "data" / "mutants.json"
EXCUSED = ("equivalent", "message only", "speed only")  # what no test of results can see
WHY = (*EXCUSED, "real")
CONTROLS = 10  # judged without their change: a judge that is always against would show


def read_report(path: Path = REPORT) -> dict[str, Any]:
    """The stored report; empty before there is one."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def sum_up(killed: int, survivors: list[dict[str, str]]) -> dict[str, Any]:
    """Counts, and the share of those killed among all that are not excused."""
    counts = Counter({"killed": killed, **dict.fromkeys(WHY, 0)})
    counts.update(survivor["why"] for survivor in survivors)
    share = killed / max(1, killed + len(survivors) - sum(counts[why] for why in EXCUSED))
    return {"counts": dict(counts), "killed_share": int(share * 1000) / 1000}


def judge_all(sample: list[Mutant], patience: float) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with who noticed it; prints a line for each."""
    folder = Path(tempfile.mkdtemp(prefix="mixconv-mutants-"))
    try:
        judge = Judge(folder, patience)
        alone = len(judge.record.alone)
        print(f"without a mutant, {len(judge.record.seconds)} tests pass, and {alone} alone")
        for mutant in sample[:CONTROLS]:
            if said := judge.ask(judge.choose(mutant)):
                raise RuntimeError(f"unchanged, and yet there fails {said}")
        for number, mutant in enumerate(sample, 1):
            said = judge.judge(mutant)
            verdict = f"killed by {said}" if said else "SURVIVES"
            print(
                number, f"{mutant.path}:{mutant.line}", mutant.name, verdict, sep="  ", flush=True
            )
            yield mutant, said
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder, ignore_errors=True)


def describe(mutant: Mutant, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """A survivor as the report has it, with what was said about it before."""
    before = known.get(mutant.key, {})
    told = {"key": mutant.key, "file": mutant.path, "change": mutant.name, "kind": mutant.kind}
    return told | {"why": before.get("why", ""), "because": before.get("because", "")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("--size", type=int, default=300, help="of the sample (300)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (1)")
    parser.add_argument("--patience", type=float, default=60, help="seconds of tests a mutant (60)")
    parser.add_argument("--again", action="store_true", help="leave out what was killed before:"
                        " after new tests, new code, or a run that was ended")  # fmt: skip
    options = parser.parse_args()
    everything, before = all_mutants(), read_report()
    sample = draw(everything, options.seed, options.size)
    known = {survivor["key"]: survivor for survivor in before.get("survivors", [])}
    killed = {*before.get("killed", [])} & {m.key for m in sample} if options.again else set()
    survivors: list[dict[str, str]] = []
    try:
        rest = [mutant for mutant in sample if mutant.key not in killed]
        for mutant, said in judge_all(rest, options.patience) if rest else ():
            killed |= {mutant.key} if said else set()
            survivors += [] if said else [describe(mutant, known)]
    finally:
        report = {
            "date": datetime.date.today().isoformat(), "python": platform.python_version(),
            "torch": version("torch").partition("+")[0], "coverage": version("coverage"),
            "operators": OPERATORS, "seed": options.seed, "patience": options.patience,
            "sample": len(killed) + len(survivors), "of": len(everything),
            **sum_up(len(killed), survivors), "survivors": survivors, "killed": sorted(killed),
        }  # fmt: skip
        if killed or survivors:
            write_atomically(REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(report["counts"], "not explained:", sum(not s["why"] for s in survivors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
