"""FSDP2 together with expert parallelism as one Lightning strategy.

    trainer:
      strategy:
        class_path: MoEParallelStrategy
        init_args: {expert_parallel_size: 2}

Dense parameters are sharded over S ranks (and replicated R times), routed experts over P ranks by expert and over S/P
ranks inside; every rank reads data of its own, and tokens travel to their experts. Gradients are plain sums over ranks,
scaled once per optimizer step: by 1/Σcount for a `SummedLoss`, by 1/ranks for a module that returns a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lit_interns1.checkpoints import (
    METADATA_FILE,
    ShardedWriter,
    load_sharded,
    partial_path,
    publish,
    remove_published,
)
from lit_interns1.checkpoints.whole import load_whole_optimizer, load_whole_weights
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.parallel_plan import HasParallelPlan, ParallelPlan, default_plan
from lit_interns1.optim import fused_optimizers
from lit_interns1.strategies import gradients
from lit_interns1.strategies.equal_steps import equal_steps
from lit_interns1.strategies.parallel_dims import Meshes, ParallelDims
from lit_interns1.strategies.parallelize import DispatcherName, Precision, fsdp_modules, parallelize
from lit_interns1.strategies.recompute import recompute_in_backward
from lit_interns1.strategies.summary import layout_summary
from lit_interns1.training import LossWindow, all_reduce_sum

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MoEParallelStrategy(ModelParallelStrategy):
    """Shards any LightningModule over replication, FSDP2 and expert parallelism.

    The module need not know: submodules that declare a `parallel_plan()` follow it, others get a unit per entry of
    their `nn.ModuleList`s, and every layer with `experts` and a `dispatcher` is a sparse one. Parameters on the meta
    device are filled by name and seed, so that the weights do not depend on the layout.

    Args:
        shard_size: S, ranks that share the parameters. "auto": ranks / `replicate_size`.
        replicate_size: R, replicas of them.
        expert_parallel_size: P, ranks that share a layer's experts; divides S and the number of experts.
        compute_dtype: FSDP2 mixed precision: parameters are gathered and computed with in this type, and stay float32.
            With it leave `Trainer(precision=...)` at "32-true".
        reduce_dtype: Type in which gradients are summed over ranks.
        reshard_after_forward: Give gathered parameters back after forward (less memory, more communication).
        activation_checkpointing: Recompute blocks in backward, with the experts that were chosen: the modules that a
            plan names, or the entries of `nn.ModuleList`s where there is no plan.
        dispatcher: How tokens travel to experts on other ranks. "static" for grouped routers with whole groups on each
            rank: no sizes are exchanged; "exact" for any router; "auto": static where it can be, else exact; "deepep":
            DeepEP's kernels, which need its package and GPUs.
        gradient_norm_type: p of the norm that `gradient_clip_val` limits; `inf` for the largest absolute value.
        save_distributed_checkpoint: A folder that every rank writes its part of; False: one file.
        async_save: Write such folders in the background: training goes on when the tensors have been copied to memory
            of the host. The next save, and the end of the run, wait for it.
        process_group_backend: "nccl", "gloo", ...; None: gloo, on GPUs "cpu:gloo,cuda:nccl".
        timeout: Of collectives.

    Raises:
        ValueError: When processes start, if the sizes do not fit the number of ranks; and when the model is set up, if
            its experts do not divide.
    """

    handles_summed_loss = True
    shards_modules = True
    """Modules may leave their parameters on the meta device."""

    publishes_checkpoints = True
    """A checkpoint replaces an older one of its name in one step."""

    def __init__(
        self,
        shard_size: int | Literal["auto"] = "auto",
        replicate_size: int = 1,
        expert_parallel_size: int = 1,
        compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        reduce_dtype: Literal["float32", "bfloat16"] | None = "float32",
        reshard_after_forward: bool = True,
        activation_checkpointing: bool = False,
        dispatcher: DispatcherName = "auto",
        gradient_norm_type: float = 2.0,
        save_distributed_checkpoint: bool = True,
        async_save: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend, timeout=timeout,
        )  # fmt: skip
        if async_save and not save_distributed_checkpoint:
            raise ValueError("async_save = True needs save_distributed_checkpoint = True: one file is written at once")
        self.sizes = (shard_size, replicate_size, expert_parallel_size)
        self._writer = ShardedWriter(async_save)
        self.precision = Precision(
            _DTYPES[compute_dtype] if compute_dtype else None, _DTYPES[reduce_dtype] if reduce_dtype else None
        )
        self.dispatcher: DispatcherName = dispatcher
        self.activation_checkpointing = activation_checkpointing
        self.reshard_after_forward, self.gradient_norm_type = reshard_after_forward, gradient_norm_type
        self._window = LossWindow()
        self._uses_sums = False

    # -- processes and mesh --------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Starts the process group and builds the mesh."""
        self._setup_distributed()
        self.dims = ParallelDims(self.world_size, *self.sizes)
        self.meshes = self.dims.build_meshes(self.root_device.type)
        self._device_mesh = self.meshes.root
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _get_process_group_backend(self) -> str:
        # host numbers are agreed on, and background saves synchronised, without the device
        on_cpu = self.root_device.type == "cpu"
        return self._process_group_backend or ("gloo" if on_cpu else f"cpu:gloo,{super()._get_process_group_backend()}")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank reads data of its own."""
        mesh = self.meshes.data_parallel
        return {"num_replicas": mesh.size(), "rank": mesh.get_local_rank()}

    def process_dataloader(self, dataloader: object) -> object:
        """Every rank takes the same number of batches from it."""
        assert self.lightning_module is not None
        return equal_steps(dataloader, self.lightning_module.trainer.state.stage)

    # -- model ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Shards the model, fills it, and makes the optimizers."""
        module = self.lightning_module
        assert module is not None
        assert self.accelerator is not None
        if self.world_size > 1 and getattr(trainer, "_val_check_time_interval", None) is not None:
            raise ValueError(
                "Trainer(val_check_interval=...) as a time is not possible on several ranks: their clocks differ, and "
                "one would validate while others train; give it as a number of batches"
            )
        self.accelerator.setup(trainer)
        if not any(isinstance(part, FSDPModule) for part in module.modules()):
            self._shard(module)
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
        # Lightning's plugin calls torch's functions, which cannot add up norms of different meshes
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        self.precision_plugin.clip_grad_by_value = self._clip_by_value  # type: ignore[method-assign]

    def _shard(self, module: LightningModule) -> None:
        is_meta = any(parameter.is_meta for parameter in module.parameters())
        if not is_meta:
            for tensor in [*module.parameters(), *module.buffers()]:
                torch.distributed.broadcast(tensor.detach(), src=0)
        self.divide(module, self.meshes, self.dims)
        if is_meta and hasattr(module, "materialize"):
            module.materialize(self.root_device)  # type: ignore[operator]  # the module's own way to fill itself
        elif is_meta:
            materialize(module, self.root_device)
        rank_zero_info(layout_summary(module, self.dims))

    def divide(self, module: nn.Module, meshes: Meshes, dims: ParallelDims) -> list[ParallelPlan]:
        """Divides the parts of a module by their plans, in place; its parameters may be on the meta device.

        Returns:
            The plans that were followed.
        """
        plans = []
        for model, plan in roots(module):
            if self.activation_checkpointing:
                recompute_in_backward(model, plan)
            parallelize(model, plan, meshes, dims, self.precision, self.reshard_after_forward, self.dispatcher)
            plans.append(plan)
        return plans

    # -- losses and gradients ------------------------------------------------------------------------------------------

    @property
    def uses_sums(self) -> bool:
        """Whether the last training step returned a `SummedLoss`."""
        return self._uses_sums

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step; a `SummedLoss` is taken apart."""
        output = super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
        return self.take_loss(output, self.lightning_module.trainer.accumulate_grad_batches)

    def take_loss(self, output: Any, accumulation: int) -> Any:
        """What a step returned, with a scalar in place of a `SummedLoss`; its count is kept for `scale_gradients`."""
        self._uses_sums, output = self._window.take(output, accumulation)
        return output

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scales the summed gradients once, after backward and before anybody looks at them."""

        def scaled() -> Any:
            result = closure()
            self.scale_gradients(optimizer)
            return result

        return super().optimizer_step(optimizer, scaled, model, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Tells optimizers that update in backward what `scale_gradients` would do afterwards."""
        if fused := fused_optimizers(self.optimizers):
            factor = self._gradient_factor()
            for optimizer in fused:
                optimizer.gradient_factor = factor

    def scale_gradients(self, optimizer: Optimizer) -> None:
        """Makes sums of gradients means: over the counts of all ranks and micro-batches, or over ranks."""
        if not fused_optimizers([optimizer]):
            gradients.scale(_gradients(optimizer), self._gradient_factor())

    def _gradient_factor(self) -> Tensor:
        if not self._uses_sums:
            return torch.tensor(1.0 / self.dims.world_size, device=self.root_device)
        count = all_reduce_sum(self._window.local_count(self.root_device))
        return LossWindow.gradient_factor(count, averaged_over=1)

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float | int) -> None:
        given = _gradients(optimizer)
        if not given:  # a callback has taken them away to skip the step
            return
        norm = gradients.clip_by_norm(given, float(clip_val), self.gradient_norm_type)
        assert self.lightning_module is not None
        self.lightning_module.log("optim/grad_norm", norm)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float | int) -> None:
        gradients.clip_by_value(_gradients(optimizer), float(clip_val))

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Gradients stay on their rank until the last micro-batch of a step."""
        assert self.model is not None
        modules = fsdp_modules(self.model)
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint and puts it in the place of an older one in one step."""
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            states = enumerate(checkpoint.pop("optimizer_states", []))
            tensors = {"state_dict": checkpoint.pop("state_dict"), **{f"optimizer_{n}": state for n, state in states}}
            self._writer.save(tensors, checkpoint, path)
            return
        partial = partial_path(path)
        super().save_checkpoint(checkpoint, partial, storage_options)
        if self.is_global_zero:
            publish(partial, path)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Removes a checkpoint, but not before the one that may replace it is whole."""
        self._writer.wait()
        if self.is_global_zero:
            remove_published(Path(filepath))

    def teardown(self) -> None:
        """Waits for a checkpoint that is still being written."""
        self._writer.wait()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a sharded checkpoint of any layout, or a single file, and executes nothing of it.

        Raises:
            UnsafeCheckpointError: If it holds more than data.
        """
        self._writer.wait()
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        assert self.lightning_module is not None
        if path.is_dir() and not (path / METADATA_FILE).exists():
            hint = (
                "; for Hugging Face weights set the module's init_weights" if list(path.glob("*.safetensors")) else ""
            )
            raise ValueError(f"{path} is no checkpoint of a run: it has no {METADATA_FILE}{hint}")
        if not path.is_dir():
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            load_whole_weights(self.model, checkpoint["state_dict"], self.lightning_module.strict_loading)
            for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
                load_whole_optimizer(optimizer, state)
            return checkpoint
        weights = {"state_dict": get_model_state_dict(self.model)}
        load_sharded(weights, path)
        self.model.load_state_dict(weights["state_dict"], strict=self.lightning_module.strict_loading)
        for number, optimizer in enumerate(self.optimizers):
            # a scheduler, or a callback, may have added entries that the file does not have
            state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            load_sharded(state, path, allow_missing=True)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"], options=options)
        metadata: dict[str, Any] = torch.load(path / METADATA_FILE, weights_only=True)
        return metadata


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def roots(module: nn.Module) -> Iterable[tuple[nn.Module, ParallelPlan]]:
    """What becomes an FSDP2 root, with its plan: the children of the LightningModule. A training step need not call the
    module's own `forward`, but it calls theirs."""
    for child in module.children():
        if isinstance(child, HasParallelPlan):
            yield child, child.parallel_plan()
        elif any(True for _ in child.parameters()):
            yield child, default_plan(child)
