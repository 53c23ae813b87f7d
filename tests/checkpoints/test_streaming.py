"""The stream of tensors against the files of an export, bit for bit, from one process and from gloo ranks."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from distributed_harness import run_ranks
from huggingface_folders import CONFIG
from lit_interns1.checkpoints import ModelSource, WeightsError, export_pretrained
from lit_interns1.checkpoints.huggingface import exported_tensors
from lit_interns1.models import LanguageModel, preset

CONFIGS = {
    "plain": CONFIG,
    "tied": replace(CONFIG, tie_word_embeddings=True),
    "uneven": replace(CONFIG, vocab_size=65, moe=replace(CONFIG.moe, num_experts=2)),
    "fourier": preset("tiny-s1-pro", vocab_size=70),
}


def odd_bits(model):
    """Bit patterns that arithmetic would not keep: a negative zero and a NaN with a payload."""
    with torch.no_grad():
        for parameter in model.parameters():
            flat = (parameter.to_local() if hasattr(parameter, "to_local") else parameter).view(-1)
            if flat.numel() > 2:
                flat[0] = -0.0
                flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)[1] = -5
    return model


def as_bytes(tensors):
    return {name: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).tolist()) for name, t in tensors}


def in_files(folder):
    """Names and bytes, file by file in the order of the tensors' names as an export has them."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found += [(name, file.get_tensor(name)) for name in file.offset_keys()]
    return as_bytes(found)


@pytest.mark.parametrize(("name", "layout"), [("plain", None), ("tied", None), ("fourier", None), ("plain", "mixtral")])
def test_a_whole_model_streams_what_an_export_writes(name, layout, tmp_path):
    model = odd_bits(LanguageModel.create(CONFIGS[name], seed=4).to(torch.bfloat16))
    if layout == "mixtral":
        model = LanguageModel.create(replace(CONFIG, qk_norm=False), seed=4)
    export_pretrained(
        ModelSource(model), model.config, tmp_path / "out", layout=layout, max_shard_bytes=40_000, progress=False
    )
    stream = list(exported_tensors(model, layout))
    written = in_files(tmp_path / "out")
    assert as_bytes(stream) == written
    assert [key for key, _ in stream] == list(written)  # layer by layer, as the files
    for _, tensor in stream:
        tensor.fill_(7.0)  # copies: the model keeps its weights
    assert as_bytes(exported_tensors(model, layout)) == written


def test_a_model_without_weights_and_an_unknown_layout_are_refused():
    with torch.device("meta"), pytest.raises(WeightsError, match="no weights yet"):
        next(exported_tensors(LanguageModel(CONFIG)))
    with pytest.raises(WeightsError, match="layout = 'nobody' is unknown"):
        next(exported_tensors(LanguageModel.create(CONFIG, seed=1), "nobody"))


def stream_all(rank, world, folder, cases):
    """The stream of every rank, the bytes of the largest message, and the export of the same divided model."""
    from pathlib import Path

    import torch.distributed as dist

    from lit_interns1.nn.initialization import materialize
    from lit_interns1.strategies.parallel_dims import ParallelDims
    from lit_interns1.strategies.parallelize import parallelize

    results, reduce, sizes = [], dist.all_reduce, []
    dist.all_reduce = lambda tensor: (sizes.append(tensor.nbytes), reduce(tensor))
    for number, (name, dtype, options) in enumerate(cases):
        config = CONFIGS[name]
        with torch.device("meta"):
            model = LanguageModel(config).to(dtype)
        dims = ParallelDims(world, **options)
        parallelize(model, model.parallel_plan(), dims.build_meshes("cpu"), dims)
        materialize(model, "cpu", seed=4, std=config.initializer_range)
        odd_bits(model)
        sizes.clear()
        stream = list(exported_tensors(model))
        results.append((as_bytes(stream), max(sizes), max(t.nbytes for _, t in stream)))
        export_pretrained(ModelSource(model), config, Path(folder) / f"{number}", progress=False)
    return results


def test_divided_models_stream_the_same_on_every_rank(tmp_path):
    cases = [
        ("plain", torch.float32, {"expert_parallel_size": 2}), ("tied", torch.bfloat16, {"expert_parallel_size": 1}),
        ("fourier", torch.float32, {"expert_parallel_size": 2}), ("uneven", torch.float32, {"expert_parallel_size": 1}),
        ("plain", torch.bfloat16, {"replicate_size": 2}),
    ]  # fmt: skip
    first, second = run_ranks(stream_all, 2, str(tmp_path), cases)
    assert first == second
    for number, (stream, message, largest) in enumerate(first):
        assert stream == in_files(tmp_path / f"{number}")
        assert message == largest  # never a stack of experts, never a layer
