"""Salience weights on disk: one safetensors file, weights and token ids as tensors, all else in a JSON header.

    weights/<capability>   (T,) float16 or float32, times `weight_scale`, so that float16 does not underflow
    token_ids              (T,) int64, ascending: number of the token that each weight belongs to
    header                 version, tokenizer_hash, data_hash; per capability k, c_0, y_lo, y_hi, rho, errors, metrics

Losses of other tokens or another tokenizer mean something else: `check` refuses them before anything is computed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lit_interns1.laws.salience import CapabilitySalience
from lit_interns1.laws.salience_scores import ScoreMetrics

FORMAT = "lit-interns1 capability salience"
VERSION = 1
_LARGEST = 1024.0
"""Largest stored weight: float16 keeps eleven bits down to 6e-5, seven decades below."""
_NUMBERS = ("k", "c_0", "y_lo", "y_hi", "rho", "logit_std")
_METRICS = ("fit_metrics", "held_out_metrics")


class SalienceFileError(ValueError):
    """A file that is no salience file, is damaged, or belongs to other data."""


@dataclass(frozen=True)
class SalienceFile:
    """Capabilities of one validation set.

    Attributes:
        tokenizer_hash: Fingerprint of the tokenizer.
        data_hash: Fingerprint of the validation tokens.
        token_ids_T: (T,) int64, ascending: number of each weighted token in the validation stream.
        capabilities: By name; all with T weights.
    """

    tokenizer_hash: str
    data_hash: str
    token_ids_T: NDArray[np.int64]
    capabilities: dict[str, CapabilitySalience]

    def __post_init__(self) -> None:
        ids_T = self.token_ids_T
        if ids_T.ndim != 1 or ids_T.dtype != np.int64 or not ids_T.size or (np.diff(ids_T, prepend=-1) <= 0).any():
            raise SalienceFileError(f"token_ids must be ascending int64 ≥ 0, got {ids_T.dtype} {ids_T.shape}")
        if not self.capabilities:
            raise SalienceFileError("a salience file needs one capability at least")
        for name, salience in self.capabilities.items():
            if not name or "/" in name:
                raise SalienceFileError(
                    f"capability name {name!r} must not be empty or hold a '/': it names logged keys"
                )
            if salience.weights_T.shape != ids_T.shape or not np.isfinite(salience.weights_T).all():
                raise SalienceFileError(
                    f"capability {name!r} needs {ids_T.size} finite weights, one per token id, "
                    f"got {salience.weights_T.shape}"
                )

    def check(self, tokenizer_hash: str, data_hash: str) -> None:
        """Refuses another tokenizer or other validation tokens.

        Raises:
            SalienceFileError: Naming both hashes.
        """
        for what, stored, given in (
            ("tokenizer", self.tokenizer_hash, tokenizer_hash),
            ("validation data", self.data_hash, data_hash),
        ):
            if stored != given:
                raise SalienceFileError(f"the weights belong to {what} {stored}, this run has {given}: fit them anew")

    def save(self, path: str | Path, dtype: Literal["float16", "float32"] = "float16") -> None:
        """Writes the file, beside its place first, so that no half of one is ever there.

        Args:
            path: File to write.
            dtype: Precision of the weights.
        """
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype={dtype!r} must be float16 or float32")
        tensors: dict[str, NDArray[Any]] = {"token_ids": np.ascontiguousarray(self.token_ids_T)}
        described = {}
        for name, salience in self.capabilities.items():
            largest = float(np.abs(salience.weights_T).max())
            scale = _LARGEST / largest if largest > 0 else 1.0
            tensors[f"weights/{name}"] = (salience.weights_T * scale).astype(dtype)
            described[name] = {
                "weight_scale": scale,
                "logit_covariance": salience.logit_covariance_22.tolist(),
                **{key: getattr(salience, key) for key in _NUMBERS},
                **{key: asdict(getattr(salience, key)) for key in _METRICS},
            }
        header = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer_hash": self.tokenizer_hash,
            "data_hash": self.data_hash,
            "capabilities": described,
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata={"header": json.dumps(header)})
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def load_salience(path: str | Path) -> SalienceFile:
    """Reads and checks a salience file.

    Raises:
        FileNotFoundError: If there is none.
        SalienceFileError: If it is no salience file, of another version, or anything in it is missing, unknown or of
            the wrong type or shape.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no salience file at {file}")
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SalienceFileError(f"{file} is damaged or no safetensors file: {error}") from None
    try:
        header = json.loads(metadata["header"])
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise SalienceFileError(
                f"{file} is {header['format']!r} version {header['version']}, expected {FORMAT!r} version {VERSION}"
            )
        _exactly(header, {"format", "version", "tokenizer_hash", "data_hash", "capabilities"}, "header")
        expected = {"token_ids", *(f"weights/{name}" for name in header["capabilities"])}
        _exactly(tensors, expected, "tensors")
        described = header["capabilities"]
        capabilities = {name: _capability(name, described[name], tensors[f"weights/{name}"]) for name in described}
        return SalienceFile(str(header["tokenizer_hash"]), str(header["data_hash"]), tensors["token_ids"], capabilities)
    except SalienceFileError as error:
        raise SalienceFileError(f"{file}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise SalienceFileError(f"{file} is no salience file: {error!r}") from None


def _capability(name: str, values: dict[str, Any], stored_T: NDArray[Any]) -> CapabilitySalience:
    _exactly(values, {"weight_scale", "logit_covariance", *_NUMBERS, *_METRICS}, f"capability {name!r}")
    if stored_T.dtype not in (np.float16, np.float32):
        raise SalienceFileError(f"weights of {name!r} are {stored_T.dtype}, expected float16 or float32")
    numbers = {key: float(values[key]) for key in ("weight_scale", *_NUMBERS)}
    covariance = np.array(values["logit_covariance"], dtype=np.float64)
    if not np.isfinite([*numbers.values(), *covariance.flat]).all() or covariance.shape != (2, 2):
        raise SalienceFileError(f"capability {name!r} has numbers that are not finite: {numbers}")
    return CapabilitySalience(
        weights_T=stored_T.astype(np.float64) / numbers["weight_scale"],
        k=numbers["k"],
        c_0=numbers["c_0"],
        y_lo=numbers["y_lo"],
        y_hi=numbers["y_hi"],
        rho=numbers["rho"],
        logit_covariance_22=covariance,
        logit_std=numbers["logit_std"],
        fit_metrics=ScoreMetrics(**values["fit_metrics"]),
        held_out_metrics=ScoreMetrics(**values["held_out_metrics"]),
    )


def _exactly(found: dict[str, Any], expected: set[str], where: str) -> None:
    missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing or unknown:
        raise SalienceFileError(f"{where}: missing {missing}, unknown {unknown}")
