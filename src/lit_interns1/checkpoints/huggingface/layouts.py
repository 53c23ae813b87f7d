"""The layouts: one table each. A layout is what `model_type` in config.json names.

Text parts of decoders differ in prefixes and in how experts are stored; beside them lie encoders, which a language
model leaves alone. Adding a layout is adding an entry to `LAYOUTS`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_interns1.checkpoints.huggingface.rules import Rule, Spelling

_LAYER = "layers.{layer}."
_SAME = (
    "embed_tokens.weight",
    "norm.weight",
    *(
        _LAYER + name
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        )
    ),
)
"""Tensors with the same name in every layout, after its prefix."""

_EXPERTS = _LAYER + "mlp.experts."
_PER_EXPERT = tuple(
    (_EXPERTS + ours, Spelling(tuple(_EXPERTS + key for key in theirs)))
    for ours, theirs in (
        ("gate_up_proj", ("{expert}.gate_proj.weight", "{expert}.up_proj.weight")),
        ("down_proj", ("{expert}.down_proj.weight",)),
    )
)
_STACKED, _STACKED_TRANSPOSED = (
    tuple((name, Spelling((name,), transposed)) for name in (_EXPERTS + "gate_up_proj", _EXPERTS + "down_proj"))
    for transposed in (False, True)
)
_SPARSE = (_PER_EXPERT, _STACKED)
"""As published, and as transformers 5 holds it in memory."""


@dataclass(frozen=True)
class Prefixes:
    """What stands before the names of the decoder's body and of its head."""

    body: str
    head: str = ""


@dataclass(frozen=True)
class Layout:
    """One way to name tensors.

    Attributes:
        name: `model_type` of config.json.
        architecture: Class of the whole model, as `architectures` of config.json names it.
        rules: The table.
        text_types: What may stand as `model_type` of the text part; empty: config.json describes nothing but text.
        text_key: Where config.json keeps the text part, if it has more.
        elsewhere: Tensors of these files that are no part of a language model, as patterns with `*`: other modules, and
            buffers that are computed.
    """

    name: str
    architecture: str
    rules: tuple[Rule, ...]
    text_types: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    text_key: str = "text_config"


def _decoder(
    prefixes: tuple[Prefixes, ...],
    experts: tuple[tuple[tuple[str, Spelling], ...], ...] = (),
    more: tuple[str, ...] = (),
) -> tuple[Rule, ...]:
    """Rules of a decoder whose files may have any of the prefixes; the first is how it is written."""

    def spelled(spelling: Spelling) -> tuple[Spelling, ...]:
        return tuple(Spelling(tuple(p.body + key for key in spelling.keys), spelling.transposed) for p in prefixes)

    rules = [Rule(name, spelled(Spelling((name,)))) for name in (*_SAME, *more)]
    rules.append(Rule("lm_head.weight", tuple(Spelling((p.head + "lm_head.weight",)) for p in prefixes)))
    if experts:
        rules.append(Rule(_LAYER + "mlp.router.weight", spelled(Spelling((_LAYER + "mlp.gate.weight",)))))
        stacks: dict[str, tuple[Spelling, ...]] = {}
        for form in experts:
            for name, spelling in form:
                stacks[name] = stacks.get(name, ()) + spelled(spelling)
        rules += [Rule(name, spellings) for name, spellings in stacks.items()]
    return tuple(rules)


_PLAIN = (Prefixes("model."),)
_NESTED = (Prefixes("model.language_model."),)
_LEGACY = (Prefixes("language_model.model.", "language_model."), *_NESTED)
_FOPE = ("rotary_emb.sin_coef", "rotary_emb.cos_coef")
_FREQUENCIES = ("*.rotary_emb.inv_freq",)
_INTERN_ENCODERS = (
    "model.vision_tower.*", "model.multi_modal_projector.*", "vision_tower.*", "multi_modal_projector.*",
    "model.time_series.*", "time_series.*",
)  # fmt: skip
_NATIVE_ENCODERS = ("model.visual.*", "model.time_series.*", "time_series.*")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("llama", "LlamaForCausalLM", _decoder(_PLAIN), elsewhere=_FREQUENCIES),
        Layout("qwen3", "Qwen3ForCausalLM", _decoder(_PLAIN), elsewhere=_FREQUENCIES),
        Layout("qwen3_moe", "Qwen3MoeForCausalLM", _decoder(_PLAIN, _SPARSE), elsewhere=_FREQUENCIES),
        Layout(
            "interns1",
            "InternS1ForConditionalGeneration",
            _decoder(_NESTED, _SPARSE),
            ("qwen3", "qwen3_moe"),
            (*_INTERN_ENCODERS, *_FREQUENCIES),
        ),
        Layout(
            "internvl",
            "InternVLForConditionalGeneration",
            _decoder(_LEGACY, _SPARSE),
            ("llama", "qwen3", "qwen3_moe"),
            (*_INTERN_ENCODERS, *_FREQUENCIES),
        ),
        Layout(
            "interns1_pro",
            "InternS1ProForConditionalGeneration",
            _decoder(_NESTED, _SPARSE, _FOPE),
            ("interns1_pro_text",),
            (*_NATIVE_ENCODERS, *_FREQUENCIES),
        ),
        Layout(
            # published files hold stacks of x W matrices, transformers 5 writes stacks of W x
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
            _decoder(_NESTED, (_STACKED_TRANSPOSED, _STACKED)),
            ("qwen3_vl_moe_text",),
            (*_NATIVE_ENCODERS, *_FREQUENCIES),
        ),
    )
}
"""Layouts by `model_type`."""
