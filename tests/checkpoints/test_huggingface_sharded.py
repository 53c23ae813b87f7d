"""`init_weights` through the strategy on gloo ranks: the weights of one process, each rank reading what it holds."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from distributed_harness import run_ranks
from huggingface_folders import CONFIG, config_values, write_folder, written_tensors
from lit_interns1.checkpoints import load_pretrained_model
from lit_interns1.models import LanguageModel
from sharded_training import batches, environment, whole

GOLDEN = Path(__file__).parents[1] / "golden" / "interns1_pro_tiny"


def start(rank, world, folder, sizes):
    """Weights before the first step, bytes that were read, and numbers that this rank holds, by type of storage."""
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.modules import LanguageModelModule
    from lit_interns1.strategies import MoEParallelStrategy

    environment(rank, world)
    warnings.filterwarnings("ignore")
    module = LanguageModelModule(init_weights=folder, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    result = {}

    class Record(L.Callback):
        def on_train_start(self, trainer, pl_module):
            tensors = {**dict(pl_module.model.named_parameters()), **dict(pl_module.model.named_buffers())}
            tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("frequencies")}
            result["weights"] = {name: whole(tensor) for name, tensor in tensors.items()}
            result["held"] = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors.values())
            result["read"] = pl_module.loaded_weights.bytes_read

    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=MoEParallelStrategy(**sizes), plugins=[TorchElasticEnvironment()],
        max_epochs=1, max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[Record()],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(rank, world, 1), batch_size=None))
    assert trainer.global_step == 1
    return result


def start_all(rank, world, cases):
    torch.set_num_threads(1)
    return [start(rank, world, *case) for case in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By name: folder and bytes per number in it (None: FP8 with its scales)."""
    root = tmp_path_factory.mktemp("folders")
    plain = replace(CONFIG, vocab_size=66)  # rows that 4 ranks cannot share evenly
    few = replace(CONFIG, moe=replace(CONFIG.moe, num_experts=2))  # more ranks than experts: rows are shared instead
    tied = replace(CONFIG, tie_word_embeddings=True)
    result = {"pro": (str(GOLDEN), 4)}
    for name, config, dtype in (
        ("plain", plain, torch.bfloat16),
        ("few", few, torch.float32),
        ("tied", tied, torch.float32),
    ):
        tensors = written_tensors(LanguageModel.create(config, seed=6), dtype)
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        folder = write_folder(root / name, tensors, config_values(config), files=3)
        result[name] = (str(folder), dtype.itemsize)
    tensors = written_tensors(LanguageModel.create(few, seed=7))
    generator = torch.Generator().manual_seed(1)
    for key in [key for key in tensors if "proj" in key]:
        height, width = tensors[key].shape
        tensors[key] = tensors[key].mul(64).to(torch.float8_e4m3fn)
        tensors[key + "_scale_inv"] = torch.rand(-(-height // 12), -(-width // 10), generator=generator)
    quantization = {"quant_method": "fp8", "weight_block_size": [12, 10]}
    folder = write_folder(root / "fp8", tensors, {**config_values(few), "quantization_config": quantization})
    result["fp8"] = (str(folder), None)
    return result


EP1, EP2, EP4 = ({"expert_parallel_size": size} for size in (1, 2, 4))
REPLICATED = {"replicate_size": 2, "expert_parallel_size": 2}
CASES = {
    "two": (2, [("plain", EP2), ("pro", EP2)]),
    "four": (4, [("plain", EP1), ("plain", EP4), ("few", EP2), ("fp8", EP2)]),
    "more": (4, [("plain", EP2), ("plain", REPLICATED), ("few", EP1), ("tied", EP2), ("pro", EP4)]),
}


@pytest.mark.parametrize("name", ["two", "four", pytest.param("more", marks=pytest.mark.slow)])
def test_each_rank_reads_its_part_and_nothing_else(name, folders):
    world, cases = CASES[name]
    results = run_ranks(start_all, world, [(folders[name][0], sizes) for name, sizes in cases], timeout=60.0)
    for number, (name, sizes) in enumerate(cases):
        folder, item_size = folders[name]
        expected = load_pretrained_model(folder)
        tensors = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
        for rank in range(world):
            ours = results[rank][number]
            assert ours["weights"].keys() == tensors.keys() - {"rotary_emb.frequencies"}
            for key, tensor in ours["weights"].items():
                assert torch.equal(tensor, tensors[key]), (name, sizes, key)
            if item_size is not None:
                assert ours["read"] == ours["held"] * item_size, (name, sizes)
        parameters = sum(parameter.numel() for parameter in expected.parameters())
        buffers = sum(ours.numel() for key, ours in tensors.items() if key.endswith("_coef"))
        held = sum(results[rank][number]["held"] for rank in range(world))
        assert held == sizes.get("replicate_size", 1) * parameters + world * buffers, (name, sizes)


def test_all_ranks_refuse_a_folder_that_does_not_fit(folders, tmp_path):
    tensors = written_tensors(LanguageModel.create(CONFIG))
    del tensors["model.layers.1.mlp.experts.7.down_proj.weight"]
    write_folder(tmp_path, tensors)
    messages = run_ranks(refusal, 2, str(tmp_path))
    assert len(set(messages)) == 1
    assert "missing  model.layers.1.mlp.experts.7.down_proj.weight" in messages[0]


def refusal(rank, world, folder):
    from lit_interns1.checkpoints import WeightsError

    try:
        start(rank, world, folder, EP2)
    except WeightsError as error:
        return str(error)
    raise AssertionError("accepted")
