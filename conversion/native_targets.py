"""Native mixtures of Transformers that can hold a mixture of ours exactly: one table, read in both directions.

To add a target: one row in `TARGETS`; the tests run every row. Names of tensors are those of the live modules without
the layer's prefix (`model.layers.N.`); the host's own `save_pretrained` and `from_pretrained` translate them to and
from what its files hold. Source of the pairs: the host's modelling code; each is proven by equal logits in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Rows(NamedTuple):
    """Tensors of one layer that are the same rows on both sides: `ours` under each other are `native` under each other.

    Attributes:
        ours, native: names; one each is a renaming, several are fused on one side or reordered.
        heads: field with the number of heads, when the rows of each head are interleaved pairs in ours (0 and 1 are
            rotated together) and halves in the native model (0 and half of the head's width are).
    """

    ours: tuple[str, ...]
    native: tuple[str, ...]
    heads: str = ""


class Condition(NamedTuple):
    """What must hold of a config, in words that complete "<target> needs ..."."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Family:
    """A dense family that a target can hold.

    Attributes:
        name: its `dense_model_type`.
        dense: fields of the dense config with the value that they must have; a function gets the config at hand.
        native: fields of the native config with the value that this family needs; a function gets the dense config.
        unread: fields of either config that evaluation does not read, given the rest of this row.
        rows: tensors outside of the sparse block that are named or laid out differently.
        zeros: native tensors that the family has no counterpart of, and that compute nothing when they are zero.
        conditions: of the dense config.
    """

    name: str
    dense: Mapping[str, Any] = field(default_factory=dict)
    native: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    rows: tuple[Rows, ...] = ()
    zeros: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()


class DenseLayers(NamedTuple):
    """How a native config says which layers are dense.

    Attributes:
        words: which sets of dense layers it can say.
        fields: from the indices of the sparse layers and the number of layers to the native fields, or None.
        sparse: from the native config to the indices of the sparse layers.
    """

    words: str
    fields: Callable[[Sequence[int], int], dict[str, Any] | None]
    sparse: Callable[[Any], list[int]]


class SharedExperts(NamedTuple):
    """The experts that every token passes, as a native config and block hold them.

    Attributes:
        field: native field of their number or width; "" where there always is one, as wide as the others.
        counts: whether the field is their number; a width in neurons otherwise.
        gated: whether their output is scaled by a learnt sigmoid.
        optional: whether there may be none. Where there must be some, one of zeros is written, and left out again when
            it is read.
        rows: their tensors.
    """

    field: str
    counts: bool
    gated: bool
    optional: bool
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class NativeTarget:
    """A native mixture; one row of `TARGETS`.

    Attributes:
        name: its `model_type`.
        router_type: the router that computes what its router does.
        fields: native field of each of our fields that it can be told.
        ours: values of our fields that it has built in.
        native: fields with the value that they must have.
        written: fields that are written with this value; what must hold where they are read is in `conditions`.
        engine: fields that Transformers does not read, or reads in another form as well, and serving engines do, as the
            architecture's published checkpoints have them; a function gets our config, and None is not written.
        width, dense_width: native fields of the experts' and of the dense layers' width.
        rows: tensors of the sparse block that are named differently.
        zeros: tensors of the router without a counterpart; zero means that they change nothing.
        layers: how it says which layers are dense; None when all are sparse.
        shared: how it holds shared experts; None when it has none.
        extra: fields of the dense config that it reads without declaring them.
        conditions: of the native config, when it is read.
        served: what must hold of the native config, or llama.cpp computes other logits without a word; told when it is
            written. Measured by `python -m benchmarks.serving`.
        families: the dense families that it holds; a native checkpoint becomes the first one that fits, and a mixture
            is written by the first row of its family.
    """

    name: str
    router_type: str
    fields: Mapping[str, str]
    families: tuple[Family, ...]
    ours: Mapping[str, Any] = field(default_factory=dict)
    native: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    rows: tuple[Rows, ...] = ()
    zeros: tuple[str, ...] = ()
    layers: DenseLayers | None = None
    shared: SharedExperts | None = None
    extra: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()
    served: tuple[Condition, ...] = ()

    @property
    def family_names(self) -> tuple[str, ...]:
        """The names of its families, each once."""
        return tuple(dict.fromkeys(family.name for family in self.families))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _own_head_dim(config: Any) -> int | None:
    """The width of heads as a config states it, and what it is where the config has no such field."""
    return getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> Mapping[str, Any]:
    return config.rope_parameters or {}


_PLAIN_HEADS = Condition(
    "head_dim to be hidden_size / num_attention_heads",
    lambda config: _head_dim(config) * config.num_attention_heads == config.hidden_size,
)
_NO_WINDOW = Condition(
    "attention over all tokens in every layer (no sliding window)",
    lambda config: (
        set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (hasattr(config, "layer_types") or getattr(config, "sliding_window", None) is None)
    ),
)
_WHOLE_ROPE = Condition(
    "rotary embeddings over the whole head (partial_rotary_factor=1)",
    lambda config: _rope(config).get("partial_rotary_factor", 1.0) == 1.0,
)
_PLAIN_ROPE = Condition(
    "rope_type 'default', for others are read from fields that it lacks",
    lambda config: _rope(config).get("rope_type", "default") == "default",
)


def _one_rename(ours: str, native: str) -> Rows:
    return Rows((ours,), (native,))


def _projections(ours: str, native: str) -> tuple[Rows, ...]:
    """Gate, up and down projections of an FFN that is named differently."""
    return tuple(_one_rename(f"{ours}.{p}_proj.weight", f"{native}.{p}_proj.weight") for p in ("gate", "up", "down"))


_FUSED = (
    Rows(
        ("self_attn.qkv_proj.weight",),
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    Rows(("mlp.gate_up_proj.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
)
_INTERLEAVED = (
    Rows(("self_attn.q_proj.weight",), ("self_attn.q_proj.weight",), heads="num_attention_heads"),
    Rows(("self_attn.k_proj.weight",), ("self_attn.k_proj.weight",), heads="num_key_value_heads"),
)
_QKV_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")


def _llama_like(
    dense: Mapping[str, Any], *, windows: bool = False, head_dim: bool = True, **given: Any
) -> tuple[Family, ...]:
    """Families whose layers are Llama's but for names and layouts: no biases, one norm before each half.

    Args:
        dense: fields that those of them that have them must have.
        windows: whether the target has a sliding window in all layers.
        head_dim: whether the target takes any width of heads.
        given: the same field of every family.
    """
    heads: tuple[Condition, ...] = () if head_dim else (_PLAIN_HEADS,)
    widths: dict[str, Any] = {} if head_dim else {"head_dim": _own_head_dim}
    unread = given.pop("unread", ())
    window = {} if windows else {"sliding_window": None}
    phi3 = ("resid_pdrop", "embd_pdrop", "original_max_position_embeddings")
    no_biases = {"mlp_bias": False, "attention_bias": False}
    return (
        Family("mistral", {**window, **widths}, unread=unread, conditions=heads, **given),
        Family(
            "llama",
            {"mlp_bias": False, **dense, **widths},
            unread=("pretraining_tp", *unread),
            conditions=heads,
            **given,
        ),
        Family(
            "phi3",
            window,
            unread=(*phi3, *unread),
            rows=_FUSED,
            conditions=(_WHOLE_ROPE, _PLAIN_ROPE, *heads),
            **given,
        ),
        Family("helium", {**no_biases, **widths}, unread=unread, rows=_INTERLEAVED, conditions=heads, **given),
        Family("ernie4_5", {"use_bias": False, **widths}, unread=unread, rows=_INTERLEAVED, conditions=heads, **given),
    )


def _named_layers(sparse: Sequence[int], num_layers: int) -> dict[str, Any]:
    return {"mlp_only_layers": [i for i in range(num_layers) if i not in sparse], "decoder_sparse_step": 1}


def _first_layers(sparse: Sequence[int], num_layers: int) -> dict[str, Any] | None:
    first = num_layers - len(sparse)
    return {"first_k_dense_replace": first} if list(sparse) == list(range(first, num_layers)) else None


def _leading_dense_layers(config: Any) -> int | None:
    """How many dense layers come before the sparse ones, if all of them do."""
    fields = _first_layers(config.sparse_layer_indices, config.num_hidden_layers)
    return fields["first_k_dense_replace"] if fields else None


def _in_every_layer(value: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """A function of the config as a list with one entry per layer."""
    return lambda config: [value(config)] * config.num_hidden_layers


def _typed_layers(sparse: Sequence[int], num_layers: int) -> dict[str, Any]:
    return {"mlp_layer_types": ["sparse" if i in sparse else "dense" for i in range(num_layers)]}


def _every_few_layers(sparse: Sequence[int], num_layers: int) -> dict[str, Any] | None:
    for step in range(1, num_layers + 1):
        start, end = min(sparse), max(sparse)
        if list(sparse) == [i for i in range(start, end + 1) if (i + 1) % step == 0]:
            return {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": step}
    return None


_BY_LIST = DenseLayers(
    "any",
    _named_layers,
    lambda config: [
        i
        for i in range(config.num_hidden_layers)
        if i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
    ],
)
_BY_FIRST = DenseLayers(
    "the first few",
    _first_layers,
    lambda config: list(range(config.first_k_dense_replace, config.num_hidden_layers)),
)
_BY_TYPE = DenseLayers(
    "any", _typed_layers, lambda config: [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
)
_BY_STEP = DenseLayers(
    "all but layers k, 2k, 3k, ... of a range",
    _every_few_layers,
    lambda config: [
        i
        for i in range(config.moe_layer_start_index, config.moe_layer_end_index + 1)
        if (i + 1) % config.moe_layer_interval == 0
    ],
)

_CHOICES = {"num_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok"}
_LOCAL = {**_CHOICES, "num_experts": "num_local_experts"}
_SIGMOID = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
}
_NORMALISED = {"norm_topk_prob": True}
# Without the first, engines take a softmax; without the second, some leave the selection bias out.
_SIGMOID_SCORES = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_SHARED_COUNTED = SharedExperts("n_shared_experts", counts=True, gated=False, optional=False, rows=())
_SHARED_QWEN = SharedExperts(
    "shared_expert_intermediate_size",
    counts=False,
    gated=True,
    optional=False,
    rows=_projections("mlp.shared_experts", "mlp.shared_expert"),
)
_SHARED_GRANITE = SharedExperts(
    "shared_intermediate_size",
    counts=False,
    gated=False,
    optional=True,
    rows=(
        Rows(
            ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
            ("shared_mlp.input_linear.weight",),
        ),
        _one_rename("mlp.shared_experts.down_proj.weight", "shared_mlp.output_linear.weight"),
    ),
)
_GRANITE_BLOCK = (
    _one_rename("mlp.gate.weight", "block_sparse_moe.router.weight"),
    _one_rename("mlp.experts.gate_up_proj", "block_sparse_moe.experts.gate_up_proj"),
    _one_rename("mlp.experts.down_proj", "block_sparse_moe.experts.down_proj"),
)
_NO_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": lambda config: _head_dim(config) ** -0.5,
}
_QWEN2 = {"use_sliding_window": False}
_WINDOW_FIELDS = ("sliding_window", "max_window_layers", "layer_types")
_WHOLE = {"rope_parameters": lambda config: {**_rope(config), "partial_rotary_factor": 1.0}}
_GRANITE_FAMILIES = (
    Family("granite", {"mlp_bias": False}),
    *_llama_like({}, head_dim=False, native=_NO_MULTIPLIERS),
    Family(
        "qwen2",
        _QWEN2,
        {**_NO_MULTIPLIERS, "attention_bias": True},
        unread=_WINDOW_FIELDS,
        zeros=("self_attn.o_proj.bias",),
        conditions=(_NO_WINDOW,),
    ),
)


def _glm_families(**native: Any) -> tuple[Family, ...]:
    """Families of targets with Llama's layers, biases on query, key and value, and a rotary part of each head."""
    native = {**_WHOLE, **native}
    return (
        *_llama_like({"attention_bias": False}, native={**native, "attention_bias": False}),
        Family("qwen2", _QWEN2, {**native, "attention_bias": True}, unread=_WINDOW_FIELDS, conditions=(_NO_WINDOW,)),
    )


def _no_window(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    return "sliding_attention" not in types if types else getattr(config, "sliding_window", None) is None


_SERVED_WITHOUT_WINDOW = Condition("attention without a sliding window", _no_window)
_SERVED_NORMALISED = Condition("norm_topk_prob=True", lambda config: config.norm_topk_prob)
_SERVED_AS_CHOSEN = Condition("norm_topk_prob=False", lambda config: not config.norm_topk_prob)
_SERVED_UNSCALED = Condition(
    "a rope_type other than 'llama3'", lambda config: (config.rope_parameters or {}).get("rope_type") != "llama3"
)

TARGETS: tuple[NativeTarget, ...] = (
    NativeTarget(
        "mixtral",
        "top_k",
        _LOCAL,
        _llama_like({"attention_bias": False}, windows=True),
        ours=_NORMALISED,
        width="intermediate_size",
        served=(_SERVED_WITHOUT_WINDOW,),
    ),
    NativeTarget(
        "qwen2_moe",
        "top_k",
        {**_CHOICES, "norm_topk_prob": "norm_topk_prob"},
        (
            Family("qwen2", native={"qkv_bias": True}),
            Family(
                "seed_oss",
                {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "head_dim": _own_head_dim},
                {"qkv_bias": True, "use_sliding_window": False},
                unread=("pretraining_tp", "residual_dropout", *_WINDOW_FIELDS),
                conditions=(_PLAIN_HEADS,),
            ),
            Family(
                "ministral",
                {"head_dim": _own_head_dim},
                {"qkv_bias": True, "use_sliding_window": lambda config: config.sliding_window is not None},
                unread=("max_window_layers",),
                zeros=_QKV_BIASES,
                conditions=(_PLAIN_HEADS,),
            ),
            # Serving engines build these biases whatever the config says, so zeros are written.
            *_llama_like(
                {"attention_bias": False},
                head_dim=False,
                native={"qkv_bias": True, "use_sliding_window": False},
                unread=_WINDOW_FIELDS,
                zeros=_QKV_BIASES,
            ),
            # Only read: what is written has a row above.
            Family(
                "llama",
                {"attention_bias": False, "mlp_bias": False, "head_dim": _own_head_dim},
                {"qkv_bias": False, "use_sliding_window": False},
                unread=("pretraining_tp", *_WINDOW_FIELDS),
                conditions=(_PLAIN_HEADS,),
            ),
        ),
        layers=_BY_LIST,
        shared=_SHARED_QWEN,
        served=(_SERVED_AS_CHOSEN, _SERVED_WITHOUT_WINDOW),
    ),
    NativeTarget(
        "qwen3_moe",
        "top_k",
        {**_CHOICES, "norm_topk_prob": "norm_topk_prob"},
        (Family("qwen3", _QWEN2, unread=_WINDOW_FIELDS, conditions=(_NO_WINDOW,)),),
        layers=_BY_LIST,
        extra=("head_dim",),
        served=(_SERVED_NORMALISED,),
    ),
    NativeTarget(
        "qwen3_5_moe_text",
        "top_k",
        _CHOICES,
        (Family("qwen3_5_text"),),
        ours=_NORMALISED,
        dense_width="moe_intermediate_size",
        shared=_SHARED_QWEN,
    ),
    NativeTarget(
        "granitemoe",
        "top_k",
        _LOCAL,
        _GRANITE_FAMILIES,
        ours=_NORMALISED,
        width="intermediate_size",
        rows=_GRANITE_BLOCK,
    ),
    NativeTarget(
        "granitemoeshared",
        "top_k",
        _LOCAL,
        _GRANITE_FAMILIES,
        ours=_NORMALISED,
        width="intermediate_size",
        rows=_GRANITE_BLOCK,
        shared=_SHARED_GRANITE,
    ),
    NativeTarget(
        "granitemoe_swa",
        "top_k",
        _LOCAL,
        (Family("granite_swa", {"mlp_bias": False}),),
        ours=_NORMALISED,
        width="intermediate_size",
        rows=_GRANITE_BLOCK,
        shared=_SHARED_GRANITE,
    ),
    NativeTarget(
        "flex_olmo",
        "top_k",
        {**_CHOICES, "norm_topk_prob": "norm_topk_prob"},
        (
            Family("olmo2"),
            Family(
                "olmo3",
                {"layer_types": lambda config: ["full_attention"] * config.num_hidden_layers},
                unread=("sliding_window",),
            ),
        ),
        width="intermediate_size",
    ),
    NativeTarget(
        "ernie4_5_moe",
        "top_k",
        {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
        (Family("ernie4_5"),),
        ours=_NORMALISED,
        zeros=("mlp.gate.moe_statics.e_score_correction_bias",),
        layers=_BY_STEP,
        shared=SharedExperts("moe_num_shared_experts", counts=True, gated=False, optional=True, rows=()),
        extra=("head_dim",),
    ),
    NativeTarget(
        "cohere2_moe",
        "top_k",
        _CHOICES,
        (Family("cohere2", native={"head_dim": _head_dim}, unread=("sliding_window_pattern",)),),
        ours=_NORMALISED,
        native={"expert_selection_fn": "softmax", "rms_norm_eps": None},
        written={
            "shared_expert_combination_strategy": "sum",
            "rope_theta": lambda config: _rope(config).get("rope_theta", 10000.0),
            # 1 would rotate the positions of dense layers that see all tokens, which the family does not.
            "prefix_dense_sliding_window_pattern": 2,
        },
        width="intermediate_size",
        dense_width="prefix_dense_intermediate_size",
        layers=_BY_TYPE,
        shared=SharedExperts("num_shared_experts", counts=True, gated=False, optional=True, rows=()),
        extra=("rope_parameters",),
        conditions=(
            Condition(
                "shared_expert_combination_strategy to be 'sum' where there are shared experts",
                lambda config: not config.num_shared_experts or config.shared_expert_combination_strategy == "sum",
            ),
            Condition(
                "prefix_dense_sliding_window_pattern other than 1 where dense layers see all tokens",
                lambda config: (
                    config.prefix_dense_sliding_window_pattern != 1
                    or ("dense", "full_attention") not in zip(config.mlp_layer_types, config.layer_types, strict=True)
                ),
            ),
        ),
    ),
    NativeTarget(
        "hunyuan_v1_moe",
        "top_k",
        {**_CHOICES, "num_experts_per_tok": "moe_topk"},
        (Family("hunyuan_v1_dense"),),
        ours=_NORMALISED,
        width="intermediate_size",
        rows=(_one_rename("mlp.gate.weight", "mlp.gate.wg.weight"),),
        shared=SharedExperts(
            "", counts=True, gated=False, optional=False, rows=_projections("mlp.shared_experts", "mlp.shared_mlp")
        ),
        engine={
            "moe_topk": _in_every_layer(lambda config: config.layer_sizes[0][1]),
            "moe_intermediate_size": _in_every_layer(
                lambda config: config.moe_intermediate_size or config.intermediate_size
            ),
            "num_shared_expert": _in_every_layer(lambda config: 1),
            "use_mixed_mlp_moe": True,
        },
    ),
    NativeTarget(
        "glm4_moe",
        "sigmoid_top_k",
        _SIGMOID,
        (
            *_glm_families(),
            Family(
                "qwen3",
                {**_QWEN2, "attention_bias": False},
                {**_WHOLE, "use_qk_norm": True},
                unread=_WINDOW_FIELDS,
                conditions=(_NO_WINDOW,),
            ),
        ),
        written={"num_mtp_layers": 0},
        served=(_SERVED_UNSCALED,),
        layers=_BY_FIRST,
        shared=_SHARED_COUNTED,
        extra=("head_dim",),
    ),
    NativeTarget(
        "solar_open",
        "sigmoid_top_k",
        _SIGMOID,
        _glm_families(head_dim=_head_dim),
        dense_width="moe_intermediate_size",
        shared=_SHARED_COUNTED,
    ),
    NativeTarget(
        "dots1",
        "sigmoid_top_k",
        _SIGMOID,
        (Family("qwen3", {"use_sliding_window": lambda config: config.sliding_window is not None}),),
        engine=_SIGMOID_SCORES,
        layers=_BY_FIRST,
        shared=_SHARED_COUNTED,
        extra=("head_dim",),
    ),
    NativeTarget(
        "deepseek_v3",
        "sigmoid_top_k",
        _SIGMOID,
        (Family("youtu", unread=("embedding_initializer_range",)),),
        written={"num_mtp_layers": 0},
        engine=_SIGMOID_SCORES,
        layers=_BY_FIRST,
        shared=_SHARED_COUNTED,
    ),
    NativeTarget(
        "glm4_moe_lite",
        "sigmoid_top_k",
        _SIGMOID,
        (Family("youtu", unread=("embedding_initializer_range",)),),
        engine={**_SIGMOID_SCORES, "first_k_dense_replace": _leading_dense_layers},
        layers=_BY_TYPE,
        shared=_SHARED_COUNTED,
    ),
)
