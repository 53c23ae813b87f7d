import pytest
import torch

from lit_interns1.nn.rotary import FourierRotaryEmbedding, RotaryEmbedding, apply_rotary, kept_frequencies


@pytest.mark.parametrize(
    ("theta", "max_positions", "head_dim", "kept"),
    [(5e6, 262144, 128, 45), (1e4, 200, 16, 4), (1e4, 512, 16, 4), (1e4, 4096, 64, 23), (1e6, 32768, 64, 20)],
)
def test_kept_frequencies(theta, max_positions, head_dim, kept):
    assert kept_frequencies(head_dim, theta, max_positions) == kept


def test_rope_is_a_complex_rotation():
    d, theta = 8, 100.0
    positions = torch.tensor([0, 1, 5, 300])
    q = torch.randn(4, 3, d, dtype=torch.float64)
    rotated, _ = apply_rotary(q, q[:, :1], *RotaryEmbedding(d, theta)(positions))
    angle = positions[:, None].double() * theta ** (-torch.arange(0, d, 2).double() / d)
    expected = torch.complex(q[..., : d // 2], q[..., d // 2 :]) * torch.exp(1j * angle)[:, None]
    torch.testing.assert_close(rotated, torch.cat([expected.real, expected.imag], -1), atol=2e-5, rtol=1e-5)


def test_fope_without_noise_and_with_every_frequency_is_rope():
    positions = torch.arange(50)
    fope = FourierRotaryEmbedding(16, 1e4, 512, num_kv_heads=2, init_factor=0.0, num_frequencies=8)
    cos, sin = RotaryEmbedding(16, 1e4)(positions)
    ours_cos, ours_sin = fope(positions)
    torch.testing.assert_close(ours_cos, cos.expand_as(ours_cos))
    torch.testing.assert_close(ours_sin, sin.expand_as(ours_sin))


@pytest.mark.parametrize("separate", [True, False])
def test_fope_mixes_tones_per_head_and_pads(separate):
    fope = FourierRotaryEmbedding(16, 1e4, 512, num_kv_heads=3, separate_heads=separate, sin_pad=1.0)
    positions = torch.tensor([0, 7, 90])
    cos, sin = fope(positions)
    heads = 3 if separate else 1
    assert cos.shape == sin.shape == (3, heads, 16)
    frequencies = 1e4 ** (-torch.arange(0, 16, 2).double() / 16)[:4]
    for head in range(heads):
        mix = (fope.cos_coef[head] if separate else fope.cos_coef).double()
        expected = torch.cos(positions[:, None] * frequencies) @ mix
        torch.testing.assert_close(cos[:, head, :4].double(), expected, atol=1e-5, rtol=1e-5)
    assert (cos[..., 4:8] == 1).all()
    assert (sin[..., 4:8] == 1).all()
    assert torch.equal(cos[..., :8], cos[..., 8:])


def test_sin_pad_of_one_doubles_the_dot_product_of_dropped_channels():
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    products = {}
    for pad in (0.0, 1.0):
        fope = FourierRotaryEmbedding(16, 1e4, 512, num_kv_heads=1, sin_pad=pad)
        rotated_q, rotated_k = apply_rotary(q, k, *fope(torch.tensor([13])))
        dropped = [*range(4, 8), *range(12, 16)]
        products[pad] = (rotated_q * rotated_k)[..., dropped].sum()
    torch.testing.assert_close(products[1.0], 2 * products[0.0])


def test_fope_is_the_same_whatever_was_drawn_before():
    tables = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        tables.append(FourierRotaryEmbedding(16, 1e4, 512, num_kv_heads=2).sin_coef)
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], torch.eye(4).expand(2, 4, 4))
    other = FourierRotaryEmbedding(16, 1e4, 512, num_kv_heads=2, seed=7)
    assert not torch.equal(other.sin_coef, tables[0])


def test_noise_of_the_mixing_matrices_has_the_published_size():
    # xavier over (4, 45, 45): std = 0.5 · sqrt(2 / (45·45 + 4·45))
    fope = FourierRotaryEmbedding(128, 5e6, 262144, num_kv_heads=4)
    noise = fope.cos_coef - torch.eye(45)
    assert noise.std().item() == pytest.approx(0.0151, rel=0.03)


def test_impossible_numbers_of_frequencies_are_refused():
    with pytest.raises(ValueError, match="keeps 9 frequencies of head_dim/2 = 8"):
        FourierRotaryEmbedding(16, 1e4, 512, num_kv_heads=2, num_frequencies=9)
    with pytest.raises(ValueError, match="keeps 0 frequencies"):
        FourierRotaryEmbedding(16, 1e4, 6, num_kv_heads=2)
