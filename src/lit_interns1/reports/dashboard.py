"""The W&B workspace that matches the HTML page: the same sections and charts, over consumed tokens.

The workspace is described in a JSON file of our own, which needs no network and no package, and can be read and edited:

    {"format": "lit-interns1 dashboard 1", "entity": …, "project": …, "name": …,
     "sections": [{"name": "Loss", "panels": [{"title": "Loss", "keys": ["train/loss", "val/loss"], "unit": …}]}]}

Keys with names in braces (`val/loss/{source}`) become a regular expression. Uploading builds the workspace with the
public interface of `wandb-workspaces`. Keys that no panel names get panels from W&B itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_interns1.reports.layout import SECTIONS, Section, key_regex

FORMAT = "lit-interns1 dashboard 1"
_X_AXIS = "train/tokens"


def describe_dashboard(
    project: str = "lit-interns1",
    entity: str | None = None,
    name: str = "Intern-S1 training",
    sections: Sequence[Section] = SECTIONS,
) -> dict[str, Any]:
    """The workspace as plain data.

    Args:
        project: W&B project.
        entity: W&B user or team; None = that of the key used for uploading.
        name: What the workspace is called.
        sections: What is drawn; sections without charts are left to W&B.
    """
    return {
        "format": FORMAT,
        "entity": entity,
        "project": project,
        "name": name,
        "sections": [
            {
                "name": section.title,
                "panels": [
                    {"title": chart.title, "keys": list(chart.keys), "unit": chart.unit} for chart in section.charts
                ],
            }
            for section in sections
            if section.charts
        ],
    }


def write_dashboard(dashboard: dict[str, Any], output: str | os.PathLike[str]) -> Path:
    """Writes the description.

    Args:
        dashboard: From `describe_dashboard`.
        output: The file. A description may be written again.

    Raises:
        FileExistsError: If the file exists and is no description of a dashboard.
    """
    target = Path(output)
    if target.exists():
        try:
            read_dashboard(target)
        except (OSError, ValueError) as error:
            raise FileExistsError(f"output {target} exists and is no dashboard; name another file") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def read_dashboard(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a description back.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no description of a dashboard, or a panel lacks its title or keys; names what and where.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no dashboard: its 'format' is not {FORMAT!r}")
    for section in _entries(path, content, "sections"):
        for panel in _entries(path, section, "panels"):
            keys = panel.get("keys")
            if not panel.get("title") or not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
                raise ValueError(f"{path}: panel {panel} needs a 'title' and a list of texts 'keys'")
    for name in ("project", "name"):
        if not isinstance(content.get(name), str) or not content[name]:
            raise ValueError(f"{path}: {name!r} is {content.get(name)!r}, not a text")
    return content


def build_workspace(dashboard: dict[str, Any], entity: str) -> Any:
    """The `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    Args:
        dashboard: From `describe_dashboard` or `read_dashboard`.
        entity: W&B user or team.

    Raises:
        ImportError: If `wandb-workspaces` is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ImportError("uploading needs wandb-workspaces: pip install 'lit-interns1[dashboard]'") from error

    def panel(entry: dict[str, Any]) -> Any:
        named = any("{" in key for key in entry["keys"])
        source = {"metric_regex": "|".join(map(key_regex, entry["keys"]))} if named else {"y": entry["keys"]}
        return panels.LinePlot(title=entry["title"], x=_X_AXIS, title_y=entry.get("unit") or None, **source)

    return workspaces.Workspace(
        entity=entity,
        project=dashboard["project"],
        name=dashboard["name"],
        sections=[
            workspaces.Section(name=section["name"], panels=[panel(entry) for entry in section["panels"]], is_open=True)
            for section in dashboard["sections"]
        ],
        settings=workspaces.WorkspaceSettings(x_axis=_X_AXIS, group_by_prefix="first"),
        auto_generate_panels=True,
    )


def upload_dashboard(dashboard: dict[str, Any]) -> str:
    """Saves the workspace at W&B as a new view.

    Returns:
        Its address.

    Raises:
        ImportError: If `wandb-workspaces` is not installed.
        ValueError: If W&B refuses (no key, no such project), or no entity is named and W&B knows none for the key.
    """
    import wandb

    try:
        entity = dashboard.get("entity") or wandb.Api().default_entity
        if not entity:
            raise ValueError("entity: W&B knows none for your key; name a user or team with --entity")
        return str(build_workspace(dashboard, entity).save().url)
    except wandb.Error as error:
        raise ValueError(f"W&B did not take the dashboard: {error}") from error


def _entries(path: str | os.PathLike[str], owner: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = owner.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: {name!r} is not a list of mappings")
    return entries
