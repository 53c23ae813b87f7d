"""Checks of the options of objectives: the error names the option, its value and the constraint."""

from __future__ import annotations

from typing import get_args


def check_number(name: str, value: float | None, low: float, high: float | None = None, strict: bool = False) -> None:
    """Raises a ValueError unless None or low ≤ value ≤ high (low < value, if strict)."""
    if value is None:
        return
    inside = (value > low if strict else value >= low) and (high is None or value <= high)
    if not inside or value != value or value in (float("inf"), float("-inf")):
        bound = f"{'above' if strict else 'at least'} {low:g}" + ("" if high is None else f" and at most {high:g}")
        raise ValueError(f"{name} = {value} must be finite and {bound}")


def check_choice(name: str, value: str, choices: object) -> None:
    """Raises a ValueError unless the value is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} = {value!r} must be one of {get_args(choices)}")
