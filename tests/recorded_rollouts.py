"""What tests of policies share: an engine whose samples follow from their seeds alone, and judges of such samples."""

import torch

from lit_interns1.rollout.engine import EngineCapabilities
from lit_interns1.rollout.prompts import RawPrompt
from lit_interns1.rollout.samples import Sample, ScoredSample

WORDS = ["alpha", "beta", "gamma", "delta", "x = 1", "a b c", "Hello there, world", "2 + 2"]


class Words:
    """Prompts of different lengths."""

    def __init__(self, count=8):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return RawPrompt(f"{WORDS[index % len(WORDS)]} {index}", f"kind{index % 2}", {"answer": str(index)})


class SeededEngine:
    """Tokens, log-probabilities and experts drawn from the seed of a sample; 1 to `longest` tokens."""

    def __init__(self, vocabulary=60, longest=9, layers=2, experts=8, per_token=2):
        self.capabilities = EngineCapabilities("sampling", True)
        self.sizes = vocabulary, longest, layers, experts, per_token
        self.version, self.calls, self.needs_routing = -1, 0, None

    def connect(self, policy, needs_routing):
        self.needs_routing = needs_routing

    def sync_weights(self, weights, version):
        self.version = version

    def close(self):
        pass

    def generate(self, requests, options, enough=None):
        self.calls += 1
        return [[self.sample(request.prompt_ids, seed) for seed in request.seeds] for request in requests]

    def sample(self, prompt_ids, seed):
        vocabulary, longest, layers, experts, per_token = self.sizes
        generator = torch.Generator().manual_seed(seed % 2**60)
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        ids = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
        logprobs = -4.0 + 0.3 * torch.randn(length, generator=generator)
        rows = len(prompt_ids) + length - 1
        routing = torch.rand(rows, layers, experts, generator=generator).topk(per_token, dim=-1).indices
        return Sample(
            tuple(prompt_ids), ids, logprobs, "stop", seed, torch.full((length,), self.version), routing.to(torch.int16)
        )


class Parity:
    """Right if the sum of the tokens is even; a judgement is missing where it is a multiple of `missing`."""

    def __init__(self, right=1.0, wrong=-1.0, missing=0):
        self.right, self.wrong, self.missing = right, wrong, missing

    def __call__(self, prompts, samples, texts):
        return [
            [self.scored(prompt, sample, text) for sample, text in zip(group, group_texts, strict=True)]
            for prompt, group, group_texts in zip(prompts, samples, texts, strict=True)
        ]

    def scored(self, prompt, sample, text):
        total = sum(sample.response_ids)
        if self.missing and total % self.missing == 0:
            return ScoredSample(prompt, sample, text, float("nan"))
        correct = total % 2 == 0
        return ScoredSample(prompt, sample, text, self.right if correct else self.wrong, correct)
