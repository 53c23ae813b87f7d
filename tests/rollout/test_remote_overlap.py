"""Generation beside training: which weights drew what, which prompts, checkpoints, errors, real requests and ranks."""

import threading
from dataclasses import replace

import lightning.pytorch as L
import pytest
import torch

from distributed_harness import run_ranks
from huggingface_folders import CONFIG
from lit_interns1.models import LanguageModel, LanguageModelConfig, MoEConfig
from lit_interns1.modules.policy_module import PolicyModule
from lit_interns1.objectives.policy import GRPO
from lit_interns1.rollout import EngineError, GenerationRequest, SamplingOptions
from lit_interns1.rollout.overlap import Asked, GenerationAhead
from lit_interns1.rollout.prompt_format import PromptFormat
from lit_interns1.rollout.remote import RemoteEngine
from lit_interns1.rollout.rollout_data_module import RolloutDataModule
from recorded_rollouts import Parity, SeededEngine, Words
from rollout_servers import FakeServer
from sharded_training import environment, whole

SIZES = {"prompts_per_rollout": 2, "num_generations": 2, "samples_per_micro_batch": 4, "max_completion_length": 9}


class ThreadedEngine(SeededEngine):
    """Seeded samples, from any thread; call number k ends only when `allowed` says so."""

    def __init__(self, allowed=lambda call: True):
        super().__init__()
        self.capabilities = replace(self.capabilities, concurrent=True, copies_weights=True)
        self.allowed, self.events, self.condition = allowed, [], threading.Condition()

    def sync_weights(self, weights, version):
        if version != self.version:
            self.events.append(("sync", version))
        super().sync_weights(weights, version)

    def generate(self, requests, options, enough=None):
        call = self.calls
        self.events.append(("begin", call))
        samples = super().generate(requests, options, enough)
        with self.condition:
            if not self.condition.wait_for(lambda: self.allowed(call), timeout=20):
                raise EngineError(f"call {call} was never allowed to end: training waits for it")
        self.events.append(("end", call))
        return samples

    def moved(self):
        with self.condition:
            self.condition.notify_all()


class Watch(L.Callback):
    """By rollout batch: prompts, tokens and weight versions; saves a checkpoint in a step, if asked."""

    def __init__(self, save_at=None, path=None):
        self.rollouts, self.step, self.save_at, self.path, self.counts = {}, 0, save_at, path, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        collected = trainer.datamodule.collected
        if collected is None:  # from a checkpoint
            return
        self.rollouts[collected.number] = [
            (s.prompt.index, tuple(s.sample.response_ids), set(s.sample.weight_versions.tolist()))
            for s in collected.samples
        ]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.step = trainer.global_step
        if isinstance(module.engine, ThreadedEngine):
            module.engine.moved()
        if self.step == self.save_at:
            trainer.save_checkpoint(self.path)


def module(engine):
    config = LanguageModelConfig(
        vocab_size=4096, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        moe=MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=8),
    )  # fmt: skip
    return PolicyModule(config, objective=GRPO(), engine=engine, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), seed=3)


def fit(engine, steps, overlap=True, watch=None, ckpt_path=None, data=None, **options):
    policy = module(engine)
    data = RolloutDataModule(
        Words(), Parity(), form=PromptFormat(style="plain"), overlap=overlap, **{**SIZES, **(data or {})}
    )
    trainer = L.Trainer(**{
        "accelerator": "cpu", "devices": 1, "max_epochs": -1, "max_steps": steps, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "num_sanity_val_steps": 0, "callbacks": [watch] if watch else [], **options,
    })  # fmt: skip
    trainer.fit(policy, data, ckpt_path=ckpt_path)
    return policy, data


def parameters(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def tokens(watch, first=0):
    return {number: [entry[:2] for entry in entries] for number, entries in watch.rollouts.items() if number >= first}


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """Lightning warns of few workers and missing loggers."""


def test_a_rollout_is_generated_while_the_one_before_is_trained_on():
    watch, plain = Watch(), Watch()
    engine = ThreadedEngine(lambda call: call == 0 or watch.step >= call)  # else training and generation take turns
    policy, data = fit(engine, 4, watch=watch)
    assert engine.calls == 4  # none for a batch that nobody will train on
    versions = {number: set().union(*(v for _, _, v in entries)) for number, entries in watch.rollouts.items()}
    assert versions == {0: {0}, 1: {0}, 2: {1}, 3: {2}}  # one optimizer step behind
    assert engine.events[:4] == [("sync", 0), ("begin", 0), ("end", 0), ("begin", 1)]
    assert_no_sync_inside(engine.events)
    assert {"throughput/wait_seconds", "throughput/generate_seconds"} <= data.rollout_metrics.keys()
    alone, _ = fit(SeededEngine(), 4, overlap=False, watch=plain)
    assert tokens(watch) == tokens(plain)  # the same prompts with the same seeds
    left, right = parameters(policy), parameters(alone)
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_no_sync_inside(events):
    inside = False
    for kind, _ in events:
        assert not (inside and kind in ("sync", "begin")), events
        inside = {"begin": True, "end": False}.get(kind, inside)


def test_several_updates_and_rounds_keep_their_prompts():
    watch, plain = Watch(), Watch()
    sizes = {"prompts_per_rollout": 4, "updates_per_rollout": 2}
    fit(ThreadedEngine(), 6, watch=watch, data=sizes)
    fit(SeededEngine(), 6, overlap=False, watch=plain, data=sizes)
    assert tokens(watch) == tokens(plain)
    assert {number: next(iter(e[0][2])) for number, e in watch.rollouts.items()} == {0: 0, 1: 0, 2: 2}


def test_validation_waits_for_the_generation_under_way():
    validated = threading.Event()
    engine = ThreadedEngine(lambda call: threading.current_thread().name != "rollout-ahead" or validated.is_set())

    class Late(L.Callback):
        def on_validation_start(self, trainer, module):
            threading.Timer(0.3, lambda: (validated.set(), engine.moved())).start()

    data = {"validation_prompts": Words(3)}
    fit(engine, 3, data=data, val_check_interval=1, limit_val_batches=1, callbacks=[Late()])
    assert_no_sync_inside(engine.events)
    assert engine.calls == 3 + 3


def test_a_checkpoint_does_not_count_the_batch_under_way(tmp_path):
    path, whole_run, resumed = str(tmp_path / "two.ckpt"), Watch(2, str(tmp_path / "two.ckpt")), Watch()
    fit(ThreadedEngine(), 4, watch=whole_run)
    saved = torch.load(path, weights_only=False)
    (state,) = [v for k, v in saved.items() if k == RolloutDataModule.__qualname__]
    assert state["sampler"] == {"drawn": 4}  # two rollout batches of two prompts
    engine = ThreadedEngine()
    fit(engine, 4, watch=resumed, ckpt_path=path)
    assert tokens(resumed, 2) == tokens(whole_run, 2)
    assert engine.events[0] == ("sync", 2)  # drawn again, by the weights of the checkpoint


def test_an_error_of_the_engine_is_one_of_the_run():
    class Failing(ThreadedEngine):
        def generate(self, requests, options, enough=None):
            if self.calls == 2:
                raise EngineError("the servers are gone")
            return super().generate(requests, options, enough)

    watch = Watch()
    with pytest.raises(EngineError, match="the servers are gone"):
        fit(Failing(), 5, watch=watch)
    assert watch.step == 2  # what was there has been trained on


def test_engines_that_need_the_trainer_cannot_run_beside_it():
    with pytest.raises(ValueError, match=r"overlap = True needs an engine .* SeededEngine does not"):
        fit(SeededEngine(), 2)


def test_samples_of_other_prompts_are_dropped():
    engine, ahead = ThreadedEngine(), GenerationAhead()
    asked = Asked([GenerationRequest((5,), (1,))], SamplingOptions(), None)
    assert ahead.take(asked) is None
    ahead.start(engine, asked)
    assert ahead.take(asked._replace(options=SamplingOptions(temperature=0.5))) is None
    assert ahead.take(asked) is None
    ahead.start(engine, asked)
    (group,) = ahead.take(Asked(list(asked.requests), SamplingOptions(), None))
    assert group[0].response_ids == engine.sample((5,), 1).response_ids


# -- with servers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overlap", "backend"), [(False, "sglang"), (True, "sglang"), (True, "vllm")])
def test_a_run_with_servers_that_fail_is_the_run_without_them(overlap, backend, tmp_path):
    expected, _ = fit(SeededEngine(), 3, overlap=False)
    watch = Watch()
    with FakeServer(backend) as first, FakeServer(backend) as second:
        servers = (first, second)

        class Trouble(L.Callback):
            def on_train_start(self, trainer, module):
                for server in servers:
                    for fault in ("500", "drop", "garbage", "abort"):
                        server.faults.put(fault)

        engine = RemoteEngine(
            backend, [s.url for s in servers], weights_folder=str(tmp_path), backoff=0.01, request_timeout=20.0,
            retries=8,
        )  # fmt: skip
        policy, _ = fit(engine, 3, overlap=overlap, watch=watch, callbacks=[watch, Trouble()])
        assert second.loaded is not None
        assert all(server.faults.empty() for server in servers)
    left, right = parameters(policy), parameters(expected)
    assert all(torch.equal(left[name], right[name]) for name in left)
    versions = [next(iter(entries[0][2])) for entries in watch.rollouts.values()]
    assert versions == ([0, 0, 1] if overlap else [0, 1, 2])


def test_a_run_whose_servers_die_goes_on_from_its_checkpoint(tmp_path):
    path = str(tmp_path / "two.ckpt")
    expected, _ = fit(SeededEngine(), 4, overlap=False)

    def remote(server):
        options = {"backoff": 0.01, "retries": 1, "request_timeout": 20.0}
        return RemoteEngine("sglang", server.url, weights_folder=str(tmp_path / "weights"), **options)

    with FakeServer("sglang") as server:

        class Kill(Watch):
            def on_train_batch_end(self, trainer, module, *rest):
                super().on_train_batch_end(trainer, module, *rest)
                if trainer.global_step == 2:
                    server.stop()

        with pytest.raises(EngineError, match=r"/pause_generation|attempts failed"):
            fit(remote(server), 4, watch=Kill(2, path))
    with FakeServer("sglang", port=server.port) as server:  # with weights of its own
        policy, _ = fit(remote(server), 4, ckpt_path=path)
        assert server.version == "2"  # of the checkpoint; the last rollout is one step old
    left, right = parameters(policy), parameters(expected)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_end_of_a_run_ends_a_generation_that_nobody_takes():
    asked = Asked([GenerationRequest((21,), (1, 2))], SamplingOptions(max_new_tokens=9), None)
    with FakeServer("sglang") as server:
        engine = RemoteEngine("sglang", server.url, weight_transfer="none", backoff=0.01)
        engine.connect(LanguageModel.create(CONFIG, seed=1), True)
        server.hold.add((21,))
        ahead = GenerationAhead()
        ahead.start(engine, asked)
        while not any(body and body.get("input_ids") == [21] for _, _, body in list(server.calls)):
            pass
        ahead.stop()  # nothing has been released
        server.release.set()
        server.hold.clear()
        (group,) = engine.generate(*asked)
        assert [s.response_ids for s in group] == [SeededEngine().sample((21,), seed).response_ids for seed in (1, 2)]


# -- ranks -------------------------------------------------------------------------------------------------------------


def train_divided(rank, world):
    """The same run with and without overlap, on ranks that share one network."""
    import warnings

    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.strategies import MoEParallelStrategy

    warnings.filterwarnings("ignore")
    found = []
    for overlap in (False, True):
        environment(rank, world)
        strategy = MoEParallelStrategy(expert_parallel_size=2)
        policy, _ = fit(
            ThreadedEngine(), 3, overlap=overlap, data={"prompts_per_rollout": 4}, devices=world, strategy=strategy,
            plugins=[TorchElasticEnvironment()],
        )  # fmt: skip
        found.append({name: whole(parameter) for name, parameter in policy.named_parameters()})
    return found


@pytest.mark.slow
def test_ranks_train_together_while_each_generates_alone():
    for plain, overlapped in run_ranks(train_divided, 2, timeout=240):
        assert all(torch.equal(plain[name], overlapped[name]) for name in plain)
