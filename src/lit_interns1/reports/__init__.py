"""What a run left behind, read and drawn."""

from lit_interns1.reports.figures import (
    expert_load_figure,
    learning_rate_figure,
    loss_figure,
    save_figure,
    throughput_figure,
)
from lit_interns1.reports.html_report import write_report
from lit_interns1.reports.pictures import draw_pictures
from lit_interns1.reports.run_directory import ExpertLoad, MetricSeries, RunDirectory, RunDirectoryError

__all__ = [
    "ExpertLoad",
    "MetricSeries",
    "RunDirectory",
    "RunDirectoryError",
    "draw_pictures",
    "expert_load_figure",
    "learning_rate_figure",
    "loss_figure",
    "save_figure",
    "throughput_figure",
    "write_report",
]
