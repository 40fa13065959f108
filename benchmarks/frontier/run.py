"""Measures every method at every strength; an interrupted run is resumed.

    python -m frontier.run lm --seed 0                 into benchmarks/results/frontier
    python -m frontier.run smollm --only kfac svd      two methods of the pretrained model
    python -m frontier.run lm --dry-run --out folder   every step, in seconds; it proves nothing

A file holds the unedited model under ``base`` and, under ``points``, by method and strength: the
measures, the CPU seconds that the change and its preparation took, and the method's settings.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import environment, write

from frontier.methods import METHODS, Method
from frontier.settings import SETTINGS, Setting, restore
from frontier.table import RESULTS

SCHEMA = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, writing after each point."""
    options = _options(arguments)
    path = options.out / f"{options.setting}-seed{options.seed}.json"
    setting = SETTINGS[options.setting](options.seed, options.dry_run)
    found = opened(path, setting)
    chosen = [m for m in METHODS[options.setting] if not options.only or m.name in options.only]
    for method in chosen:
        points = found["points"].setdefault(method.name, {})
        ends = (method.strengths[0], method.strengths[-1])
        for strength in ends if options.dry_run else method.strengths:
            key = str(strength)
            if key in points:
                continue
            points[key] = measured(setting, method, strength)
            write(path, found)
            sys.stdout.write(f"{method.name} {key}: {_line(points[key])}\n")
            sys.stdout.flush()
    return 0


def opened(path: Path, setting: Setting) -> dict[str, Any]:
    """Return an earlier run's results to continue, or new ones with the unedited model's.

    Raises:
        SystemExit: If the earlier run was of another setting.
    """
    facts = {
        **setting.facts, "seen": len(setting.seen), "unseen": len(setting.unseen),
        "clean_rows": sum(len(batch["input_ids"]) for batch in setting.clean),
    }  # fmt: skip
    # JSON has lists for tuples.
    facts = json.loads(json.dumps(facts))
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["setting"] != facts or found["schema_version"] != SCHEMA:
            raise SystemExit(f"{path} is of another setting; move it away, or pass another --out")
        return found
    return {
        "schema_version": SCHEMA, "name": setting.name, "setting": facts,
        "environment": environment(), "base": setting.measures(), "points": {},
    }  # fmt: skip


def measured(setting: Setting, method: Method, strength: float) -> dict[str, Any]:
    """Change the model, measure it, and restore its weights."""
    before = {name: value.clone() for name, value in setting.model.state_dict().items()}
    earlier = sum(setting.spent.values())
    started = time.process_time()
    try:
        facts = method.change(setting, strength)
        # Each needed preparation counts, also if another method made it.
        own = time.process_time() - started - (sum(setting.spent.values()) - earlier)
        seconds = own + sum(setting.spent[need] for need in method.needs)
        return {**setting.measures(), "cpu_seconds": seconds, **facts}
    finally:
        restore(setting.model, before)


def _line(point: dict[str, Any]) -> str:
    return (
        f"recited {point['strict_seen']:.0%} of the seen, {point['strict_unseen']:.0%} of the "
        f"unseen, perplexity {point['perplexity']:.2f}, {point['cpu_seconds']:.1f} CPU seconds"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    names = sorted({method.name for methods in METHODS.values() for method in methods})
    parser.add_argument("--only", nargs="+", choices=names, help="these methods alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny, two strengths a method")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
