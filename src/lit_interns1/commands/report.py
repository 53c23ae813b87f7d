"""`lit-interns1 report RUN_DIR`: one HTML page about a run, from its local logs alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def run(args: Sequence[str]) -> None:
    """Writes the page and prints where it is.

    Args:
        args: What stands behind the command's name.
    """
    parser = argparse.ArgumentParser(
        prog="lit-interns1 report", description="One self-contained HTML page about a run, from its local logs alone."
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run; it needs metrics/metrics.csv")
    parser.add_argument("--output", metavar="FILE", help="where to write; default: report.html in the run directory")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN_DIR", help="other runs, whose curves are drawn beside"
    )
    options = parser.parse_args(args)

    from lit_interns1.reports import write_report

    try:
        print(f"wrote {write_report(options.run_dir, options.output, options.compare)}")
    except (OSError, ValueError) as error:
        print(f"lit-interns1 report: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
