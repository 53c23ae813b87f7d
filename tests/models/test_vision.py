"""Image encoders: images of all sizes packed into one batch equal one another's runs alone."""

import pytest
import torch

from lit_interns1.models.vision import (
    InternVisionConfig,
    NativeVisionConfig,
    build_merger,
    build_vision,
    window_order,
)
from lit_interns1.nn.initialization import materialize

CONFIGS = {
    "intern": InternVisionConfig(16, 2, 2, 24, image_size=16, patch_size=4),
    "native": NativeVisionConfig(16, 2, 2, 24, patch_size=2, num_positions=25),
}
GRIDS = torch.tensor([[1, 4, 4], [1, 2, 6], [3, 4, 2], [1, 4, 4], [1, 8, 2]])


def build(config):
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"vision": build_vision(config), "projector": build_merger(config, 12)})
    return materialize(model, std=0.3)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_images_equal_single_ones_gradients_too(name):
    config = CONFIGS[name]
    model = build(config).double()
    counts = GRIDS.prod(1).tolist()
    patches = torch.randn(sum(counts), config.patch_values, generator=torch.Generator().manual_seed(3)).double()
    together = model["projector"](model["vision"](patches, GRIDS))
    assert together.shape == (sum(counts) // 4, 12)
    together.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parts = together.split([count // 4 for count in counts])
    for grid, piece, ours in zip(GRIDS, patches.split(counts), parts, strict=True):
        alone = model["projector"](model["vision"](piece, grid[None]))
        torch.testing.assert_close(ours, alone, atol=1e-6, rtol=1e-5)
        alone.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-6, msg=name)


def test_frames_of_a_video_see_only_themselves():
    config = CONFIGS["native"]
    model = build(config)
    patches = torch.randn(3 * 8, config.patch_values, generator=torch.Generator().manual_seed(4))
    video = model["vision"](patches, torch.tensor([[3, 4, 2]]))
    frames = model["vision"](patches, torch.tensor([[1, 4, 2]] * 3))
    torch.testing.assert_close(video, frames)


def test_windows_are_row_major_inside_and_outside():
    assert window_order(2, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert sorted(window_order(6, 4, 2).tolist()) == list(range(24))


@pytest.mark.parametrize("name", CONFIGS)
def test_smallest_input_reaches_every_parameter(name):
    model = build(CONFIGS[name])
    model["projector"](model["vision"](*model["vision"].smallest_input())).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_does_not_fit_is_refused():
    config = CONFIGS["native"]
    encoder = build(config)["vision"]
    with pytest.raises(ValueError, match=r"patches must be \(patches, 24\)"):
        encoder(torch.zeros(4, 7), torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="need 4 patches, got 8"):
        encoder(torch.zeros(8, 24), torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="multiples of merge_size = 2"):
        encoder(torch.zeros(6, 24), torch.tensor([[1, 3, 2]]))
    with pytest.raises(ValueError, match="num_positions = 24 must be a square"):
        NativeVisionConfig(16, 2, 2, 24, num_positions=24)
    with pytest.raises(ValueError, match="image_size = 30 must be divisible by patch_size × merge_size = 28"):
        InternVisionConfig(16, 2, 2, 24, image_size=30)
