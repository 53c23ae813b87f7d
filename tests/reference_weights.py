"""Reads weights under Hugging Face names into our model, tensor by tensor, for the parity tests."""

import re

import torch


def load_reference_weights(model, state: dict[str, torch.Tensor], prefix: str = "model.") -> None:
    """Copies a Qwen3, Qwen3-MoE or Intern-S1-Pro text state dict; every tensor of ours must be filled exactly once."""
    ours = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n.endswith("_coef")}}
    filled: dict[str, int] = {}

    def put(name: str, value: torch.Tensor, window=...) -> None:
        with torch.no_grad():
            target = ours[name][window]
            assert target.shape == value.shape, (name, target.shape, value.shape)
            target.copy_(value)
        filled[name] = filled.get(name, 0) + value.numel()

    for key, value in state.items():
        if not key.startswith(("lm_head.", prefix)):
            continue
        name = key.removeprefix(prefix)
        name = name.replace("mlp.gate.weight", "mlp.router.weight")
        expert = re.match(r"(layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if expert:
            stack, index, kind = expert[1], int(expert[2]), expert[3]
            half = value.shape[0]
            if kind == "down":
                put(f"{stack}.down_proj", value, index)
            else:
                put(f"{stack}.gate_up_proj", value, (index, slice(0, half) if kind == "gate" else slice(half, None)))
        elif name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        else:
            put(name, value)
    assert filled == {name: tensor.numel() for name, tensor in ours.items()}, set(ours) ^ set(filled)


def reference_gradients(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the gradients of a transformers model to our names."""
    return {
        name.removeprefix("model.").replace("mlp.gate.weight", "mlp.router.weight"): gradient
        for name, gradient in gradients.items()
    }
