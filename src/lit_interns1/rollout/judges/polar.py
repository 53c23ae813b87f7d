"""POLAR as a judge (arXiv 2507.05197, §4): how much a response looks like a reference answer to the same prompt.

    PolarJudge(PolarScorer(model, encoder))         the reward model in this process
    PolarJudge(PolarServer(url, backend))           a server: SGLang /classify, vLLM /pooling, LMDeploy /pooling

Scores are unbounded (published examples: 0.69 … −11), so `MixtureOfRewards` normalises them in their group by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

from lit_interns1.data.polar_template import PolarEncoder, PolarTemplate, contents, without_thinking
from lit_interns1.data.tokenizer import TextTokenizer, load_tokenizer
from lit_interns1.rollout.judges.answers import reference
from lit_interns1.rollout.judges.base import Judge, Judgement
from lit_interns1.rollout.remote.http import Call, PassingError, Patience, Server
from lit_interns1.rollout.samples import Prompt, Sample

PolarBackend = Literal["sglang", "vllm", "lmdeploy"]


class Scorer(Protocol):
    """What gives scores: `models.polar.PolarScorer`, `PolarServer`."""

    def score(self, prompts: Sequence[Any], references: Sequence[Any], candidates: Sequence[Any]) -> list[float]:
        """A reward for each candidate; the thinking part of a candidate does not count."""


class PolarServer:
    """A server of a POLAR model. What it sends and reads is taken from the client that is published with the models; no
    live server has confirmed it.

    Args:
        url: Such as "http://host:30000".
        backend: "sglang", "vllm" or "lmdeploy".
        model: The name or path under which the server knows the model.
        tokenizer: Of the model; it cuts what is too long.
        template: The form of what the model reads.
        timeout: Seconds without a byte from the server.
        retries: Attempts after the first, where a failure may pass.

    Raises:
        ValueError: If the URL or the backend is none, or the tokenizer lacks a token of the template.
    """

    def __init__(
        self,
        url: str,
        backend: PolarBackend,
        model: str,
        tokenizer: str | TextTokenizer,
        template: PolarTemplate | None = None,
        timeout: float = 120.0,
        retries: int = 2,
    ) -> None:
        if backend not in get_args(PolarBackend):
            raise ValueError(f"backend = {backend!r} is unknown: choose one of {', '.join(get_args(PolarBackend))}")
        self.server, self.backend, self.model = Server(url), backend, model
        base = tokenizer if isinstance(tokenizer, TextTokenizer) else load_tokenizer(tokenizer)
        self.encoder, self.patience = PolarEncoder(base, template), Patience(timeout, retries)

    def score(self, prompts: Sequence[Any], references: Sequence[Any], candidates: Sequence[Any]) -> list[float]:
        """See `Scorer`.

        Raises:
            EngineError: If the server does not answer, refuses, or answers something else.
        """
        texts = [
            self.encoder.texts(prompt, wanted, [without_thinking(contents(candidate))])[0]
            for prompt, wanted, candidate in zip(prompts, references, candidates, strict=True)
        ]
        if self.backend == "sglang":
            call = Call("/classify", {"model": self.model, "text": texts}, flag="--is-embedding")
        else:
            flag = "--task=reward" if self.backend == "vllm" else ""
            call = Call("/pooling", {"model": self.model, "input": texts}, flag=flag)
        answer = self.server.patiently(call, self.patience)
        try:
            if self.backend == "sglang":
                scores = [float(one["embedding"][0]) for one in answer]
            elif self.backend == "vllm":
                scores = [float(one["data"][-1][0]) for one in answer["data"]]
            else:
                scores = [float(one["data"]) for one in answer["data"]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PassingError(f"{self.server.url}{call.path}: no scores in the answer ({error!r})") from None
        if len(scores) != len(texts):
            raise PassingError(f"{self.server.url}{call.path}: {len(scores)} scores for {len(texts)} texts")
        return scores


class PolarJudge(Judge):
    """The score of a POLAR reward model.

    Args:
        scorer: A `PolarScorer` or a `PolarServer`.
        field: Of the prompt's data: the reference answer, a text or messages.
        batch: Responses that are scored together; if that fails, so do all of them.

    Raises:
        ValueError: If `batch` is below 1.
    """

    quick = True  # in this process: the model is here, or the server's time is limited by `PolarServer`
    normalize = "group"

    def __init__(self, scorer: Scorer, field: str = "reference", batch: int = 64) -> None:
        if batch < 1:
            raise ValueError(f"batch = {batch} must be at least 1")
        self.scorer, self.field, self.batch = scorer, field, batch

    def judge(self, prompt: Prompt, text: str, sample: Sample) -> Judgement:
        """See `Judge`."""
        return Judgement(self.scorer.score([prompt.text], [reference(prompt, self.field)], [text])[0])

    def judge_batch(
        self, prompts: Sequence[Prompt], texts: Sequence[str], samples: Sequence[Sample]
    ) -> list[Judgement | Exception]:
        """See `Judge`."""
        found: dict[int, Judgement | Exception] = {}
        asked: list[tuple[int, Any]] = []
        for place, prompt in enumerate(prompts):
            try:
                asked.append((place, reference(prompt, self.field)))
            except ValueError as error:
                found[place] = error
        for first in range(0, len(asked), self.batch):
            part = asked[first : first + self.batch]
            places = [place for place, _ in part]
            try:
                scores = self.scorer.score(
                    [prompts[i].text for i in places], [wanted for _, wanted in part], [texts[i] for i in places]
                )
                found |= {i: Judgement(score) for i, score in zip(places, scores, strict=True)}
            except Exception as error:
                found |= dict.fromkeys(places, error)
        return [found[place] for place in range(len(prompts))]
