"""Every shipped kernel, compiled ahead of time for chips that need not be there, and inspected."""

import pytest

pytest.importorskip("triton")

from lit_interns1_kernels.device.codegen import SHARED_MEMORY_LIMIT, compile_report, shipped_builds

CASES = [
    pytest.param(build, target, id=f"{build.name}-{target}", marks=[pytest.mark.slow] if build.extended else [])
    for build in shipped_builds()
    for target in build.targets
]


@pytest.mark.parametrize(("build", "target"), CASES)
def test_compiles_without_spills_and_with_the_right_instructions(build, target):
    report = compile_report(build, target)
    assert report.shared <= SHARED_MEMORY_LIMIT[target]
    if report.registers is None:
        return
    assert report.stack == 0, f"{report.stack} bytes of stack"
    assert report.local_accesses == 0, report.instructions
    for prefix in build.instructions.get(target, ()):
        assert any(name.startswith(prefix) for name in report.instructions), f"no {prefix}: {report.instructions}"
