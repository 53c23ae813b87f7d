from lit_interns1_kernels.device.runtime import INTERPRETED


def test_kernels_are_interpreted_here():
    assert INTERPRETED
