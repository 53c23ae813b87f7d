"""Conversations with media: what is rendered, packed, read, resumed and refused."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lit_interns1.data.bundled_conversations import labelled_arrays
from lit_interns1.data.conversation_data_module import ConversationDataModule
from lit_interns1.data.conversation_media import NativeVisuals, RandomAffine, TiledVisuals, image_size
from lit_interns1.data.conversation_rows import ConversationFormat
from lit_interns1.data.conversations import ConversationSource, parse_conversation
from lit_interns1.data.media import (
    ImageOptions,
    MediaError,
    NativeImageProcessor,
    NativeVideoProcessor,
    TileProcessor,
    TimeSeriesProcessor,
)
from lit_interns1.data.media_tokens import PRO_TOKENS, S1_TOKENS, with_media_tokens
from lit_interns1.data.sources import SourceError
from lit_interns1.data.tokenizer import TokenizerError, load_tokenizer
from lit_interns1.models import MultimodalModel
from lit_interns1.models.config import changed
from lit_interns1.models.multimodal_presets import multimodal_preset
from lit_interns1.nn.initialization import initialize_parameters
from lit_interns1.nn.media import MediaItems

VISUALS = NativeVisuals(
    NativeImageProcessor(4, min_pixels=64, max_pixels=4096), NativeVideoProcessor(4, min_pixels=64, max_pixels=4096)
)
IDS = {"image_token_id": 4097, "video_token_id": 4099, "time_series_token_id": 4101}
MODEL = changed(multimodal_preset("tiny-s1-pro"), {"text": {"vocab_size": 4103, "num_layers": 1}, **IDS})


def image(index):
    return {"type": "image", "image": f"media/{index}.png"}


def text(content):
    return {"type": "text", "text": content}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(content):
    return {"role": "assistant", "content": content}


VIDEO = {"type": "video", "video": [f"media/{i}.png" for i in (0, 0, 0, 0)], "fps": 2}
SIGNAL = {"type": "time_series", "time_series": "media/signal.npy", "sampling_rate": 100}


@pytest.fixture
def folder(tmp_path):
    """Images of 16 × 24 pixels and others, a signal of two channels."""
    (tmp_path / "media").mkdir()
    random = np.random.default_rng(0)
    for index in range(4):
        size = (16, 24) if index % 2 == 0 else (32, 16)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"media/{index}.png")
    np.save(tmp_path / "media/signal.npy", random.normal(size=(400, 2)))
    return tmp_path


def write(folder, *conversations, name="a.jsonl"):
    lines = [json.dumps(c if isinstance(c, dict) else {"messages": c}) for c in conversations]
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def mixed(count=24):
    """Conversations of different lengths: images of two sizes, two images, a video, a signal, text alone."""
    kinds = [
        lambda i: user(image(i % 4), text("What is it?")),
        lambda i: user(image(0), text("or"), image(1), text(f"number {i}?")),
        lambda i: user(text("Hello."), text(f" {i}")),
        lambda i: user(VIDEO, text("What happens?")),
        lambda i: user(SIGNAL, text("Which class?")),
    ]
    return [[kinds[i % 5](i), assistant(f"Answer {i}.")] for i in range(count)]


def module(folder, path, validation=None, **options):
    defaults = {
        "visuals": VISUALS, "signals": TimeSeriesProcessor(), "row_length": 128, "global_batch_size": 4,
        "micro_batch_size": 4, "cache_dir": folder / "cache", "seed": 3,
    }  # fmt: skip
    return ConversationDataModule([path], validation, **{**defaults, **options})


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def form_of(tokens=PRO_TOKENS, visuals=VISUALS, tokenizer=None):
    tokenizer = with_media_tokens(tokenizer or load_tokenizer(), tokens)
    return ConversationFormat(tokenizer, tokens, visuals, TimeSeriesProcessor())


# what is rendered


def test_chat_with_an_image(folder):
    """16 × 24 pixels are 4 × 6 patches, 2 × 3 vectors."""
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            user(text("Look: "), image(0), text("What is it?")),
            assistant("A 7."),
            user(text("Sure?")),
            {"role": "assistant", "content": [text("Yes"), text(", it is.")]},
        ]
    }
    form = form_of()
    rendered = form.render(parse_conversation(row, folder, "here"))
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nLook: <|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA 7.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes, it is.<|im_end|>\n"
    )
    assert rendered.ids == form.tokenizer.encode(expected)
    answers = [token for token, answer in zip(rendered.ids, rendered.answers, strict=True) if answer]
    assert answers == form.tokenizer.encode("A 7.<|im_end|>Yes, it is.<|im_end|>")
    prompt = form.render(parse_conversation({"messages": row["messages"][:2]}, folder, "here", False), prompt=True)
    begun = [*prompt.ids, *form.tokenizer.encode("A 7.")]
    assert begun == rendered.ids[: len(begun)]


def test_video_and_signal(folder):
    """Four frames at 2 Hz make two temporal patches, at 0.25 and 1.25 s; 400 points at 100 Hz give 6 vectors."""
    form = form_of()
    rendered = form.render(parse_conversation({"messages": [user(VIDEO, SIGNAL), assistant("x")]}, folder, "here"))
    frames = "".join(
        f"<{seconds} seconds><|vision_start|>{'<|video_pad|>' * 6}<|vision_end|>" for seconds in ("0.2", "1.2")
    )
    stride = int(160 / (1 + np.exp(-1)) ** 6)
    patches = int(np.ceil((400 - 2 * stride) / stride)) + 1
    signal = f"<|ts|>{'<TS_CONTEXT>' * ((patches // 2 + 1) // 2)}<|/ts|>"
    expected = f"<|im_start|>user\n{frames}{signal}<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"
    assert form.tokenizer.decode(rendered.ids) == expected


def test_tiles(folder):
    """Intern-S1's form: one pair of tags around all tiles of an image, a line for every frame."""
    tiled = TiledVisuals(TileProcessor(16, max_tiles=4), patch_size=4, max_frames=2)
    form = form_of(S1_TOKENS, tiled)
    conversation = parse_conversation({"messages": [user(image(1), VIDEO), assistant("x")]}, folder, "here")
    shown = form.tokenizer.decode(form.render(conversation).ids)
    tile = "<IMG_CONTEXT>" * 4
    # 32 × 16 pixels are two tiles and a thumbnail
    assert f"<img>{tile * 3}</img>Frame1: <img>{tile}</img>\nFrame2: <img>{tile}</img><|im_end|>" in shown
    items = form.items(conversation)
    assert [kind for kind, _ in items] == ["image"] * 3
    whole = items[0][1]
    pixels = tiled.tiles(folder / "media/1.png").pixel_values
    unfolded = torch.nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(whole.values, unfolded, rtol=0, atol=0)
    assert whole.facts == (3, 4, 4)


def test_size_is_that_of_the_upright_image_from_its_header(tmp_path):
    picture = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg", ImageOptions()) == (20, 10)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "head.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    assert image_size(tmp_path / "head.png", ImageOptions()) == (40, 60)
    assert image_size(np.zeros((10, 20), dtype=np.uint8), ImageOptions()) == (10, 20)


# tokenizers


def test_missing_tokens_come_behind_the_vocabulary(tmp_path):
    plain = load_tokenizer()
    extended = with_media_tokens(plain, PRO_TOKENS)
    assert extended.vocab_size == plain.vocab_size + 7
    assert [extended.encode(name) for name in PRO_TOKENS.names] == [[2], [3], *[[4096 + i] for i in range(7)]]
    assert with_media_tokens(extended, PRO_TOKENS) is extended
    assert plain.vocab_size == 4096  # the original is as it was
    extended.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert with_media_tokens(loaded, PRO_TOKENS) is loaded
    assert loaded.encode("<|image_pad|> a") == extended.encode("<|image_pad|> a")
    assert PRO_TOKENS.of_model(loaded, {"image": 4097, "video": 4099})
    assert not PRO_TOKENS.of_model(loaded, {"image": 4098})
    assert not S1_TOKENS.of_model(loaded, {"image": 4097})


def test_a_tokenizer_with_other_vocabularies_is_not_extended():
    class Other(type(load_tokenizer())):
        pass

    with pytest.raises(TokenizerError, match=r"Other lacks .*<\|image_pad\|>"):
        with_media_tokens(Other(load_tokenizer().tokenizer), PRO_TOKENS)


# batches


def equal(ours, theirs):
    """Whether two batches are the same, media included."""
    same = torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.labels, theirs.labels)
    same = same and torch.equal(ours.cu_seqlens, theirs.cu_seqlens) and ours.media.keys() == theirs.media.keys()
    return same and all(
        torch.equal(getattr(items, field), getattr(theirs.media[kind], field))
        for kind, items in ours.media.items()
        for field in ("values", "length_M", "fact_MK", "row_M")
    )


def test_the_model_finds_every_vector_in_its_place(folder):
    """Each conversation alone gives the same logits at its answer as in the packed batch with all others."""
    data = ready(module(folder, write(folder, *mixed())))
    torch.manual_seed(0)
    model = MultimodalModel(MODEL)
    initialize_parameters(model, std=0.05)
    model.eval()
    rows = data.row_order.num_rows
    batch = data._training.read([data.row_order.row(row) for row in range(rows)])
    assert set(batch.media) == {"image", "video", "time_series"}
    with torch.no_grad():
        together = model(batch.input_ids, batch.media, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens)
    checked = 0
    (source,) = data._training.sources
    start = 0
    for row in range(rows):
        _, number = data.row_order.row(row)
        for document in source.documents(number):
            ids, labels = source.store.document(document)
            end = start + len(ids)
            assert torch.equal(batch.input_ids[start:end], torch.from_numpy(ids))
            assert torch.equal(batch.labels[start:end], torch.from_numpy(labels))
            found = {}
            for kind, item in data.form.items(source.conversations.read(document)):
                found.setdefault(kind, []).append(item)
            media = {k: MediaItems.of([i.values for i in v], [i.facts for i in v]) for k, v in found.items()}
            with torch.no_grad():
                alone = model(torch.from_numpy(ids), media)
            torch.testing.assert_close(together.logits[start:end], alone.logits, rtol=1e-4, atol=1e-4)
            start, checked = end, checked + 1
        start = (row + 1) * 128
    assert checked == 24


def test_labels_are_the_next_tokens_of_answers(folder):
    data = ready(module(folder, write(folder, *mixed(5) * 8)))
    for batch in data.train_dataloader():
        for first, last in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            if int(batch.sample_id_T[first]) < 0:
                continue
            labels = batch.labels[first:last]
            shown = data.tokenizer.decode(labels[labels >= 0].tolist())
            assert shown.startswith("Answer ")
            assert shown.endswith(".<|im_end|>")
            where = torch.nonzero(labels >= 0).flatten()
            assert torch.equal(labels[where], batch.input_ids[first:last][where + 1])


def test_rows_do_not_depend_on_ranks_or_workers_and_resume(folder):
    """One rank of 4 rows, two of 2, workers, and a run that goes on in the middle of an epoch: the same pixels."""
    path = write(folder, *mixed(60))
    options = {"transform": RandomAffine(2, 20, 0.1)}
    whole = ready(module(folder, path, **options))
    wanted = list(whole.train_dataloader()) + list(whole.train_dataloader())
    assert len(wanted) == 2 * len(whole.train_dataloader())
    assert len(whole.train_dataloader()) >= 2
    ahead = ready(module(folder, path, num_workers=2, **options))
    for ours, theirs in zip(ahead.train_dataloader(), wanted, strict=False):
        assert equal(ours, theirs)

    class OfRank:
        def __init__(self, rank):
            self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}

    halves = []
    for rank in range(2):
        half = module(folder, path, micro_batch_size=2, **options)
        half._ranks = lambda rank=rank: (2, rank)
        halves.append(list(ready(half).train_dataloader()))
    for both, theirs in zip(zip(*halves, strict=True), wanted, strict=False):
        assert equal(type(theirs).concatenate(both), theirs)

    first = ready(module(folder, path, **options))
    loader = iter(first.train_dataloader())
    next(loader)
    state = json.loads(json.dumps(first.state_dict()))
    second = ready(module(folder, path, **options))
    second.load_state_dict(state)
    rest = list(second.train_dataloader()) + list(second.train_dataloader())
    assert len(rest) == len(wanted) - 1
    assert all(equal(ours, theirs) for ours, theirs in zip(rest, wanted[1:], strict=True))
    other = ready(module(folder, path, transform=RandomAffine(1)))
    with pytest.raises(ValueError, match=r"transform: .*shift=2"):
        other.load_state_dict(state)


def test_images_change_from_epoch_to_epoch_in_training_alone(folder):
    path = write(folder, *[[user(image(0)), assistant("x")]] * 6)
    options = {"row_length": 48, "global_batch_size": 3, "micro_batch_size": 3, "transform": RandomAffine(3)}
    data = ready(module(folder, path, path, **options))
    first, second = (next(iter(data.train_dataloader())).media["image"].values for _ in range(2))
    assert len({first[24 * i : 24 * (i + 1)].numpy().tobytes() for i in range(6)}) == 6
    assert not torch.equal(first, second)
    validated = next(iter(data.val_dataloader())).media["image"].values
    expected = VISUALS.image(folder / "media/0.png").pixel_values
    assert torch.equal(validated, expected.repeat(6, 1))


def test_random_affine():
    class Drawn:
        def __init__(self, *values):
            self.values = values

        def uniform(self, low, high, count):
            return np.array(self.values)

    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    every = RandomAffine(2, 90, 0.5, fill=7)
    assert np.array_equal(every(picture, Drawn(0, 0, 0, 0)), pixels)
    moved = np.asarray(every(picture, Drawn(1, -0.5, 0, 0)))
    assert np.array_equal(moved[:8, 2:], pixels[1:, :7])
    assert (moved[:, :2] == 7).all()
    turned = np.asarray(every(picture, Drawn(0, 0, 1, 0))).astype(int)
    assert min(abs(turned - np.rot90(pixels, k)).max() for k in (1, 3)) <= 1
    grown = np.asarray(every(Image.new("L", (8, 8), 200).convert("RGB"), Drawn(0, 0, 0, -1)))
    assert (grown[:2] == 7).all()
    assert (grown[3:5, 3:5] == 200).all()
    for wrong in ({"shift": -1}, {"scale": 1.0}, {"fill": 256}):
        with pytest.raises(ValueError, match="limits"):
            RandomAffine(**wrong)


# what is refused

BAD = {
    "address": ([user({"type": "image", "image": "https://a.b/c.png"}), assistant("x")], "address; nothing is fetched"),
    "data": ([user({"type": "image", "image": "data:image/png;base64,AA"}), assistant("x")], "is an address"),
    "absolute": ([user({"type": "image", "image": "/etc/hostname"}), assistant("x")], "leads out of"),
    "parent": ([user({"type": "image", "image": "media/../../b.png"}), assistant("x")], "leads out of"),
    "link": ([user({"type": "image", "image": "media/out.png"}), assistant("x")], "leads out of"),
    "missing": ([user({"type": "image", "image": "media/none.png"}), assistant("x")], r"none\.png' is not in"),
    "frame": ([user({"type": "video", "video": ["media/0.png", "x.png"], "fps": 1}), assistant("x")], r"video\[1\]"),
    "no frames": ([user({"type": "video", "video": [], "fps": 1}), assistant("x")], "list of frames is empty"),
    "role": ([{"role": "robot", "content": "a"}], r"messages\[0\].role: 'robot' is none of"),
    "kind": ([user({"type": "sound", "sound": "a"}), assistant("x")], r"content\[0\].type: 'sound' is none of"),
    "field": ([user({"type": "time_series", "time_series": "a", "sample_rate": 1})], "has no 'sample_rate'"),
    "message": ([{"role": "user", "text": "a"}], "a message has `role` and `content`"),
    "content": ([{"role": "user", "content": []}], "expected a text or a list"),
    "value": ([user({"type": "image"}), assistant("x")], "the field `image` is missing"),
    "number": ([user({"type": "image", "image": 3}), assistant("x")], "expected the path of a file"),
    "rate": ([user({**SIGNAL, "sampling_rate": -1}), assistant("x")], "positive numbers, got -1"),
    "text": ([user({"type": "text", "text": 3}), assistant("x")], "expected a string, got int"),
    "answer": ([user(text("a"))], "nothing to learn"),
    "empty answer": ([user(text("a")), assistant("")], "answer is empty"),
    "media answer": ([user(text("a")), {"role": "assistant", "content": [image(0)]}], "answers are text"),
    "messages": ({"conversation": []}, "expected an object with a list `messages`"),
    "control": ([user(text("a <|image_pad|> b")), assistant("x")], r"text holds '<\|image_pad\|>'"),
    "turn": ([user(text("a")), assistant("x<|im_end|>y")], r"messages\[1\].content\[0\]: the text holds"),
    "damaged": ([user({"type": "image", "image": "media/damaged.png"}), assistant("x")], "not an image, or damaged"),
    "nothing": ([user({"type": "image", "image": "media/nothing.png"}), assistant("x")], "not an image, or damaged"),
    "no pixels": ([user({"type": "image", "image": "media/zero.bmp"}), assistant("x")], "zero.bmp"),
    "signal": ([user({**SIGNAL, "time_series": "media/empty.npy"}), assistant("x")], "no points"),
    "no signal": ([user({**SIGNAL, "time_series": "media/0.png"}), assistant("x")], "cannot tell the kind of file"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_conversations_are_named_by_file_and_line(folder, name):
    conversation, message = BAD[name]
    (folder.parent / "b.png").write_bytes((folder / "media/0.png").read_bytes())
    (folder / "media/out.png").symlink_to(folder.parent / "b.png")
    (folder / "media/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    (folder / "media/nothing.png").write_bytes(b"")
    bitmap = bytearray(54)
    bitmap[:2], bitmap[10], bitmap[14], bitmap[26], bitmap[28] = b"BM", 54, 40, 1, 24
    (folder / "media/zero.bmp").write_bytes(bytes(bitmap))
    np.save(folder / "media/empty.npy", np.zeros((0, 1)))
    path = write(folder, mixed(1)[0], conversation)
    with pytest.raises((SourceError, MediaError), match=message) as caught:
        module(folder, path).prepare_data()
    assert f"{path}, line 2" in str(caught.value)


def test_files_are_checked(folder):
    (folder / "bad.jsonl").write_bytes(b'{"messages": []}\n{"messages"\n')
    with pytest.raises(SourceError, match=r"line 1: expected an object with a list"):
        module(folder, str(folder / "bad.jsonl")).prepare_data()
    (folder / "bad.jsonl").write_bytes(b"\n{\xff\n")
    with pytest.raises(SourceError, match=r"line 2: not valid JSON in UTF-8"):
        module(folder, str(folder / "bad.jsonl")).prepare_data()
    (folder / "empty.jsonl").write_text("\n")
    for path, message in (("empty.jsonl", "has no line"), ("none.jsonl", "no such file")):
        with pytest.raises(SourceError, match=message):
            module(folder, str(folder / path)).prepare_data()
    for path in ("a.json", "bundled:letters"):
        with pytest.raises(SourceError, match=r"ConversationSource: path="):
            ConversationSource(path)
    with pytest.raises(ValueError, match="overlong='cut'"):
        module(folder, "a.jsonl", overlong="cut")
    with pytest.raises(ValueError, match="media_tokens='qwen' is unknown"):
        module(folder, "a.jsonl", media_tokens="qwen")


def test_media_root_lets_files_lie_elsewhere(folder, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("lists"), [user(image(0)), assistant("x")])
    source = ConversationSource(path, media_root=str(folder))
    data = ConversationDataModule([source], visuals=VISUALS, cache_dir=folder / "cache")
    data.prepare_data()
    with pytest.raises(SourceError, match="media_root"):
        ConversationDataModule([replace(source, media_root=str(folder / "no"))], cache_dir=folder / "c").prepare_data()


def test_long_conversations(folder):
    path = write(folder, *[[user(text("a " * n)), assistant("x")] for n in (3, 90, 4, 100)])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: .* more than row_length=64 \(2 of 4"):
        ready(module(folder, path, row_length=64, global_batch_size=1, micro_batch_size=1))
    data = module(folder, path, row_length=64, global_batch_size=1, micro_batch_size=1, overlong="skip")
    with pytest.warns(UserWarning, match="2 conversations are longer"):
        ready(data)
    assert data.skipped == 2
    with pytest.raises(ValueError, match="all 4 conversations"):
        ready(module(folder, path, row_length=4, global_batch_size=1, micro_batch_size=1, overlong="skip"))


def test_damaged_content_is_found_when_read_or_before(folder):
    """A file whose header is fine fails at its sample; with `read_media` before training."""
    whole = (folder / "media/2.png").read_bytes()
    (folder / "media/cut.png").write_bytes(whole[: len(whole) // 2])
    signal = np.zeros((50, 1))
    signal[17] = np.nan
    np.save(folder / "media/nan.npy", signal)
    for part, message in (
        ({"type": "image", "image": "media/cut.png"}, "damaged or truncated image"),
        ({**SIGNAL, "time_series": "media/nan.npy"}, "nan at point 17"),
    ):
        path = write(folder, [user(part), assistant("x")])
        options = {"global_batch_size": 1, "micro_batch_size": 1}
        data = ready(module(folder, path, **options))
        for loader in (
            data.train_dataloader(),
            ready(module(folder, path, num_workers=1, **options)).train_dataloader(),
        ):
            with pytest.raises(MediaError, match=message) as caught:
                next(iter(loader))
            assert f"{path}, line 1, messages[0].content[0]" in str(caught.value)
        with pytest.raises(MediaError, match=message):
            module(folder, path, read_media=True, **options).prepare_data()


def test_a_file_that_changes_after_the_plan(folder):
    path = write(folder, [user(image(0)), assistant("x")])
    data = ready(module(folder, path, global_batch_size=1, micro_batch_size=1))
    Image.new("RGB", (64, 64)).save(folder / "media/0.png")
    with pytest.raises(MediaError, match=r"a\.jsonl, line 1: its media give 64 vectors, but .* announced 6"):
        next(iter(data.train_dataloader()))


def test_tokens_are_kept_until_something_changes(folder, monkeypatch):
    path = write(folder, *mixed(20))
    ready(module(folder, path))
    rendered = []
    original = ConversationFormat.render
    monkeypatch.setattr(ConversationFormat, "render", lambda self, c, *a: rendered.append(c) or original(self, c, *a))
    ready(module(folder, path))
    assert not rendered
    Image.new("RGB", (64, 64)).save(folder / "media/3.png")
    ready(module(folder, path))
    assert len(rendered) == 20
    ready(module(folder, path, visuals=replace(VISUALS, image=replace(VISUALS.image, max_pixels=2048))))
    assert len(rendered) == 40


def test_the_model_must_agree(folder):
    data = ready(module(folder, write(folder, *mixed())))
    data.check_model(MODEL)
    for changes, message in (
        ({"image_token_id": 4}, r"image_token_id=4 of the model differs .*'<\|image_pad\|>'.* 4097"),
        ({"time_series": None}, r"hold media of the kind time_series, the model takes image, video"),
        ({"vision": {"patch_size": 8}}, r"patches of 96 numbers.* encoder takes 384"),
        ({"vision": {"merge_size": 1}}, r"merged 2 × 2.*merged 1 × 1"),
    ):
        with pytest.raises(ValueError, match=message):
            data.check_model(changed(MODEL, changes))
    with pytest.raises(ValueError, match="4100 entries, the tokenizer 4103"):
        data.check_vocabulary(4100)


def test_bundled_sets():
    for name, sizes, classes in (("digits", (4000, 1000), 10), ("vowels", (270, 370), 9)):
        seen = []
        for part, size in zip(("train", "test"), sizes, strict=True):
            path = f"bundled:{name}/{part}"
            values, labels = labelled_arrays(path)
            assert len(values) == len(labels) == len(ConversationSource(path).open()) == size
            assert len(set(labels.tolist())) == classes
            seen.append({value.tobytes() for value in values})
            asked, answered = ConversationSource(path).open().read(7).messages
            assert np.array_equal(asked.parts[0].value, values[7])
            assert answered.parts[0].value == str(labels[7])
        assert not seen[0] & seen[1]


def test_a_module_can_be_pickled_for_workers(folder):
    data = ready(module(folder, write(folder, *mixed(20))))
    reader = pickle.loads(pickle.dumps(data._training))
    assert equal(reader.read([(0, 0)], first=5), data._training.read([(0, 0)], first=5))
