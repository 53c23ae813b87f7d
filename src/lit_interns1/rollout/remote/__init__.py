"""Engines on the other side of HTTP: SGLang, vLLM and LMDeploy servers."""

from lit_interns1.rollout.remote.remote_engine import RemoteEngine

__all__ = ["RemoteEngine"]
