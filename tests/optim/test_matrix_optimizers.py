"""Muon and Mousse on one process: the authors' own code, closed forms, and properties."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_interns1.optim import Mousse, Muon, matrix_groups, newton_schulz, polar_factor

GOLDEN = Path(__file__).parents[1] / "golden" / "mousse"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
SIDES = {0: "both", 1: "left", 2: "right"}
DOUBLE = torch.float64


def matrix(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def golden_run(variant, dtype, **options):
    """Largest relative error of the parameters over 12 steps, by step."""
    hyper, changes = CONFIG["hyper_parameters"], CONFIG["variants"][variant]
    data = load_file(GOLDEN / f"{variant}.safetensors")
    parameters = [nn.Parameter(data[f"init.{n}"].to(dtype)) for n in range(2)]
    optimizer = Mousse(
        parameters, lr=hyper["lr"], momentum=hyper["mu"], weight_decay=hyper["weight_decay"],
        side=SIDES[changes.get("use_LorR", 0)], alpha=hyper["shampoo_alpha"], beta=hyper["shampoo_beta"],
        eps=hyper["shampoo_epsilon"], refresh_every=hyper["shampoo_update_freq"],
        graft=changes.get("apply_norm", True),
        adjust_lr="match_rms_adamw" if changes.get("adjust_lr") == "rms_norm" else "spectral_norm", **options,
    )  # fmt: skip
    errors = []
    for step in range(12):
        for number, parameter in enumerate(parameters):
            parameter.grad = data[f"grad.{step}.{number}"].to(dtype)
        optimizer.step()
        want = [data[f"param.{step}.{number}"] for number in range(2)]
        errors.append(max(float((p.detach() - w).norm() / w.norm()) for p, w in zip(parameters, want, strict=True)))
    return errors
