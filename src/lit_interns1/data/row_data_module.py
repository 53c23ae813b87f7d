"""What every DataModule of packed rows shares: a plan of rows, one global order, and loaders that resume to the row.

    rows of the sources -> global order -> ranks        optimizer step s consumes rows [s·B, (s+1)·B);   B = A · W · m

W ranks, m rows per rank and forward pass, A accumulated micro-batches: A follows and is set on the Trainer.
"""

from __future__ import annotations

from typing import Any

from lit_interns1.data.loader import EvaluationLoader, ResumableLoader
from lit_interns1.data.order import RowOrder
from lit_interns1.data.tokenized_data_module import TokenizedDataModule
from lit_interns1.training import GlobalBatch


class RowDataModule(TokenizedDataModule):
    """Base of DataModules of rows. A subclass has a `tokenizer`, plans in `_plan`, and says in `_identity` what
    determines its rows.

    Args:
        row_length: L, tokens per row.
        global_batch_size: B, rows per optimizer step over all ranks and accumulated micro-batches.
        micro_batch_size: m, rows per rank and forward pass.
        validation_rows: Validate on at most this many rows; None = all.
        seed: Seed of the global order.
        num_workers: Processes per rank that read ahead; 0 = none.
        pin_memory: Page-locked batches; None = when the Trainer uses CUDA.
        block_rows: Rows of a block of the global order.

    Raises:
        ValueError: For an option out of its range, by name.
    """

    _training: Any = None
    _validation: Any = None
    _order: RowOrder | None = None
    _train_loader: ResumableLoader | None = None

    def __init__(
        self,
        row_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        validation_rows: int | None,
        seed: int,
        num_workers: int,
        pin_memory: bool | None,
        block_rows: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("row_length", row_length, 2),
            ("global_batch_size", global_batch_size, 1),
            ("micro_batch_size", micro_batch_size, 1),
            ("block_rows", block_rows, 1),
            ("num_workers", num_workers, 0),
            ("validation_rows", 1 if validation_rows is None else validation_rows, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        GlobalBatch(global_batch_size, micro_batch_size)  # B must at least be a multiple of m
        self.row_length, self.global_batch_size, self.micro_batch_size = row_length, global_batch_size, micro_batch_size
        self.validation_rows, self.seed, self.block_rows = validation_rows, seed, block_rows
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self._restored: dict[str, Any] = {}

    # what a subclass says

    def _plan(self) -> None:
        """Sets `_training`, `_validation` and `_order`."""
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """What determines the rows, by name."""
        raise NotImplementedError

    # what follows

    @property
    def data_parallel_size(self) -> int:
        """W, ranks that read different rows."""
        return self._ranks()[0]

    @property
    def global_batch(self) -> GlobalBatch:
        """B, m and W.

        Raises:
            ValueError: If B is not a multiple of W·m.
        """
        return GlobalBatch(self.global_batch_size, self.micro_batch_size, self.data_parallel_size)

    # Lightning's hooks

    def setup(self, stage: str | None = None) -> None:
        """Plans rows and order; for `fit` also derives the accumulation and sets it on the Trainer.

        Raises:
            ValueError: If the Trainer has another accumulation, B is not divisible, or there are too few documents.
        """
        if stage in ("fit", None):
            self._set_accumulation()
            self._train_loader = None
        if self._training is None:
            self._plan()
        if stage in ("fit", None):
            self.train_dataloader()  # too few rows for a step: say it now

    def train_dataloader(self) -> ResumableLoader:
        """The loader of this rank; the same one, at its position, until the next `setup`."""
        if self._train_loader is None:
            size, rank = self._ranks()
            batch = GlobalBatch(self.global_batch_size, self.micro_batch_size, size)
            self._train_loader = ResumableLoader(
                self._reader(self._training),
                self.row_order,
                batch,
                rank,
                num_workers=self.num_workers,
                pin_memory=self._pin_memory(),
                batches_per_epoch=self._limit(batch),
                identity=self._identity(),
            )
            if self._restored:
                self._train_loader.load_state_dict(self._restored)
            self._train_loader.on_load = self._align_progress
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The position of the training rows.

        Lightning stores it with the loader, too, but does not give it back to a run that goes on after its end (with a
        larger budget): that run would start again at the first row.
        """
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues behind the rows of the checkpoint; see `ResumableLoader.load_state_dict`."""
        self._restored = state_dict
        if self._train_loader is not None and state_dict:
            self._train_loader.load_state_dict(state_dict)

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Every validation token once over all ranks; an empty list if there is nothing to validate on."""
        reader = self._reader(self._validation)
        if not reader.sources:
            return []
        size, rank = self._ranks()
        listed = [(index, row) for index, source in enumerate(reader.sources) for row in range(source.plan.num_rows)]
        return EvaluationLoader(reader, listed, self.micro_batch_size, size, rank, self.num_workers, self._pin_memory())

    def test_dataloader(self) -> EvaluationLoader | list[Any]:
        """The validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EvaluationLoader | list[Any]:
        """The validation rows."""
        return self.val_dataloader()

    # for reports

    @property
    def row_order(self) -> RowOrder:
        """The global order of training rows."""
        if self._order is None:
            raise RuntimeError(f"{type(self).__name__}: call setup('fit') first")
        return self._order

    @property
    def rows_consumed(self) -> int:
        """Training rows that all ranks together have consumed so far."""
        return self._train_loader.rows if self._train_loader is not None else 0

    # inside

    def _reader(self, reader: Any) -> Any:
        if reader is None:
            raise RuntimeError(f"{type(self).__name__}: call prepare_data() and setup(...) first")
        return reader

    def _set_accumulation(self) -> None:
        accumulation = self.global_batch.accumulation
        if self.trainer is None:
            return
        present = self.trainer.accumulate_grad_batches
        if present not in (1, accumulation):
            raise ValueError(
                f"Trainer(accumulate_grad_batches={present}) contradicts global_batch_size={self.global_batch_size}: "
                f"with micro_batch_size={self.micro_batch_size} on {self.data_parallel_size} data-parallel ranks it "
                f"takes {accumulation} micro-batches; leave accumulate_grad_batches at 1"
            )
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches:
            raise ValueError(
                f"Trainer(overfit_batches={overfit_batches}) is not possible with a global row order; "
                "train on a small source instead"
            )
        self.trainer.accumulate_grad_batches = accumulation

    def _limit(self, batch: GlobalBatch) -> int | None:
        """`limit_train_batches` as the length of an epoch, so that the loader's epochs are the Trainer's."""
        limit = getattr(self.trainer, "limit_train_batches", None)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            return None
        if limit % batch.accumulation and not getattr(self.trainer, "fast_dev_run", False):
            raise ValueError(
                f"Trainer(limit_train_batches={limit}) is not a multiple of the {batch.accumulation} micro-batches of "
                f"an optimizer step: the last step of every epoch would see fewer than {batch.rows_per_step} rows"
            )
        return limit

    def _pin_memory(self) -> bool:
        if self.pin_memory is not None:
            return self.pin_memory
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", None)
        return device is not None and device.type == "cuda"

    def _align_progress(self, loader: ResumableLoader) -> None:
        """After a resume with another W·m: Lightning counts micro-batches of the epoch, and those have another size."""
        if self.trainer is None:
            return
        current = self.trainer.fit_loop.epoch_loop.batch_progress.current
        shift = loader.batches_done - current.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + shift)
