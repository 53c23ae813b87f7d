"""An export holds one block of one matrix in memory, not a file, a stack or a stored chunk."""

import json
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace

import pytest
import torch
from torch.distributed.checkpoint import save

from huggingface_folders import CONFIG, config_values, write_folder, written_tensors
from lit_interns1.checkpoints.huggingface import is_pretrained_folder
from lit_interns1.models import LanguageModel

LARGE = replace(
    CONFIG, hidden_size=512, num_layers=1, vocab_size=8192,
    moe=replace(CONFIG.moe, num_experts=64, intermediate_size=704),
)  # fmt: skip
"""310 MB, of which one stack of experts has 185."""

_SCRIPT = textwrap.dedent("""
    import json, sys, threading, time
    from pathlib import Path

    import torch
    torch.set_num_threads(1)
    from lit_interns1.checkpoints import export_pretrained, open_source

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    source, config = open_source(sys.argv[1])
    if sys.argv[3] == "whole":  # the control: a stack at once
        read = source.read
        whole = {}
        def read_whole(name, window):
            if name not in whole:
                whole.clear()
                whole[name] = read(name, tuple(slice(0, n) for n in source.tensors[name].shape))
            return whole[name][window]
        source.read = read_whole
    start, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    result = export_pretrained(source, config, sys.argv[2], dtype=sys.argv[4])
    done.set()
    thread.join()
    print(json.dumps([peak[0] - start, max(result.files.values()), result.total_bytes]))
""")


def growth(path, out, how="blocks", dtype="native"):
    """Bytes by which anonymous memory grew at most, those of the largest file, and all."""
    output = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(path), str(out), how, dtype], check=True, capture_output=True, text=True
    ).stdout
    assert is_pretrained_folder(out)
    return json.loads(output)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_memory_does_not_grow_with_files_or_chunks(tmp_path):
    model = LanguageModel.create(LARGE, seed=1)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    rest = {"language_model_config": asdict(LARGE), "global_step": 7}
    torch.save({"state_dict": weights, **rest}, tmp_path / "last.ckpt")
    save({"state_dict": weights}, checkpoint_id=tmp_path / "sharded.ckpt")
    torch.save(rest, tmp_path / "sharded.ckpt" / "meta.pt")
    write_folder(tmp_path / "hub", written_tensors(model), config_values(LARGE) | {
        "hidden_size": 512, "num_hidden_layers": 1, "moe_intermediate_size": 704,
    })  # fmt: skip
    del model, weights
    limit = 48 << 20  # a matrix has 1.4 MB, the embedding 17
    for name, dtype in (
        ("last.ckpt", "native"),
        ("sharded.ckpt", "native"),
        ("sharded.ckpt", "fp8"),
        ("hub", "bfloat16"),
    ):
        grown, largest, total = growth(tmp_path / name, tmp_path / f"{name}-{dtype}", dtype=dtype)
        print(f"{name:<13} {dtype:<9} {grown / 1e6:7.1f} MB anonymous, largest file {largest / 1e6:.0f} MB")
        assert grown < limit, (name, dtype)
        assert largest > total > 80e6
    grown, *_ = growth(tmp_path / "sharded.ckpt", tmp_path / "control", "whole")
    print(f"control       {grown / 1e6:.1f} MB")
    assert grown > 150e6
