"""Losses: scores in, (sum, count) out. Pure functions of tensors; no weight, no model, no Lightning."""

from lit_interns1.objectives.cross_entropy import NextTokenCrossEntropy

__all__ = ["NextTokenCrossEntropy"]
