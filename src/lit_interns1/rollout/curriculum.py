"""Which prompts are drawn, by how hard they have been.

    pass rate p of a prompt = right answers / answers           measured before (a file), and as training goes on

    kept      low ≤ p < high of a bucket, as often per epoch as the bucket says; prompts in no bucket are left out
    replay    with a probability, a draw is one of the hard prompts of late instead of the next of the epoch
    again     prompts of which no sample was judged (generation aborted, judges failed) are drawn next

OREAL (arXiv 2502.06781, §3.2, and its released configuration) repeats prompts 6, 4, 4 and 2 times by p in fifths, and
leaves out p ≥ 0.8. Every epoch of a source is a new permutation of what it then keeps. All ranks hear of the same
outcomes and draw the same prompts.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_interns1.data.order import IntArray, mix, permutation
from lit_interns1.rollout.prompts import PromptError, PromptOutcome, PromptSampler

OREAL_BUCKETS: tuple[tuple[float, float, int], ...] = ((0.0, 0.2, 6), (0.2, 0.4, 4), (0.4, 0.6, 4), (0.6, 0.8, 2))
"""(low, high, times) of OREAL's released configuration; all of p ≥ 0.8 are left out."""


class CurriculumPrompts(PromptSampler):
    """Draws prompts by their pass rates.

    Args:
        pass_rates: JSONL file with an object per line: `index`, the number of a prompt, and `pass_rate` in [0, 1].
        buckets: (low, high, times): how often per epoch a prompt with low ≤ p < high is drawn; a bucket whose high is 1
            also has p = 1. Prompts in no bucket are left out, prompts with no pass rate yet are drawn once. None: every
            prompt once, whatever its pass rate.
        online: Whether outcomes change pass rates: those of groups of which every sample was judged. They take effect
            in the next epoch of the source. A prompt that is left out is not measured again.
        momentum: Share of the old pass rate in the new one, in [0, 1); the first outcome counts wholly.
        replay: Probability that a draw is a hard prompt of late.
        replay_below: A prompt is hard if less than this fraction of its last samples was right.
        replay_memory: How many of the latest hard prompts are remembered.
        requeue: How often in a row a prompt is drawn again if none of its samples was judged.
        source_weights: Share of the draws by source, replayed and repeated ones not counted; sources that are not named
            have 1. None: sources have as many draws as their prompts are kept.

    Raises:
        PromptError: If the file cannot be read, with the line.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        pass_rates: str | Path | None = None,
        buckets: Sequence[tuple[float, float, int]] | None = OREAL_BUCKETS,
        online: bool = True,
        momentum: float = 0.5,
        replay: float = 0.0,
        replay_below: float = 0.25,
        replay_memory: int = 256,
        requeue: int = 2,
        source_weights: dict[str, float] | None = None,
    ) -> None:
        self.buckets = None if buckets is None else _checked_buckets(buckets)
        for name, value in (("replay", replay), ("momentum", momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} = {value} must lie in [0, 1)")
        if not 0 <= replay_below <= 1:
            raise ValueError(f"replay_below = {replay_below} must lie in [0, 1]")
        if replay_memory < 1 or requeue < 0:
            raise ValueError(f"replay_memory = {replay_memory} must be at least 1, requeue = {requeue} at least 0")
        for source, weight in (source_weights or {}).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"source_weights: the weight of {source!r} is {weight}, it must be at least 0")
        self.pass_rates = None if pass_rates is None else Path(pass_rates).expanduser()
        self.online, self.momentum = online, momentum
        self.replay, self.replay_below, self.requeue = replay, replay_below, requeue
        self.source_weights = source_weights
        self._measured = {} if self.pass_rates is None else _read(self.pass_rates)
        self._hard: deque[int] = deque(maxlen=replay_memory)
        self._again: deque[int] = deque()
        self._attempts: dict[int, int] = {}
        self._draws = 0  # of the whole run
        self._pools: list[_Pool] = []
        self._rates = np.zeros(0)

    def start(self, sources: Sequence[str], seed: int) -> None:
        """See `PromptSampler`.

        Raises:
            PromptError: If the file names a prompt that is not there.
            ValueError: If no prompt is left, or weights name an unknown source.
        """
        self._seed = seed
        self._rates = np.full(len(sources), np.nan)
        for index, (rate, line) in self._measured.items():
            if index >= len(sources):
                raise PromptError(f"{self.pass_rates}, line {line}: there is no prompt {index}, only {len(sources)}")
            self._rates[index] = rate
        if self.source_weights is None:
            self._pools = [_Pool(np.arange(len(sources)), 1.0, 0)]
        else:
            names = sorted(set(sources))
            if unknown := sorted(set(self.source_weights) - set(names)):
                raise ValueError(f"source_weights: there is no source {unknown[0]!r}; there are {', '.join(names)}")
            array = np.array(sources)
            pools = [
                _Pool(np.flatnonzero(array == name), self.source_weights.get(name, 1.0), place)
                for place, name in enumerate(names)
            ]
            self._pools = [pool for pool in pools if pool.weight > 0 and len(self._kept(pool))]
        if not self._pools or not any(len(self._kept(pool)) for pool in self._pools):
            raise ValueError(
                f"no prompt is left to be drawn: of {len(sources)}, {np.isfinite(self._rates).sum()} have a pass rate; "
                f"buckets = {self.buckets}, source_weights = {self.source_weights}"
            )

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self, count: int) -> list[int]:
        """See `PromptSampler`."""
        found: list[int] = []
        for _ in range(count):
            chance, choice = mix(np.array([1, 2], dtype=np.uint64), self._seed, 7, self._draws).tolist()
            fresh_hard = [index for index in self._hard if index not in found]
            if self._again:
                index = self._again.popleft()
            elif fresh_hard and chance / 2**64 < self.replay:
                index = fresh_hard[choice % len(fresh_hard)]
            else:
                index = self._next()
            self._draws += 1
            found.append(index)
        return found

    def _next(self) -> int:
        """The next prompt of the source whose turn it is (the method of Webster and Sainte-Laguë)."""
        pool = min(self._pools, key=lambda pool: (pool.given + 0.5) / pool.weight)
        if pool.position == len(pool.order):
            kept = self._kept(pool)
            if not len(kept):
                warnings.warn(
                    f"pass rates of all {len(pool.members)} prompts of a source are outside of the buckets "
                    f"{self.buckets}: the epoch takes all of them",
                    stacklevel=2,
                )
                kept = pool.members
            pool.order = kept[permutation(len(kept), self._seed, 8, pool.place, pool.epoch)]
            pool.epoch, pool.position = pool.epoch + 1, 0
        pool.position, pool.given = pool.position + 1, pool.given + 1
        return int(pool.order[pool.position - 1])

    def _kept(self, pool: _Pool) -> IntArray:
        """Prompts of an epoch, each as often as its bucket says."""
        if self.buckets is None:
            return pool.members
        rate_M = self._rates[pool.members]
        times_M = np.isnan(rate_M).astype(np.int64)
        for low, high, times in self.buckets:
            inside_M = (rate_M >= low) & ((rate_M < high) | ((high == 1.0) & (rate_M == 1.0)))
            times_M[inside_M] = times
        return np.repeat(pool.members, times_M)

    # -- outcomes -----------------------------------------------------------------------------------------------------

    def report(self, outcomes: Sequence[PromptOutcome]) -> None:
        """See `PromptSampler`."""
        for outcome in outcomes:
            index = outcome.index
            if all(math.isnan(reward) for reward in outcome.rewards):
                attempts = self._attempts.get(index, 0)
                if attempts < self.requeue:
                    self._attempts[index] = attempts + 1
                    self._again.append(index)
                continue
            self._attempts.pop(index, None)
            if math.isnan(outcome.correct) or any(math.isnan(reward) for reward in outcome.rewards):
                continue  # samples that finished before the others were stopped are the short ones
            if self.online:
                old = self._rates[index]
                share = 0.0 if math.isnan(old) else self.momentum
                self._rates[index] = outcome.correct if share == 0 else share * old + (1 - share) * outcome.correct
            if index in self._hard:
                self._hard.remove(index)
            if outcome.correct < self.replay_below:
                self._hard.append(index)

    @property
    def rates(self) -> NDArray[np.float64]:
        """(prompts,) pass rates as they are now; NaN = unknown."""
        return self._rates.copy()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `PromptSampler`."""
        return {
            "draws": self._draws,
            "rates": [None if math.isnan(rate) else rate for rate in self._rates.tolist()],
            "hard": list(self._hard),
            "again": list(self._again),
            "attempts": [list(entry) for entry in self._attempts.items()],
            "pools": [[pool.place, pool.given, pool.epoch, pool.position, pool.order.tolist()] for pool in self._pools],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `PromptSampler`.

        Raises:
            ValueError: If it is the state of other prompts.
        """
        pools = {pool.place: pool for pool in self._pools}
        if len(state["rates"]) != len(self._rates) or {entry[0] for entry in state["pools"]} != set(pools):
            raise ValueError(
                f"the state is that of {len(state['rates'])} prompts in {len(state['pools'])} sources with draws; here "
                f"are {len(self._rates)} in {len(pools)}: prompts and source_weights must be those of the first run"
            )
        self._draws = int(state["draws"])
        self._rates = np.array([math.nan if rate is None else rate for rate in state["rates"]])
        self._hard = deque(state["hard"], maxlen=self._hard.maxlen)
        self._again, self._attempts = deque(state["again"]), dict(state["attempts"])
        for place, given, epoch, position, order in state["pools"]:
            pool = pools[place]
            pool.given, pool.epoch, pool.position = given, epoch, position
            pool.order = np.array(order, dtype=np.int64)


class _Pool:
    """Prompts that share a weight: those of a source, or all.

    Args:
        members: Their numbers.
        weight: Share of the draws.
        place: Number of the pool.
    """

    def __init__(self, members: IntArray, weight: float, place: int) -> None:
        self.members, self.weight, self.place = members, weight, place
        self.given = self.epoch = self.position = 0
        self.order: IntArray = np.zeros(0, dtype=np.int64)


def _checked_buckets(buckets: Sequence[tuple[float, float, int]]) -> tuple[tuple[float, float, int], ...]:
    found = tuple((float(low), float(high), int(times)) for low, high, times in buckets)
    last = 0.0
    for low, high, times in found:
        if not last <= low < high <= 1 or times < 0:
            raise ValueError(
                f"buckets = {list(buckets)}: ascending (low, high, times) with 0 ≤ low < high ≤ 1 and times ≥ 0 are "
                f"wanted, got {(low, high, times)}"
            )
        last = high
    if not found:
        raise ValueError("buckets: at least one is needed, or None")
    return found


def _read(path: Path) -> dict[int, tuple[float, int]]:
    """Pass rate and line by number of the prompt."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"pass_rates = {str(path)!r}: {error}") from None
    found: dict[int, tuple[float, int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            index, rate = entry["index"], entry["pass_rate"]
        except (ValueError, TypeError, KeyError):
            raise PromptError(f"{path}, line {number}: an object with index and pass_rate is wanted") from None
        if type(index) is not int or index < 0 or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise PromptError(
                f"{path}, line {number}: index = {index!r} must be a number from 0, pass_rate = {rate!r} in [0, 1]"
            )
        if index in found:
            raise PromptError(f"{path}, line {number}: prompt {index} is in line {found[index][1]}, too")
        found[index] = (float(rate), number)
    return found
