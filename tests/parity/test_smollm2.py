"""A published model, SmolLM2-135M-Instruct in 4 bits: transformers' reading of the same file is the reference.

`make smollm2` fetches it; LIT_INTERNS1_SMOLLM2 may name another place. Without the file these tests are skipped.
"""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from lit_interns1.checkpoints import config_from_pretrained, load_pretrained_model
from lit_interns1.checkpoints.expanded_source import ExpandedSource
from lit_interns1.checkpoints.expansion import Expansion
from lit_interns1.checkpoints.huggingface import end_of_text_ids
from lit_interns1.checkpoints.huggingface.sources import open_source
from lit_interns1.commands.generate import continue_prompt
from lit_interns1.data import load_tokenizer
from lit_interns1.models import LanguageModel, generate

ROOT = Path(__file__).parents[2]
FILE = Path(
    os.environ.get("LIT_INTERNS1_SMOLLM2", ROOT / ".cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
).absolute()
SHAKESPEARE = ROOT / "src" / "lit_interns1" / "data" / "bundled" / "shakespeare.jsonl.gz"
PROMPTS = ("The capital of France is", "Water boils at a temperature of", "def fibonacci(n):\n", "Once upon a time,")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is not there: `make smollm2` fetches it (98 MB)"),
]


@pytest.fixture(scope="module")
def ours():
    return load_pretrained_model(FILE).eval()


@pytest.fixture(scope="module")
def theirs():
    import transformers.modeling_utils

    with pytest.MonkeyPatch.context() as patch:
        # from_pretrained asks for accelerate before it reads a GGUF file, and does not use it
        patch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *args: True)
        model = transformers.AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FILE)


@pytest.fixture(scope="module")
def their_tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


@pytest.fixture(scope="module")
def shakespeare(tokenizer):
    """(8, 1024) ids: the first 8,192 tokens of the bundled text."""
    ids: list[int] = []
    with gzip.open(SHAKESPEARE, "rt", encoding="utf-8") as file:
        while len(ids) < 8192:
            ids += [*tokenizer.encode(json.loads(next(file))["text"]), tokenizer.end_of_text_id]
    return torch.tensor(ids[:8192]).view(8, 1024)


def test_config():
    config = config_from_pretrained(FILE)
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (49152, 576, 30)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size) == (9, 3, 64, 1536)
    assert config.tie_word_embeddings
    assert (config.positions.theta, config.rms_norm_eps) == (1e5, 1e-5)
    assert end_of_text_ids(FILE) == [2]


@torch.no_grad()
def test_logits(ours, theirs, tokenizer):
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        reference, logits = theirs(ids).logits, ours(ids).logits
        print(f"{prompt!r}: largest difference {float((logits - reference).abs().max()):.2e}")
        torch.testing.assert_close(logits, reference, rtol=0, atol=1e-4)


def test_greedy_text(ours, theirs, tokenizer, their_tokenizer):
    stops = [tokenizer.end_of_text_id, *end_of_text_ids(FILE)]
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = generate(ours, ids, max_new_tokens=24, temperature=0.0, stop_ids=stops).token_ids
    for prompt, tokens in zip(PROMPTS, texts, strict=True):
        prompt_ids = their_tokenizer(prompt, return_tensors="pt").input_ids
        output = theirs.generate(
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), do_sample=False, max_new_tokens=24,
            eos_token_id=stops, pad_token_id=2,
        )  # fmt: skip
        expected = output[0, prompt_ids.shape[1] :].tolist()
        print(repr(prompt + tokenizer.decode(tokens)))
        assert [token for token in tokens if token not in stops] == [t for t in expected if t not in stops]
    (text,) = continue_prompt(FILE, PROMPTS[0], max_new_tokens=5, temperature=0.0)
    assert text == PROMPTS[0] + tokenizer.decode(texts[0][:5])


@torch.no_grad()
def loss_sum(model, ids_BS):
    """Nats over the tokens of every row but its first, float64."""
    total = 0.0
    for ids in ids_BS:
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1).double()
        total -= float(logp.gather(-1, ids[1:, None]).sum())
    return total


def test_perplexity(ours, theirs, shakespeare):
    count = shakespeare.numel() - len(shakespeare)
    values = [float(torch.tensor(loss_sum(model, shakespeare) / count).exp()) for model in (ours, theirs)]
    print("perplexity (ours, theirs)", values)
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_token_ids(tokenizer, their_tokenizer, shakespeare):
    texts = [
        "Hello, world!", "It's 2024; they'll pay $1,234.56.", "naïve café — Ω≈ç√∫ 你好，世界 🙂👩‍🔬",
        "a  b   c \n \n d", "\n\n\tdef f(x):\n    return x**2\n", "<|im_start|>user\nHi<|im_end|>\n",
        "ﬁ ﬂ e\u0301 \u00e9", "x=1\r\ny=22\r\n", "", " ", "C[C@H](N)C(=O)O  the SMILES of L-alanine",
        "1 2 33 444 5,555", tokenizer.decode(shakespeare[0].tolist()),
    ]  # fmt: skip
    for text in texts:
        assert tokenizer.encode(text) == their_tokenizer(text, add_special_tokens=False).input_ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The model's own rule cuts digits out first, so both spaces are one token; transformers' reader of GGUF files
    # splits by GPT-2's rule, in which the second space belongs to the number.
    two_spaces = tokenizer.tokenizer.token_to_id("ĠĠ")
    assert tokenizer.encode("a  7")[1] == two_spaces
    assert two_spaces not in their_tokenizer("a  7", add_special_tokens=False).input_ids


@torch.no_grad()
def test_upcycled_to_experts_it_starts_as_the_dense_model(ours, shakespeare):
    source, config = open_source(FILE)
    grown = ExpandedSource(source, config, Expansion(num_experts=8, experts_per_token=2))
    assert grown.config.moe is not None
    assert (grown.config.moe.num_experts, grown.config.moe.experts_per_token) == (8, 2)
    with torch.device("meta"):
        model = LanguageModel(grown.config)
    model.to_empty(device="cpu")
    model.rotary_emb.reset_buffers()
    model.tie_weights()
    tensors = model.state_dict()
    for name in grown.tensors:
        for window in grown.windows(name):
            tensors[name][window] = grown.read(name, window).float()
    ids = shakespeare[:1, :512]
    dense, sparse = loss_sum(ours, ids) / 511, loss_sum(model.eval(), ids) / 511
    print("loss (dense, 8 experts top-2)", dense, sparse)
    assert sparse == pytest.approx(dense, rel=1e-5)


def test_a_step_of_reinforcement_learning_moves_what_may_learn(ours, tmp_path, monkeypatch):
    from lit_interns1.commands.trainer import run

    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = ROOT / "configs" / "rl" / "smollm2.yaml"
    cli = run([
        "fit", f"--config={config}", f"--run_dir={tmp_path / 'run'}", f"--model.init_weights={FILE}",
        f"--data.form.tokenizer={FILE}", "--data.prompts_per_rollout=2", "--data.num_generations=2",
        "--data.samples_per_micro_batch=4", "--data.max_completion_length=8", "--trainer.max_steps=1",
        "--trainer.logger=false", "--data.rewards.binary=zero_one",
        "--model.objective=GRPO",
    ])  # fmt: skip
    samples = cli.datamodule.collected.samples
    assert len(samples) == 4
    assert all(scored.counts and scored.text for scored in samples)
    assert cli.model.rollout_metrics["mismatch/k3"] < 1e-6
    start = dict(ours.named_parameters())
    moved = {name for name, p in cli.model.model.named_parameters() if not torch.equal(p, start[name])}
    learned = any(scored.reward != samples[0].reward for scored in samples)
    assert all(name.startswith(("layers.28.", "layers.29.", "norm.")) for name in moved)
    assert bool(moved) == learned
