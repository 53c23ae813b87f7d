"""Pairs of images and captions: which belong together, in which order, on how many ranks; the bundled digit pairs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lit_interns1.data import SourceError
from lit_interns1.data.bundled_conversations import bundled_record, bundled_size
from lit_interns1.data.caption_data_module import CaptionDataModule
from lit_interns1.data.conversation_media import NativeVisuals, RandomAffine
from lit_interns1.data.digit_pairs import CANVAS, NAMES, RELATIONS, SIZES, Scene, digit_pair, draw, scene
from lit_interns1.data.media.native import NativeImageProcessor, NativeVideoProcessor

GREYS = [10 * index for index in range(22)]


def visuals(patch_size=4):
    size = {"patch_size": patch_size, "min_pixels": 64, "max_pixels": 64}
    return NativeVisuals(NativeImageProcessor(**size), NativeVideoProcessor(**size))


def message(image, *captions):
    asked = {"role": "user", "content": [{"type": "image", "image": image}]}
    return {"messages": [asked, *({"role": "assistant", "content": caption} for caption in captions)]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Image number i is one grey, and its caption says which; two pairs say the same."""
    folder = tmp_path_factory.mktemp("greys")
    for grey in GREYS:
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / f"{grey}.png")
    lines = [message(f"{grey}.png", f"grey {grey}") for grey in GREYS]
    lines.append(message("200.png", "grey 200"))
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "pairs.jsonl"


def module(path, ranks=1, rank=0, **options):
    data = CaptionDataModule(str(path), **{"visuals": visuals(), "row_length": 12, "global_batch_size": 4, **options})
    sampler = {"num_replicas": ranks, "rank": rank}
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(distributed_sampler_kwargs=sampler), accumulate_grad_batches=1
    )
    data.setup("fit")
    return data


def contents(data, batch):
    """(grey of the image, caption, key) of every pair."""
    found = []
    images = batch.media["image"]
    for index, patches in enumerate(images.values.split(images.length_M.tolist())):
        span = slice(index * batch.row_length, (index + 1) * batch.row_length)
        real = batch.sample_id_T[span] == index
        grey = round(float((patches.mean() * 0.5 + 0.5) * 255))
        assert batch.token_fields["caption_key"][span][real].unique().numel() == 1
        assert (batch.token_fields["caption_key"][span][~real] == -1).all()
        found.append((grey, data.tokenizer.decode(batch.input_ids[span][real].tolist()),
                      int(batch.token_fields["caption_key"][span][0])))  # fmt: skip
    assert images.row_M.tolist() == list(range(batch.num_rows))
    return found


def test_every_image_has_its_caption(path):
    data = module(path, validation_sources=str(path), validation_batch_size=6)
    epoch = [pair for batch in data.train_dataloader() for pair in contents(data, batch)]
    assert len(epoch) == 20
    assert all(caption == f"grey {grey}" for grey, caption, _ in epoch)
    pairs = [pair for batch in data.val_dataloader() if batch.media for pair in contents(data, first_rows(batch))]
    assert sorted(grey for grey, _, _ in pairs) == sorted([*GREYS, 200])
    keys = {}
    for _, caption, key in pairs:
        assert keys.setdefault(caption, key) == key
    assert len(set(keys.values())) == len(keys) == 22
    assert data.train_dataloader().batch.micro_batch_rows == 4


def first_rows(batch):
    """Without the rows of padding."""
    rows = len(batch.media["image"])
    return batch if rows == batch.num_rows else batch.split(1)[0].concatenate(batch.split(1)[:rows])


def test_ranks_share_the_pairs_of_a_step(path):
    whole = module(path)
    wanted = [sorted(contents(whole, batch)) for batch in whole.train_dataloader()]
    shares = [module(path, 2, rank) for rank in range(2)]
    loaders = [iter(data.train_dataloader()) for data in shares]
    for step in wanted:
        parts = [contents(data, next(loader)) for data, loader in zip(shares, loaders, strict=True)]
        assert [len(part) for part in parts] == [2, 2]
        assert sorted(parts[0] + parts[1]) == step
    with pytest.raises(ValueError, match="global_batch_size=4 is not a multiple of the 3"):
        module(path, 3)


def test_a_loader_continues_with_the_next_pairs_and_the_same_changes(path):
    options = {"transform": RandomAffine(shift=3.0), "seed": 9}
    first = module(path, **options)
    batches = list(zip(range(5), first.train_dataloader(), strict=False))
    half = module(path, **options)
    loader = iter(half.train_dataloader())
    for _ in range(2):
        next(loader)
    resumed = module(path, **options)
    resumed.load_state_dict(half.state_dict())
    for (_, expected), got in zip(batches[2:], resumed.train_dataloader(), strict=False):
        torch.testing.assert_close(got.media["image"].values, expected.media["image"].values, rtol=0, atol=0)
        assert torch.equal(got.input_ids, expected.input_ids)
    shares = [module(path, 2, rank, **options).train_dataloader() for rank in range(2)]
    for (_, expected), *parts in zip(batches, *shares, strict=False):
        values = torch.cat([part.media["image"].values for part in parts])
        torch.testing.assert_close(values, expected.media["image"].values, rtol=0, atol=0)
    with pytest.raises(ValueError, match="transform"):
        module(path, seed=9).load_state_dict(half.state_dict())


def test_long_captions_are_refused_or_cut(path, tmp_path):
    (tmp_path / "a.png").write_bytes((path.parent / "0.png").read_bytes())
    caption = "one two three four five six seven eight nine ten eleven twelve"
    lines = [message("a.png", text) for text in [caption, *["short"] * 3]]
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ValueError, match=r"line 1: the caption has \d+ tokens, more than row_length=5 \(1 of 4"):
        module(file, row_length=5)
    data = module(file, row_length=5, overlong="cut")
    (batch,) = data.train_dataloader()
    ids = data.tokenizer.encode(caption)[:5]
    assert [row.tolist() for row in batch.input_ids.view(4, 5)].count(ids) == 1
    assert sorted(torch.bincount(batch.sample_id_T[batch.sample_id_T >= 0]).tolist())[-1] == 5


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (message("0.png", "one", "two"), r"line 2: a pair has one image and one message.*image and 2"),
        ({"messages": [{"role": "assistant", "content": "no image"}]}, r"line 2: a pair.*no media and 1"),
        (message("nowhere.png", "one"), r"line 2.*nowhere.png"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_line(path, tmp_path, line, match):
    (tmp_path / "0.png").write_bytes((path.parent / "0.png").read_bytes())
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(entry) for entry in [message("0.png", "fine"), line]))
    with pytest.raises(SourceError, match=match):
        module(file, global_batch_size=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"overlong": "skip"}, "overlong='skip'"),
        ({"validation_batch_size": 0}, "validation_batch_size must be at least 1"),
        ({"row_length": 1}, "row_length must be at least 2"),
    ],
)
def test_options_are_checked(path, options, match):
    with pytest.raises(ValueError, match=match):
        CaptionDataModule(str(path), **options)


def test_other_patches_than_the_encoders_are_refused(path):
    data = CaptionDataModule(str(path), visuals=visuals())
    data.check_vision(SimpleNamespace(patch_values=96, merge_size=2))
    with pytest.raises(ValueError, match=r"patches of 96 numbers.*takes 48"):
        data.check_vision(SimpleNamespace(patch_values=48, merge_size=2))


# -- the bundled pairs -----------------------------------------------------------------------------------------------


def test_a_scene_is_drawn_as_its_caption_says():
    images, labels = [np.full((28, 28), 20 * digit + 20, np.uint8) for digit in range(10)], np.arange(10)
    random = np.random.default_rng(1)
    for number in random.integers(0, 800, 60):
        what = scene(int(number))
        first, second = what.digits
        if first == second:
            continue
        canvas = draw(what, images, labels, random)
        boxes = []
        for digit, size in zip(what.digits, what.sizes, strict=True):
            rows, columns = np.nonzero(canvas == 20 * digit + 20)
            side = SIZES[size][1]
            assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (side, side)
            boxes.append((rows.min(), columns.min(), side))
        axis = 1 if RELATIONS[what.relation] == "left of" else 0
        assert boxes[0][axis] + boxes[0][2] <= boxes[1][axis]
        middles = [box[1 - axis] + box[2] / 2 for box in boxes]
        assert abs(middles[0] - middles[1]) <= 6
    assert Scene((7, 2), (0, 1), 0).caption == "a large seven left of a small two"


def test_bundled_pairs_are_fixed_and_captions_do_not_repeat_before_all_were_used():
    assert (bundled_size("bundled:digit-pairs/train"), bundled_size("bundled:digit-pairs/test")) == (8000, 400)
    images, labels = [np.full((28, 28), 20 * digit + 20, np.uint8) for digit in range(10)], np.arange(10)
    test = [digit_pair(index, False, images, labels)[1] for index in range(400)]
    assert len(set(test)) == 400
    train = [digit_pair(index, True, images, labels)[1] for index in range(800)]
    assert len(set(train)) == 800
    assert all(any(f"large {name}" in caption for caption in train) for name in NAMES)
    one, again = (bundled_record("bundled:digit-pairs/test", 7) for _ in range(2))
    image = one["messages"][0]["content"][0]["image"]
    assert image.shape == (CANVAS, CANVAS)
    assert np.array_equal(image, again["messages"][0]["content"][0]["image"])
    assert one["messages"][1]["content"] == test[7]
