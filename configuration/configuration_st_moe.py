"""`STMoEConfig`: one flat config, the fields of a dense Transformers family and the fields of the mixture.

For each dense family one config class is derived, once and on demand: the mixture's fields on the family's own strict
dataclass. `STMoEConfig(dense_model_type="qwen3", ...)` returns an instance of that class, so every field of the family
is checked by the family's own rules and generic code finds each field under the name it knows.
"""

import copy
import dataclasses
import difflib
import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from packaging.version import InvalidVersion, Version
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from st_moe.configuration.heads import auto_class_of
from st_moe.configuration.routers import ROUTER_TYPES
from st_moe.configuration.rules import layer_sizes, rule_faults, sparse_layer_indices

logger = logging.get_logger(__name__)

#: Names under which decoder layers hold their feed-forward network as one module, tried in this order.
FFN_ATTRIBUTES = (
    "mlp",
    "feed_forward",
    "ffn.ffn",
    "ffn",
    "mlp_block",
    "shared_mlp",
    "shared_transf.feed_forward",
    "shared_transformer.feed_forward",
)

#: The part of a composite's config that its image classifier runs.
VISION_PART = "vision_config"

# Where num_hidden_layers does not count the layers with an FFN: the field that does, and how many stacks it is for.
_LAYER_COUNTS: Mapping[str, int] = {"decoder_layers": 1, "num_decoder_layers": 1, "num_layers_per_stack": 2}

#: Families that no mixture can be made from, with the reason.
REFUSED_FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), "its layers are a state-space mixer and hold no FFN"),
    "rwkv": "its FFN mixes each token with the one before it, so it cannot be routed per token",
    "reformer": "its layers are reversible: the backward pass runs them again, outside of the forward pass's routing",
    "xlnet": "its FFN adds the residual and normalises, on tokens ordered [S, B], which no token mask [B, S] fits",
    "zamba2": "its FFN is one for all layers with an adapter for each, chosen by an argument beside the tokens",
    **dict.fromkeys(
        (
            *("aria_text", "dbrx", "deepseek_v4", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa"),
            *("granitemoeshared", "hunyuan_v1_moe", "inkling2_text", "jetmoe", "kolibri1", "longcat_flash"),
            *("minimax", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen3_5_moe_text", "qwen4_exp_text"),
            *("solar_open", "zaya"),
        ),
        "each of its layers holds experts of its own",
    ),
}

SecondExpertPolicy = Literal["all", "none", "threshold", "random"]

# A config without any size should build a model that fits a laptop, not the family's 7B default.
_SMALL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
}

# Unknown names that hold one of these words are taken for misspelt mixture fields, not for the user's own attributes.
_MIXTURE_WORDS = (
    "expert",
    "router",
    "capacity",
    "sparse_layer",
    "sparse_step",
    "moe_",
    "z_loss",
    "aux_loss",
    "balanc",
    "jitter",
)
# Names that hosts' configs carry as plain attributes, close to a mixture field's name.
_KNOWN_EXTRA_NAMES = ("experts_implementation", "_experts_implementation_internal", "intermediate_size")


def installed_version() -> str:
    """Version of the installed package, written into every saved config."""
    return importlib.metadata.version("st_moe")


@strict
class STMoEConfig(PreTrainedConfig):
    """Configuration of a sparse mixture of experts made from a dense Transformers family.

    Every field of the dense family is accepted beside the fields below (`hidden_size`, `rope_parameters`, ...).

    Args:
        dense_model_type: `model_type` of the dense family (`"llama"`, `"qwen3"`, `"gpt2"`, ...).
        num_experts: E, experts per sparse layer; a list gives every sparse layer its own number.
        num_experts_per_tok: K, experts that each token is routed to; a list as for `num_experts`.
        sparse_layers: which layers are sparse: None (all), a list of layer indices, `"every:k"` (the last of each
            group of k: layers k-1, 2k-1, ...), `"every:k:first"` (first, first + k, ...) or `"last:k"` (the last k
            layers).
        moe_intermediate_size: I, width of one expert; None takes the width of the dense FFN.
        router_type: name of the router, one of `ROUTER_TYPES`.
        norm_topk_prob: whether the K combine weights are divided by their sum. An upcycled model computes the dense
            function at step 0 only if they sum to 1.
        second_expert_policy_train, second_expert_policy_eval: which choices after the first are used (ST-MoE):
            `"all"`, `"none"`, `"threshold"` (weight > threshold) or `"random"` (with probability weight / threshold).
        second_expert_threshold: the threshold of that policy, one value or one per rank from the second choice on.
        router_jitter_noise: e >= 0; in training the choice (not the experts) reads inputs times U[1-e, 1+e].
        router_gumbel_noise, router_gaussian_noise: scale of Gumbel / normal noise that the choice reads on top of the
            router logits, in training.
        allow_non_causal_routing: let a causal language model have a router that sees later tokens.
        capacity_factor, eval_capacity_factor: an expert takes at most floor(tokens of the scope * factor / E)
            assignments, the rest is dropped; None drops nothing. Capacity with K >= 2 is not causal. With
            `"expert_choice"`, the tokens that an expert takes; None is a factor of K.
        min_capacity: least capacity of an expert, in assignments per scope.
        capacity_scope: tokens that share an expert's capacity: `"sequence"`, `"batch"` or `"group"`.
        capacity_group_size: consecutive tokens of the batch that are one group, in tokens.
        drop_priority: who is served first, `"position"` (left to right) or `"router_prob"` (largest first-choice
            probability first: batch-prioritised routing, which is not causal).
        renormalize_after_drop: whether a token's remaining combine weights are divided by their sum (GShard).
        balance_loss_coef: coefficient of the load-balancing loss (first-choice count: 1 balanced, E collapsed).
        balance_loss_scope: tokens over which balance is asked for, `"batch"` or `"sequence"`.
        balance_loss_count: which choices it counts, `"first"` or `"all"` (1 balanced, E/K collapsed).
        balance_loss_after_drop: whether it counts only what capacity accepted.
        router_z_loss_coef: coefficient of the router z-loss.
        sequence_balance_loss_coef, second_place_loss_coef, importance_loss_coef, load_loss_coef, diversity_loss_coef,
            simplicity_loss_coef, top_any_balance_loss_coef, efficiency_loss_coef, depth_loss_coef: coefficients of
            losses that some routers have; None takes the router's default, see `ROUTER_TYPES`.
        straight_through: `"top_any"`: experts whose threshold gets a gradient from a token, `"all"` or `"active"`.
        fallback: `"top_any"`: where a token goes that no expert wants, to the `"best"` or to `"none"`.
        initial_experts: `"top_any"`: experts in use at first; None is all.
        n_group, topk_group: `"sigmoid_top_k"`: groups of experts, and how many of them a token may use.
        routed_scaling_factor: `"sigmoid_top_k"`: what the combine weights sum to.
        bias_update_rate: `"sigmoid_top_k"`: step of the selection bias per optimizer step (loss-free balancing).
        coordinate_descent_iterations, coordinate_descent_epsilon, coordinate_descent_k_ratio: of
            `"coordinate_descent"`: steps, temperature, and experts aimed at as a multiple of K.
        slots_per_expert: `"soft"`: slots that each expert processes per sequence.
        depth_fraction: `"mixture_of_depths"`: share of a sequence's tokens that should pass the layer.
        hash_by: `"hash"`: what decides, the `"token"` id or the `"position"`.
        expert_dropout: dropout on the hidden activation of the experts.
        multiplicative_bias: whether experts scale their hidden activation with a learnt vector (ST-MoE, appendix C).
        ffn_before, ffn_after: an extra dense FFN with own norm and residual before / after each sparse FFN.
        num_shared_experts: experts that every token passes, as one FFN of that many times the expert width.
        shared_expert_gate: whether their output is scaled by a learnt sigmoid per token (Qwen2-MoE).
        native_fields: of a family with experts of its own in other layers, its values of the fields whose names the
            fields here take (`num_experts`, `moe_intermediate_size`, ...); those left out are the family's defaults.
        output_router_logits: whether outputs carry the router logits of each sparse layer.
        initializer_range: standard deviation of the router's (and a fresh expert's) initial weights.

    Raises:
        ValueError: with every fault of the mixture's fields, each with field, rule and value.
    """

    model_type = "st_moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "lm_loss",
        "balance_loss",
        "router_z_loss",
        "aux_loss",
        "aux_losses",
        "router_logits",
        "expert_load",
        "router_entropy",
        "dropped_fraction",
    ]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "num_experts",
        "router_aux_loss_coef": "balance_loss_coef",
    }
    dense_config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    whole_config_class: ClassVar[type[PreTrainedConfig] | None] = None

    dense_model_type: str = "llama"
    num_experts: int | list[int] | tuple[int, ...] = 8
    num_experts_per_tok: int | list[int] | tuple[int, ...] = 2
    sparse_layers: list[int] | tuple[int, ...] | str | None = None
    moe_intermediate_size: int | None = None
    router_type: str = "top_k"
    norm_topk_prob: bool = True
    second_expert_policy_train: SecondExpertPolicy = "all"
    second_expert_policy_eval: SecondExpertPolicy = "all"
    second_expert_threshold: float | int | list[float] | tuple[float, ...] = 0.2
    router_jitter_noise: float | int = 0.0
    router_gumbel_noise: float | int = 0.0
    router_gaussian_noise: float | int = 0.0
    allow_non_causal_routing: bool = False
    capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    min_capacity: int = 4
    capacity_scope: Literal["sequence", "batch", "group"] = "sequence"
    capacity_group_size: int = 1024
    drop_priority: Literal["position", "router_prob"] = "position"
    renormalize_after_drop: bool = False
    balance_loss_coef: float | int = 1e-2
    balance_loss_scope: Literal["batch", "sequence"] = "batch"
    balance_loss_count: Literal["first", "all"] = "first"
    balance_loss_after_drop: bool = False
    router_z_loss_coef: float | int = 1e-3
    sequence_balance_loss_coef: float | int | None = None
    second_place_loss_coef: float | int | None = None
    importance_loss_coef: float | int | None = None
    load_loss_coef: float | int | None = None
    diversity_loss_coef: float | int | None = None
    simplicity_loss_coef: float | int | None = None
    top_any_balance_loss_coef: float | int | None = None
    efficiency_loss_coef: float | int | None = None
    depth_loss_coef: float | int | None = None
    straight_through: Literal["all", "active"] = "all"
    fallback: Literal["best", "none"] = "best"
    initial_experts: int | None = None
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float | int = 1.0
    bias_update_rate: float | int = 1e-3
    coordinate_descent_iterations: int = 20
    coordinate_descent_epsilon: float | int = 0.1
    coordinate_descent_k_ratio: float | int = 1.125
    slots_per_expert: int = 1
    depth_fraction: float | int = 0.125
    hash_by: Literal["token", "position"] = "token"
    expert_dropout: float | int = 0.0
    multiplicative_bias: bool = False
    ffn_before: bool = False
    ffn_after: bool = False
    num_shared_experts: int = 0
    shared_expert_gate: bool = False
    native_fields: dict[str, Any] | None = None
    output_router_logits: bool = False
    initializer_range: float | int = 0.02
    st_moe_version: str | None = None

    def __new__(cls, **kwargs: Any) -> "STMoEConfig":
        """Pick the family's class and report every fault of the mixture's fields at once."""
        if cls is STMoEConfig:
            cls = family_config(kwargs.get("dense_model_type", "llama"))
        faults = cls._faults(kwargs)
        if faults:
            raise ValueError(f"{len(faults)} invalid field(s) in STMoEConfig:\n" + "\n".join(f"- {f}" for f in faults))
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        if _is_newer(self.st_moe_version):
            unknown = sorted(name for name in kwargs if _nearest_field(name, type(self)) is not None)
            logger.warning(
                f"This config was written by st_moe {self.st_moe_version}, newer than the installed "
                f"{installed_version()}. Fields unknown here are kept as they are: {', '.join(unknown) or 'none'}."
            )
        else:
            self.st_moe_version = installed_version()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dense(cls, dense_config: PreTrainedConfig, **mixture_fields: Any) -> "STMoEConfig":
        """Config of the mixture that `dense_config`'s model becomes.

        Args:
            dense_config: config of a dense Transformers model.
            mixture_fields: fields of `STMoEConfig`.

        Raises:
            ValueError: when `dense_config` is no dense config, or a mixture field is at fault.
        """
        if isinstance(dense_config, STMoEConfig):
            raise ValueError("dense_config: must be a dense model's config, got an STMoEConfig.")
        fields = {k: v for k, v in dense_config.to_dict().items() if k not in ("model_type", "architectures")}
        fields.pop("transformers_version", None)
        family = family_config(dense_config.model_type)
        native = {name: copy.deepcopy(getattr(dense_config, name)) for name in family.shared_names()}
        for name in native:
            fields.pop(name, None)
            # Where the family keeps it under another name that is none of its fields.
            stored = dense_config.attribute_map.get(name, name)
            if stored not in family.dense_config_class.__dataclass_fields__:
                fields.pop(stored, None)
        foreign = [name for name in fields if _nearest_field(name, family)]
        if foreign:
            # A saved config with these names could not be told from one with misspelt fields.
            logger.warning(f"Attributes of the dense config left out, too like mixture fields: {', '.join(foreign)}.")
        fields = {name: value for name, value in fields.items() if name not in foreign}
        native |= mixture_fields.get("native_fields") or {}
        own = {"dense_model_type": dense_config.model_type, "native_fields": native or None}
        return cls(**{**fields, **own, **mixture_fields, "native_fields": own["native_fields"]})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The host's way from a dictionary; mixture fields among `kwargs` are checked like all others.

        Raises:
            ValueError: when the dictionary is another model's, or a mixture field is at fault.
        """
        model_type = config_dict.get("model_type", STMoEConfig.model_type)
        if model_type != STMoEConfig.model_type:
            raise ValueError(
                f"model_type: must be 'st_moe', got {model_type!r}; st_moe.upcycle turns a dense model into a mixture"
            )
        own = {*MIXTURE_FIELDS, *STMoEConfig.attribute_map}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def dense_config(self) -> PreTrainedConfig:
        """Config of the dense parent: the family's fields alone, `native_fields` under their own names."""
        dense = {f.name for f in dataclasses.fields(self.dense_config_class)}
        own = set(MIXTURE_FIELDS) - (dense - set(self.shared_names()))
        fields = {k: v for k, v in self.to_dict().items() if k not in own | {"model_type", "architectures"}}
        return self.dense_config_class(**{**fields, **copy.deepcopy(self.native_fields or {})})

    def whole_config(self) -> PreTrainedConfig:
        """Config of the composite whose image classifier runs the dense parent as its vision tower."""
        whole: Any = self.whole_config_class
        fields = {name: getattr(self, name) for name in _fields_around(whole)}
        return whole(**fields, **{VISION_PART: self.dense_config()})

    @classmethod
    def shared_names(cls) -> list[str]:
        """Fields of the family whose names fields here take: its own experts' numbers, in a model with such layers."""
        fields = {field.name for field in dataclasses.fields(cls.dense_config_class)}
        return sorted(fields & {*MIXTURE_FIELDS, *STMoEConfig.attribute_map} - {"initializer_range"})

    @property
    def sparse_layer_indices(self) -> list[int]:
        """Indices of the sparse layers, ascending."""
        return sparse_layer_indices(self.sparse_layers, num_ffn_layers(self))

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """Number of experts and of choices per token, (E, K), of each sparse layer."""
        return layer_sizes(vars(self), len(self.sparse_layer_indices))

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Coefficient of each auxiliary loss that the router has, by the loss's name."""
        given = {name: getattr(self, f"{name}_coef") for name in ROUTER_TYPES[self.router_type].losses}
        defaults = ROUTER_TYPES[self.router_type].losses
        return {name: defaults[name] if value is None else value for name, value in given.items()}

    @property
    def combine_weights_sum_to_one(self) -> bool:
        """Whether each token's combine weights sum to 1 in evaluation: then copies of an FFN compute what it did."""
        policy = self.second_expert_policy_eval == "all" or all(choices == 1 for _, choices in self.layer_sizes)
        all_kept = self.eval_capacity_factor is None and policy
        scaled = self.norm_topk_prob and self.routed_scaling_factor == 1
        return ROUTER_TYPES[self.router_type].keeps_function and all_kept and scaled

    @property
    def base_model_tp_plan(self) -> dict[str, Any] | None:
        """Tensor-parallel plan of the family's base model, with the sparse FFNs' rules in the dense FFNs' place."""
        dense = self.dense_config_class.base_model_tp_plan
        if dense is None:
            return None
        plan = {**dense, **self.__dict__.get("_host_tp_rules", {})}
        for prefix, rules in self._ffn_rules().items():
            if len(self.sparse_layer_indices) == num_ffn_layers(self):
                for rule in rules:
                    del plan[rule]
            plan |= {
                f"{prefix}.experts.gate_up_proj": "packed_colwise",
                f"{prefix}.experts.down_proj": "rowwise",
                f"{prefix}.experts": "moe_tp_experts",
            }
            if self.num_shared_experts:
                shared = f"{prefix}.shared_experts"
                plan |= {f"{shared}.gate_proj": "colwise", f"{shared}.up_proj": "colwise"}
                plan |= {f"{shared}.down_proj": "rowwise"}
        return plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, Any] | None) -> None:
        # Transformers before 5.23 adds a rule for tied embeddings to every instance; what it adds is kept, not saved.
        known = self.base_model_tp_plan or {}
        self.__dict__["_host_tp_rules"] = {rule: style for rule, style in (plan or {}).items() if rule not in known}

    def to_dict(self) -> dict[str, Any]:
        """The host's dictionary of what is saved."""
        output = super().to_dict()
        output.pop("_host_tp_rules", None)
        return output

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """Expert-parallel plan of the base model: whole experts per rank."""
        plan: dict[str, str] = {}
        for prefix in self._ffn_rules():
            plan |= {
                f"{prefix}.experts.gate_up_proj": "grouped_gemm",
                f"{prefix}.experts.down_proj": "grouped_gemm",
                f"{prefix}.experts": "ep_dispatch_experts",
            }
        return plan or None

    def num_parameters(self, active: bool = False) -> int:
        """Number of parameters of the model with its head, see `auto_class_of`; nothing is allocated.

        Args:
            active: count only what one token uses: K of the E experts of each layer that has some.
        """
        # Counted on the host's Auto class over meta tensors, so any dense family is counted by its own code.
        import torch

        with torch.device("meta"):
            return self.parameters_of(auto_class_of(self).from_config(self), active)

    def parameters_of(self, model: Any, active: bool = False) -> int:
        """As `num_parameters`, of a model of this config that is there."""
        total = sum(parameter.numel() for parameter in model.parameters())
        if not active:
            return total
        sizes = [*self.layer_sizes, *self.native_sizes(model).values()]
        blocks = [block.experts for block in model.base_model.sparse_blocks]
        modules = [*blocks, *(model.get_submodule(name) for name in self.native_sizes(model))]
        for (experts, choices), module in zip(sizes, modules, strict=True):
            in_experts = sum(parameter.numel() for parameter in module.parameters())
            # Exact: experts are alike, so their sum is a multiple of E.
            total -= in_experts - in_experts * choices // experts
        return total

    def native_sizes(self, model: Any) -> dict[str, tuple[int, int]]:
        """E and K of the experts that the family has of its own in a model of this config, by their modules' names."""
        choices = getattr(self.dense_config(), "num_experts_per_tok", None) if self.shared_names() else None
        ours = {id(block.experts) for block in model.base_model.sparse_blocks}
        named = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]
        stacked = {name: len(next(module.parameters())) for name, module in named if id(module) not in ours}
        return {name: (experts, choices) for name, experts in stacked.items() if choices}

    def validate_mixture(self) -> None:
        """Part of the host's strict validation, run at construction and at save time."""
        values = {name: getattr(self, name) for name in MIXTURE_FIELDS}
        faults = type(self)._native_faults(self.native_fields)
        faults += rule_faults(values, _defaults(), num_ffn_layers(self), type(self)._is_causal(vars(self)))
        if faults:
            raise ValueError("; ".join(faults))

    @classmethod
    def _faults(cls, kwargs: Mapping[str, Any]) -> list[str]:
        """Faults of the keyword arguments: misspelt names, wrong types, broken rules."""
        faults = []
        newer = _is_newer(kwargs.get("st_moe_version"))
        if newer is None:
            faults.append(f"st_moe_version: must be a version such as '0.1.0', got {kwargs['st_moe_version']!r}")
        for name in () if newer else kwargs:
            nearest = _nearest_field(name, cls)
            if nearest is not None:
                faults.append(f"{name}: is not a field of STMoEConfig; did you mean {nearest!r}?")
        family = kwargs.get("dense_model_type", cls.dense_model_type)
        if family != cls.dense_model_type:
            faults.append(f"dense_model_type: must be {cls.dense_model_type!r} for this family's class, got {family!r}")
        values: dict[str, Any] = {}
        given = dict(kwargs)
        for alias, name in STMoEConfig.attribute_map.items():
            if alias in kwargs and kwargs[alias] != given.setdefault(name, kwargs[alias]):
                faults.append(f"{alias}: is another name of {name}, got {kwargs[alias]!r} and {given[name]!r}")
        for name in MIXTURE_FIELDS:
            value = given.get(name, getattr(cls, name, None))
            reason = _type_fault(cls, name, value)
            if reason:
                faults.append(f"{name}: {reason}")
                continue
            values[name] = value
        faults += cls._native_faults(values.get("native_fields"))
        return faults + rule_faults(values, _defaults(), cls._given_layers(kwargs), cls._is_causal(kwargs))

    @classmethod
    def _given_layers(cls, kwargs: Mapping[str, Any]) -> int | None:
        """Number of layers with an FFN, as far as the keyword arguments tell before the family fills in the rest."""
        fields = cls.dense_config_class.__dataclass_fields__
        count_name = next((name for name in _LAYER_COUNTS if name in fields), "num_hidden_layers")
        field = cls.attribute_map.get(count_name, count_name)
        given = kwargs.get(count_name, kwargs.get(field, getattr(cls, field, None)))
        return given * _LAYER_COUNTS.get(count_name, 1) if isinstance(given, int) else None

    @classmethod
    def _native_faults(cls, native: Mapping[str, Any] | None) -> list[str]:
        """Faults of `native_fields`: names that the family does not share with the mixture, values that it refuses."""
        shared = cls.shared_names()
        family, names = cls.dense_model_type, ", ".join(shared) or "none"
        faults = [
            f"native_fields: must name fields that {family!r} shares with the mixture ({names}), got {name!r}"
            for name in native or ()
            if name not in shared
        ]
        given = {name: value for name, value in (native or {}).items() if name in shared}
        reasons = {name: _type_fault(cls.dense_config_class, name, value) for name, value in given.items()}
        return faults + [f"native_fields: {name} {reason}" for name, reason in reasons.items() if reason]

    @classmethod
    def _is_causal(cls, values: Mapping[str, Any]) -> bool:
        """Whether the family is a causal language model: a decoder, or an encoder switched to be one."""
        both = MODEL_FOR_MASKED_LM_MAPPING_NAMES
        decoder = cls.dense_model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and cls.dense_model_type not in both
        return decoder or bool(values.get("is_decoder"))

    def _ffn_rules(self) -> dict[str, list[str]]:
        """Rules of the dense plan that shard FFNs, by the FFN's place (`layers.*.mlp`)."""
        rules: dict[str, list[str]] = {}
        for rule in self.dense_config_class.base_model_tp_plan or {}:
            prefix, _, _ = rule.rpartition(".")
            if prefix.rpartition(".")[2] in FFN_ATTRIBUTES:
                rules.setdefault(prefix, []).append(rule)
        return rules


#: Names of the mixture's own fields, in the order of the class.
MIXTURE_FIELDS: tuple[str, ...] = tuple(
    field.name
    for field in dataclasses.fields(STMoEConfig)
    if field.name not in {base.name for base in dataclasses.fields(PreTrainedConfig)}
)


def _type_fault(config_class: type[PreTrainedConfig], name: str, value: Any) -> str:
    """Why a field of a strict config class cannot take a value, or ""."""
    try:
        for validator in config_class.__validators__[name]:  # type: ignore[attr-defined]
            validator(value)
    except (TypeError, ValueError) as error:
        return str(error).removeprefix(f"Field {name!r} ").removeprefix(f"Field '{name}' with value ")
    return ""


def _is_newer(version: Any) -> bool | None:
    """Whether a config's version is newer than the installed one; None if it is no version."""
    if version is None:
        return False
    try:
        return Version(version) > Version(installed_version())
    except (InvalidVersion, TypeError):
        return None


def _nearest_field(name: str, cls: type[STMoEConfig]) -> str | None:
    """The mixture field that an unknown `name` is a misspelling of, or None."""
    known = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map) | set(_KNOWN_EXTRA_NAMES)
    if name in known or hasattr(PreTrainedConfig, name):
        return None
    candidates = [*MIXTURE_FIELDS, *STMoEConfig.attribute_map]
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    if not near and any(word in name for word in _MIXTURE_WORDS):
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)
    return near[0] if near else None


def _defaults() -> dict[str, Any]:
    """Defaults of the mixture's fields."""
    return {name: getattr(STMoEConfig, name) for name in MIXTURE_FIELDS}


_NEW_FAMILY_LISTENERS: list[Callable[[type[STMoEConfig]], None]] = []


def on_new_family(listener: Callable[[type[STMoEConfig]], None]) -> None:
    """Call `listener` with the config class of every family, those made so far and those to come."""
    _NEW_FAMILY_LISTENERS.append(listener)
    for cls in list(_FAMILIES.values()):
        listener(cls)


_FAMILIES: dict[str, type[STMoEConfig]] = {}


def num_ffn_layers(config: PreTrainedConfig) -> int:
    """Number of layers that may hold an FFN: those of the decoder, in all of its stacks."""
    counts = ((getattr(config, name, None), stacks) for name, stacks in _LAYER_COUNTS.items())
    return next((count * stacks for count, stacks in counts if isinstance(count, int)), config.num_hidden_layers)


@lru_cache
def dense_model_types() -> tuple[str, ...]:
    """`model_type`s of the families that a mixture can be made from: dense, with a causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    names = {config_class.model_type for config_class in MODEL_FOR_CAUSAL_LM_MAPPING if not _refusal(config_class)}
    return tuple(sorted(names))


def _whole_of(part: type[PreTrainedConfig]) -> type[PreTrainedConfig] | None:
    """Config class of the composite that has an image classifier on a vision tower of this config class, or None."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    if getattr(part, "base_config_key", "") != VISION_PART:
        return None
    wholes = (whole for whole in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if whole.sub_configs.get(VISION_PART) is part)
    return next(wholes, None)


def _fields_around(whole: type[PreTrainedConfig]) -> set[str]:
    """Fields of a composite's config that are not those of one of its parts."""
    return {field.name for field in dataclasses.fields(whole)} - {*whole.sub_configs, "architectures"}


def dense_config_of(config: PreTrainedConfig, head: str) -> PreTrainedConfig:
    """Config of the dense family that a model is of; of a composite's image classifier, the vision tower's and labels.

    Args:
        config: the model's.
        head: name of its class.
    """
    flat: Any = copy.deepcopy(getattr(config, VISION_PART, None))
    if not head.endswith("ForImageClassification") or _whole_of(type(flat)) is not type(config):
        return config
    own = type(flat).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    for name in _fields_around(type(config)) - own:
        setattr(flat, name, copy.deepcopy(getattr(config, name)))
    return flat


def _is_composite(config_class: type[PreTrainedConfig]) -> bool:
    """Whether a config holds those of other models, not just those of its own parts, which have no model_type."""
    return any(getattr(part, "model_type", None) != "" for part in config_class.sub_configs.values())


def _refusal(config_class: type[PreTrainedConfig]) -> str:
    """Why no mixture can be made from a family of the host, or ""."""
    family = config_class.model_type
    if issubclass(config_class, STMoEConfig):
        return f"must be a model_type of Transformers, got {family!r}"
    if family in REFUSED_FAMILIES:
        return f"no mixture can be made from {family!r}: {REFUSED_FAMILIES[family]}"
    if _is_composite(config_class):
        text = [name for name in CONFIG_MAPPING if name.startswith(f"{family}_text")]
        return f"{family!r} is a composite of several models" + (f"; use its text model: {text[0]!r}" if text else "")
    return ""


def _dense_config_class(dense_model_type: str) -> type[PreTrainedConfig]:
    """Config class of a dense family; ValueError with the reason when there is none."""
    if dense_model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(dense_model_type, dense_model_types(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"dense_model_type: must be a model_type of Transformers, got {dense_model_type!r}{hint}")
    config_class = CONFIG_MAPPING[dense_model_type]
    refusal = _refusal(config_class)
    if refusal:
        raise ValueError(f"dense_model_type: {refusal}")
    return config_class


def family_config(dense_model_type: str) -> type[STMoEConfig]:
    """Config class of one dense family: the mixture's fields on the family's config; made once, then kept.

    Raises:
        ValueError: when Transformers has no such dense family.
    """
    if not isinstance(dense_model_type, str):
        raise ValueError(f"dense_model_type: must be a model_type of Transformers, got {dense_model_type!r}")
    if dense_model_type in _FAMILIES:
        return _FAMILIES[dense_model_type]
    dense = _dense_config_class(dense_model_type)
    whole = _whole_of(dense)
    defaults, annotations = _family_fields(dense, whole)
    taken = {*MIXTURE_FIELDS, *STMoEConfig.attribute_map} - {"initializer_range"}
    renamed = {name: field for name, field in dense.attribute_map.items() if not {name, field} & taken}
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": f"{dense_model_type}.STMoEConfig",
        "__annotations__": annotations,
        "__doc__": STMoEConfig.__doc__,
        "model_type": STMoEConfig.model_type,
        "attribute_map": {**renamed, **STMoEConfig.attribute_map},
        "keys_to_ignore_at_inference": sorted(
            {*getattr(dense, "keys_to_ignore_at_inference", ()), *STMoEConfig.keys_to_ignore_at_inference}
        ),
        "dense_config_class": dense,
        "whole_config_class": whole,
        **defaults,
    }
    if whole is not None:
        # The composite's code asks its config for the part's, which is flat here.
        namespace[VISION_PART] = property(lambda self: self)
    cls: type[STMoEConfig] = strict(type("STMoEConfig", (STMoEConfig, dense), namespace))
    _FAMILIES[dense_model_type] = cls
    for listener in _NEW_FAMILY_LISTENERS:
        listener(cls)
    return cls


def _family_fields(
    dense: type[PreTrainedConfig], whole: type[PreTrainedConfig] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Defaults and annotations of a family's class beyond those that it inherits; `whole` as in `_whole_of`."""
    defaults: dict[str, Any] = {"dense_model_type": dense.model_type, **_SMALL_DEFAULTS.get(dense.model_type, {})}
    initializer_range = getattr(dense, "initializer_range", None)
    if initializer_range is not None:
        defaults["initializer_range"] = initializer_range
    annotations = {name: _annotation(name, dense) for name in defaults}
    if whole is not None:
        for name in _fields_around(whole) - dense.__dataclass_fields__.keys():
            field = whole.__dataclass_fields__[name]
            defaults[name], annotations[name] = field.default, field.type
    # A field of the family that is another name of a field of ours is no field of its own any more.
    aliases = STMoEConfig.attribute_map.keys() & dense.__dataclass_fields__.keys()
    return defaults, annotations | dict.fromkeys(aliases, ClassVar[Any])


def _annotation(name: str, dense: type[PreTrainedConfig]) -> Any:
    """Type of a field as the class that declares it states it."""
    own = STMoEConfig.__dataclass_fields__
    return (own if name in own else dense.__dataclass_fields__)[name].type


class _Namespace:
    """Attribute access for pickle: `<module>.<dense_model_type>.STMoEConfig`."""

    def __init__(self, cls: type[STMoEConfig]) -> None:
        self.STMoEConfig = cls


def __getattr__(name: str) -> _Namespace:
    """Resolve `<dense_model_type>` so that instances of derived classes pickle; the family is made on demand."""
    if name.startswith("_") or name not in CONFIG_MAPPING:
        raise AttributeError(f"module {sys.modules[__name__].__name__!r} has no attribute {name!r}")
    return _Namespace(family_config(name))
