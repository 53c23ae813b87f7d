"""Every shipped kernel, compiled ahead of time for chips that need not be there, and inspected."""

import pytest

pytest.importorskip("triton")

from lit_interns1_kernels.device.codegen import SHARED_MEMORY_LIMIT, compile_report, shipped_builds

BUILDS = shipped_builds()


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_compiles_without_spills_and_with_the_right_instructions(build):
    for target in build.targets:
        report = compile_report(build, target)
        assert report.shared <= SHARED_MEMORY_LIMIT[target], target
        if report.registers is None:
            continue
        assert report.stack == 0, f"{target}: {report.stack} bytes of stack"
        assert report.local_accesses == 0, f"{target}: {report.instructions}"
        for prefix in build.instructions.get(target, ()):
            assert any(name.startswith(prefix) for name in report.instructions), f"{target}: no {prefix}"
