"""What a server gives, found out with requests of one token before anything depends on it.

    log-probability of the most probable token at τ = 1 and τ = 1/4, drawn with top_p → 0:
        both 0                    of the distribution that is drawn from, truncated
        the second one is higher  after temperature, before truncation
        equal                     before temperature

Servers do not tell which of these they return; it hangs on flags. Routing is asked for in the same requests.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

from lit_interns1.rollout.engine import EngineError
from lit_interns1.rollout.remote.answers import Wanted
from lit_interns1.rollout.remote.batch import Batch
from lit_interns1.rollout.remote.dialects import Dialect
from lit_interns1.rollout.remote.http import Call, Patience, Server
from lit_interns1.rollout.samples import GenerationRequest, Sample, SamplingOptions

_log = logging.getLogger(__name__)

LogprobsOf = Literal["drawn", "tempered", "raw"]
"""As it is drawn from; after temperature, before top-p and top-k; before all of them."""
HEALTH = Call("/health", None, "GET", is_json=False)
PROMPT = (1, 2, 3)
COLD = 0.25
RESOLUTION = 1e-4
"""Log-probabilities that differ by less are equal."""


def probe(server: Server, dialect: Dialect, patience: Patience, wanted: Wanted, name: str) -> LogprobsOf:
    """Asks for health and for two tokens.

    Args:
        server: The server.
        dialect: Its kind.
        patience: With failures; a server may still be loading its model.
        wanted: Routing that samples need, and flags.
        name: Beginning of request ids.

    Raises:
        EngineError: If it cannot be reached, or does not give what is needed; it names the flag.
    """
    server.patiently(HEALTH, patience)
    samples: list[Sample] = []
    for temperature in (1.0, COLD):
        options = SamplingOptions(max_new_tokens=1, temperature=temperature, top_p=1e-3)
        batch = Batch(dialect, [server], patience, 1, replace(wanted, options=options), None, f"{name}-{temperature}")
        samples += batch.run([GenerationRequest(PROMPT, (0,))], None)[0]
    warm, cold = samples
    if warm.response_ids != cold.response_ids:
        raise EngineError(
            f"{server.url}: the most probable token is {warm.response_ids[0]} once and {cold.response_ids[0]} once: it "
            "does not keep to top_p = 0.001"
        )
    first, second = float(warm.logprobs), float(cold.logprobs)
    if second < first - RESOLUTION:
        raise EngineError(
            f"{server.url}: the most probable token has log-probability {first:g} at temperature 1 and {second:g} at "
            f"{COLD}, where it must be higher: start it with {dialect.logprobs_flag}"
        )
    if -first < RESOLUTION:
        return "drawn"
    return "tempered" if second > first + RESOLUTION else "raw"


def unlike_drawn(options: SamplingOptions, kind: LogprobsOf, dialect: Dialect) -> str | None:
    """Why log-probabilities will not be those of the distribution that is drawn from; None if they will."""
    if options.temperature == 0 or kind == "drawn":
        return None
    given = [("top_p", options.top_p, 1.0), ("top_k", options.top_k, 0)]
    if kind == "raw":
        given.insert(0, ("temperature", options.temperature, 1.0))
    wrong = [f"{name} = {value}" for name, value, plain in given if value != plain]
    if not wrong:
        return None
    before = "temperature, top-p and top-k" if kind == "raw" else "top-p and top-k"
    return (
        f"RemoteEngine({dialect.name}): {', '.join(wrong)}, but the servers return log-probabilities from before "
        f"{before}, which are not those of the distribution that is drawn from: use temperature 1 (or start them with "
        f"{dialect.logprobs_flag}), top_p 1 and top_k 0; or other_logprobs = 'omit'"
    )
