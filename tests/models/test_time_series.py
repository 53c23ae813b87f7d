"""The time-series encoder: the authors' code on random weights, and packing that changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_interns1.models import time_series
from lit_interns1.models.time_series import TimeSeriesConfig, TimeSeriesEncoder
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.signal_patches import patch_count, patch_stride, token_count

GOLDEN = Path(__file__).parents[1] / "golden" / "interns1_pro_time_series"
TINY = TimeSeriesConfig(
    hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_positions=8, patch_size=8, patch_heads=2,
    patch_intermediate_size=12, output_size=12,
)  # fmt: skip


def tiny(**changes):
    with torch.device("meta"):
        encoder = TimeSeriesEncoder(TimeSeriesConfig(**{**vars(TINY), **changes}), 20)
    return materialize(encoder, std=0.3).eval()


def signals():
    generator = torch.Generator().manual_seed(5)
    shapes_rates = [((90, 1), 10.0), ((41, 3), 10.0), ((7, 2), 400.0), ((400, 1), 100.0), ((120, 2), 10.0)]
    return [torch.randn(shape, generator=generator) for shape, _ in shapes_rates], [rate for _, rate in shapes_rates]


def test_features_of_the_released_code():
    golden = load_file(GOLDEN / "golden.safetensors")
    sizes = json.loads((GOLDEN / "config.json").read_text())
    config = TimeSeriesConfig(
        hidden_size=sizes["d_model"], num_layers=sizes["encoder_layers"], num_heads=sizes["encoder_attention_heads"],
        intermediate_size=sizes["encoder_ffn_dim"], max_positions=sizes["max_source_positions"],
        output_size=sizes["ts_adapt_out_dim"],
    )  # fmt: skip
    encoder = TimeSeriesEncoder(config, sizes["out_hidden_size"])
    encoder.load_state_dict(load_file(GOLDEN / "model.safetensors"))
    inputs = [golden[f"{i}.signal"] for i in range(4)]
    rates = [golden[f"{i}.sampling_rate"].item() for i in range(4)]
    for i, ours in enumerate(encoder(inputs, rates)):
        torch.testing.assert_close(ours, golden[f"{i}.features"], atol=1e-5, rtol=1e-5)
        assert len(ours) == token_count(len(inputs[i]), rates[i])


def test_strides_and_lengths():
    assert [patch_stride(rate) for rate in (1, 10, 50, 100, 200, 400, 500, 1000, 16000)] == [
        2, 3, 9, 24, 74, 143, 153, 159, 160,
    ]  # fmt: skip
    for rate, points, patches, tokens in (
        (100, 1000, 41, 10), (1000, 64000, 402, 101), (16000, 64000, 399, 100), (16000, 240000, 1499, 375),
        (1, 100, 49, 12),
    ):  # fmt: skip
        assert (patch_count(points, patch_stride(rate)), token_count(points, rate)) == (patches, tokens)
    assert token_count(1, 16000) == 1
    for wrong in (0, -3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sampling_rate"):
            patch_stride(wrong)


@pytest.mark.parametrize("channels", ["interleaved", "separate"])
def test_a_batch_equals_its_signals_one_by_one_gradients_too(channels):
    inputs, rates = signals()
    inputs, encoder = [signal.double() for signal in inputs], tiny(channels=channels).double()
    together = encoder(inputs, rates)
    torch.cat(together).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    for ours, signal, rate in zip(together, inputs, rates, strict=True):
        (alone,) = encoder([signal], [rate])
        torch.testing.assert_close(ours, alone)
        alone.square().sum().backward()
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-6, msg=name)


def test_many_points_are_encoded_in_parts(monkeypatch):
    inputs, rates = signals()
    inputs, encoder = [signal.double() for signal in inputs], tiny().double()
    whole = torch.cat(encoder(inputs, rates))
    whole.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    monkeypatch.setattr(time_series, "_POINTS_AT_ONCE", 30)
    parts = torch.cat(encoder(inputs, rates))
    torch.testing.assert_close(parts, whole)
    parts.square().sum().backward()
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(encoder(inputs, rates)), whole)


def test_separate_channels_do_not_see_one_another():
    signal = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))
    swapped = signal.flip(1)
    separate, interleaved = tiny(channels="separate"), tiny()
    torch.testing.assert_close(separate([signal], [10.0])[0], separate([swapped], [10.0])[0])
    assert not torch.allclose(interleaved([signal], [10.0])[0], interleaved([swapped], [10.0])[0], atol=1e-4)
    one = signal[:, :1]
    torch.testing.assert_close(separate([one], [10.0])[0], interleaved([one], [10.0])[0])


def test_later_points_do_not_change_earlier_tokens():
    encoder = tiny()
    signal = torch.randn(300, 1, generator=torch.Generator().manual_seed(2))
    changed = signal.clone()
    changed[200:] += 1
    first, second = encoder([signal], [10.0])[0], encoder([changed], [10.0])[0]
    kept = 200 // (3 * 4) - 2  # a token covers four strides, and the convolutions look two patches ahead
    torch.testing.assert_close(first[:kept], second[:kept])
    assert not torch.allclose(first[-2:], second[-2:], atol=1e-3)


def test_the_shortest_signal_and_refusals():
    encoder = tiny()
    assert encoder([torch.ones(1, 1)], [16000.0])[0].shape == (1, 20)
    assert torch.isfinite(encoder(*encoder.smallest_input())[0]).all()
    with pytest.raises(ValueError, match=r"must be \(points, channels\).*\(5,\)"):
        encoder([torch.ones(5)], [1.0])
    with pytest.raises(ValueError, match="1 signals have 2 sampling rates"):
        encoder([torch.ones(5, 1)], [1.0, 2.0])
    with pytest.raises(ValueError, match="channels = 'mixed'"):
        tiny(channels="mixed")
