"""The public model classes: what every family's classes share.

A family's class, made by `st_moe.modeling.families`, derives from one of these and from the dense family's class of the
same kind. The dense class does everything a dense model does; these swap its FFNs and add the routers' losses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from st_moe.configuration import ROUTER_TYPES, STMoEConfig, check_own_code
from st_moe.modeling.bundle import IN_BUNDLE, write_bundle
from st_moe.modeling.experts import EXPERTS_IMPLEMENTATION, ModuleExperts, STMoEExperts
from st_moe.modeling.ffn import FFNLocation, check_sparse_layers, locate_ffns
from st_moe.modeling.outputs import (
    STMoECausalLMOutput,
    STMoEImageClassifierOutput,
    STMoEModelOutput,
    STMoESequenceClassifierOutput,
    STMoETokenClassifierOutput,
)
from st_moe.modeling.pruning import pruned
from st_moe.modeling.routing import Router, losses
from st_moe.modeling.routing.scope import (
    RoutingScope,
    activate,
    active_scope,
    checkpoint_in_scope,
    positions_of,
    token_mask_of,
)
from st_moe.modeling.routing.sigmoid_top_k import SigmoidTopKRouter, update_biases
from st_moe.modeling.sparse_block import DenseFFN, SparseBlock
from st_moe.modeling.step_hooks import update_after_steps

logger = logging.get_logger(__name__)

_OWN_INITIALISATION = (Router, STMoEExperts, DenseFFN)


class STMoEPreTrainedModel(PreTrainedModel):
    """What base models and heads have in common: construction, initialisation, checkpointing, loading."""

    config_class = STMoEConfig
    #: The dense family's class that a family's class derives from; None on the public classes.
    dense_class: ClassVar[type[PreTrainedModel] | None] = None

    #: Whether the dense class is the image classifier of a composite, on its vision tower.
    part_of_whole: ClassVar[bool] = False

    #: What every call of the dense forward pass is given: its own router logits, and their loss, stay off.
    dense_arguments: ClassVar[Mapping[str, Any]] = {}

    #: How far the mixture is from its dense parent, when it was upcycled in this process.
    identity_proof: Any = None

    #: Whether `save_pretrained` is asked for code by `push_to_hub`.
    _bundles_code: bool = False

    _can_set_experts_implementation_cached_value = True

    def __new__(cls, config: PreTrainedConfig | None = None, *args: Any, **kwargs: Any) -> STMoEPreTrainedModel:
        """An instance of the family's class for `config`; copies of an instance are made without one."""
        return super().__new__(cls._class_for(config))

    def __init__(self, config: STMoEConfig) -> None:
        # A config may have been changed since it was made.
        config.validate_mixture()
        device = torch.get_default_device()
        wanted = config._experts_implementation
        checkpointing = getattr(config, "gradient_checkpointing", False)
        # The dense skeleton is built without memory; the parts that it would throw away never exist anywhere else.
        # It must not see the experts implementation, which a dense class refuses.
        with torch.device("meta"):
            with _experts_implementation(config, "eager"):
                self._build_dense(config)
            if checkpointing:
                # The dense constructor has used the flag up, on layers that are about to be replaced.
                config.gradient_checkpointing = True
            config._experts_implementation_internal = self._check_and_adjust_experts_implementation(wanted)
            self._make_sparse(config)
        self._follow_optimizers()
        if device.type == "meta":
            return
        self.to_empty(device=device)
        for module in self.modules():
            module._is_hf_initialized = False  # type: ignore[assignment]
            if type(module).__module__ == "transformers.activations" and module.state_dict():
                # Activations with tensors set them in their constructor, and nowhere else.
                module.load_state_dict(type(module)().state_dict())
            if next(module.buffers(recurse=False), None) is not None:
                # Buffers are constants: due even where the drawing of weights is switched off.
                with torch.no_grad():
                    self._init_weights(module)
        self.init_weights()

    def _build_dense(self, config: STMoEConfig) -> None:
        """Construct the dense skeleton; layers with experts of their own are built from the family's own config."""
        if not (config.shared_names() or self.part_of_whole):
            super().__init__(config)
            return
        skeleton = self.dense_parent_config(config)
        skeleton._attn_implementation_internal = config._attn_implementation
        skeleton._experts_implementation_internal = config._experts_implementation
        super().__init__(skeleton)
        config._attn_implementation_internal = skeleton._attn_implementation
        self.name_or_path = config.name_or_path
        # What is switched later, such as the attention implementation, must reach every module.
        for module in self.modules():
            if getattr(module, "config", None) is skeleton:
                module.config = config  # type: ignore[assignment]

    @classmethod
    def dense_parent_config(cls, config: STMoEConfig) -> PreTrainedConfig:
        """Config of the dense class that this class derives from; of a composite, where that has the head."""
        return config.whole_config() if cls.part_of_whole else config.dense_config()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and unpickled models are made without a call of the constructor.
        super().__setstate__(state)
        self._follow_optimizers()

    def _follow_optimizers(self) -> None:
        """Have `update_router_bias` called after optimizer steps, if there is such a bias."""
        if "bias_update_rate" in ROUTER_TYPES[self.config.router_type].options:
            update_after_steps(self)

    def update_router_bias(self) -> None:
        """Move each router's selection bias by its experts' load since the last call (loss-free balancing).

        Due after each optimizer step, on every rank. Steps of torch's optimizers do it themselves; only a training loop
        whose optimizer is none of them (DeepSpeed's engine) has to call this. A second call changes nothing. Routers
        without such a bias stay as they are. The step is `config.bias_update_rate` of the moment.
        """
        routers = [module for module in self.modules() if isinstance(module, SigmoidTopKRouter)]
        update_biases(routers, self.config.bias_update_rate)

    def _make_sparse(self, config: STMoEConfig) -> None:
        """Put the sparse parts in place and refresh what the host collects from submodules."""
        raise NotImplementedError(f"{type(self).__name__} is a public class; its families' classes are built instead")

    @classmethod
    def _class_for(cls, config: PreTrainedConfig | None) -> type[STMoEPreTrainedModel]:
        """The family's class of this kind for a config."""
        if cls.dense_class is not None:
            return cls
        if not isinstance(config, STMoEConfig):
            raise ValueError(
                f"config: {cls.__name__} needs an STMoEConfig, got {type(config).__name__}; use "
                "STMoEConfig.from_dense(config, ...) for a fresh mixture or st_moe.upcycle(model, ...) to keep weights"
            )
        from st_moe.modeling.families import family_of

        return family_of(config.dense_model_type).model_class(cls.__name__)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> STMoEPreTrainedModel:
        """Load a saved mixture; arguments as in Transformers. Weights are read from safetensors only.

        Raises:
            ValueError: when the checkpoint is not a mixture's.
        """
        kwargs.setdefault("use_safetensors", True)
        if cls.dense_class is None:
            cls = cls._class_for(_saved_config(pretrained_model_name_or_path, kwargs))
            return cls.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        bundle_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as Transformers does; other arguments as there.

        Args:
            bundle_code: also write the code that the model runs on, so that the folder loads with
                `trust_remote_code=True` where this package is not installed. A model that was loaded in this way always
                brings its code along. Without, the config names no code.

        Raises:
            ValueError: when the code cannot be bundled; nothing is written then.
        """
        adapters = getattr(self, "_hf_peft_config_loaded", False)
        bundle_code = bundle_code or self._bundles_code or (IN_BUNDLE and not adapters)
        if bundle_code:
            check_own_code(self.config.router_type, self.config.dense_model_type)
            if push_to_hub or adapters:
                raise ValueError(
                    "bundle_code: must be False in save_pretrained with push_to_hub=True, for which there is "
                    "model.push_to_hub(repo_id, bundle_code=True), and with adapters, which are saved without the "
                    "model; got True"
                )
        # As loaded, it names the code of another folder.
        vars(self.config).pop("auto_map", None)
        super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
        if bundle_code and self.should_save_on_this_rank(is_main_process):
            write_bundle(save_directory)

    def push_to_hub(  # type: ignore[override]  # the host's is a copied function, typed with another self
        self, repo_id: str, *, bundle_code: bool = False, **kwargs: Any
    ) -> str:
        """Upload as Transformers does, with the code that the model runs on if `bundle_code`; see `save_pretrained`.

        Raises:
            ValueError: when the code cannot be bundled; nothing is uploaded then.
        """
        before = self._bundles_code
        # The host saves to a temporary folder, whose files it uploads.
        self._bundles_code = before or bundle_code
        try:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        finally:
            self._bundles_code = before

    def _take_flags(self, kwargs: dict[str, Any]) -> tuple[bool, bool]:
        """`output_router_logits` and `return_dict`, taken out of a call's arguments; the config's if not given."""
        given = (kwargs.pop(name, None) for name in ("output_router_logits", "return_dict"))
        logits, as_dict = given
        return (
            bool(self.config.output_router_logits if logits is None else logits),
            bool(self.config.return_dict if as_dict is None else as_dict),
        )

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The host's choice of experts implementation, with this project's as the default.

        Raises:
            ValueError: when the implementation is unknown, or would leave out a field of the config without a word.
        """
        if requested_experts not in (None, "eager", EXPERTS_IMPLEMENTATION):
            unknown_to_host = [name for name in ("multiplicative_bias", "expert_dropout") if getattr(self.config, name)]
            if unknown_to_host:
                raise ValueError(
                    f"experts_implementation: must be {EXPERTS_IMPLEMENTATION!r} or 'eager' with "
                    f"{' and '.join(unknown_to_host)}, which the host's implementations do not apply, got "
                    f"{requested_experts!r}"
                )
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside of the host, it skips modules whose tensors are all loaded, and with them the constants that
        # some models write from their top module. The dense code is the host's own and needs no such care.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise as the dense family does, then routers, experts and extra FFNs by their own rules."""
        fresh = [m for m in self.modules() if isinstance(m, _OWN_INITIALISATION)]
        fresh = [module for module in fresh if not getattr(module, "_is_hf_initialized", False)]
        super().initialize_weights()
        for module in fresh:
            module.reset_parameters()

    def prune_experts(self) -> Any:
        """A new, smaller model of the same class with the same outputs, without the experts that are out of use.

        For `router_type="top_any"`, after `st_moe.finetune.AdaptiveExperts`. Without inactive experts it is an equal
        copy. This model is left as it is.

        Raises:
            ValueError: when the router is another, or a capacity factor is set.
        """
        return pruned(self)

    def _set_gradient_checkpointing(  # type: ignore[override]  # every_n_layers is not in the oldest host
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Checkpoint layers so that their recomputation sees the forward pass's token mask and records nothing."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: use_reentrant must be False, got True; reentrant checkpointing cuts "
                "the router logits off from their gradient, which silently turns the auxiliary losses off"
            )
        function = gradient_checkpointing_func
        if "use_reentrant" not in getattr(function, "keywords", {}):
            function = partial(function, use_reentrant=False)
        function = checkpoint_in_scope(function)
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=function, **kwargs)


@contextmanager
def _scope_of(inputs: dict[str, Any], with_losses: bool = False) -> Iterator[RoutingScope]:
    """The routing scope of a forward pass: the head's, if this is its base model, or a new one."""
    ids = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if ids is None else ids
    outer = active_scope()
    if tokens is None:
        # Pixels: the model makes its own tokens, and all of them count. Or the dense model says what is missing.
        if outer is not None and outer.token_mask is None:
            yield outer
            return
        scope = RoutingScope(with_losses=with_losses)
    elif outer is not None and outer.token_mask is not None and outer.token_mask.shape == tokens.shape[:2]:
        yield outer
        return
    else:
        given, past = inputs.get("attention_mask"), inputs.get("past_key_values")
        mask = token_mask_of(given, tokens.shape[0], tokens.shape[1], tokens.device)
        positions = positions_of(given, inputs.get("position_ids"), _past_length(past), mask)
        scope = RoutingScope(mask, ids, positions, with_losses)
    with activate(scope):
        yield scope


def _past_length(past: Any) -> Any:
    """Number of tokens in the cache; 0 where it does not count them, as without attention layers."""
    try:
        return past.get_seq_length() if hasattr(past, "get_seq_length") else 0
    except ValueError:
        return 0


def _rebuilt(output_class: type[ModelOutput], dense: ModelOutput) -> Any:
    """The dense model's output as one of ours, with whatever else it carries."""
    names = output_class.__dataclass_fields__  # type: ignore[attr-defined]  # every output is a dataclass
    output = output_class(**{name: value for name, value in dense.items() if name in names})
    for name in {**dense.__dataclass_fields__, **dense}:  # type: ignore[attr-defined]
        # Heads may read any field of their base model's output, those that are None too.
        if name not in names:
            setattr(output, name, None)
            if dense.get(name) is not None:
                output[name] = dense[name]
    return output


def _saved_config(source: Any, kwargs: dict[str, Any]) -> STMoEConfig:
    """Config of a saved mixture, or the one that the caller gives instead."""
    given = kwargs.get("config")
    if isinstance(given, PreTrainedConfig):
        return given  # type: ignore[return-value]
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    found, _ = STMoEConfig.get_config_dict(given or source, **hub)
    if found.get("model_type") != STMoEConfig.model_type:
        raise ValueError(
            f"{source}: model_type must be 'st_moe', got {found.get('model_type')!r}; turn a dense checkpoint into a "
            "mixture with st_moe.upcycle"
        )
    return STMoEConfig.from_dict(found)


@contextmanager
def _experts_implementation(config: STMoEConfig, name: str) -> Iterator[None]:
    """Let `config` name another experts implementation for a while."""
    before = config._experts_implementation
    config._experts_implementation_internal = name
    try:
        yield
    finally:
        config._experts_implementation_internal = before


class STMoEModel(STMoEPreTrainedModel):
    """Sparse mixture of experts without a head: the dense family's base model with sparse FFNs.

    `STMoEModel(config)` returns an instance of the family's class, which is also an instance of the dense base class.

    Args:
        config: the mixture's config.
    """

    positional_names: ClassVar[tuple[str, ...]] = ()

    def _make_sparse(self, config: STMoEConfig) -> None:
        locations = locate_ffns(self)
        self._check_tied_ffns(locations)
        check_sparse_layers(locations, config.sparse_layer_indices)
        for position, index in enumerate(config.sparse_layer_indices):
            install_sparse_block(self, locations[index], SparseBlock(config, locations[index], position))
        self.post_init()

    def _check_tied_ffns(self, locations: list[FFNLocation]) -> None:
        """Refuse to make only some of the layers sparse that share an FFN by tied weights (Zamba)."""
        indices = set(self.config.sparse_layer_indices)
        for names in self.all_tied_weights_keys.items():
            tied = {ffn.layer for ffn in locations for name in names if name.startswith(f"{ffn.path}.")}
            if len(tied) > 1 and not tied <= indices and tied & indices:
                layers = ", ".join(map(str, sorted(tied)))
                alone = ", ".join(map(str, sorted(tied & indices)))
                raise ValueError(
                    f"sparse_layers: layers {layers} share one FFN, so all of them or none must be sparse, got "
                    f"{alone} alone"
                )

    def init_parallel_plans(self) -> None:
        """The host's plans, with the experts' rules as the experts at hand need them.

        Expert parallelism shards every expert tensor by expert. Tensor parallelism splits the width of gated experts
        without biases; others stay whole on every rank: their biases would be added once per rank, and an ungated
        projection needs another split.
        """
        super().init_parallel_plans()
        self._ep_plan = {}
        whole = set()
        for name, module in self.named_modules():
            if isinstance(module, STMoEExperts | ModuleExperts):
                place = re.sub(r"\.\d+\.", ".*.", name)
                parameters = [key for key, _ in module.named_parameters(recurse=False)]
                if parameters:
                    self._ep_plan |= {f"{place}.{key}": "grouped_gemm" for key in parameters}
                    self._ep_plan[place] = "ep_dispatch_experts"
                if set(parameters) != {"gate_up_proj", "down_proj"}:
                    whole.add(place)
        tp_plan = self.tp_plan.items()
        self._tp_plan = {rule: style for rule, style in tp_plan if not rule.startswith(tuple(whole) or "-")}

    @property
    def sparse_blocks(self) -> list[SparseBlock]:
        """The sparse blocks, in the order of the layers."""
        return [module for module in self.modules() if isinstance(module, SparseBlock)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense family's forward pass over sparse layers; arguments and output are the family's.

        Args:
            output_router_logits: also return `router_logits`, float32 [B * S, E] per run of a sparse layer.
        """
        kwargs |= dict(zip(self.positional_names, args, strict=False))
        want_logits, return_dict = self._take_flags(kwargs)
        with _scope_of(kwargs) as scope:
            dense = super().forward(**kwargs, **self.dense_arguments, return_dict=True)
        output = _rebuilt(STMoEModelOutput, dense)
        output.router_logits = tuple(routing.logits for routing in scope.records) if want_logits else None
        return output if return_dict else output.to_tuple()


def install_sparse_block(model: nn.Module, ffn: FFNLocation, block: SparseBlock) -> None:
    """Put a sparse block in the place of a located FFN."""
    if ffn.rule == "module":
        parent, _, name = ffn.path.rpartition(".")
        setattr(model.get_submodule(parent), name, block)
        return
    layer = model.get_submodule(ffn.path)
    if ffn.rule == "loose":
        layer.fc1, layer.activation_fn, layer.fc2 = block, nn.Identity(), nn.Identity()
    else:
        intermediate, output = (layer.get_submodule(name) for name in ("intermediate", "output"))
        intermediate.dense, intermediate.intermediate_act_fn, output.dense = block, nn.Identity(), nn.Identity()


class _Head(STMoEPreTrainedModel):
    """A dense family's head on the sparse base model, with the routers' losses in its output."""

    output_class: ClassVar[type[ModelOutput]]
    positional_names: ClassVar[tuple[str, ...]] = ()

    def _base_name(self) -> str:
        """Name under which the dense class holds its base model; the prefix may be that of a composite (Llama 4)."""
        models = [name for name, child in self.named_children() if isinstance(child, PreTrainedModel)]
        if hasattr(self, self.base_model_prefix) or len(models) != 1:
            return self.base_model_prefix
        return models[0]

    def _make_sparse(self, config: STMoEConfig) -> None:
        from st_moe.modeling.families import family_of

        self.base_model_prefix = self._base_name()
        dense_base = getattr(self, self.base_model_prefix)
        base = family_of(config.dense_model_type).base_class(type(dense_base))(config)
        for name in list(base._modules):
            # Some heads build their base model without a part, such as BERT's pooler.
            if getattr(dense_base, name, None) is None:
                setattr(base, name, None)
        setattr(self, self.base_model_prefix, base)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense family's forward pass and loss, plus the routers' losses; arguments are the family's.

        Args:
            output_router_logits: also return `router_logits`, float32 [B * S, E] per run of a sparse layer.
        """
        kwargs |= dict(zip(self.positional_names, args, strict=False))
        want_logits, return_dict = self._take_flags(kwargs)
        with_losses = self.training or kwargs.get("labels") is not None or want_logits
        with _scope_of(kwargs, with_losses) as scope:
            dense = super().forward(**kwargs, **self.dense_arguments, return_dict=True)
        output: Any = _rebuilt(self.output_class, dense)
        output.lm_loss = output.loss
        if want_logits:
            output.router_logits = tuple(routing.logits for routing in scope.records)
        if with_losses:
            self._add_losses(output, scope, self._loss_share(kwargs))
        return output if return_dict else output.to_tuple()

    def _add_losses(self, output: Any, scope: RoutingScope, share: Tensor | float) -> None:
        """Write the routers' losses and statistics into `output`, and in training add them to its loss.

        Of a layer that is run several times, they are the mean over its runs.
        """
        layers = len(self.config.sparse_layer_indices)
        if len(set(scope.layers)) < layers:
            raise RuntimeError(
                f"{len(set(scope.layers))} of {layers} sparse layers recorded their routing, so router losses would "
                "leave some out; compile the whole model, not its layers one by one"
            )
        device = scope.records[0].logits.device
        coefficients = self.config.loss_coefficients

        def per_layer(values: Iterable[Tensor]) -> Tensor:
            return torch.stack(scope.mean_over_runs([value.to(device) for value in values], layers))

        aux_losses = {name: per_layer(each[name] for each in scope.losses).mean() for name in scope.losses[0]}
        output.aux_losses = aux_losses
        output.balance_loss, output.router_z_loss = (aux_losses.get(name) for name in ("balance_loss", "router_z_loss"))
        terms = [coefficients[name] * loss for name, loss in aux_losses.items()]
        output.aux_loss = torch.stack(terms).sum() if terms else torch.zeros((), device=device)
        most = max(routing.logits.shape[-1] for routing in scope.records)
        load = (losses.expert_load(routing).detach() for routing in scope.records)
        output.expert_load = per_layer(nn.functional.pad(each, (0, most - each.shape[0])) for each in load)
        for name in ("router_entropy", "dropped_fraction"):
            output[name] = per_layer(getattr(losses, name)(routing).detach() for routing in scope.records)
        if self.training and output.loss is not None and any(coefficients[name] for name in aux_losses):
            output.loss = output.loss + (output.aux_loss * share).to(output.loss.device, output.loss.dtype)

    def _loss_share(self, kwargs: dict[str, Any]) -> Tensor | float:
        """Weight of this batch's auxiliary losses in the loss of the optimizer step."""
        return 1.0


class STMoEForCausalLM(_Head):
    """Sparse mixture of experts with the dense family's language-model head.

    `STMoEForCausalLM(config)` returns an instance of the family's class, which is also an instance of the dense class.

    Args:
        config: the mixture's config.
    """

    output_class = STMoECausalLMOutput

    def _loss_share(self, kwargs: dict[str, Any]) -> Tensor | float:
        # The language-model loss is divided by the label tokens of the whole step (all accumulated batches, all ranks);
        # scaling the auxiliary part by this batch's share of them keeps its coefficient what the config says.
        total = kwargs.get("num_items_in_batch")
        labels = kwargs.get("shift_labels")
        if labels is None and kwargs.get("labels") is not None:
            labels = kwargs["labels"][..., 1:]
        if total is None or labels is None:
            return 1.0
        share = (labels != -100).sum() / total
        return share.to(labels.device) if isinstance(share, Tensor) else share


class STMoEForSequenceClassification(_Head):
    """Sparse mixture of experts with the dense family's sequence-classification head.

    `STMoEForSequenceClassification(config)` returns an instance of the family's class.

    Args:
        config: the mixture's config.
    """

    output_class = STMoESequenceClassifierOutput
    # The classification loss is a mean over the batch's sequences and knows no step total: the Trainer has to average.
    accepts_loss_kwargs = False


class STMoEForTokenClassification(_Head):
    """Sparse mixture of experts with the dense family's token-classification head.

    `STMoEForTokenClassification(config)` returns an instance of the family's class.

    Args:
        config: the mixture's config.
    """

    output_class = STMoETokenClassifierOutput
    # As for sequences: the loss is a mean over the batch's labelled tokens.
    accepts_loss_kwargs = False


class STMoEForImageClassification(_Head):
    """Sparse mixture of experts with the dense family's image-classification head.

    `STMoEForImageClassification(config)` returns an instance of the family's class. Its tokens are the patches, and
    whatever the model adds to them; all of them count, and an image is a sequence.

    Args:
        config: the mixture's config.
    """

    output_class = STMoEImageClassifierOutput
    accepts_loss_kwargs = False
