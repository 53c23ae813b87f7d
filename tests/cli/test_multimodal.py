"""The configs of whole models train through the command line, stage by stage, and `generate` asks them questions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_interns1.cli import main
from lit_interns1.commands.multimodal_prompt import check_kinds, format_of, readers_of
from lit_interns1.commands.trainer import run as run_command
from lit_interns1.data import load_tokenizer
from lit_interns1.data.conversation_data_module import ConversationDataModule
from lit_interns1.data.conversation_media import NativeVisuals, TiledVisuals
from lit_interns1.models.multimodal_presets import multimodal_preset
from lit_interns1.modules.multimodal_module import load_multimodal_model, part_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "multimodal"
OPTIONS = [
    "--data.row_length=100", "--data.global_batch_size=2", "--data.micro_batch_size=2", "--data.validation_rows=4",
    "--data.num_workers=0", f"--data.cache_dir={ROOT / '.cache' / 'tests'}", "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=2", "--clock.max_tokens=600",
]  # fmt: skip


def fit(folder, *names, options=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        configs = [f"--config={CONFIGS / name}.yaml" for name in names]
        return run_command(["fit", *configs, f"--run_dir={folder}", *OPTIONS, *options])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    cli = fit(folder, "digits")
    return folder, cli


def test_digits_train(digits):
    folder, cli = digits
    metrics = cli.trainer.callback_metrics
    assert cli.trainer.global_step >= 3
    assert {"train/loss", "val/loss", "val/accuracy"} <= metrics.keys()
    assert 0 <= float(metrics["val/accuracy"]) <= 1
    assert load_tokenizer(folder / "tokenizer.json").vocab_size == 4103
    header = (folder / "metrics" / "metrics.csv").read_text().splitlines()[0]
    assert "val/accuracy" in header.split(",")


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("projector", {"projector"}),
        ("encoder-projector", {"vision", "projector"}),
        ("all", {"language_model", "vision", "projector"}),
    ],
)
def test_stages(tmp_path, stage, parts):
    cli = fit(tmp_path / "run", "digits", stage, options=["--clock.max_tokens=200", "--data.validation_sources=null"])
    trained = {part_of(name) for name, p in cli.model.model.named_parameters() if p.requires_grad}
    assert trained == parts
    assert cli.trainer.global_step >= 1


def test_signals_train_and_answer(tmp_path, capsys):
    fit(tmp_path / "run", "signals")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(20, 12)))
    checkpoint = f"--ckpt={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    asked = ["generate", checkpoint, "--max_new_tokens=3", "--prompt=Which speaker is this?"]
    main([*asked, f"--time_series={tmp_path / 'a.npy'}"])
    assert capsys.readouterr().out.count("\n") >= 1
    with pytest.raises(SystemExit):
        main([*asked, f"--image={tmp_path / 'a.npy'}"])
    assert "--image: the model of" in (error := capsys.readouterr().err)
    assert "has no vision encoder; it takes text, time_series" in error


@pytest.mark.parametrize(("name", "encoder"), [("science-pictures", "vision"), ("molecules", None)])
def test_pictures_and_molecules_train(tmp_path, name, encoder):
    few = [] if encoder else ["--data.sources=[bundled:molecule-questions/test]"]  # quicker to render
    cli = fit(tmp_path / "run", name, options=["--clock.max_tokens=400", *few])
    assert cli.trainer.global_step >= 2
    assert 0 <= float(cli.trainer.callback_metrics["val/accuracy"]) <= 1
    assert (cli.model.model.config.vision is None) == (encoder is None)
    assert cli.model.model.config.time_series is None


def test_questions_about_images(digits, tmp_path, capsys):
    folder, _ = digits
    for number in range(2):
        Image.fromarray(np.full((28, 28), 100 * number, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    asked = ["generate", f"--ckpt={folder / 'checkpoints' / 'last.ckpt'}", "--max_new_tokens=2", "--temperature=1"]
    one = f"--image={tmp_path / '0.png'}"
    main([*asked, "--prompt=Which digit is this?", "--num_samples=2", one])
    assert "--- sample 2 ---" in capsys.readouterr().out
    main([*asked, one, "--image", str(tmp_path / "1.png")])
    main([*asked, "--prompt=Hello"])
    capsys.readouterr()
    for options, message in (
        ([f"--image={tmp_path / 'none.png'}"], "none.png: no such file"),
        ([f"--image={tmp_path / 'bad.png'}"], "bad.png: not an image, or damaged"),
        (["--image=https://a.b/c.png"], "nothing is fetched"),
        (["--time_series=a.npy"], "has no time-series encoder; it takes text, image, video"),
        ([], "--prompt: a whole model answers questions"),
        (["--prompt=a<|im_end|>b"], "--prompt: the text holds '<|im_end|>'"),
        ([one, "--tokenizer=bundled:tokenizer"], "name the tokenizer of the run with --tokenizer"),
    ):
        with pytest.raises(SystemExit):
            main([*asked, *options])
        assert message in capsys.readouterr().err, options
    with pytest.raises(ValueError, match=r"--image: the model of x has no vision encoder; it takes text$"):
        check_kinds(Path("x"), ["image"], ())


def test_a_question_is_what_the_model_was_trained_on(digits):
    """The first token of the answer has the logits that it has in a packed batch of the data module."""
    from lit_interns1.commands.multimodal_prompt import question
    from lit_interns1.data.bundled_conversations import labelled_arrays
    from lit_interns1.nn.media import MediaItems

    folder, _ = digits
    checkpoint = folder / "checkpoints" / "last.ckpt"
    model = load_multimodal_model(checkpoint)
    form = format_of(checkpoint, model.config, load_tokenizer(folder / "tokenizer.json"))
    assert form.visuals.image.patch_size == 7  # from the run's config.yaml
    data = ConversationDataModule(["bundled:digits/test"], visuals=form.visuals, row_length=100, global_batch_size=1,
                                  micro_batch_size=1, cache_dir=ROOT / ".cache" / "tests")  # fmt: skip
    data.prepare_data()
    data.setup()
    (source,) = data._training.sources
    batch = data._training.read([(0, 0)])
    values, _ = labelled_arrays("bundled:digits/test")
    with torch.no_grad():
        packed = model(batch.input_ids, batch.media, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens)
    places = torch.nonzero(batch.labels >= 0).flatten()[::2]
    for document, place in zip(source.documents(0), places.tolist(), strict=True):
        asked = question([values[document]], [], None, "Which digit is this?")
        ids = torch.tensor(form.render(asked, prompt=True).ids)
        items = [item for _, item in form.items(asked)]
        media = {"image": MediaItems.of([i.values for i in items], [i.facts for i in items])}
        with torch.no_grad():
            alone = model(ids, media)
        torch.testing.assert_close(alone.logits[-1], packed.logits[place], rtol=1e-4, atol=1e-4)


def test_without_a_run_directory_sizes_follow_from_the_model(tmp_path):
    for name, kind in (("tiny-s1-pro", NativeVisuals), ("tiny-s1", TiledVisuals)):
        config = multimodal_preset(name)
        visuals, _ = readers_of(tmp_path / "a.ckpt", config)
        assert isinstance(visuals, kind)
        assert (visuals.patch_values, visuals.merge_size) == (config.vision.patch_values, config.vision.merge_size)
    assert readers_of(tmp_path / "a.ckpt", multimodal_preset("tiny-s1", vision=None, image_token_id=None))[0] is None


def test_data_and_model_are_compared_before_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", "digits", options=["--model.changes.image_token_id=4098"])
    assert "image_token_id=4098 of the model differs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
