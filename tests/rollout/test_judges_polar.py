"""POLAR as a judge: a reward model in this process, and servers that answer as the three projects do."""

import json
import math
import threading
import warnings
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from huggingface_folders import CONFIG
from judged_samples import prompt, sample
from lit_interns1.data.polar_template import PolarEncoder, PolarTemplate
from lit_interns1.data.tokenizer import load_tokenizer
from lit_interns1.models import RewardModel
from lit_interns1.models.polar import PolarScorer
from lit_interns1.nn.initialization import materialize
from lit_interns1.rollout import JudgeEntry, MixtureOfRewards
from lit_interns1.rollout.judges import PolarJudge, PolarServer

TEMPLATE = PolarTemplate(end="<|endoftext|>", max_length=120, max_response_length=40)


def true_score(text):
    return text.count("e") - 5.25


@pytest.fixture
def server():
    """Scores the letters e of what it is sent; `told` holds the requests, `errors` what to answer first."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.append((self.path, body))
            problem = errors.pop(0) if errors else None
            if isinstance(problem, int):
                self.send_error(problem)
                return
            texts = body.get("text") or body["input"]
            scores = [true_score(text) for text in texts]
            if self.path == "/classify":
                answer = [{"embedding": [score], "meta_info": {}} for score in scores]
            elif "vllm" in body["model"]:
                answer = {"data": [{"index": i, "data": [[9.0], [score]]} for i, score in enumerate(scores)]}
            else:
                answer = {"data": [{"index": i, "data": score} for i, score in enumerate(scores)]}
            content = json.dumps(problem if problem is not None else answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    told, errors = [], []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", told, errors
    http.shutdown()
    http.server_close()
    thread.join()


def judge(url, backend="sglang", **options):
    scorer = PolarServer(url, backend, f"polar-{backend}", load_tokenizer(), TEMPLATE, timeout=60.0, **options)
    return PolarJudge(scorer, batch=2)


@pytest.mark.parametrize("backend", ["sglang", "vllm", "lmdeploy"])
def test_servers(server, backend):
    url, told, _ = server
    mixture = MixtureOfRewards([JudgeEntry(judge(url, backend), "polar", normalize="none")])
    texts = [["<think>eee</think>\nthe tree", "a", "wheel"]]
    (group,) = mixture([prompt(text="Say", reference="elm")], [[sample()] * 3], texts)
    expected = ["Say\nelm<|reward|>Say\n" + text + "<|endoftext|>" for text in ("the tree", "a", "wheel")]
    assert [scored.reward for scored in group] == [true_score(text) for text in expected]
    assert [path for path, _ in told] == ["/classify" if backend == "sglang" else "/pooling"] * 2
    assert [text for _, body in told for text in body["text" if backend == "sglang" else "input"]] == expected
    assert {body["model"] for _, body in told} == {f"polar-{backend}"}


def test_scores_are_normalised_in_their_group(server):
    mixture = MixtureOfRewards([JudgeEntry(judge(server[0]), "polar")])
    (group,) = mixture([prompt(reference="x")], [[sample()] * 2], [["eeeeeeeee", "a"]])
    assert [scored.reward for scored in group] == pytest.approx([0.5**0.5, -(0.5**0.5)])
    assert group[0].correct is None


def test_failures_of_servers_mask_their_batch(server):
    url, told, errors = server
    errors += [503, [{"embedding": []}], [{"embedding": [1.0]}], 400]
    mixture = MixtureOfRewards([JudgeEntry(judge(url, retries=1), "polar")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (group,) = mixture([prompt(reference="x")], [[sample()] * 8], [["e"] * 8])
    # the second attempt has no scores; the second batch has too few; the third is refused; the fourth is fine
    assert [math.isnan(scored.reward) for scored in group] == [True] * 6 + [False] * 2
    assert mixture.failures["polar"] == {"error": 6}
    assert "no scores in the answer" in mixture.messages["polar"][0]
    assert "1 scores for 2 texts" in mixture.messages["polar"][2]
    assert len(told) == 5


def test_a_server_that_is_not_there_is_no_reward():
    mixture = MixtureOfRewards([JudgeEntry(judge("http://127.0.0.1:9", retries=0), "polar")])
    with pytest.warns(UserWarning, match="Connection refused"):
        (group,) = mixture([prompt(reference="x")], [[sample()] * 2], [["e"] * 2])
    assert not any(scored.counts for scored in group)


def test_options(server):
    with pytest.raises(ValueError, match="backend = 'tgi' is unknown"):
        judge(server[0], "tgi")
    with pytest.raises(ValueError, match="must look like http"):
        judge("localhost:80")


def test_a_model_in_this_process():
    tokenizer = load_tokenizer()
    model = materialize(RewardModel(replace(CONFIG, vocab_size=4096), head_std=1.0), seed=1)
    encoder = PolarEncoder(tokenizer, TEMPLATE)
    scorer = PolarScorer(model, encoder)
    mixture = MixtureOfRewards([JudgeEntry(PolarJudge(scorer, batch=3), "polar", normalize="none")])
    texts = [["one", "<think>no</think>two", "three", "four"]]
    (group,) = mixture([prompt(text="Count", reference="one")], [[sample()] * 4], texts)
    for scored, answer in zip(group, ["one", "two", "three", "four"]):
        ids = torch.tensor(encoder.ids("Count", "one", [answer])[0])
        with torch.no_grad():
            values = model(ids, cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32)).values_T
        assert scored.reward == pytest.approx(float(values[-1]), abs=1e-5)
    assert len({scored.reward for scored in group}) == 4
