"""What the compiler makes of every Triton kernel, and what the chip would allow: two Markdown tables, without a GPU.

    python benchmarks/kernel_report.py [--targets sm_90] [--all] > report.md

The first table is read from kernels that were compiled ahead of time: registers and spilled bytes per thread, shared
memory per block, and how many instructions of the matrix units and of bulk copies the code holds.

The second is arithmetic, not a measurement: floating point operations and bytes of each operation at the sizes of one
layer of Intern-S1-Pro (hidden 4096, 512 experts of 1536, 8 per token, 32,768 tokens on a rank, no expert parallelism),
their ratio, and the least time on an H100 SXM from its peak rates: 989 TFLOP/s in bfloat16, 1979 in FP8, 67 in float32,
3.35 TB/s (NVIDIA H100 data sheet, dense).
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from lit_interns1_kernels.device.codegen import TARGETS, compile_report, shipped_builds

MATRIX = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA")
BULK = ("UTMALDG", "UTMASTG", "LDGSTS")
BF16, FP8, FP32, BANDWIDTH = 989e12, 1979e12, 67e12, 3.35e12


class Work(NamedTuple):
    """Operations and bytes of one call."""

    name: str
    operations: float
    bytes: float
    peak: float


def layer_work() -> list[Work]:
    """Every operation of the package at the sizes of the module's docstring, in bfloat16 unless named otherwise."""
    tokens, hidden, inner, experts, per_token, vocabulary = 32768, 4096, 1536, 512, 8, 152064
    heads, width = 64, 128
    rows = tokens * per_token
    two, one, four = 2, 1, 4  # bytes of bfloat16, FP8, float32
    gate_up, down = experts * 2 * inner * hidden, experts * inner * hidden

    def product(n: int, k: int, weight: int, size: int = two) -> tuple[float, float]:
        return 2.0 * rows * n * k, size * (rows * k + weight) + two * rows * n

    both = tuple(a + b for a, b in zip(product(2 * inner, hidden, gate_up), product(hidden, inner, down), strict=True))
    fp8 = product(2 * inner, hidden, gate_up, one)
    return [
        Work("grouped product, gate and up, with gather and SwiGLU", *product(2 * inner, hidden, gate_up), BF16),
        Work("grouped product, down", *product(hidden, inner, down), BF16),
        Work("gradient of the gate and up weights", 2.0 * rows * 2 * inner * hidden,
             two * (rows * (2 * inner + hidden) + gate_up), BF16),
        Work("routed experts, forward", *both, BF16),
        Work("routed experts, backward", 2 * both[0], 2 * both[1], BF16),
        Work("FP8 grouped product, gate and up", *fp8, FP8),
        Work("quantise 1×128", 3.0 * rows * hidden, rows * hidden * (two + one) + four * rows * hidden / 128, FP32),
        Work("group by expert", 0.0, rows * (8 + 8 + 8), FP32),
        Work("permute rows", 0.0, two * hidden * 2 * rows, FP32),
        Work("sum rows back, weighted", 2.0 * rows * hidden, two * hidden * (rows + tokens), FP32),
        Work("route: softmax, top-k, weights", 6.0 * tokens * experts, four * tokens * experts * 2, FP32),
        Work("RMSNorm, forward", 4.0 * tokens * hidden, two * 2 * tokens * hidden, FP32),
        Work("RMSNorm, backward", 8.0 * tokens * hidden, two * 3 * tokens * hidden, FP32),
        Work("rotary, queries", 3.0 * tokens * heads * width, two * 2 * tokens * heads * width, FP32),
        Work("token scores of 4096 rows of logits", 6.0 * 4096 * vocabulary, four * 4096 * vocabulary, FP32),
    ]  # fmt: skip


def print_builds(targets: list[str], everything: bool) -> None:
    print("| kernel, configuration | chip | registers | stack | shared KiB | matrix instructions | bulk copies |")
    print("|---|---|---:|---:|---:|---|---|")
    for build in shipped_builds():
        if build.extended and not everything:
            continue
        for target in (t for t in targets if t in build.targets):
            report = compile_report(build, target)
            shared = f"{report.shared / 1024:.1f}"
            if report.registers is None:
                print(f"| {build.name} | {target} | | | {shared} | | |")
                continue

            def counts(names: tuple[str, ...], found: dict[str, int] = report.instructions) -> str:
                return ", ".join(f"{found[name]} {name}" for name in names if found[name])

            print(
                f"| {build.name} | {target} | {report.registers} | {report.stack} | {shared} | {counts(MATRIX)} "
                f"| {counts(BULK)} |"
            )


def print_rooflines() -> None:
    print("| operation | GFLOP | MB | FLOP per byte | least ms on an H100 | bound by |")
    print("|---|---:|---:|---:|---:|---|")
    for work in layer_work():
        computing, moving = work.operations / work.peak, work.bytes / BANDWIDTH
        bound = "compute" if computing > moving else "memory"
        print(
            f"| {work.name} | {work.operations / 1e9:,.1f} | {work.bytes / 1e6:,.0f} "
            f"| {work.operations / work.bytes:,.1f} | {max(computing, moving) * 1e3:.3f} | {bound} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--all", action="store_true", help="every configuration, not just the first of each kernel")
    arguments = parser.parse_args()
    print_builds(arguments.targets, arguments.all)
    print()
    print_rooflines()


if __name__ == "__main__":
    main()
