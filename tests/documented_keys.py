"""The tables of keys in docs/metrics.md: every table whose first column is `key`."""

import re
from pathlib import Path

from lit_interns1.reports.layout import key_regex

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
CELL = r"\s*((?:[^|\\]|\\.)+?)\s*\|"
ROW = re.compile(rf"^\|\s*`([^`]+)`\s*\|{CELL}{CELL}{CELL}$")


def documented_keys() -> dict[str, str]:
    """Unit by key; every row of the tables is read or refused."""
    keys, in_table = {}, False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\|\s*key\s*\|\s*unit\s*\|\s*when\s*\|\s*meaning\s*\|$", line):
            in_table = True
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not set(line) <= set("|- :"):
            row = ROW.match(line)
            assert row, f"{PAGE.name}: not `key` | unit | when | meaning: {line}"
            key, unit, _, _ = row.groups()
            assert key not in keys, f"{PAGE.name} documents {key} twice"
            keys[key] = unit
    return keys


def undocumented(names) -> list[str]:
    """Those of the names that no row stands for."""
    patterns = [re.compile(key_regex(key)) for key in documented_keys()]
    return sorted(name for name in names if not any(pattern.match(name) for pattern in patterns))
