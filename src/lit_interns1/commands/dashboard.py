"""`lit-interns1 dashboard`: the W&B workspace of the documented keys, written to a file or uploaded from one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def run(args: Sequence[str]) -> None:
    """Writes the description of the workspace, or uploads one.

    Args:
        args: What stands behind the command's name.
    """
    parser = argparse.ArgumentParser(
        prog="lit-interns1 dashboard",
        description="The W&B workspace of the documented keys: written to a file without network, then uploaded.",
    )
    parser.add_argument("--project", help="W&B project; default: lit-interns1, or the one in the uploaded file")
    parser.add_argument("--entity", help="W&B user or team; default: that of your W&B key")
    parser.add_argument("--output", metavar="FILE", help="where to write; default: dashboard.json")
    parser.add_argument("--upload", metavar="FILE", help="upload this file instead of writing one")
    options = parser.parse_args(args)
    if options.upload and options.output:
        parser.error("--output and --upload exclude each other")

    from lit_interns1.reports import dashboard

    named = {name: value for name in ("project", "entity") if (value := getattr(options, name))}
    try:
        if options.upload:
            print(f"saved {dashboard.upload_dashboard(dashboard.read_dashboard(options.upload) | named)}")
            return
        target = dashboard.write_dashboard(dashboard.describe_dashboard(**named), options.output or "dashboard.json")
        print(f"wrote {target}; upload it with: lit-interns1 dashboard --upload {target}")
    except (ImportError, OSError, ValueError) as error:
        print(f"lit-interns1 dashboard: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
