"""The family factory: for each dense family, one set of model classes, made once and on demand.

A family's class has two parents: the public class (`STMoEForCausalLM`) and the dense family's own (`Qwen3ForCausalLM`).
"""

from __future__ import annotations

import inspect
import sys
from functools import wraps
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder

from st_moe.configuration import STMoEConfig, family_config, on_new_family
from st_moe.modeling.modeling_st_moe import (
    STMoEForCausalLM,
    STMoEForImageClassification,
    STMoEForSequenceClassification,
    STMoEForTokenClassification,
    STMoEModel,
    STMoEPreTrainedModel,
)
from st_moe.modeling.outputs import STMoEModelOutput
from st_moe.modeling.routing import Router

#: Public class, the host's map from dense config to dense class, and the Auto class that finds the family's class.
KINDS: tuple[tuple[type[STMoEPreTrainedModel], Any, Any], ...] = (
    (STMoEModel, MODEL_MAPPING, AutoModel),
    (STMoEForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    (STMoEForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
    (STMoEForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoModelForTokenClassification),
    (STMoEForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification),
)


class Family:
    """The derived classes of one dense family, as attributes under their public names.

    Args:
        config_class: the family's config class.
    """

    def __init__(self, config_class: type[STMoEConfig]) -> None:
        self.STMoEConfig = config_class
        self.dense_model_type = config_class.dense_model_type
        for public, mapping, auto_class in KINDS:
            whole = config_class.whole_config_class if public is STMoEForImageClassification else None
            dense = mapping.get(whole or config_class.dense_config_class, None)
            if dense is None:
                continue
            dense = dense[0] if isinstance(dense, tuple) else dense
            model_class = _derive(public, dense, config_class)
            model_class.part_of_whole = whole is not None
            setattr(self, public.__name__, model_class)
            auto_class.register(config_class, model_class)

    def __getattr__(self, name: str) -> type[STMoEPreTrainedModel]:
        # A base model that only heads have, such as the decoder of an encoder-decoder model, under its dense name.
        heads = [vars(self).get(public.__name__) for public, _, _ in KINDS]
        modules = [sys.modules[head.dense_class.__module__] for head in heads if head is not None]
        dense = next((found for module in modules if (found := getattr(module, name, None))), None)
        if not (inspect.isclass(dense) and issubclass(dense, PreTrainedModel)):
            raise AttributeError(f"{type(self).__name__} {self.dense_model_type!r} has no attribute {name!r}")
        setattr(self, name, _derive(STMoEModel, dense, self.STMoEConfig, name))
        return vars(self)[name]

    def base_class(self, dense: type[PreTrainedModel]) -> type[STMoEPreTrainedModel]:
        """The family's class for the dense class of a head's base model."""
        usual = vars(self).get("STMoEModel")
        return usual if usual is not None and usual.dense_class is dense else getattr(self, dense.__name__)

    def model_class(self, name: str) -> type[STMoEPreTrainedModel]:
        """The family's class under a public name.

        Raises:
            ValueError: when the dense family has no class of that kind.
        """
        found = getattr(self, name, None)
        if found is None:
            raise ValueError(f"dense_model_type: {self.dense_model_type!r} has no dense class for {name}")
        return found


def _derive(
    public: type[STMoEPreTrainedModel],
    dense: type[PreTrainedModel],
    config_class: type[STMoEConfig],
    name: str | None = None,
) -> type[STMoEPreTrainedModel]:
    """A family's class: the public class's behaviour on the dense class; `name` is its place in `Family`."""
    signature = inspect.signature(dense.forward)
    names = tuple(key for key, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)

    @wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return public.forward(self, *args, **kwargs)

    output = getattr(public, "output_class", STMoEModelOutput)
    forward.__signature__ = _with_router_logits(signature, output)  # type: ignore[attr-defined]
    forward.__annotations__ = {**dense.forward.__annotations__, "return": output, "output_router_logits": bool | None}
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": f"{config_class.dense_model_type}.{name or public.__name__}",
        "__doc__": public.__doc__,
        "config_class": config_class,
        "dense_class": dense,
        "forward": forward,
        "positional_names": names[1:],
        "dense_arguments": {name: False for name in ("output_router_logits",) if name in signature.parameters},
        # Guessed by the host from the source of the class's module: ask the dense class about its own.
        "_can_set_attn_implementation_cached_value": dense._can_set_attn_implementation(),
    }
    if public is STMoEModel:
        # For tools of the host that read what a model can record; the models themselves use the routing scope.
        recorders = {**(dense._can_record_outputs or {}), "router_logits": OutputRecorder(Router, index=0)}
        namespace["_can_record_outputs"] = recorders
    return type(public.__name__, (public, dense), namespace)


def _with_router_logits(signature: inspect.Signature, output: type) -> inspect.Signature:
    """The dense signature with `output_router_logits` added, as tools that read signatures should see it."""
    parameters = [p for name, p in signature.parameters.items() if name != "output_router_logits"]
    extra = inspect.Parameter("output_router_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*parameters[:at], extra, *parameters[at:]], return_annotation=output)


_FAMILIES: dict[str, Family] = {}


def _make_family(config_class: type[STMoEConfig]) -> None:
    if config_class.dense_model_type not in _FAMILIES:
        _FAMILIES[config_class.dense_model_type] = Family(config_class)


def family_of(dense_model_type: str) -> Family:
    """The derived classes of a dense family.

    Raises:
        ValueError: when Transformers has no such dense family.
    """
    family_config(dense_model_type)
    return _FAMILIES[dense_model_type]


for _public, _, _auto_class in KINDS:
    _auto_class.register(STMoEConfig, _public)
on_new_family(_make_family)


def __getattr__(name: str) -> Family:
    """Resolve `<dense_model_type>` so that classes made here pickle; the family is made on demand."""
    if name.startswith("_"):  # as every import asks for `__path__`; to know the families takes their configs' import
        raise AttributeError(f"module {sys.modules[__name__].__name__!r} has no attribute {name!r}")
    try:
        return family_of(name)
    except ValueError:
        raise AttributeError(f"module {sys.modules[__name__].__name__!r} has no attribute {name!r}") from None
