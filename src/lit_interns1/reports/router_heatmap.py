"""One window of a run: the load of every expert of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lit_interns1.reports.figures import _empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def router_heatmap(load: ArrayLike, title: str) -> Figure:
    """Layers over experts; white is the uniform load, blue less, red more; red is full at twice the uniform load.

    Args:
        load: (layers, experts), shares of the routed slots; sums to 1 over the experts.
        title: What stands above.
    """
    load_LE = np.asarray(load, dtype=np.float64)
    layers, experts = load_LE.shape
    figure = _empty_figure(8.0, min(9.0, 1.8 + 0.25 * layers))
    axes = figure.add_subplot()
    image = axes.imshow(
        experts * load_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest", origin="lower"
    )
    axes.set_title(title, loc="left")
    axes.set_xlabel("Expert")
    axes.set_ylabel("MoE layer")
    figure.colorbar(image, extend="max", label="Load / uniform load")
    return figure
