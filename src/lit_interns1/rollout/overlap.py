"""The next rollout batch is generated while this one is trained on.

    rollout r is ready, weights θ  →  the engine takes θ  →  generates r + 1 in a thread   ┐
                                      optimizer steps on r: θ → θ′                         ┘ side by side

So samples are one rollout batch old when they are learned from, and say so in their `weight_versions`. Only the call of
the engine runs in the thread: drawing, judging and everything that ranks do together stay where they are, and weights
change between two generations, never within one. Prompts of the batch under way count as drawn when its samples are
taken; a run that is resumed from before that draws them again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from lit_interns1.rollout.engine import RolloutEngine
from lit_interns1.rollout.samples import GenerationRequest, Sample, SamplingOptions

_log = logging.getLogger(__name__)

STOP_SECONDS = 30.0
"""How long the end of a run waits for a generation that it has told to stop."""


class Asked(NamedTuple):
    """One call of an engine: requests, options, and how many finished requests are enough."""

    requests: Sequence[GenerationRequest]
    options: SamplingOptions
    enough: int | None


class GenerationAhead:
    """At most one call of an engine in a thread of its own."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        """Wall time of the generation that was taken last; whoever reads it sets it to None."""
        self._asked: Asked | None = None
        self._engine: RolloutEngine | None = None
        self._thread: threading.Thread | None = None
        self._samples: list[list[Sample]] = []
        self._error: BaseException | None = None
        self._took = 0.0

    def start(self, engine: RolloutEngine, asked: Asked) -> None:
        """Begins to generate; the weights must be up to date."""
        self.settle()
        self._asked, self._engine, self._error = asked, engine, None
        self._thread = threading.Thread(target=self._run, name="rollout-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._asked is not None
        assert self._engine is not None
        started = time.perf_counter()
        try:
            self._samples = self._engine.generate(*self._asked)
        except BaseException as error:
            self._error = error
        self._took = time.perf_counter() - started

    def settle(self) -> None:
        """Waits until the engine is idle; what it has generated is kept."""
        if self._thread is not None:
            self._thread.join()

    def take(self, asked: Asked) -> list[list[Sample]] | None:
        """The samples, if these were asked for; None if nothing or something else was.

        Raises:
            EngineError: That of the engine.
        """
        self.settle()
        mine, self._asked, self._thread = self._asked, None, None
        samples, self._samples = self._samples, []
        if mine is None:
            return None
        if self._error is not None:
            raise self._error
        if (list(mine.requests), *mine[1:]) != (list(asked.requests), *asked[1:]):
            _log.warning("a rollout batch that was generated ahead is dropped: other prompts or options are wanted now")
            return None
        self.seconds = self._took
        return samples

    def stop(self) -> None:
        """Ends a generation that nobody will take."""
        if self._thread is not None and self._thread.is_alive() and self._engine is not None:
            self._engine.close()
            self._thread.join(STOP_SECONDS)
        self._asked = self._thread = None
