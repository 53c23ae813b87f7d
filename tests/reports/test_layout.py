"""Every logged key is drawn exactly once, related ones in one chart; documented patterns match what they stand for."""

import re

import pytest

from lit_interns1.reports.layout import arrange, key_regex


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("val/loss/{source}", "val/loss/english", True),
        ("val/loss/{source}", "val/loss", False),
        ("val/loss/{source}", "val/loss/a/b", False),
        ("train/loss", "train/loss", True),
        ("train/loss", "train/loss_2", False),
        ("a.b/{x}/{y}", "a.b/1/2", True),
        ("a.b/{x}/{y}", "axb/1/2", False),
    ],
)
def test_key_regex(pattern, key, matches):
    assert bool(re.match(key_regex(pattern), key)) is matches


def charts(names):
    return {(section, curves.title): curves.keys for section, all_curves in arrange(names) for curves in all_curves}


def test_named_charts_and_axes():
    names = ["val/loss", "epoch", "train/loss", "train/tokens", "val/loss/english", "val/loss/code", "optim/lr"]
    assert charts(names) == {
        ("Loss", "Loss"): {"train": "train/loss", "validation": "val/loss"},
        ("Loss", "Validation loss by source"): {"code": "val/loss/code", "english": "val/loss/english"},
        ("Optimizer", "Learning rate"): {"optim": "optim/lr"},
    }


def test_new_keys_join_the_section_of_their_prefix():
    names = [
        "router/layer_10/load_std", "router/layer_2/load_std", "router/all/entropy_mean", "router/all/entropy_max",
        "router/val/entropy_max", "router/all/drift", "stability/new_thing/head", "stability/new_thing/norm",
        "salience/code/rank", "salience/chemistry/rank", "mine/first/value", "mine/second/value", "plain",
    ]  # fmt: skip
    found = charts(names)
    assert list(found["Router", "Load std by layer"]) == ["layer_2", "layer_10"]
    assert found["Router", "Entropy"] == {"max": "router/all/entropy_max", "mean": "router/all/entropy_mean"}
    assert found["Router", "Entropy, validation"] == {"max": "router/val/entropy_max"}
    assert set(found["Stability", "New thing"]) == {"head", "norm"}
    assert set(found["Capability salience", "Rank"]) == {"code", "chemistry"}
    assert set(found["mine", "Value"]) == {"first", "second"}
    assert found["other", "Plain"] == {"plain": "plain"}


def test_no_key_is_lost_or_drawn_twice():
    names = ["train/a/x", "val/a/x", "test/a/x", "train/x", "val/x", "router/all/a_b_mean", "router/all/a b_mean"]
    names += ["router/all/max_violation_mean", "router/all/max_violation_max", "router/layer_0/max_violation"]
    drawn = [key for keys in charts(names).values() for key in keys.values()]
    assert sorted(drawn) == sorted(names)
    assert set(charts(names)["Router", "Imbalance (MaxVio)"]) == {"mean", "max"}
    assert set(charts(names)["Router", "Imbalance of single layers"]) == {"layer_0"}
