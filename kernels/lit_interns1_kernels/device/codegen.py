"""Compiles kernels ahead of time for a chip that is not there, and reads what came out.

Registers, stack and shared memory come from `cuobjdump --dump-resource-usage`, instructions from the disassembly. Both
tools ship in the Triton wheel. A kernel that spills shows a stack, and local loads and stores (LDL, STL); the field
LOCAL of the tool stays 0 even then, and is not read.

Cannot run in a process whose kernels are interpreted (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY_LIMIT: Mapping[str, int] = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
"""Bytes of shared memory that one block may have (CUDA programming guide, technical specifications; CDNA3: LDS)."""


@dataclass(frozen=True)
class KernelBuild:
    """One shipped kernel with one configuration, as a launch would specialise it.

    Attributes:
        name: For tests and tables, for example `grouped_gemm/bf16/128x128x64`.
        kernel: What `triton.jit` gave.
        signature: Type of every argument in order: "*bf16", "*fp32", "*i32", "i32", "fp32", "tensordesc<bf16[128,64]>".
            Constants are left out.
        constants: Values of the `tl.constexpr` arguments.
        undivided: Arguments that a launch need not find divisible by 16. All other pointers and integers are.
        options: `num_warps`, `num_stages`, ...
        targets: Names in `TARGETS` for which it ships.
        instructions: For each target, prefixes of instructions of which at least one must occur each.
        extended: A further configuration of a kernel that another build shows: its test is marked slow.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    undivided: tuple[str, ...] = ()
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 2})
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    instructions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extended: bool = False


@dataclass(frozen=True)
class BuildReport:
    """What the compiler made of a kernel. AMD targets have only `shared`.

    Attributes:
        shared: Bytes of shared memory per block, static and dynamic.
        registers: Per thread.
        stack: Bytes per thread; more than 0 means spills.
        instructions: How often each instruction occurs, by its name before the first dot.
    """

    shared: int
    registers: int | None = None
    stack: int | None = None
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def local_accesses(self) -> int:
        """Loads and stores of spilled values."""
        return self.instructions["LDL"] + self.instructions["STL"]


def compile_kernel(build: KernelBuild, target: str) -> Any:
    """The compiled kernel (`asm`, `metadata`); raises what Triton raises."""
    names = build.kernel.arg_names
    unknown = (build.signature.keys() | build.constants.keys()) ^ set(names)
    if unknown:
        raise ValueError(f"{build.name}: arguments {sorted(unknown)} are not both in the kernel and in the build")
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in build.undivided and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    }
    source = ASTSource(build.kernel, signature, constexprs=dict(build.constants), attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=dict(build.options))


def compile_report(build: KernelBuild, target: str) -> BuildReport:
    """Compiles and inspects."""
    compiled = compile_kernel(build, target)
    shared = int(compiled.metadata.shared)
    if "cubin" not in compiled.asm:
        return BuildReport(shared)
    usage = _resource_usage(compiled.asm["cubin"])
    return BuildReport(shared, usage["REG"], usage["STACK"], _instructions(compiled.asm["sass"]))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def _instructions(sass: str) -> Counter[str]:
    """Instruction names in a disassembly of lines `control codes <tab> [@predicate] NAME.modifiers operands;`."""
    return Counter(re.findall(r"^[-\dYB:]+\t(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE))


def shipped_builds() -> list[KernelBuild]:
    """The `BUILDS` of every module beside this one."""
    modules = (
        import_module(f"{__package__}.{module.name}") for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    )
    return [build for module in modules for build in getattr(module, "BUILDS", ())]
