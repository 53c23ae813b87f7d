"""Contrastive pre-training under the Trainer: both encoders, any number of ranks, resuming, and what follows."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from distributed_harness import run_ranks
from sharded_training import environment, whole

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "grey": (128, 128, 128)}


def write_pairs(folder, count=28):
    """Noisy images whose left and right half have a colour; captions of different lengths, some of them equal."""
    random = np.random.default_rng(0)
    names = list(COLOURS)
    lines = []
    for index in range(count):
        left, right = names[index % 4], names[(index // 4) % 4]
        pixels = random.normal(0, 12, (8, 16, 3))
        pixels[:, :8] += COLOURS[left]
        pixels[:, 8:] += COLOURS[right]
        name = f"{index}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
        caption = f"{left} beside {right}" + " and nothing else at all" * (index % 3 == 0)
        question = [{"type": "image", "image": name}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
        lines.append(json.dumps({"messages": messages}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def native(**options):
    from lit_interns1.data.conversation_media import NativeVisuals
    from lit_interns1.data.media.native import NativeImageProcessor, NativeVideoProcessor

    size = {"patch_size": 4, "min_pixels": 64, "max_pixels": 4096, **options}
    return NativeVisuals(NativeImageProcessor(**size), NativeVideoProcessor(**size))


def tiled():
    from lit_interns1.data.conversation_media import TiledVisuals
    from lit_interns1.data.media.tiling import TileProcessor

    return TiledVisuals(TileProcessor(tile_size=8, max_tiles=2), patch_size=4)


def data_module(path, **options):
    from lit_interns1.data.caption_data_module import CaptionDataModule

    options = {"visuals": native(), "row_length": 16, "global_batch_size": 8, "validation_batch_size": 6, **options}
    return CaptionDataModule(path, path, **options)


def make_module(**options):
    from lit_interns1.models.text_encoder import TextEncoderConfig
    from lit_interns1.modules import VisionEncoderModule

    options.setdefault("vision", "tiny-s1-pro")
    options.setdefault("vision_changes", {"hidden_size": 32, "num_layers": 1, "intermediate_size": 32})
    text = TextEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
    options.setdefault("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4))
    return VisionEncoderModule(text=text, embedding_size=16, seed=3, **options)


def make_trainer(**options):
    import lightning.pytorch as L

    return L.Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "max_steps": 3, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "use_distributed_sampler": False, "log_every_n_steps": 1, "limit_val_batches": 0, **options,
        }
    )  # fmt: skip


def softmax(**options):
    from lit_interns1.objectives.contrastive import SoftmaxContrastiveLoss

    return SoftmaxContrastiveLoss(**options)


# -- both encoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["native", "tiles"])
def test_both_encoders_learn(path, family):
    tiles = family == "tiles"
    changes = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 32}
    module = make_module(
        vision="tiny-s1" if tiles else "tiny-s1-pro", pooling="mean" if tiles else "attention",
        vision_changes=changes | ({"image_size": 8, "patch_size": 4} if tiles else {}),
        loss=softmax() if tiles else None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )  # fmt: skip
    data = data_module(path, visuals=tiled() if tiles else native(), row_length=16, global_batch_size=28)
    trainer = make_trainer(max_steps=30, max_epochs=-1, limit_val_batches=1.0, check_val_every_n_epoch=50)
    trainer.validate(module, data, verbose=False)
    before = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    after = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert after["val/loss"] < 0.7 * before["val/loss"]
    assert after["val/image_to_text/recall_at_1"] > 4 * after["val/retrieval_chance"]
    assert after["val/image_to_text/recall_at_5"] >= after["val/image_to_text/recall_at_1"]
    assert after["val/text_to_image/recall_at_5"] > 0.6
    # 28 captions, of which "a beside b" repeats whenever the length agrees, too
    reader = data.val_dataloader()
    keys = torch.cat([batch.token_fields["caption_key"][batch.position_ids == 0] for batch in reader])
    keys = keys[keys >= 0]
    assert len(keys) == 28
    assert after["val/retrieval_chance"] == pytest.approx(
        np.mean([float((keys == key).sum()) / 28 for key in keys]), rel=1e-5
    )


def test_attention_pooling_is_attention_of_one_query_inside_each_image():
    from lit_interns1.models.image_text import AttentionPooling, MeanPooling
    from lit_interns1.nn.initialization import initialize_parameters

    pooling = AttentionPooling(12, 3)
    initialize_parameters(pooling, std=0.5)
    lengths = torch.tensor([4, 1, 7])
    x = torch.randn(12, 12)
    pooled = pooling(x, lengths)
    for row, part in zip(pooled, x.split(lengths.tolist()), strict=True):
        k, v = pooling.kv(part).view(-1, 2, 3, 4).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(pooling.query[:, None], k, v)
        torch.testing.assert_close(row, pooling.o_proj(attended.flatten()))
    torch.testing.assert_close(MeanPooling()(x, lengths)[2], x[5:].mean(0))


def test_embeddings_do_not_depend_on_the_other_pairs(path):
    module, data = make_module(), data_module(path, global_batch_size=6)
    data.setup("fit")
    module.configure_model()
    batch = next(iter(data.train_dataloader()))
    together = module(batch)
    torch.testing.assert_close(together.image_ND.norm(dim=1), torch.ones(6))
    for index, single in enumerate(batch.split(1)):
        alone = module(single)
        torch.testing.assert_close(alone.image_ND[0], together.image_ND[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.text_ND[0], together.text_ND[index], rtol=1e-4, atol=1e-5)


def test_the_temperature_is_held_and_accumulation_is_refused(path):
    module = make_module(loss=softmax(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    trainer = make_trainer(max_steps=1)
    module.configure_model()
    with torch.no_grad():
        module.model.log_scale.fill_(6.0)
    trainer.fit(module, data_module(path))
    assert module.model.log_scale.exp().item() == pytest.approx(100.0)
    with pytest.raises(ValueError, match="accumulate_grad_batches = 2"):
        make_trainer(accumulate_grad_batches=2).fit(module, _loader(path))


def _loader(path):
    data = data_module(path)
    data.setup("fit")
    return data.train_dataloader()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_module(pairs_per_pass=0), "pairs_per_pass = 0"),
        (lambda: make_module(pooling="max"), "pooling = 'max'"),
        (lambda: make_module(vision="tiny-s2"), "tiny-s2"),
    ],
)
def test_options_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- any number of ranks ---------------------------------------------------------------------------------------------


def train(rank, world, path, strategy, options):
    """Losses, gradients of the first step as they were applied, parameters in the end, and what validation says."""
    import lightning.pytorch as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    warnings.filterwarnings("ignore")
    environment(rank, world)
    result = {"losses": []}

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                result["gradients"] = {n: whole(p.grad) for n, p in pl_module.named_parameters()}
            result["losses"].append(float(trainer.callback_metrics["train/loss"]))

    module = make_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)
    if strategy is None:
        more = {}
    elif strategy == "ddp":
        more = {"devices": world, "strategy": "ddp", "plugins": [TorchElasticEnvironment()]}
    else:
        from lit_interns1.strategies import MoEParallelStrategy

        more = {"devices": world, "strategy": MoEParallelStrategy(), "plugins": [TorchElasticEnvironment()]}
    # 13 pairs in batches of 6: with two ranks the second batch of the second rank has nothing
    trainer = make_trainer(callbacks=[Record()], limit_val_batches=1.0, val_check_interval=3, **more)
    trainer.fit(module, data_module(path, validation_rows=13))
    result["parameters"] = {name: whole(p) for name, p in module.named_parameters()}
    result["metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    return result


CASES = [
    ("ddp", {"pairs_per_pass": 3}),
    ("moe_parallel", {"pairs_per_pass": 3}),
    ("moe_parallel", {"softmax": True, "pooling": "mean"}),
]


def train_all(rank, world, path, cases):
    results = []
    for strategy, options in cases:
        options = dict(options)
        if options.pop("softmax", False):
            options["loss"] = softmax(chunk_pairs=3)
        results.append(train(rank, world, path, strategy, options))
    return results


def test_ranks_train_like_one_process(path):
    alone = [(None, {k: v for k, v in options.items() if k != "pairs_per_pass"}) for _, options in CASES]
    wanted = train_all(0, 1, path, [alone[0], alone[2]])
    wanted = [wanted[0], *wanted]
    (first, second) = run_ranks(train_all, 2, path, CASES, timeout=120.0)
    for number, expected in enumerate(wanted):
        for ours in (first[number], second[number]):
            assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5), CASES[number]
            assert ours["metrics"] == pytest.approx(expected["metrics"], rel=1e-4), CASES[number]
            assert len(ours["metrics"]) == 6
            for kind in ("gradients", "parameters"):
                assert ours[kind].keys() == expected[kind].keys()
                for name, tensor in ours[kind].items():
                    error = (tensor - expected[kind][name]).norm() / expected[kind][name].norm().clamp(min=1e-6)
                    assert error < 1e-4, f"{CASES[number]}: {kind} of {name}: {error:.1e}"


def test_passes_do_not_change_the_step(path):
    data = data_module(path, global_batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    results = []
    for size in (None, 3, 8):
        module = make_module(pairs_per_pass=size)
        module.configure_model()
        x = module(batch)
        module.loss(x.image_ND, x.text_ND, x.scale, x.bias)[0].mean.backward()
        results.append([p.grad for p in module.parameters()])
        with torch.no_grad():
            torch.testing.assert_close(module(batch).image_ND, x.image_ND)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)


# -- resuming and handing over ---------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one(path, tmp_path):
    from lit_interns1.data.conversation_media import RandomAffine

    transform = RandomAffine(shift=1.0, rotation=10.0)
    steps = []
    for stops in ([6], [4, 6]):
        checkpoint = None
        for stop in stops:
            module = make_module()
            trainer = make_trainer(max_steps=stop, max_epochs=-1)
            trainer.fit(module, data_module(path, transform=transform, seed=4), ckpt_path=checkpoint)
            checkpoint = tmp_path / "run.ckpt"
            trainer.save_checkpoint(checkpoint)
        steps.append([p.detach().clone() for p in module.parameters()])
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="transform"):
        make_trainer(max_steps=8, max_epochs=-1).fit(make_module(), data_module(path, seed=4), ckpt_path=checkpoint)
    with pytest.raises(ValueError, match="pooling"):
        make_trainer(max_steps=8, max_epochs=-1).fit(
            make_module(pooling="mean"), data_module(path, transform=transform, seed=4), ckpt_path=checkpoint
        )


def save_sharded(rank, world, path, folder):
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from lit_interns1.modules.vision_encoder_module import load_vision_weights
    from lit_interns1.strategies import MoEParallelStrategy

    warnings.filterwarnings("ignore")
    environment(rank, world)
    results = []
    for name, distributed in (("sharded", True), ("whole", False)):
        strategy = MoEParallelStrategy(save_distributed_checkpoint=distributed)
        module = make_module()
        trainer = make_trainer(max_steps=2, devices=world, strategy=strategy, plugins=[TorchElasticEnvironment()])
        trainer.fit(module, data_module(path))
        trainer.save_checkpoint(f"{folder}/{name}.ckpt")
        results.append({k: whole(v) for k, v in module.model.vision.named_parameters()})
        # into an encoder that is divided over ranks
        with torch.no_grad():
            for parameter in module.model.vision.parameters():
                parameter.zero_()
        load_vision_weights(module.model.vision, f"{folder}/{name}.ckpt")
        results.append({k: whole(v) for k, v in module.model.vision.named_parameters()})
    return results


def test_the_encoder_goes_into_a_whole_model(path, tmp_path):
    from lit_interns1.modules import MultimodalModule
    from lit_interns1.modules.vision_encoder_module import load_vision_weights

    (results, _) = run_ranks(save_sharded, 2, path, str(tmp_path), timeout=120.0)
    for again in results[1:]:
        torch.testing.assert_close(again, results[0])
    vision = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 32}
    for name in ("sharded.ckpt", "whole.ckpt"):
        module = MultimodalModule("tiny-s1-pro", {"vision": vision}, vision_weights=str(tmp_path / name))
        module.configure_model()
        torch.testing.assert_close(dict(module.model.vision.named_parameters()), results[0])
    assert not any(
        torch.equal(p, module.model.vision.layers[0].mlp.fc1.weight) for p in module.model.projector.parameters()
    )

    other = MultimodalModule(
        "tiny-s1-pro", {"vision": {**vision, "num_layers": 2}}, vision_weights=str(tmp_path / name)
    )
    with pytest.raises(ValueError, match="num_layers: 1 → 2"):
        other.configure_model()
    with pytest.raises(ValueError, match="vision_weights"):
        MultimodalModule("tiny-s1-pro", {"vision": None}, vision_weights=str(tmp_path / name))
    torch.save({"state_dict": {}, "global_step": 0}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="image_text_config"):
        load_vision_weights(module.model.vision, tmp_path / "foreign.ckpt")
