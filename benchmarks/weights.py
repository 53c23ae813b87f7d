"""Memory and time of weights on their way in and out: a checkpoint of several GB in shards of at least 2 GB.

    python benchmarks/weights.py --folder scratch/weights [--layers 8] [--experts 64] [--repeats 3]

Memory: each conversion runs in a fresh process. The peak of its anonymous memory (RssAnon, sampled each 2 ms) above
that of the process, and of its model if it has one, must stay below twice the largest tensor of the files + 256 MiB.
With a whole file in memory at once it must not: that shows that the measurement would notice.
Times: all candidates take turns with `cp` of the same files; exports end with fsync, so that is added to `cp`, too.
The folder must not exist; it needs four times the checkpoint's size and is removed at the end. Linux only.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from measure import MEBIBYTE, interleaved_times, resident, start_peak, started, verdict
from safetensors.torch import load
from torch import Tensor
from torch.distributed.checkpoint import save

from lit_interns1.checkpoints import (
    CONFIG_KEY,
    METADATA_FILE,
    CheckpointSource,
    ModelSource,
    export_pretrained,
    load_pretrained_weights,
)
from lit_interns1.checkpoints.huggingface.files import WeightFiles
from lit_interns1.checkpoints.huggingface.safetensors_file import SafetensorsFile, Window
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig

ALLOWANCE = 256 * MEBIBYTE
CONVERSIONS = ("import", "export of the model", "export of a file", "export of shards")
CONTROLS = ("import, a shard at once", "export of a file, all at once")


class AnonymousPeak:
    """The most anonymous memory of this process while the block runs, in bytes above that at its start."""

    def __enter__(self) -> AnonymousPeak:
        self.level = self.peak = start_peak()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, resident("RssAnon"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.extra = max(self.peak, resident("RssAnon")) - self.level


def make_model(config: LanguageModelConfig) -> LanguageModel:
    """A bfloat16 model whose memory is there; the experts of a layer differ."""
    with torch.device("meta"):
        model = LanguageModel(config).bfloat16()
    model.to_empty(device="cpu")
    generator, bases = torch.Generator().manual_seed(0), dict[torch.Size, Tensor]()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            for number, matrix in enumerate(tensor if tensor.ndim == 3 else [tensor]):
                if matrix.shape not in bases:
                    bases[matrix.shape] = torch.empty_like(matrix).uniform_(-0.05, 0.05, generator=generator)
                torch.mul(bases[matrix.shape], 1 + number / 64, out=matrix)
    return model


def make_checkpoints(folder: Path, config: LanguageModelConfig, shard_bytes: int, connection: Connection) -> None:
    """The same weights three times: a Hugging Face folder, a checkpoint in one file, and a sharded one."""
    model = make_model(config)
    export_pretrained(ModelSource(model), config, folder / "huggingface", max_shard_bytes=shard_bytes, progress=False)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    rest = {CONFIG_KEY: asdict(config), "global_step": 1}
    torch.save({"state_dict": weights, **rest}, folder / "file.ckpt")
    save({"state_dict": weights}, checkpoint_id=folder / "shards.ckpt")
    torch.save(rest, folder / "shards.ckpt" / METADATA_FILE)
    connection.send(None)


def read_whole_file(file: SafetensorsFile, key: str, window: Window, kept: dict[Path, Any] | None = None) -> Tensor:
    """The control in place of `SafetensorsFile.read`: all tensors of a file come into memory, one file at a time."""
    kept = _KEPT if kept is None else kept
    if file.path not in kept:
        kept.clear()
        kept[file.path] = load(file.path.read_bytes())
    tensor: Tensor = kept[file.path][key][window]
    return tensor


_KEPT: dict[Path, Any] = {}


def conversion(name: str, folder: Path, config: LanguageModelConfig, model: LanguageModel | None) -> Callable[[], None]:
    """What is measured, from files to a model or to `folder`/out."""
    out = folder / "out"
    if name.startswith("import"):
        assert model is not None
        checked = "without checksums" not in name
        return lambda: _nothing(load_pretrained_weights(model, folder / "huggingface", verify_checksums=checked))

    def export() -> None:
        path = folder / ("file.ckpt" if "file" in name else "shards.ckpt")
        source = ModelSource(model) if model is not None else CheckpointSource(path)
        export_pretrained(source, config, out, max_shard_bytes=2**62, progress=False)

    return export


def _nothing(result: object) -> None:
    """Drops what is not asked for."""


def measure_memory(name: str, folder: Path, config: LanguageModelConfig, connection: Connection) -> None:
    """Peak anonymous memory of one conversion; runs in a process of its own."""
    with_model = name.startswith("import") or name == "export of the model"
    model = make_model(config) if with_model else None
    if name == CONTROLS[0]:
        SafetensorsFile.read = read_whole_file  # type: ignore[assignment,method-assign]
    if name == CONTROLS[1]:
        whole = functools.partial(torch.load, weights_only=True)
        torch.load = lambda *arguments, **named: whole(*arguments)  # type: ignore[assignment]
    torch.ones(4).bfloat16().sum()  # threads and kernels are there
    run = conversion(name, folder, config, model)
    with AnonymousPeak() as peak:
        run()
    connection.send(peak.extra)


def memory_of(name: str, folder: Path, config: LanguageModelConfig) -> int:
    """Bytes above idle, see `measure_memory`."""
    try:
        with started(measure_memory, name, folder, config) as connection:
            return int(connection.recv())
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)


def copy(folder: Path) -> None:
    """`cp` of the weights, on the disk when it ends as those of an export are."""
    out = folder / "out"
    out.mkdir()
    subprocess.run(["cp", "--reflink=never", *sorted((folder / "huggingface").glob("*.safetensors")), out], check=True)
    for path in out.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure_times(folder: Path, config: LanguageModelConfig, repeats: int, connection: Connection) -> None:
    """Seconds of everything in turn; runs in a process of its own, which holds a model."""
    model = make_model(config)
    candidates: dict[str, Callable[[], Any]] = {"cp and fsync": lambda: copy(folder)}
    for name in ("import", "import without checksums"):
        candidates[name] = conversion(name, folder, config, model)
    candidates["export of the model"] = conversion("export of the model", folder, config, model)
    for name in CONVERSIONS[2:]:
        candidates[name] = conversion(name, folder, config, None)
    all_candidates: dict[str, Callable[[], Any]] = {}
    for name, candidate in candidates.items():
        all_candidates[name] = candidate
        all_candidates[f"remove after {name}"] = lambda: shutil.rmtree(folder / "out", ignore_errors=True)
    times = interleaved_times(all_candidates, repeats)
    connection.send({name: times[name] for name in candidates})


def benchmark_config(layers: int, experts: int, hidden: int, intermediate: int, vocab: int) -> LanguageModelConfig:
    """A sparse model of this size."""
    return LanguageModelConfig(
        vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_heads=hidden // 64, num_kv_heads=2, head_dim=64,
        moe=MoEConfig(num_experts=experts, experts_per_token=min(4, experts), intermediate_size=intermediate),
    )  # fmt: skip


def limit_of(folder: Path) -> tuple[int, int]:
    """The largest tensor of the files in bytes, and what a conversion may use."""
    largest = max(tensor.nbytes for tensor in WeightFiles(folder / "huggingface").tensors.values())
    return largest, 2 * largest + ALLOWANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="is made for the run and removed after it")
    for name, value in (("layers", 8), ("experts", 64), ("hidden", 2048), ("intermediate", 768), ("vocab", 16384)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--shard_bytes", type=int, default=2_600_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    config = benchmark_config(options.layers, options.experts, options.hidden, options.intermediate, options.vocab)
    options.folder.mkdir(parents=True)
    try:
        with started(make_checkpoints, options.folder, config, options.shard_bytes) as connection:
            connection.recv()
        sizes = [path.stat().st_size for path in sorted((options.folder / "huggingface").glob("*.safetensors"))]
        largest, limit = limit_of(options.folder)
        print(f"shards of {', '.join(f'{size / 1e9:.2f} GB' for size in sizes)}; largest tensor {largest / 1e6:.0f} MB")
        print(f"\npeak RssAnon above idle; limit 2 x largest + 256 MiB = {limit / 1e6:.0f} MB")
        for name in (*CONVERSIONS, *CONTROLS):
            extra = memory_of(name, options.folder, config)
            goal = (
                f"above the limit, as it must be: {verdict(extra > limit)}"
                if name in CONTROLS
                else verdict(extra <= limit)
            )
            print(f"  {name:<32} {extra / 1e6:8.0f} MB   {goal}", flush=True)
        with started(measure_times, options.folder, config, options.repeats) as connection:
            times = connection.recv()
        medians = {name: statistics.median(values) for name, values in times.items()}
        base = medians["cp and fsync"]
        print(f"\nseconds per GB, median of {options.repeats} (least … most), and ratio to cp")
        for name, seconds in medians.items():
            low, high = (bound(times[name]) / sum(sizes) * 1e9 for bound in (min, max))
            rate = seconds / sum(sizes) * 1e9
            print(f"  {name:<32} {rate:6.2f} s/GB ({low:.2f} … {high:.2f})   {seconds / base:5.2f} x")
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
