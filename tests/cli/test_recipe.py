"""`lit-interns1 recipe`: from small runs whose laws are known to a config that trains as planned."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from lit_interns1.cli import main
from lit_interns1.commands.recipe import make_recipe, parse, read_small_runs
from lit_interns1.commands.recipe_config import changed_config
from lit_interns1.commands.recipe_inputs import read_annealing
from lit_interns1.laws import BatchSizeRow, BatchSizeTable, MixingLaw, annealing_sums, published_rate_law
from lit_interns1.optim import WarmupStableDecay
from lit_interns1.optim.batch_schedules import ARTEFACT_FORMAT
from lit_interns1.reports.learning_rate_search import RateSearchResult

CONFIG = """
seed_everything: 1
run_dir: runs/base
model:
  class_path: LanguageModelModule
  init_args:
    config:
      vocab_size: 4096
      hidden_size: 16
      num_layers: 1
      num_heads: 2
      num_kv_heads: 1
      head_dim: 8
      moe: {num_experts: 4, experts_per_token: 1, intermediate_size: 16}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.006, weight_decay: 0.05}}
    schedule: {class_path: WarmupStableDecay, init_args: {total_tokens: 8200, warmup_tokens: 0.05}}
data:
  class_path: TextDataModule
  init_args:
    sources:
      - {path: FOLDER/salt.txt, name: salt, weight: 3, document_separator: "|"}
      - {path: FOLDER/stars.txt, name: stars, weight: 1, document_separator: "|"}
    row_length: 32
    global_batch_size: 6
    micro_batch_size: 2
    cache_dir: FOLDER/cache
clock: {max_tokens: 8200}
trainer:
  max_epochs: -1
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  log_every_n_steps: 1
  check_val_every_n_epoch: null
  limit_val_batches: 0
  gradient_clip_val: 1.0
best_checkpoint: {monitor: null}
"""


def write_base(folder):
    for name, text in (("salt", "salt and water, "), ("stars", "a field of stars | ")):
        (folder / f"{name}.txt").write_text(text * 4000)  # one epoch is longer than the runs
    (folder / "base.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """The base, parsed once: a parser takes seconds."""
    return parse(["--config", str(write_base(tmp_path_factory.mktemp("base")) / "base.yaml")])


@pytest.fixture
def planned(parsed):
    """Plans with some options, and writes nothing; gives what `recipe.json` would hold."""

    def plan(**options):
        config = parsed.config.clone()
        for name, value in options.items():
            parsed.config[name] = value
        try:
            return make_recipe(parsed, parsed.values(parsed.config), read_small_runs(parsed.config)).to_dict()
        finally:
            parsed.config = config

    return plan


def search(folder, parameters, tokens, config="", constant=30.0, size=-0.2, data=-0.3):
    """A search whose optima are K N^a D^b, with C = 0.05."""
    rates = np.geomspace(1e-4, 1.0, 9)
    losses = [[2 + 0.05 * math.log(r / (constant * parameters**size * d**data)) ** 2 for d in tokens] for r in rates]
    RateSearchResult(
        parameters=parameters, active_parameters=parameters // 2, first_tokens=0, tokens=tuple(tokens),
        rates=tuple(rates), losses=tuple(map(tuple, losses)), stopped=(None,) * 9, stopped_tokens=(None,) * 9,
        measure="loss",
    ).save(folder / "lr_search.json")  # fmt: skip
    if config:
        (folder / "config.yaml").write_text(config)
    return str(folder)


def batch_sizes(path, tokens=(512, 1024, 2048), rate=0.006):
    """B_opt = 64 √(D / 512) without an error: 90.5 at 1024 tokens, 156.8 at 3072, 221.7 at 6144."""
    nan = (math.nan, math.nan)
    made = [
        BatchSizeRow(5 - n, 1.0, 64 * math.sqrt(d / 512), float(d), 1.0, 0.0, "c1", "none", "none", 6, nan, nan, nan)
        for n, d in enumerate(tokens)
    ]
    table = BatchSizeTable(tuple(made), (32.0, 64.0, 128.0, 512.0)).to_dict()
    runs = [{"name": "a", "batch": 64, "rate": rate}]
    text = json.dumps({"format": ARTEFACT_FORMAT, "law": None, "table": table, "runs": runs})
    path.write_text(text.replace("NaN", "null"))
    return str(path)


def mixing_law(path, domains=("salt", "stars"), slope=2.0):
    """L_v = 1 + exp(−s r_v): with weights w the best r_0 − r_1 is ln(w_0 / w_1) / s."""
    law = MixingLaw(
        domains=domains, targets=("salt", "stars"), floor_V=np.ones(2), slope_VK=-slope * np.eye(2),
        r_squared_V=np.ones(2), max_error_V=np.zeros(2), leave_one_out_V=np.zeros(2),
        floor_samples_RV=np.ones((2, 2)), slope_samples_RVK=-slope * np.stack([np.eye(2)] * 2),
        lowest_K=np.full(2, 0.1), highest_K=np.full(2, 0.9), num_runs=9, warnings=(),
    )  # fmt: skip
    path.write_text(json.dumps({"law": json.loads(law.to_json()), "runs": [{"tokens": 4100.0}]}))
    return str(path)


def recipe(*options):
    main(["recipe", "--config", "base.yaml", "--out", "plan", *map(str, options)])
    config = yaml.safe_load(Path("plan/config.yaml").read_text())
    return json.loads(Path("plan/recipe.json").read_text()), config


class Page(HTMLParser):
    """Keeps the text, and attributes that load something."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data):
        self.text += data


def test_the_proposed_config_trains_as_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    base = write_base(tmp_path)
    searches = [search(base / name, n, [2000, 4000, 8000], CONFIG) for name, n in (("a", 30_000), ("b", 300_000))]
    mixing_law(base / "mixing_law.json")
    law = batch_sizes(base / "law.json")
    options = ["--rates", *searches, "--batch_sizes", law, "--mixture", base, "--weights", "{salt: 1, stars: 1.5}"]
    found, config = recipe(*options, "--available", "{salt: 2000, stars: 1e6}")
    printed = capsys.readouterr().out
    rate = 30 * found["parameters"] ** -0.2 * 8200**-0.3
    assert found["peak_rate"]["value"] == pytest.approx(rate, rel=1e-6)
    assert f"{rate:.3g}" in printed
    assert found["tokens"]["value"] == 8192
    steps = [(step["tokens"], step["batch"]) for step in found["batch"]["steps"]]
    assert steps == [(0, 64), (1024, 128), (3072, 192), (6144, 256)]
    shares = {source["name"]: source["share"]["value"] for source in found["mixture"]["sources"]}
    best = 0.5 + math.log(1 / 1.5) / 4
    assert shares == pytest.approx({"salt": best, "stars": 1 - best}, abs=1e-6)
    assert found["mixture"]["sources"][0]["epochs"] == pytest.approx(best * 8200 / 2000)
    loss = (math.exp(-2 * best) + 1.5 * math.exp(-2 * (1 - best))) / 2.5 + 1
    assert found["predictions"]["weighted loss by the mixing law"]["value"] == pytest.approx(loss)
    assert "mixture: D = 8.2 k is 2 times beyond what was tried (4.1 k)" in found["warnings"]
    assert any(warning.startswith("peak rate: N") for warning in found["warnings"]) is False, "N is between the sizes"
    # as it is
    main(["fit", "--config", "plan/config.yaml"])
    lines = Path("plan/run/metrics/metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    values = [(float(row["train/tokens"]), row) for row in rows if row.get("train/tokens")]
    switches = [(tokens, int(float(row["batch/switch"]) * 32)) for tokens, row in values if row.get("batch/switch")]
    assert switches == [(1024, 128), (3072, 192), (6144, 256)]
    logged = [(tokens, float(row["optim/lr"])) for tokens, row in values if row.get("optim/lr")]
    assert logged[-1][0] == 8192
    assert len({tokens for tokens, _ in logged}) == found["optimizer_steps"] == 56
    assert max(rate for _, rate in logged) == pytest.approx(rate, rel=1e-5)
    assert (
        min(tokens for tokens, now in logged if now < rate * 0.999 and tokens > 4000) > found["schedule"]["decay_start"]
    )
    assert logged[-1][1] == pytest.approx(0.1 * rate, rel=1e-4)
    assert found["schedule"]["decay_start"] == pytest.approx(0.8 * 8200)
    weights = [source["weight"] for source in config["data"]["init_args"]["sources"]]
    assert weights == pytest.approx([best, 1 - best], abs=1e-5)
    # what the base says and the recipe does not is kept
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.05
    assert config["trainer"]["check_val_every_n_epoch"] is None
    assert config["seed_everything"] == 1
    text = Path("plan/recipe.html").read_text()
    page = Page(text)
    assert page.loaded == []
    assert text.count('<svg class="chart"') == 2 + 2 + 1  # rate and batch over tokens, two searches, the mixture
    for warning in found["warnings"]:
        assert warning in page.text
    assert not [path for path in base.iterdir() if "partial" in path.name]
    with pytest.raises(SystemExit) as exit_:
        recipe()
    assert exit_.value.code == 2
    assert "--out plan exists already: name a new directory" in capsys.readouterr().err


def test_without_small_runs_everything_is_a_marked_default(parsed, planned):
    found = planned()
    assert found["warnings"] == []
    assert found["peak_rate"]["is_default"]
    assert found["peak_rate"]["value"] == 0.006
    assert found["batch"]["is_default"]
    assert [step["batch"] for step in found["batch"]["steps"]] == [192]
    assert found["tokens"] | {"source": ""} == {"value": 8064, "interval": None, "is_default": True, "source": ""}
    assert found["schedule"]["decay_share"]["is_default"]
    assert "2405.18392" in found["schedule"]["decay_share"]["source"]
    assert found["schedule"]["warmup_tokens"] == pytest.approx(410)  # 5 % of 8200, as in the base
    assert [source["share"]["value"] for source in found["mixture"]["sources"]] == [0.75, 0.25]
    assert all(source["share"]["is_default"] for source in found["mixture"]["sources"])
    parsed.config.clock.max_tokens = None
    found = planned()
    parsed.config.clock.max_tokens = 8200
    assert found["tokens"]["value"] == pytest.approx(20 * found["active_parameters"], rel=0.01)
    assert "2203.15556" in found["tokens"]["source"]


def test_config_without_small_runs(parsed):
    """Only what was planned is changed, whatever the base says."""
    base = parsed.values(parsed.config)
    recipe = make_recipe(parsed, base, read_small_runs(parsed.config))
    old = {"class_path": "lit_interns1.callbacks.BatchSizeScheduler", "init_args": {}}
    other = {"class_path": "LearningRateMonitor"}
    base["trainer"]["callbacks"] = [old, other]
    base["checkpoint"]["dirpath"] = "runs/base/checkpoints"
    changed = changed_config(base, recipe, Path("there"))
    assert changed["trainer"]["callbacks"] == [old, other], "no law of batch sizes: as it was"
    assert changed["checkpoint"]["dirpath"] is None, "a new run does not write over that of the base"
    assert changed["run_dir"] == "there/run"
    assert changed["clock"]["max_tokens"] == 8064
    assert [source["weight"] for source in changed["data"]["init_args"]["sources"]] == [3, 1]
    assert changed["model"]["init_args"]["config"] == base["model"]["init_args"]["config"]
    schedule = changed["model"]["init_args"]["schedule"]["init_args"]
    assert schedule["warmup_tokens"] == 410
    assert schedule["decay_tokens"] == 8064 - 0.8 * 8200
    del base["model"]["init_args"]["schedule"]
    with pytest.raises(ValueError, match="takes no schedule"):
        changed_config(base, recipe, Path("there"))


def test_one_search_gives_ratios_with_the_published_exponents(tmp_path, planned):
    other = CONFIG.replace("AdamW", "SGD").replace("global_batch_size: 6", "global_batch_size: 12")
    one = search(tmp_path / "a", 30_000, [2000, 4000], other.replace("stars.txt", "moon.txt"))
    found = planned(rates=[one])
    reference = 30 * 30_000**-0.2 * 4000**-0.3
    expected = published_rate_law().predict_ratio(reference, 30_000, 4000, found["parameters"], 8200).rate
    assert found["peak_rate"]["value"] == pytest.approx(expected)
    warnings = "\n".join(found["warnings"])
    assert "SGD instead of AdamW" in warnings
    assert "searched with 384 tokens per step, planned are 192" in warnings
    assert "searched on other sources" in warnings
    assert "published ones without errors" in warnings
    assert f"peak rate: D = 8.2 k is {8200 / 4000:.3g} times beyond" in warnings
    assert found["peak_rate"]["others"] == {}
    own = search(tmp_path / "own", found["parameters"], [1000, 2000, 4000], CONFIG)
    assert list(planned(rates=[own])["peak_rate"]["others"]) == ["loss over tokens at each rate, extrapolated"]
    found = planned(rates=[str(tmp_path / "a" / "lr_search.json")], tokens=4000.0)
    assert "is not known" in found["warnings"][0]
    found = planned(published_rate_law=True)
    law = published_rate_law(absolute=True)
    assert found["peak_rate"]["value"] == pytest.approx(law.predict(found["parameters"], 8200).rate)
    assert "the published law is used with its constant" in found["warnings"][0]
    several = [search(tmp_path / str(n), n, [2000, 4000], CONFIG) for n in (10_000, 20_000, 40_000)]
    found = planned(rates=several, count="active")
    assert found["peak_rate"]["value"] == pytest.approx(30 * (2 * found["active_parameters"]) ** -0.2 * 8200**-0.3)
    assert not any("rests on two sizes" in warning for warning in found["warnings"])
    assert not any("another optimizer" in warning or "per step" in warning for warning in found["warnings"])


def test_rates_that_are_not_bracketed(tmp_path, planned):
    rates, falling = (0.001, 0.002, 0.004), ((3.0,), (2.5,), (2.0,))
    result = RateSearchResult(1000, 500, 0, (4000,), rates, falling, (None,) * 3, (None,) * 3, "loss")
    result.save(tmp_path / "open" / "lr_search.json")
    found = planned(rates=[str(tmp_path / "open")])
    ratio = published_rate_law().predict_ratio(0.004, 1000, 4000, found["parameters"], 8200).rate
    assert found["peak_rate"]["value"] == pytest.approx(ratio)
    assert found["peak_rate"]["interval"] is None
    assert any("no search brackets its best rate" in warning for warning in found["warnings"])
    with pytest.raises(ValueError, match="named twice"):
        planned(rates=[str(tmp_path / "open")] * 2)


def test_batch_sizes_on_several_ranks(tmp_path, parsed, planned):
    law = batch_sizes(tmp_path / "law.json", rate=0.001)
    found = planned(batch_sizes=[law], ranks=2)
    assert [(step["tokens"], step["batch"]) for step in found["batch"]["steps"]] == [(0, 128), (4096, 256)]
    parsed.config.trainer.num_nodes = 2
    on_nodes = planned(batch_sizes=[law])
    parsed.config.trainer.num_nodes = 1
    assert on_nodes == found
    warnings = "\n".join(found["warnings"])
    assert "had the learning rate 0.001, planned is 0.006" in warnings
    assert "a pass has 128" in warnings
    assert "batch size: D = 6.56 k is 3.2 times" in warnings
    with pytest.raises(ValueError, match="divisible"):
        planned(ranks=2)  # 6 rows, and 2 ranks read 2 each
    with pytest.raises(ValueError, match="--ranks = 0"):
        planned(ranks=0)


def test_bounds_of_the_mixture(tmp_path, planned):
    mixture = mixing_law(tmp_path / "mixing_law.json")
    found = planned(mixture=mixture, caps={"salt": 0.4}, available={"salt": 1500, "stars": 1e6})
    first = found["mixture"]["sources"][0]
    assert first["share"]["value"] == pytest.approx(0.4)
    assert first["limit"] == "cap"
    for own, losses in zip((0.4, 0.6), found["mixture"]["losses"].values(), strict=True):
        assert losses[0] == pytest.approx(1 + math.exp(-2 * own))
    assert found["mixture"]["losses"]["salt"][1] == pytest.approx(1 + math.exp(-2 * 0.75))
    assert any("salt is at its cap of 0.400, read 2.19 times" in warning for warning in found["warnings"])
    # without `available` the sources are counted: whole rows
    one_sided = {"mixture": mixture, "weights": {"salt": 1, "stars": 0}}
    found = planned(**one_sided, epochs=1.0, tokens=30_000.0)
    sources = found["mixture"]["sources"]
    rows = sources[0]["share"]["value"] * 30_000 / sources[0]["epochs"] / 32
    assert rows == pytest.approx(round(rows))
    assert sources[0]["epochs"] == pytest.approx(1)
    assert sources[0]["limit"] == "cap"
    plenty = {"salt": 1e9, "stars": 1e9}
    found = planned(**one_sided, available=plenty)
    assert found["mixture"]["sources"][1]["limit"] == "floor"
    assert found["mixture"]["sources"][1]["share"]["value"] == pytest.approx(1 / 16)
    found = planned(**one_sided, available=plenty, floors={"stars": 0.01})
    assert any("below 1/16 the law does not hold" in warning for warning in found["warnings"])
    for options, words in (
        ({"mixture": mixing_law(tmp_path / "other.json", ("salt", "moon"))}, "domains salt, moon"),
        ({"mixture": batch_sizes(tmp_path / "law.json")}, "is no mixing law"),
        ({"weights": {"salt": 1}}, "--weights needs --mixture"),
        ({"mixture": mixture, "caps": {"sugar": 1}}, "--caps names 'sugar'"),
        ({"rates": [mixture]}, "no result of a learning-rate search"),
        ({"batch_sizes": [mixture]}, "was not written by"),
        ({"mixture": mixture, "available": {"salt": 10, "stars": 10}}, "fewer than"),
    ):
        with pytest.raises(ValueError, match=words):
            planned(**options)


def annealed_run(folder, schedule, law=(2.0, 3.0, 0.4, 2.0, 0.9), peak=0.01, batch=100, steps=400, config=None):
    """Logs losses that follow L_0 + A S_1^−α − C S_2."""
    tokens = batch * np.arange(1.0, steps + 1)
    rates = peak * np.array([schedule(t) for t in tokens])
    first, second = annealing_sums(rates, law[4])
    losses = law[0] + law[1] * first ** -law[2] - law[3] * second
    (folder / "metrics").mkdir(parents=True)
    columns = (range(steps), *(values.tolist() for values in (tokens, rates, losses)))
    rows = [",".join(map(repr, row)) for row in zip(*columns, strict=True)]
    (folder / "metrics/metrics.csv").write_text("step,train/tokens,optim/lr,train/loss\n" + "\n".join(rows) + "\n")
    if config:
        (folder / "config.yaml").write_text(config)
    return str(folder)


def test_annealing_runs_decide_the_decay(tmp_path, planned):
    total = 40_000.0
    runs = [
        annealed_run(tmp_path / "a", WarmupStableDecay(total, 0.05, 0.5, "linear", 0.0), config=CONFIG),
        annealed_run(tmp_path / "b", WarmupStableDecay(total, 0.05, 0.1, "cosine", 0.0), config=CONFIG),
    ]
    law = read_annealing(runs).law
    assert law.momentum == pytest.approx(0.9, abs=0.02)
    assert (law.irreducible, law.annealing) == pytest.approx((2.0, 2.0), rel=0.1)
    found = planned(annealing=runs, tokens=total)
    schedule = found["schedule"]
    shares = np.linspace(0.02, 0.9, 45)
    ends = []
    for share in shares:
        steps = [0.006 * WarmupStableDecay(total, 0.05, share, schedule["shape"], 0.0)(100.0 * n) for n in range(400)]
        first, second = annealing_sums(np.array(steps), 0.9)
        ends.append(2 + 3 * first[-1] ** -0.4 - 2 * second[-1])
    assert found["schedule"]["decay_share"]["value"] == pytest.approx(shares[np.argmin(ends)], abs=0.06)
    assert schedule["final_factor"] == 0.0
    assert found["schedule"]["loss_over_decay_share"]
    assert any("192" in warning and "100 tokens per step" in warning for warning in found["warnings"])
    assert "loss by the annealing law" not in found["predictions"], "the networks are written differently"
    longer = CONFIG.replace("row_length: 32", "row_length: 64")
    annealed_run(tmp_path / "c", WarmupStableDecay(total, 0.05, 0.1), config=longer)
    with pytest.raises(ValueError, match="row_length is 32"):
        planned(annealing=[runs[0], str(tmp_path / "c")])
    annealed_run(tmp_path / "d", WarmupStableDecay(total, 0.05, 0.1), batch=200)
    with pytest.raises(ValueError, match=r"different batch sizes \(100, 200"):
        planned(annealing=[runs[0], str(tmp_path / "d")])
