"""What a rank's device and its links can do at most. Numbers of the vendors' data sheets, derated by nothing.

Sources: NVIDIA H100, H200 and DGX B200 data sheets (dense bf16 peaks, SXM parts; bandwidths per direction: NVLink 900
GB/s and 1.8 TB/s are sums of both), InfiniBand NDR 400 Gb/s per device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lit_interns1.training.peak_flops import PEAK_BF16_FLOPS


@dataclass(frozen=True)
class Hardware:
    """One kind of machine.

    Attributes:
        name: For the report.
        memory: Bytes of a device.
        flops: Dense bf16 FLOP/s of a device.
        memory_bandwidth: Bytes/s of a device's memory.
        devices_per_node: Ranks that share the fast links.
        node_bandwidth: Bytes/s of a device to its node, one direction.
        network_bandwidth: Bytes/s of a device to other nodes, one direction.

    Raises:
        ValueError: If a number is not positive.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    devices_per_node: int
    node_bandwidth: float
    network_bandwidth: float

    def __post_init__(self) -> None:
        for entry in fields(self)[1:]:
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"hardware {self.name}: {entry.name} = {value!r} must be a positive number")
        if self.devices_per_node != int(self.devices_per_node):
            raise ValueError(f"hardware {self.name}: devices_per_node = {self.devices_per_node} must be whole")


HARDWARE: dict[str, Hardware] = {
    "h100": Hardware("H100 SXM", 80e9, PEAK_BF16_FLOPS["H100"], 3.35e12, 8, 450e9, 50e9),
    "h200": Hardware("H200 SXM", 141e9, PEAK_BF16_FLOPS["H200"], 4.8e12, 8, 450e9, 50e9),
    "b200": Hardware("B200", 180e9, PEAK_BF16_FLOPS["B200"], 8e12, 8, 900e9, 50e9),
}
"""Machines by name."""


def load_hardware(name: str) -> Hardware:
    """A machine by name, or from a YAML file with the fields of `Hardware`.

    Raises:
        ValueError: If there is neither such a machine nor such a file, or the file misses fields or has others.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"hardware {name!r} is neither a file nor one of {', '.join(HARDWARE)}")
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"hardware file {path} is no YAML") from None
    wanted = [entry.name for entry in fields(Hardware)]
    if not isinstance(values, Mapping):
        raise ValueError(f"hardware file {path} must hold the fields {', '.join(wanted)}")
    missing, unknown = [n for n in wanted if n not in values], [str(n) for n in values if n not in wanted]
    if missing or unknown:
        problems = [("misses", missing), ("has unknown", unknown)]
        listed = " and ".join(f"{what} {', '.join(names)}" for what, names in problems if names)
        raise ValueError(f"hardware file {path} {listed}")
    numbers = {key: _number(value) for key, value in values.items() if key != "name"}
    return Hardware(name=str(values["name"]), **numbers)


def _number(value: Any) -> Any:
    """YAML reads 80e9 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
