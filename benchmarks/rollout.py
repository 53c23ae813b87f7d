"""Tokens per second of rollouts on a CPU, beside transformers' `generate`, and what the engine's own means bring.

    python benchmarks/rollout.py [--quick] [--threads 1] [--repeats 5] [--part transformers prefill batching]

- transformers: the same Qwen3-MoE weights, prompts and numbers of new tokens; greedy and sampled, batches of 8 and 32;
  a tiny model, where the host's work counts, and a small one, where products do.
  Goal: 2 times the tokens per second on the tiny model.
- prefill: G = 8 samples of long prompts; the prompt once for its group, and once for every sample.
- batching: responses of very different length; slots filled again at once, and only when a whole batch is done.

Candidates take turns in one process; medians of wall time. The limit of new tokens is exact on both sides: no token
stops a sequence. transformers runs its experts with `grouped_mm`, the fastest of its implementations here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import interleaved_medians, verdict

from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig, PositionConfig
from lit_interns1.rollout import EmbeddedEngine, GenerationRequest, SamplingOptions

GOAL = 2.0


def model_config(name: str) -> LanguageModelConfig:
    """A Qwen3-MoE shape, tiny or small."""
    tiny = name == "tiny"
    return LanguageModelConfig(
        vocab_size=2048 if tiny else 8192, hidden_size=128 if tiny else 384, num_layers=4 if tiny else 6,
        num_heads=8 if tiny else 6, num_kv_heads=2, head_dim=16 if tiny else 64,
        moe=MoEConfig(16, 4, 64) if tiny else MoEConfig(32, 8, 128),
        positions=PositionConfig(theta=1e4, max_position_embeddings=4096),
    )  # fmt: skip


def transformers_model(config: LanguageModelConfig, model: LanguageModel) -> Any:
    """transformers' model with the same weights."""
    import transformers

    moe = config.moe
    assert moe is not None
    reference = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
            max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            tie_word_embeddings=False, num_experts=moe.num_experts, num_experts_per_tok=moe.experts_per_token,
            moe_intermediate_size=moe.intermediate_size, norm_topk_prob=True, decoder_sparse_step=1,
            mlp_only_layers=[],
        )
    ).eval()  # fmt: skip
    reference.set_experts_implementation("grouped_mm")
    names = {key.removeprefix("model.").replace("mlp.gate.", "mlp.router."): key for key in reference.state_dict()}
    own = model.state_dict()
    reference.load_state_dict({key: own[name] for name, key in names.items()})
    return reference


def engine(model: LanguageModel, **options: Any) -> EmbeddedEngine:
    """An engine that generates with the model."""
    made = EmbeddedEngine(**options)
    made.connect(model, needs_routing=False)
    return made


def prompts(count: int, length: int, vocabulary: int) -> torch.Tensor:
    """(count, length) random tokens."""
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def requests(ids_BS: torch.Tensor, samples: int = 1) -> list[GenerationRequest]:
    """A request per prompt."""
    rows = enumerate(ids_BS.tolist())
    return [GenerationRequest(tuple(row), tuple(range(n * samples, (n + 1) * samples))) for n, row in rows]


def beside_transformers(quick: bool, repeats: int) -> None:
    """Ours and theirs."""
    new = 16 if quick else 48
    for size in ("tiny",) if quick else ("tiny", "small"):
        config = model_config(size)
        model = LanguageModel.create(config)
        reference = transformers_model(config, model)
        for batch in (8,) if quick else (8, 32):
            ids = prompts(batch, 32, config.vocab_size)
            ours = engine(model, max_batch_size=batch)
            for label, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                sampling: dict[str, Any] = {"do_sample": False}
                if temperature:
                    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

                def theirs(ids: torch.Tensor = ids, sampling: dict[str, Any] = sampling, model: Any = reference) -> Any:
                    return model.generate(
                        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                        eos_token_id=None, pad_token_id=0, **sampling,
                    )  # fmt: skip

                options = SamplingOptions(max_new_tokens=new, temperature=temperature)
                if not temperature:
                    found = [sample.response_ids for (sample,) in ours.generate(requests(ids), options)]
                    same = sum(a == b for a, b in zip(found, theirs()[:, ids.shape[1] :].tolist(), strict=True))
                    print(f"{size}, batch {batch}: {same} of {batch} greedy responses are equal")
                seconds = interleaved_medians(
                    {
                        "ours": lambda ids=ids, o=options, e=ours: e.generate(requests(ids), o),
                        "transformers": theirs,
                    },
                    repeats,
                )
                rates = {name: batch * new / value for name, value in seconds.items()}
                ratio = rates["ours"] / rates["transformers"]
                print(
                    f"{size}, batch {batch:2}, {label:7}: {rates['ours']:6.0f} tokens/s, transformers "
                    f"{rates['transformers']:6.0f}: {ratio:.2f} times"
                    + (f" (goal {GOAL:g}: {verdict(ratio >= GOAL)})" if size == "tiny" else "")
                )


def compare(title: str, candidates: dict[str, Callable[[], Any]], repeats: int) -> None:
    """Prints the seconds of two candidates, the first one ours."""
    seconds = interleaved_medians(candidates, repeats)
    (ours, first), (other, second) = seconds.items()
    print(f"{title}: {ours} {first:.2f} s, {other} {second:.2f} s: {second / first:.2f} times")


def group_prefill(quick: bool, repeats: int) -> None:
    """Long prompts, 8 samples each."""
    model = LanguageModel.create(model_config("tiny"))
    for length in (128,) if quick else (256, 1024):
        asked = requests(prompts(4, length, 2048), samples=8)
        options = SamplingOptions(max_new_tokens=16)
        compare(
            f"prefill, 4 prompts of {length} tokens, 8 samples of 16 new tokens",
            {
                "once per group": lambda a=asked, o=options: engine(model).generate(a, o),
                "once per sample": lambda a=asked, o=options: engine(model, group_prefill=False).generate(a, o),
            },
            repeats,
        )


def continuous_batching(quick: bool, repeats: int) -> None:
    """Lengths from a skewed distribution: most responses short, a few as long as the limit."""
    model = LanguageModel.create(model_config("tiny"))
    count, slots, limit = (16, 4, 32) if quick else (64, 16, 128)
    # tokens are drawn evenly enough that a stop set of a given size ends a response with a known rate
    stops = tuple(range(2048 // 16))
    asked = requests(prompts(count, 16, 2048))
    options = SamplingOptions(max_new_tokens=limit, stop_ids=stops)

    def static(asked: Sequence[GenerationRequest] = asked) -> list[int]:
        lengths = []
        for start in range(0, count, slots):
            found = engine(model, max_batch_size=slots).generate(asked[start : start + slots], options)
            lengths += [len(sample.response_ids) for (sample,) in found]
        return lengths

    lengths = sorted(static())
    print(
        f"batching: lengths {lengths[0]} … median {lengths[count // 2]} … {lengths[-1]}, {slots} slots, {count} samples"
    )
    compare(
        "batching",
        {
            "slots filled at once": lambda: engine(model, max_batch_size=slots).generate(asked, options),
            "static": static,
        },
        repeats,
    )


PARTS = {"transformers": beside_transformers, "prefill": group_prefill, "batching": continuous_batching}


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in arguments.part:
        PARTS[part](arguments.quick, 2 if arguments.quick else arguments.repeats)


if __name__ == "__main__":
    main()
