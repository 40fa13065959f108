"""The command line: ``curvfast`` and ``python -m curvfast``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from curvfast.cli import demo, env, evaluate, lab, mine, patch, plan, report, spectrum_log, study
from curvfast.errors import CurvfastError

_EPILOG = """\
quick start:
  curvfast demo                  the paper's experiment in small, about five minutes on two cores
  curvfast demo --out results    keep results.json, a picture and the edited checkpoint
  curvfast demo smollm           the same edit on a real pretrained model
  curvfast lab vit               wrong labels learnt by heart are forgotten, the right ones kept
  curvfast study figure3         a figure of the paper, over three seeds
  curvfast report results        one page of HTML of what demo, lab, study or you kept in a folder
  curvfast plan olmo-2-7b        what collecting its factors takes: memory, passes, FLOPs
  curvfast apply PATCH --model DIR    edit a checkpoint; curvfast revert takes it back
  curvfast evaluate DIR --patch PATCH --text FILE   perplexity and more, before and after
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed with a reason, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="curvfast",
        description="The curvature of large networks, and the memorization it gives away.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    loud = parser.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="tell what is being done")
    loud.add_argument("-q", "--quiet", action="store_true", help="print results only")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, lab, study, report, plan, mine, patch, evaluate, spectrum_log, env):
        command.add_to(commands)
    options = parser.parse_args(arguments)
    level = os.environ.get("CURVFAST_LOG") or ("INFO" if options.verbose else "WARNING")
    if level.upper() not in logging.getLevelNamesMapping():
        parser.error(f"CURVFAST_LOG={level!r}: pass DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(level=level.upper(), format="%(name)s: %(message)s")
    try:
        code: int = options.run(options)
    except CurvfastError as error:
        print(f"curvfast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("curvfast: interrupted", file=sys.stderr)
        return 130
    return code
