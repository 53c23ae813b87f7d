"""Capability salience on synthetic checkpoints whose score depends on a fifth of the tokens."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lit_interns1.laws import (
    SalienceFile,
    SalienceFileError,
    TokenLosses,
    fit_salience,
    load_salience,
    score_metrics,
)

NUM_TOKENS, NUM_CHECKPOINTS, SALIENT = 200, 48, 40
ABILITY = slice(0, SALIENT)


def checkpoints(seed):
    """Losses (M, T), scores and recipes: recipes and checkpoints shift the loss of the other tokens, not the score."""
    rng = np.random.default_rng(seed)
    ability = rng.uniform(-1, 1, NUM_CHECKPOINTS)
    recipe = np.repeat(["code", "mixed", "web"], NUM_CHECKPOINTS // 3)
    others = NUM_TOKENS - SALIENT
    offset = rng.normal(0, 0.25, (3, others))[np.unique(recipe, return_inverse=True)[1]]
    shared = rng.normal(0, 0.2, (NUM_CHECKPOINTS, 1))
    losses = rng.uniform(2, 6, NUM_TOKENS) + rng.normal(0, 0.02, (NUM_CHECKPOINTS, NUM_TOKENS))
    losses[:, ABILITY] -= 0.8 * ability[:, None]
    losses[:, SALIENT:] += offset + shared
    c = losses[:, ABILITY].mean(axis=1)
    scores = 0.25 + 0.70 / (1 + np.exp(6 * (c - c.mean())))
    return losses, scores, recipe


@pytest.mark.parametrize("seed", [0, 1])
def test_salient_tokens_are_found_and_held_out_recipes_predicted(seed):
    losses, scores, recipes = checkpoints(seed)
    for rho in (1e-3, 0.1, 10.0):
        fit = fit_salience(losses, scores, recipes, 0.25, 0.95, rhos=rho)
        assert fit.salience.held_out_metrics.r_squared >= 0.993
        weights = np.abs(fit.salience.weights_T)
        assert weights[ABILITY].sum() / weights.sum() >= 0.94
        assert fit.baseline_metrics.r_squared < 0.5
    stiff = fit_salience(losses, scores, recipes, 0.25, 0.95, rhos=1000.0)
    assert stiff.salience.held_out_metrics.r_squared < 0.9
    chosen = fit_salience(losses, scores, recipes, 0.25, 0.95)
    assert chosen.salience.held_out_metrics.r_squared >= 0.999
    assert set(chosen.recipe_metrics) == {"code", "mixed", "web"}
    assert chosen.rho_errors[chosen.rhos == chosen.salience.rho] == chosen.rho_errors.min()


def test_weights_are_the_ridge_solution_in_token_space():
    losses, scores, recipes = checkpoints(2)
    rho = 0.7
    salience = fit_salience(losses, scores, recipes, 0.25, 0.95, rhos=rho).salience
    target = -np.log((share := np.clip((scores - 0.25) / 0.70, 1e-3, 1 - 1e-3)) / (1 - share))
    z = losses - losses.mean(axis=0)
    direct = np.linalg.solve(z.T @ z + rho * np.eye(NUM_TOKENS), z.T @ (target - target.mean()))
    np.testing.assert_allclose(salience.k * salience.weights_T, direct, atol=1e-9)
    assert salience.k == pytest.approx(np.abs(direct).sum())
    offset = target.mean() - losses.mean(axis=0) @ direct
    predicted, _ = salience.predict(salience.capability_loss(losses))
    np.testing.assert_allclose(predicted, 0.25 + 0.70 / (1 + np.exp(losses @ direct + offset)), atol=1e-9)


def test_held_out_predictions_do_not_see_their_recipe():
    losses, scores, recipes = checkpoints(3)
    fit = fit_salience(losses, scores, recipes, 0.25, 0.95)
    changed = scores.copy()
    changed[recipes == "web"] = 0.6
    other = fit_salience(losses, changed, recipes, 0.25, 0.95)
    np.testing.assert_allclose(other.held_out_M[recipes == "web"], fit.held_out_M[recipes == "web"], rtol=1e-9)
    np.testing.assert_allclose(other.baseline_M[recipes == "web"], fit.baseline_M[recipes == "web"], rtol=1e-6)
    assert not np.allclose(other.held_out_M[recipes == "code"], fit.held_out_M[recipes == "code"], atol=1e-3)


def test_uniform_prior_becomes_the_mean_loss():
    losses, scores, recipes = checkpoints(0)
    fit = fit_salience(losses, scores, recipes, 0.25, 0.95, rhos=1e12, prior="uniform").salience
    np.testing.assert_allclose(fit.weights_T, 1 / NUM_TOKENS, rtol=1e-6)
    np.testing.assert_allclose(fit.capability_loss(losses), losses.mean(axis=1), rtol=1e-9)
    share = np.clip((scores - 0.25) / 0.70, 1e-3, 1 - 1e-3)
    slope, offset = np.polyfit(losses.mean(axis=1), -np.log(share / (1 - share)), 1)
    assert (fit.k, fit.c_0) == pytest.approx((slope, -offset / slope), rel=1e-6)
    free = fit_salience(losses, scores, recipes, 0.25, 0.95, prior="uniform").salience
    assert free.held_out_metrics.r_squared > 0.99


def test_nonnegative_weights_meet_the_optimality_conditions():
    losses, scores, _ = checkpoints(1)
    rows, rho = np.arange(NUM_CHECKPOINTS), 0.5
    target = np.log(1 / scores - 1)
    weights = TokenLosses(losses, block_tokens=64).nonnegative_ridge(rows, target, rho)
    z = losses - losses.mean(axis=0)
    gradient = z.T @ (z @ weights - (target - target.mean())) + rho * weights
    assert (weights >= 0).all()
    assert np.abs(gradient[weights > 0]).max() < 1e-6
    assert gradient[weights == 0].min() > -1e-6


def test_options_of_the_weights():
    losses, scores, recipes = checkpoints(0)
    nonneg = fit_salience(losses, scores, recipes, 0.25, 0.95, nonneg=True, rhos=[0.1, 1.0]).salience
    assert nonneg.weights_T.min() >= 0
    assert nonneg.weights_T.sum() == pytest.approx(1)
    assert nonneg.held_out_metrics.r_squared > 0.99
    signed = fit_salience(losses, scores, recipes, 0.25, 0.95, rhos=0.1).salience
    summed = fit_salience(losses, scores, recipes, 0.25, 0.95, rhos=0.1, normalise="sum1").salience
    assert np.abs(signed.weights_T).sum() == pytest.approx(1)
    assert summed.weights_T.sum() == pytest.approx(1)
    for salience in (signed, summed):
        got, _ = salience.predict(salience.capability_loss(losses))
        np.testing.assert_allclose(got, signed.predict(signed.capability_loss(losses))[0], rtol=1e-9)


def test_pooled_tokens_share_a_weight():
    losses, scores, recipes = checkpoints(0)
    pool = np.arange(NUM_TOKENS) // 7  # the last group is smaller, one holds both kinds
    rho = 0.3
    salience = fit_salience(losses, scores, recipes, 0.25, 0.95, rhos=rho, pool=pool).salience
    for group in np.unique(pool):
        assert np.ptp(salience.weights_T[pool == group]) < 1e-15
    # oracle: one unknown per group, penalised once per token
    member = np.eye(pool.max() + 1)[pool]
    z = (losses - losses.mean(axis=0)) @ member
    share = np.clip((scores - 0.25) / 0.70, 1e-3, 1 - 1e-3)
    target = -np.log(share / (1 - share))
    shared = np.linalg.solve(z.T @ z + rho * np.diag(member.sum(axis=0)), z.T @ (target - target.mean()))
    np.testing.assert_allclose(salience.k * salience.weights_T, member @ shared, atol=1e-9)
    assert salience.held_out_metrics.r_squared > 0.99


def test_blocks_and_half_precision_change_nothing_that_matters():
    losses, scores, recipes = checkpoints(0)
    whole, blocks = TokenLosses(losses), TokenLosses(losses, block_tokens=33)
    np.testing.assert_allclose(blocks.gram_MM, whole.gram_MM, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(blocks.mean_M, losses.mean(axis=1), rtol=1e-12)
    half = fit_salience(losses.astype(np.float16), scores, recipes, 0.25, 0.95)
    assert half.salience.held_out_metrics.r_squared > 0.999


def test_polish_is_kept_only_if_held_out_recipes_gain():
    losses, scores, recipes = checkpoints(4)
    plain = fit_salience(losses, scores, recipes, 0.25, 1.0)  # y_hi is 0.95 in truth: the logits are bent
    polished = fit_salience(losses, scores, recipes, 0.25, 1.0, polish=True)
    assert polished.polished
    assert polished.salience.held_out_metrics.mse < plain.salience.held_out_metrics.mse
    assert 0.95 < polished.salience.y_hi < 0.99
    c = polished.salience.capability_loss(losses)
    again = score_metrics(polished.salience.predict(c)[0], scores)
    assert dataclasses.astuple(again) == pytest.approx(dataclasses.astuple(polished.salience.fit_metrics), rel=1e-6)
    # with the true y_hi the logits are straight, and there is nothing to gain
    losses, scores, recipes = checkpoints(0)
    tried, plain = (fit_salience(losses, scores, recipes, 0.25, 0.95, polish=polish) for polish in (True, False))
    assert not tried.polished
    np.testing.assert_array_equal(tried.salience.weights_T, plain.salience.weights_T)


def test_predicted_error_matches_the_scatter():
    inside = []
    for seed in range(12):
        losses, scores, recipes = checkpoints(seed)
        rng = np.random.default_rng(seed)
        share = (scores - 0.25) / 0.70
        noisy = 0.25 + 0.70 / (1 + (1 / share - 1) * np.exp(rng.normal(0, 0.3, NUM_CHECKPOINTS)))
        kept = recipes != "web"
        more = np.where(np.arange(NUM_CHECKPOINTS) % 2, "a", "b")[kept]
        salience = fit_salience(losses[kept], noisy[kept], np.char.add(recipes[kept], more), 0.25, 0.95).salience
        predicted, error = salience.predict(salience.capability_loss(losses[~kept]))
        inside.append((np.abs(predicted - noisy[~kept]) < 1.28 * error).mean())
    assert 0.65 <= np.mean(inside) <= 0.97  # 80 % claimed


def test_metrics():
    metrics = score_metrics([1.0, 2.0, 2.0, 5.0], [1.0, 2.0, 3.0, 4.0])
    assert (metrics.mse, metrics.mae, metrics.r_squared) == pytest.approx((0.5, 0.5, 1 - 2 / 5))
    assert metrics.spearman == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    assert np.isnan(score_metrics([1.0, 1.0], [0.0, 1.0]).spearman)


def test_bad_input_is_named():
    losses, scores, recipes = checkpoints(0)
    with pytest.raises(ValueError, match="1 data recipes"):
        fit_salience(losses, scores, np.full(NUM_CHECKPOINTS, "web"))
    with pytest.raises(ValueError, match="one per checkpoint"):
        fit_salience(losses, scores[:-1], recipes)
    with pytest.raises(ValueError, match=r"y_lo=0.9 \(chance\)"):
        fit_salience(losses, scores, recipes, y_lo=0.9, y_hi=0.5)
    with pytest.raises(ValueError, match="goes without"):
        fit_salience(losses, scores, recipes, prior="uniform", nonneg=True)
    broken = losses.copy()
    broken[5, 7] = np.nan
    with pytest.raises(ValueError, match=r"checkpoints \[5\] are not finite"):
        fit_salience(broken, scores, recipes)


# --- the file ---


@pytest.fixture
def artefact():
    losses, scores, recipes = checkpoints(0)
    fits = {
        "code": fit_salience(losses, scores, recipes, 0.25, 0.95).salience,
        "maths": fit_salience(losses, scores**2, recipes, 0.0, 0.95, nonneg=True, rhos=1.0).salience,
    }
    return SalienceFile("tok", "data", np.arange(NUM_TOKENS, dtype=np.int64) * 3, fits)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-11), ("float32", 2**-24)])
def test_file_round_trip(artefact, tmp_path, dtype, tolerance):
    path = tmp_path / "new" / "salience.safetensors"
    artefact.save(path, dtype)
    back = load_salience(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert (back.tokenizer_hash, back.data_hash) == ("tok", "data")
    np.testing.assert_array_equal(back.token_ids_T, artefact.token_ids_T)
    assert back.capabilities.keys() == artefact.capabilities.keys()
    for name, salience in back.capabilities.items():
        before = artefact.capabilities[name]
        largest = np.abs(before.weights_T).max()
        np.testing.assert_allclose(salience.weights_T, before.weights_T, rtol=tolerance, atol=largest * 1e-7)
        for key in ("k", "c_0", "y_lo", "y_hi", "rho", "logit_std", "fit_metrics", "held_out_metrics"):
            assert getattr(salience, key) == getattr(before, key)
        np.testing.assert_array_equal(salience.logit_covariance_22, before.logit_covariance_22)


def test_tiny_weights_survive_half_precision(artefact, tmp_path):
    salience = dataclasses.replace(artefact.capabilities["code"], weights_T=np.full(NUM_TOKENS, 1e-9))
    file = dataclasses.replace(artefact, capabilities={"code": salience})
    file.save(tmp_path / "s")
    np.testing.assert_allclose(load_salience(tmp_path / "s").capabilities["code"].weights_T, 1e-9, rtol=1e-3)


def test_other_hashes_are_refused(artefact):
    artefact.check("tok", "data")
    with pytest.raises(SalienceFileError, match="tokenizer tok, this run has other"):
        artefact.check("other", "data")
    with pytest.raises(SalienceFileError, match="validation data data, this run has other"):
        artefact.check("tok", "other")


def test_reader_is_strict(artefact, tmp_path):
    path = tmp_path / "salience.safetensors"
    artefact.save(path)
    with safe_open(path, framework="numpy") as opened:
        header = json.loads(opened.metadata()["header"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def refused(message, header=header, tensors=tensors):
        save_file(tensors, path, metadata={"header": json.dumps(header)})
        with pytest.raises(SalienceFileError, match=message):
            load_salience(path)

    refused("version 2, expected", {**header, "version": 2})
    refused(r"missing \['data_hash'\]", {key: value for key, value in header.items() if key != "data_hash"})
    refused(r"unknown \['extra'\]", {**header, "extra": 1})
    refused(r"missing \['weights/maths'\]", tensors={k: v for k, v in tensors.items() if k != "weights/maths"})
    refused(r"unknown \['more'\]", tensors={**tensors, "more": tensors["token_ids"]})
    refused("one per token id", tensors={**tensors, "weights/code": tensors["weights/code"][:-1].copy()})
    refused("expected float16 or float32", tensors={**tensors, "weights/code": np.zeros(NUM_TOKENS)})
    refused("finite weights", tensors={**tensors, "weights/code": np.full(NUM_TOKENS, np.nan, dtype=np.float16)})
    refused("ascending", tensors={**tensors, "token_ids": tensors["token_ids"][::-1].copy()})
    without_k = {key: value for key, value in header["capabilities"]["code"].items() if key != "k"}
    refused(r"'code': missing \['k'\]", {**header, "capabilities": {**header["capabilities"], "code": without_k}})
    path.write_bytes(b"no such thing")
    with pytest.raises(SalienceFileError, match="damaged"):
        load_salience(path)
    with pytest.raises(FileNotFoundError):
        load_salience(tmp_path / "none")
