"""What modules of decoders share: a config, weights to start from, the losses of routers, and what checkpoints say.

loss + α · balance + α_z · router z
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_interns1.callbacks import ExpertBiasUpdate
from lit_interns1.checkpoints import CONFIG_KEY
from lit_interns1.checkpoints.huggingface import LoadedWeights, WeightsError
from lit_interns1.models import LanguageModelConfig, preset
from lit_interns1.models.config import changed, differing_fields
from lit_interns1.modules.counted_module import CountedModule
from lit_interns1.modules.initial_weights import config_of_weights, load_weights
from lit_interns1.nn.initialization import materialize
from lit_interns1.nn.moe import BalanceLoss, RouterStats
from lit_interns1.optim import TokenSchedule
from lit_interns1.training import SummedLoss, WindowMeans, token_weight


class DecoderModule(CountedModule):
    """A module whose `model` has the body of a language model.

    Args:
        config: The model's shape, or the name of a preset; default: that of `init_weights`, else "tiny-s1-pro".
        changes: Fields of the preset, or of the folder's config, to change.
        optimizer: Makes the optimizer from parameter groups.
        schedule: Factor on the rate as a function of consumed tokens; None = constant.
        balance: Balance and z losses of the routers.
        seed: Seed of the initial weights.
        decay_embeddings: Also apply weight decay to the embedding.
        init_weights: What to start from instead of random weights; see `initial_weights`.
    """

    loaded_weights: LoadedWeights | None = None
    """What was read from `init_weights`."""
    checkpoint_follows: bool = False
    """A checkpoint will be loaded, so `init_weights` need not be read. Lightning does not say so in time; the command
    line sets this. Without it the folder is read first, and the checkpoint goes over it."""

    def __init__(
        self,
        config: LanguageModelConfig | str | None,
        changes: dict[str, Any] | None,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        schedule: TokenSchedule | None,
        balance: BalanceLoss | None,
        seed: int,
        decay_embeddings: bool,
        init_weights: str | None,
    ) -> None:
        super().__init__(optimizer, schedule, decay_embeddings, seed)
        if changes and isinstance(config, LanguageModelConfig):
            raise ValueError(f"changes = {changes} are for presets and folders; write them into the config itself")
        self.init_weights, self._config_is_theirs = init_weights, config is None and init_weights is not None
        if self._config_is_theirs:
            config = config_of_weights(str(init_weights))
        elif not isinstance(config, LanguageModelConfig):
            config = preset(config or "tiny-s1-pro")
        self.config = changed(config, changes or {})
        self.balance = balance or BalanceLoss()
        self._means = WindowMeans()

    # -- building ----------------------------------------------------------------------------------------------------

    def materialize(self, device: torch.device | str) -> None:
        """Fills in the initial weights: those of `init_weights`, or random ones. They do not depend on how the model is
        divided."""
        try:
            self.loaded_weights = self.fill(self.model, device)
        except WeightsError:
            del self.model  # without memory it cannot be moved, which Lightning would complain about instead
            raise

    def fill(self, model: nn.Module, device: torch.device | str, weights: str | None = None) -> LoadedWeights | None:
        """Gives a network of this module's config its initial weights.

        Args:
            model: The network.
            device: Where it goes from the meta device.
            weights: Where they come from; default: from `init_weights`, or else random ones.

        Returns:
            What was read, if anything was.
        """
        found = weights or self.init_weights
        if found is None or self.checkpoint_follows:
            materialize(model, device=device, seed=self.seed, std=self.config.initializer_range)
            return None
        check = weights is not None or not self._config_is_theirs  # theirs differs by what `changes` says, if at all
        return load_weights(model, found, device, check, self.seed)

    def wanted_callbacks(self) -> list[Callback]:
        """Also the bias of sigmoid routers."""
        sigmoid = self.config.moe is not None and self.config.moe.router == "sigmoid"
        return [*super().wanted_callbacks(), *([ExpertBiasUpdate()] if sigmoid else [])]

    def setup(self, stage: str) -> None:
        """Checks the vocabulary of the data against the model's."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "check_vocabulary"):
            data.check_vocabulary(self.config.vocab_size)

    # -- steps -------------------------------------------------------------------------------------------------------

    def finished_loss(
        self, loss: SummedLoss, values: dict[str, Tensor], router_stats: Sequence[RouterStats]
    ) -> SummedLoss:
        """What a training step returns: the loss with those of the routers; keeps means for the log.

        Args:
            loss: Of the objective; logged as `train/loss`.
            values: More means over what `loss` counts, by the key of the log.
            router_stats: Of the forward pass.
        """
        values = {"train/loss": loss.mean, **values}
        auxiliary, parts = self.balance(list(router_stats))
        if auxiliary is not None:
            loss = loss.plus_mean(auxiliary, token_weight(loss.count, router_stats[0].num_tokens))
            values |= {f"train/{name}": value for name, value in parts.items()}
        self._means.add(values, loss.count)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the means over the optimizer step."""
        for name, value in self._means.reduce().items():
            self.log(name, value, prog_bar=name == "train/loss")
        self.balance.start_step()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the model's config."""
        checkpoint[CONFIG_KEY] = asdict(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another architecture, naming the fields that differ."""
        saved = checkpoint.get(CONFIG_KEY)
        if saved is None:
            raise ValueError(f"the checkpoint has no {CONFIG_KEY!r}: it holds no decoder")
        differences = differing_fields(saved, asdict(self.config))
        if differences:
            raise ValueError("the checkpoint holds another architecture (saved → present): " + "; ".join(differences))
