"""The layouts: one table each. A layout is what `model_type` in config.json names.

    layout = text ∪ vision ∪ projector ∪ time series        what a model does not have of these lies elsewhere

Decoders differ in prefixes and in how experts are stored, encoders in their names. Whole models of ours have the
decoder under `language_model.`, a language model alone has no prefix. Adding a layout is adding an entry to `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

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
_VALUE_HEADS = ("score.weight", "v_head.weight")
"""Of a reward model: as transformers' classes for sequence classification name it, and as InternLM's reward models."""
_MIXTRAL = _LAYER + "block_sparse_moe."
_MIXTRAL_EXPERTS = tuple(
    (_EXPERTS + ours, Spelling(tuple(f"{_MIXTRAL}experts.{{expert}}.{key}.weight" for key in theirs)))
    for ours, theirs in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))
)


@dataclass(frozen=True)
class Prefixes:
    """What stands before the names of the decoder's body and of its head."""

    body: str
    head: str = ""


@dataclass(frozen=True)
class Part:
    """A module of a whole model.

    Attributes:
        ours: What the names of its tensors start with in our models.
        rules: The table, with names as they are in our models; for the text without the prefix.
        theirs: What its keys in files may start with.
    """

    ours: str
    rules: tuple[Rule, ...]
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """One way to name tensors.

    Attributes:
        name: `model_type` of config.json.
        architecture: Class of the whole model, as `architectures` of config.json names it.
        text: The language model.
        encoders: What lies beside it.
        text_types: What may stand as `model_type` of the text part; empty: config.json describes nothing but text.
        text_key: Where config.json keeps the text part, if it has more.
        computed: Buffers that models compute and files may hold, as patterns with `*`.
    """

    name: str
    architecture: str
    text: Part
    encoders: tuple[Part, ...] = ()
    text_types: tuple[str, ...] = ()
    text_key: str = "text_config"
    computed: tuple[str, ...] = ("*.rotary_emb.inv_freq",)

    def part_of(self, name: str) -> Part:
        """The part to which a tensor of ours belongs."""
        return next((part for part in self.encoders if name.startswith(part.ours)), self.text)

    def spellings(self, name: str) -> tuple[Spelling, ...]:
        """How files may spell one tensor of ours, the usual way first; empty: they have none."""
        part = self.part_of(name)
        known = name.removeprefix(part.ours) if part is self.text else name
        return next((found for rule in part.rules if (found := rule.spellings(known)) is not None), ())

    def elsewhere(self, key: str, parts: Collection[str]) -> str | None:
        """Whether a key of files has no place in a model: the pattern that says so, else None.

        Args:
            key: The key, which fills no tensor of the model.
            parts: `ours` of the parts that the model has.
        """
        computed = next((pattern for pattern in self.computed if fnmatchcase(key, pattern)), None)
        owners = [(prefix, part.ours) for part in (self.text, *self.encoders) for prefix in part.theirs]
        found = max((owner for owner in owners if key.startswith(owner[0])), key=lambda o: len(o[0]), default=None)
        if computed is not None or found is None or found[1] in parts:
            return computed
        return f"{found[0]}*"


def _decoder(
    prefixes: tuple[Prefixes, ...],
    experts: tuple[tuple[tuple[str, Spelling], ...], ...] = (),
    more: tuple[str, ...] = (),
    router: str = _LAYER + "mlp.gate.weight",
) -> Part:
    """A decoder whose files may have any of the prefixes; the first is how it is written."""

    def spelled(spelling: Spelling) -> tuple[Spelling, ...]:
        return tuple(Spelling(tuple(p.body + key for key in spelling.keys), spelling.transposed) for p in prefixes)

    rules = [Rule(name, spelled(Spelling((name,)))) for name in (*_SAME, *more)]
    rules.append(Rule("lm_head.weight", tuple(Spelling((p.head + "lm_head.weight",)) for p in prefixes)))
    if experts:
        rules.append(Rule(_LAYER + "mlp.router.weight", spelled(Spelling((router,)))))
        stacks: dict[str, tuple[Spelling, ...]] = {}
        for form in experts:
            for name, spelling in form:
                stacks[name] = stacks.get(name, ()) + spelled(spelling)
        rules += [Rule(name, spellings) for name, spellings in stacks.items()]
    rules.append(Rule("value_head.weight", tuple(Spelling((p.head + key,)) for p in prefixes for key in _VALUE_HEADS)))
    keys = tuple(prefix for p in prefixes for prefix in (p.body, p.head + "lm_head."))
    return Part("language_model.", tuple(rules), keys)


def _encoder(
    ours: str,
    theirs: tuple[str, ...],
    tensors: Mapping[str, str] | None = None,
    modules: Mapping[str, str | tuple[str, ...]] | None = None,
) -> Part:
    """An encoder whose files may have any of the prefixes.

    Args:
        ours: Our prefix.
        theirs: Prefixes in files.
        tensors: Keys by our names, both behind the prefixes.
        modules: The same for modules with a weight and perhaps a bias; of several keys each has some rows of ours.
    """
    keys: dict[str, tuple[str, ...]] = {name: (key,) for name, key in (tensors or {}).items()}
    for name, key in (modules or {}).items():
        for kind in (".weight", ".bias"):
            keys[name + kind] = tuple(one + kind for one in ((key,) if isinstance(key, str) else key))
    rules = [
        Rule(ours + name, tuple(Spelling(tuple(prefix + key for key in group)) for prefix in theirs))
        for name, group in keys.items()
    ]
    return Part(ours, tuple(rules), theirs)


_PLAIN = (Prefixes("model."),)
_NESTED = (Prefixes("model.language_model."),)
_LEGACY = (Prefixes("language_model.model.", "language_model."),)
_FOPE = ("rotary_emb.sin_coef", "rotary_emb.cos_coef")

_BLOCK = "encoder.layer.{layer}."
_INTERN_VIT_TENSORS = {
    "class_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    _LAYER + "layer_scale1": _BLOCK + "lambda_1",
    _LAYER + "layer_scale2": _BLOCK + "lambda_2",
}
_INTERN_VIT_MODULES: dict[str, str | tuple[str, ...]] = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    _LAYER + "norm1": _BLOCK + "layernorm_before",
    _LAYER + "norm2": _BLOCK + "layernorm_after",
    _LAYER + "attention.qkv": tuple(_BLOCK + f"attention.{name}_proj" for name in "qkv"),
    _LAYER + "attention.q_norm": _BLOCK + "attention.q_norm",
    _LAYER + "attention.k_norm": _BLOCK + "attention.k_norm",
    _LAYER + "attention.o_proj": _BLOCK + "attention.projection_layer",
    _LAYER + "mlp.fc1": _BLOCK + "mlp.fc1",
    _LAYER + "mlp.fc2": _BLOCK + "mlp.fc2",
}
"""InternViT, as transformers and Intern-S1 name it."""

_CHAT_BLOCK = "encoder.layers.{layer}."
_CHAT_VIT_TENSORS = {
    "class_token": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding",
    _LAYER + "layer_scale1": _CHAT_BLOCK + "ls1",
    _LAYER + "layer_scale2": _CHAT_BLOCK + "ls2",
}
_CHAT_VIT_MODULES = {
    "patch_embedding": "embeddings.patch_embedding",
    _LAYER + "norm1": _CHAT_BLOCK + "norm1",
    _LAYER + "norm2": _CHAT_BLOCK + "norm2",
    _LAYER + "attention.qkv": _CHAT_BLOCK + "attn.qkv",
    _LAYER + "attention.q_norm": _CHAT_BLOCK + "attn.q_norm",
    _LAYER + "attention.k_norm": _CHAT_BLOCK + "attn.k_norm",
    _LAYER + "attention.o_proj": _CHAT_BLOCK + "attn.proj",
    _LAYER + "mlp.fc1": _CHAT_BLOCK + "mlp.fc1",
    _LAYER + "mlp.fc2": _CHAT_BLOCK + "mlp.fc2",
}
"""The same encoder in OpenGVLab's own files."""

_NATIVE_BLOCK = "blocks.{layer}."
_NATIVE_VIT_MODULES = {
    "patch_embedding": "patch_embed.proj",
    "position_embedding": "pos_embed",
    _LAYER + "norm1": _NATIVE_BLOCK + "norm1",
    _LAYER + "norm2": _NATIVE_BLOCK + "norm2",
    _LAYER + "attention.qkv": _NATIVE_BLOCK + "attn.qkv",
    _LAYER + "attention.o_proj": _NATIVE_BLOCK + "attn.proj",
    _LAYER + "mlp.fc1": _NATIVE_BLOCK + "mlp.linear_fc1",
    _LAYER + "mlp.fc2": _NATIVE_BLOCK + "mlp.linear_fc2",
}
"""The encoder of native resolutions of Intern-S1-Pro and Qwen3-VL."""


def _intern_encoders(*prefixes: str) -> tuple[Part, Part]:
    projector = {"norm": "layer_norm", "fc1": "linear_1", "fc2": "linear_2"}
    tower = tuple(prefix + "vision_tower." for prefix in prefixes)
    return (
        _encoder("vision.", tower, _INTERN_VIT_TENSORS, _INTERN_VIT_MODULES),
        _encoder("projector.", tuple(prefix + "multi_modal_projector." for prefix in prefixes), modules=projector),
    )


_CHAT_ENCODERS = (
    _encoder("vision.", ("vision_model.",), _CHAT_VIT_TENSORS, _CHAT_VIT_MODULES),
    _encoder("projector.", ("mlp1.",), modules={"norm": "0", "fc1": "1", "fc2": "3"}),
)
_NATIVE_ENCODERS = (
    _encoder("vision.", ("model.visual.",), modules=_NATIVE_VIT_MODULES),
    _encoder(
        "projector.",
        ("model.visual.merger.",),
        modules={"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"},
    ),
)
_TIME_SERIES = _encoder("time_series.", ("model.time_series.", "time_series."), {"{name}": "{name}"})
"""Our names are those of the files."""

_FREQUENCIES, _SINUSOIDS = "*.rotary_emb.inv_freq", "*.encoder_embed.pos_encoder.pe"

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("llama", "LlamaForCausalLM", _decoder(_PLAIN)),
        Layout("qwen3", "Qwen3ForCausalLM", _decoder(_PLAIN)),
        Layout("qwen3_moe", "Qwen3MoeForCausalLM", _decoder(_PLAIN, _SPARSE)),
        Layout(
            "mixtral",
            "MixtralForCausalLM",
            _decoder(_PLAIN, (_MIXTRAL_EXPERTS,), router=_MIXTRAL + "gate.weight"),
        ),
        Layout(
            "interns1",
            "InternS1ForConditionalGeneration",
            _decoder(_NESTED, _SPARSE),
            (*_intern_encoders("model.", ""), _TIME_SERIES),
            ("qwen3", "qwen3_moe"),
            computed=(_FREQUENCIES, _SINUSOIDS),
        ),
        Layout(
            # written with the prefixes of transformers 4
            "internvl",
            "InternVLForConditionalGeneration",
            _decoder((*_LEGACY, *_NESTED), _SPARSE),
            _intern_encoders("", "model."),
            ("llama", "qwen3", "qwen3_moe"),
        ),
        Layout(
            "internvl_chat",
            "InternVLChatModel",
            _decoder(_LEGACY, _SPARSE),
            _CHAT_ENCODERS,
            ("llama", "qwen3", "qwen3_moe"),
            "llm_config",
        ),
        Layout(
            "interns1_pro",
            "InternS1ProForConditionalGeneration",
            _decoder(_NESTED, _SPARSE, _FOPE),
            (*_NATIVE_ENCODERS, _TIME_SERIES),
            ("interns1_pro_text",),
            computed=(_FREQUENCIES, _SINUSOIDS),
        ),
        Layout(
            # published files hold stacks of x W matrices, transformers 5 writes stacks of W x
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
            _decoder(_NESTED, (_STACKED_TRANSPOSED, _STACKED)),
            _NATIVE_ENCODERS,
            ("qwen3_vl_moe_text",),
        ),
    )
}
"""Layouts by `model_type`."""
