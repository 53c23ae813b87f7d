"""Exports of a model that is divided over gloo ranks: the files of one process, byte for byte, on any mesh."""

import hashlib
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from distributed_harness import RankError, run_ranks
from huggingface_folders import CONFIG
from lit_interns1.checkpoints import ModelSource, export_pretrained
from lit_interns1.models import LanguageModel, preset

GOLDEN = Path(__file__).parents[1] / "golden" / "interns1_pro_tiny"
FEW = replace(CONFIG, vocab_size=66, moe=replace(CONFIG.moe, num_experts=2))  # uneven rows; more ranks than experts
TIED = replace(CONFIG, tie_word_embeddings=True)
WIDE = replace(
    CONFIG,
    hidden_size=256,
    num_heads=16,
    num_kv_heads=16,
    moe=replace(CONFIG.moe, num_experts=4, intermediate_size=128),
)
CONFIGS = {"plain": CONFIG, "few": FEW, "tied": TIED, "wide": WIDE, "fourier": preset("tiny-s1-pro", vocab_size=70)}
OPTIONS = {"max_shard_bytes": 60_000, "progress": False}


def divided(config, world, dtype=torch.float32, **sizes):
    """As the strategy divides it; weights depend on the seed and nothing else."""
    from lit_interns1.nn.initialization import materialize
    from lit_interns1.strategies.parallel_dims import ParallelDims
    from lit_interns1.strategies.parallelize import parallelize

    with torch.device("meta"):
        model = LanguageModel(config).to(dtype)
    dims = ParallelDims(world, **sizes)
    parallelize(model, model.parallel_plan(), dims.build_meshes("cpu"), dims)
    materialize(model, "cpu", seed=4, std=config.initializer_range)
    return model


def export_all(rank, world, folder, cases):
    from lit_interns1.checkpoints import ShardedWriter

    written = []
    for number, (name, sizes, options) in enumerate(cases):
        model = divided(CONFIGS[name], world, **sizes)
        final = Path(folder) / f"{number}"
        result = export_pretrained(ModelSource(model), CONFIGS[name], final, **OPTIONS, **options)
        written.append(result.bytes_written)
        if number == 0:  # the sharded checkpoint of the same model
            state = {"state_dict": {"model." + key: tensor for key, tensor in model.state_dict().items()}}
            rest = {"language_model_config": asdict(CONFIGS[name]), "global_step": 1}
            ShardedWriter().save(state, rest, Path(folder) / "last.ckpt")
    return written


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


EP1, EP2, EP4 = ({"expert_parallel_size": size} for size in (1, 2, 4))
BF16 = {"dtype": "bfloat16"}
REPLICATED = {"replicate_size": 2, "expert_parallel_size": 2}
CASES = {
    "two": (2, [("plain", EP2, {}), ("tied", EP1, BF16), ("fourier", EP2, {}), ("wide", EP2, {"dtype": "fp8"})]),
    "four": (4, [*(("plain", sizes, {}) for sizes in (EP2, EP1, EP4, REPLICATED)), ("few", EP1, {})]),
    "more": (4, [("few", EP2, {}), ("few", REPLICATED, {}), ("tied", EP4, {}), ("fourier", REPLICATED, {})]),
}  # fmt: skip


@pytest.mark.parametrize("name", ["two", "four", pytest.param("more", marks=pytest.mark.slow)])
def test_files_do_not_depend_on_the_ranks(name, tmp_path):
    from lit_interns1.checkpoints import open_source

    world, cases = CASES[name]
    results = run_ranks(export_all, world, str(tmp_path), cases)
    for number, (case, sizes, options) in enumerate(cases):
        model, alone = LanguageModel.create(CONFIGS[case], seed=4), tmp_path / f"alone-{number}"
        total = export_pretrained(ModelSource(model), CONFIGS[case], alone, **OPTIONS, **options).total_bytes
        assert contents(tmp_path / f"{number}") == contents(alone), (case, sizes)
        shares = [written[number] for written in results]
        assert sum(shares) == total  # each number once
        assert max(shares) < total
    source, config = open_source(tmp_path / "last.ckpt")
    assert config == CONFIGS[cases[0][0]]
    export_pretrained(source, config, tmp_path / "from-shards", **OPTIONS)
    assert contents(tmp_path / "from-shards") == contents(tmp_path / "alone-0")
    assert not list(tmp_path.glob(".*partial"))


# -- errors ----------------------------------------------------------------------------------------------------------


def fail_everywhere(rank, world, folder):
    """What each rank is told: of a target that exists, of FP8 blocks that are cut, of a disk of one rank, of a folder
    that one rank does not see."""
    from lit_interns1.checkpoints.huggingface import export

    export.SHARED_FOLDER_SECONDS = 0.2
    model = divided(CONFIG, world, expert_parallel_size=world)
    source, told = ModelSource(model), []

    def attempt(name, source=source, **options):
        try:
            export_pretrained(source, CONFIG, Path(folder) / name, progress=False, **options)
        except Exception as error:
            told.append(str(error))
        else:
            raise AssertionError(f"{name} was written")

    attempt("mine")
    attempt("cut", dtype="fp8")
    read = source.read
    if rank == 1:
        source.read = lambda name, window: (_ for _ in ()).throw(OSError("the disk of rank 1 is gone"))
    attempt("broken")
    source.read = read
    if rank == 1:
        check = export._Export._check_shared

        def elsewhere(self, token):
            self.partial = self.partial / "of another machine"
            check(self, token)

        export._Export._check_shared = elsewhere
    attempt("unseen")
    return told


def test_an_error_of_one_rank_is_one_of_all_and_nothing_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    first, second = run_ranks(fail_everywhere, 2, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    for told in (first, second):
        assert "mine exists: an export overwrites nothing" in told[0]
        assert "across the 128 × 128 blocks of FP8: save a checkpoint and export that" in told[1]
        assert "the disk of rank 1 is gone" in told[2]
        assert "rank 1 does not see" in told[3]


def die(rank, world, folder, moment):
    """SIGKILL of one rank when it has written half of what it has, or of rank 0 just before the final name."""
    model = divided(CONFIG, world, expert_parallel_size=world)
    source, reads = ModelSource(model), []
    read, rename = source.read, os.rename

    def deadly(name, window):
        reads.append(name)
        if moment == "middle" and rank == world - 1 and len(reads) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(name, window)

    source.read = deadly
    if moment == "end":
        os.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    try:
        export_pretrained(source, CONFIG, Path(folder) / "out", progress=False)
    finally:
        os.rename = rename


@pytest.mark.parametrize("moment", ["middle", "end"])
def test_an_export_that_is_killed_leaves_no_folder(tmp_path, moment):
    world = {"middle": 2, "end": 1}[moment]
    with pytest.raises(RankError, match="died without a traceback"):
        run_ranks(die, world, str(tmp_path), moment)
    assert not (tmp_path / "out").exists()
    if moment == "end":
        assert (tmp_path / ".out.partial" / "config.json").exists()
    model = LanguageModel.create(CONFIG, seed=4)
    export_pretrained(ModelSource(model), CONFIG, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    export_pretrained(ModelSource(model), CONFIG, tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
