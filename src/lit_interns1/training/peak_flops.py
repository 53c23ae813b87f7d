"""What devices can compute at most."""

from __future__ import annotations

PEAK_BF16_FLOPS: dict[str, float] = {
    "A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12,
}  # fmt: skip
"""Dense bf16 peaks from the vendors' data sheets, by a part of the device's name; the first match counts."""
