"""Laws of POLAR's pre-training: rate, batch and loss of a reward model by its size and its data (arXiv 2507.05197).

    rate   2.306e-4 · N^0.01125 · D_p^−0.66587 · D_rm^0.33916        batch  31.9032 · N^0.06944 · D_rm^0.52997
    loss   0.9 · N^−0.0425        2.4 · C^−0.0342                    §4.4; rate and batch: appendix D

N parameters, D_p tokens that the language model was pre-trained on, D_rm tokens of the reward model's pre-training, C
FLOPs. The paper says that rate and batch take all three in millions. Its own final values (rates 1.43e-5 and 1.67e-5,
batches 1946 and 4357) come out with N in millions and tokens in units of 2^30, and only so: that is what is done here,
from plain counts. D_p was not printed beside them; 2.5 and 4.0 trillion give the two rates. The loss laws take plain
counts: in millions, and C in larger units than FLOPs, they would give losses above ln 2, which is that of a coin.
"""

from __future__ import annotations

import math

_MILLION, _TOKEN_UNIT = 1e6, float(1 << 30)


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} = {value} must be positive and finite")


def polar_learning_rate(parameters: float, pretrain_tokens: float, reward_tokens: float) -> float:
    """The best peak rate, as fitted at a batch of 256 sequences.

    Args:
        parameters: N.
        pretrain_tokens: D_p.
        reward_tokens: D_rm.

    Raises:
        ValueError: If one is not positive.
    """
    _check(parameters=parameters, pretrain_tokens=pretrain_tokens, reward_tokens=reward_tokens)
    size, before, data = parameters / _MILLION, pretrain_tokens / _TOKEN_UNIT, reward_tokens / _TOKEN_UNIT
    return float(2.306e-4 * size**0.01125 * before**-0.66587 * data**0.33916)


def polar_batch_size(parameters: float, reward_tokens: float) -> float:
    """The best batch in sequences.

    Args:
        parameters: N.
        reward_tokens: D_rm.

    Raises:
        ValueError: If one is not positive.
    """
    _check(parameters=parameters, reward_tokens=reward_tokens)
    return float(31.9032 * (parameters / _MILLION) ** 0.06944 * (reward_tokens / _TOKEN_UNIT) ** 0.52997)


def polar_loss_of_size(parameters: float) -> float:
    """Validation loss of models of 50 million to one billion parameters, nats per pair.

    Raises:
        ValueError: If the number is not positive.
    """
    _check(parameters=parameters)
    return float(0.9 * parameters**-0.0425)


def polar_loss_of_compute(flops: float) -> float:
    """Validation loss at the best size for a training of so many FLOPs, nats per pair.

    Raises:
        ValueError: If the number is not positive.
    """
    _check(flops=flops)
    return float(2.4 * flops**-0.0342)
