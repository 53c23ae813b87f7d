"""The W&B workspace: panels of documented keys only, written and read back, built and sent as W&B expects."""

import json
import re
import subprocess
import sys

import pytest

from documented_keys import documented_keys
from lit_interns1.cli import main
from lit_interns1.reports.dashboard import build_workspace, describe_dashboard, read_dashboard, upload_dashboard
from lit_interns1.reports.layout import SECTIONS


def test_charts_have_documented_keys_and_units_only():
    documented = documented_keys()
    for section in SECTIONS:
        for chart in section.charts:
            for key in chart.keys:
                assert key in documented, f"{section.title}: {key} is not in docs/metrics.md"
                assert (chart.unit or "1") == documented[key], f"unit of {key}"
    panels = [panel for section in describe_dashboard()["sections"] for panel in section["panels"]]
    assert {key for panel in panels for key in panel["keys"]} <= set(documented)
    assert {"train/loss", "val/loss", "optim/lr", "throughput/tokens_per_second"} <= {
        key for panel in panels for key in panel["keys"]
    }


def test_every_documented_prefix_has_a_section():
    prefixes = {prefix for section in SECTIONS for prefix in section.prefixes}
    assert {key.split("/")[0] for key in documented_keys() if "/" in key} <= prefixes | {"trainer"}


def test_file_and_what_it_says(tmp_path, capsys):
    target = tmp_path / "new" / "board.json"
    main(["dashboard", "--project", "chemistry", "--entity", "me", "--output", str(target)])
    assert f"--upload {target}" in capsys.readouterr().out
    written = read_dashboard(target)
    assert (written["project"], written["entity"]) == ("chemistry", "me")
    main(["dashboard", "--output", str(target)])  # a file of its own is renewed
    assert read_dashboard(target) == describe_dashboard()
    foreign = tmp_path / "package.json"
    foreign.write_text("{}")
    with pytest.raises(SystemExit) as end:
        main(["dashboard", "--output", str(foreign)])
    assert end.value.code == 2
    assert "is no dashboard" in capsys.readouterr().err
    assert foreign.read_text() == "{}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "'format' is not"),
        ({"sections": 1}, "'sections' is not a list"),
        ({"sections": [{"name": "a", "panels": [{"title": "b", "keys": "train/loss"}]}]}, "needs a 'title' and a list"),
        ({"project": ""}, "'project' is ''"),
    ],
)
def test_malformed_files(tmp_path, change, message):
    file = tmp_path / "board.json"
    file.write_text(json.dumps(describe_dashboard() | change))
    with pytest.raises(ValueError, match=message) as caught:
        read_dashboard(file)
    assert "board.json" in str(caught.value)


def test_workspace():
    """What W&B would get: the same panels over tokens, patterns as regular expressions, other keys by themselves."""
    pytest.importorskip("wandb_workspaces")
    dashboard = describe_dashboard()
    workspace = build_workspace(dashboard, "me")
    assert (workspace.entity, workspace.project, workspace.auto_generate_panels) == ("me", "lit-interns1", True)
    assert workspace.settings.x_axis == "train/tokens"
    assert [section.name for section in workspace.sections] == [section["name"] for section in dashboard["sections"]]
    for section, described in zip(workspace.sections, dashboard["sections"], strict=True):
        for panel, entry in zip(section.panels, described["panels"], strict=True):
            assert (panel.title, panel.x) == (entry["title"], "train/tokens")
            if any("{" in key for key in entry["keys"]):
                for key in entry["keys"]:
                    assert re.match(panel.metric_regex, re.sub(r"\{\w+\}", "name", key))
                    assert not re.match(panel.metric_regex, re.sub(r"\{\w+\}", "two/parts", key))
            else:
                assert panel.y == entry["keys"]


def test_upload(monkeypatch):
    """The view that is sent holds the panels; the transport is replaced, no network is used."""
    internal = pytest.importorskip("wandb_workspaces.workspaces.internal")
    import wandb

    sent = []

    class Api:
        default_entity = "team"
        client = None
        settings = {"base_url": "https://api.wandb.ai"}

    def receive(api, query, variables):
        sent.append(variables)
        return {"upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}}

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(internal, "execute_graphql", receive)
    monkeypatch.setattr("wandb_workspaces.workspaces.interface.get_app_url", lambda api: "https://wandb.ai")
    url = upload_dashboard(describe_dashboard(project="chemistry"))
    assert url.startswith("https://wandb.ai/team/chemistry?nw=")
    (variables,) = sent
    assert (variables["entityName"], variables["projectName"]) == ("team", "chemistry")
    spec = json.loads(variables["spec"])
    sections = spec["section"]["panelBankConfig"]["sections"]
    metrics = [panel["config"].get("metrics") for section in sections for panel in section["panels"]]
    assert ["train/loss", "val/loss"] in metrics


def test_upload_without_the_extra_or_a_key_is_one_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "board.json"
    main(["dashboard", "--entity", "me", "--output", str(file)])
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(SystemExit):
        main(["dashboard", "--upload", str(file)])
    assert "pip install 'lit-interns1[dashboard]'" in capsys.readouterr().err

    import wandb

    def refuse():
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(SystemExit):
        main(["dashboard", "--upload", str(file), "--entity", ""])
    assert capsys.readouterr().err.count("\n") == 1


def test_writing_needs_no_heavy_import(tmp_path):
    program = (
        "import sys\nfrom lit_interns1.cli import main\n"
        "main(['dashboard', '--output', 'board.json'])\n"
        "assert not {'torch', 'lightning', 'wandb', 'matplotlib'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
