"""Where a dense model keeps its feed-forward networks, and what they look like: rules and a table, no family names.

To add a layout: one row in `LAYOUTS`, one test. Shape letters: H hidden size, I FFN width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from st_moe.configuration import FFN_ATTRIBUTES, dense_config_of, num_ffn_layers


@dataclass(frozen=True)
class FFNLayout:
    """Names of an FFN's parts; one row of `LAYOUTS`.

    Attributes:
        projections_in: names of the linear layers H -> I: (gate, up), (gate and up fused,) or (up,).
        projection_out: name of the linear layer I -> H.
        gated: whether the activation of the gate multiplies up.
    """

    projections_in: tuple[str, ...]
    projection_out: str
    gated: bool

    def linears(self, module: nn.Module) -> list[Any]:
        """The projections of an FFN, out last; None in the place of those it lacks."""
        return [_get(module, name) for name in (*self.projections_in, self.projection_out)]


LAYOUTS: tuple[FFNLayout, ...] = (
    FFNLayout(("gate_proj", "up_proj"), "down_proj", gated=True),
    FFNLayout(("gate_up_proj",), "down_proj", gated=True),
    FFNLayout(("w1", "w3"), "w2", gated=True),
    FFNLayout(("Wi",), "Wo", gated=True),
    FFNLayout(("proj_up_gate", "proj_up"), "proj_down", gated=True),
    FFNLayout(("up_proj",), "down_proj", gated=False),
    FFNLayout(("fc1",), "fc2", gated=False),
    FFNLayout(("fc_in",), "fc_out", gated=False),
    FFNLayout(("c_fc",), "c_proj", gated=False),
    FFNLayout(("dense_h_to_4h",), "dense_4h_to_h", gated=False),
    FFNLayout(("w_in.w_0", "w_in.w_1"), "w_out", gated=True),
    FFNLayout(("lin1",), "lin2", gated=False),
    FFNLayout(("intermediate",), "output", gated=False),
    FFNLayout(("0",), "2", gated=False),
    FFNLayout(("intermediate.dense",), "output.dense", gated=False),
    FFNLayout(("input_linear",), "output_linear", gated=True),
)

#: Names that layers give to parts of any kind: an FFN only where a row of `LAYOUTS` matches.
SHARED_ATTRIBUTES = ("mixer",)

#: Names under which FFNs keep their activation, and the dropout of their output.
ACTIVATION_ATTRIBUTES = (
    "act_fn",
    "activation_fn",
    "act",
    "activation",
    "gelu_impl",
    "intermediate.intermediate_act_fn",
    "w_in.act",
    "1",
)
ACTIVATION_FIELDS = ("hidden_activation", "hidden_act", "activation_function", "activation", "ffn_activation")
OUTPUT_DROPOUT_ATTRIBUTES = ("dropout", "hidden_dropout", "residual_dropout")

# Numbers in an FFN that are no arithmetic of its own. Any other may be a multiplier, which 3-D tensors cannot hold.
_INERT_NUMBERS = ("pretraining_tp", "layer_idx", *OUTPUT_DROPOUT_ATTRIBUTES)


@dataclass(frozen=True)
class FFNLocation:
    """The feed-forward network of one decoder layer.

    Attributes:
        layer: index of the layer.
        path: dotted name of the FFN's module in the model; of the decoder layer, if the FFN lies loose in it.
        rule: `"module"` (a child module), `"loose"` (fc1, activation_fn, fc2 directly in the layer) or `"split"`
            (intermediate and output modules, as in BERT).
        module: the module at `path`.
        layout: the row of `LAYOUTS` that names its parts; None for experts held as modules.
        gated, bias, conv1d: whether it is gated, has biases, stores its weights transposed (Conv1D).
        hidden_size, intermediate_size: H and I; 0 without a layout.
        activation: the activation module; an identity without a layout.
        output_dropout: probability of the dropout on the FFN's output.
        adds_residual: whether the FFN is handed the residual and adds it.
        storage: `"tensors"`, `"modules"`, or `"none"` when the layer cannot be made sparse.
        reason: why the storage is not `"tensors"`; empty if it is.
    """

    layer: int
    path: str
    rule: str
    module: nn.Module = field(repr=False)
    layout: FFNLayout | None = None
    gated: bool = False
    bias: bool = False
    conv1d: bool = False
    hidden_size: int = 0
    intermediate_size: int = 0
    activation: nn.Module = field(default_factory=nn.Identity)
    output_dropout: float = 0.0
    adds_residual: bool = False
    storage: str = "none"
    reason: str = ""

    def linears(self) -> list[Any]:
        """The projections of the FFN, out last; empty without a layout."""
        return [] if self.layout is None else self.layout.linears(self.module)

    def describe(self) -> str:
        """One line for people."""
        if self.storage == "none":
            return f"layer {self.layer}: cannot be made sparse: {self.reason}"
        if self.layout is None:
            return f"layer {self.layer}: {self.path} ({type(self.module).__name__}), experts as modules: {self.reason}"
        kind = "gated" if self.gated else "ungated"
        fused = ", fused" if self.gated and len(self.layout.projections_in) == 1 else ""
        parts = f"{kind}{fused}{', Conv1D' if self.conv1d else ''}{', bias' if self.bias else ''}"
        activation = type(self.activation).__name__
        size = f"{self.hidden_size} -> {self.intermediate_size}"
        return f"layer {self.layer}: {self.path} ({parts}, {activation}, {size})"


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Dotted name and module of each decoder layer: the lists of modules that hold FFNs, in order.

    Raises:
        ValueError: when these are not as many as the config says.
    """
    count = num_ffn_layers(dense_config_of(model.config, type(model).__name__))
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and not inner and any(_find_in_layer(layer) for layer in module):
            stacks[name] = module
    found = [(f"{name}.{index}", layer) for name, stack in stacks.items() for index, layer in enumerate(stack)]
    if not found:
        raise ValueError(f"{type(model).__name__}: holds no list of layers with a feed-forward network to make sparse")
    if len(found) != count:
        sizes = ", ".join(f"{name} ({len(stack)})" for name, stack in stacks.items())
        raise ValueError(
            f"{type(model).__name__}: must have {count} layers with a feed-forward network among them, as its config "
            f"says, but the lists found are {sizes}; use a decoder or an encoder alone"
        )
    return found


def locate_ffns(model: PreTrainedModel) -> list[FFNLocation]:
    """Find the feed-forward network of each decoder layer.

    Args:
        model: a dense Transformers model, with weights or on the meta device.

    Returns:
        One location per layer, in order; `storage == "none"` with the reason where a layer cannot be made sparse.

    Raises:
        ValueError: when the decoder layers found are not as many as the config says.
    """
    layers = enumerate(decoder_layers(model))
    return [_locate(model, index, path, layer) for index, (path, layer) in layers]


def check_sparse_layers(locations: Sequence[FFNLocation], indices: Sequence[int]) -> None:
    """Refuse `sparse_layers` that name a layer without an FFN that can be replaced.

    Raises:
        ValueError: naming the first such layer, the reason, and the layers that can be sparse.
    """
    fault = next((locations[index] for index in indices if locations[index].storage == "none"), None)
    able = [ffn.layer for ffn in locations if ffn.storage != "none"]
    if fault is not None and able:
        raise ValueError(f"sparse_layers: {fault.describe()}; the layers that can be are sparse_layers={able}")
    if fault is not None:
        raise ValueError(f"sparse_layers: {fault.describe()}; no other layer can be either")


def _row_of(module: nn.Module) -> FFNLayout | None:
    """The row of `LAYOUTS` whose projections a module has."""
    return next((layout for layout in LAYOUTS if all(_is_linear(linear) for linear in layout.linears(module))), None)


def _find_in_layer(layer: nn.Module) -> tuple[str, str] | None:
    """Rule and attribute of the FFN in a decoder layer: the location rules, in order; "" is the layer itself."""
    for name in (*FFN_ATTRIBUTES, *SHARED_ATTRIBUTES):
        part = _get(layer, name)
        if isinstance(part, nn.Module) and (name not in SHARED_ATTRIBUTES or _row_of(part)):
            return "module", name
    layout = _row_of(layer)
    if layout is not None and not _odd_parts(layer, layout, numbers=False):
        return "module", ""
    if all(isinstance(getattr(layer, name, None), nn.Module) for name in ("fc1", "fc2")):
        return "loose", ""
    intermediate, output = (getattr(layer, name, None) for name in ("intermediate", "output"))
    if hasattr(intermediate, "dense") and hasattr(output, "dense"):
        return "split", ""
    return None


def _locate(model: nn.Module, index: int, path: str, layer: nn.Module) -> FFNLocation:
    found = _find_in_layer(layer)
    if found is None:
        names = ", ".join(name for name, _ in layer.named_children())
        return FFNLocation(index, path, "", layer, reason=f"no feed-forward network among its parts ({names})")
    rule, attribute = found
    module = layer.get_submodule(attribute)
    path = f"{path}.{attribute}" if attribute else path
    own = _own_experts(layer, module)
    if own:
        return FFNLocation(index, path, rule, module, reason=f"it holds experts of its own ({own})")
    layout = _row_of(module)
    if layout is not None:
        return _describe(model, index, path, rule, module, layout)
    reason = f"its parts ({', '.join(name for name, _ in module.named_children())}) match no row of LAYOUTS"
    return _as_modules(index, path, rule, module, reason)


def _describe(model: nn.Module, index: int, path: str, rule: str, module: nn.Module, layout: FFNLayout) -> FFNLocation:
    """Fill in a location whose layout is known; whatever 3-D tensors cannot hold is kept as modules."""
    linears = layout.linears(module)
    biases = {linear.bias is not None for linear in linears}
    activation = next((a for name in ACTIVATION_ATTRIBUTES if (a := _get(module, name)) is not None), None)
    if activation is None:
        name = next(
            (n for field in ACTIVATION_FIELDS if isinstance(n := getattr(model.config, field, None), str)), "silu"
        )
        activation = name
    if isinstance(activation, str):
        activation = ACT2FN[activation]
    conv1d = isinstance(linears[-1], Conv1D)
    out_features, in_features = linears[-1].weight.shape[::-1] if conv1d else linears[-1].weight.shape
    fused = layout.gated and len(layout.projections_in) == 1
    first = linears[0].weight.shape[1 if conv1d else 0]
    reason = ""
    if first != in_features * (2 if fused else 1):
        reason = f"projections of widths {first} and {in_features}"
    elif len(biases) > 1:
        reason = "only some of its projections have a bias"
    elif rule == "module":
        reason = _odd_parts(module, layout)
    elif rule == "split":
        # What stands before the projection (a norm) is applied before it, and stays where it is.
        names = [name for name, _ in module.get_submodule("intermediate").named_children()]
        odd = [name for name in names[names.index("dense") + 1 :] if name != "intermediate_act_fn"]
        reason = f"parts beyond two projections and an activation: {', '.join(odd)}" if odd else ""
    if not reason and (not isinstance(activation, nn.Module) or any(True for _ in activation.parameters())):
        reason = f"the activation {type(activation).__name__} is not an elementwise module without parameters"
    if reason:
        return _as_modules(index, path, rule, module, reason)
    return FFNLocation(
        layer=index,
        path=path,
        rule=rule,
        module=module,
        layout=layout,
        gated=layout.gated,
        bias=biases == {True},
        conv1d=conv1d,
        hidden_size=out_features,
        intermediate_size=in_features,
        activation=activation,
        output_dropout=_output_dropout(module) if rule == "module" else 0.0,
        adds_residual=_takes_residual(module),
        storage="tensors",
    )


def _as_modules(index: int, path: str, rule: str, module: nn.Module, reason: str) -> FFNLocation:
    """A location whose experts are whole modules, if the FFN is one; a refusal otherwise."""
    if rule != "module":
        return FFNLocation(index, path, rule, module, reason=reason)
    arguments = _positional_arguments(module)
    if len(arguments) != 1:
        reason = f"{type(module).__name__}.forward takes {', '.join(arguments)}, not the hidden states of a token alone"
        return FFNLocation(index, path, rule, module, reason=reason)
    return FFNLocation(index, path, rule, module, storage="modules", reason=reason)


def _own_experts(layer: nn.Module, ffn: nn.Module) -> str:
    """What says that a layer is a mixture already, in its FFN or beside it, or "": the host names such parts so."""
    named = (name for name, _ in layer.named_modules() if name.rpartition(".")[2] == "experts")
    return next(named, f"{type(ffn).__name__}.num_experts" if hasattr(ffn, "num_experts") else "")


def _get(module: nn.Module, dotted: str) -> Any:
    """Attribute of nested modules, or None."""
    current: Any = module
    for name in dotted.split("."):
        current = getattr(current, name, None)
    return current


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and module.weight.is_floating_point()


def _odd_parts(module: nn.Module, layout: FFNLayout, numbers: bool = True) -> str:
    """What an FFN holds beside projections, activation and dropout (and inert `numbers`), or "" if nothing."""
    expected = {name.split(".")[0] for name in (*layout.projections_in, layout.projection_out, *ACTIVATION_ATTRIBUTES)}
    children = [name for name, child in module.named_children() if not isinstance(child, nn.Dropout | nn.Identity)]
    odd = [name for name in children if name not in expected]
    odd += [name for name, _ in module.named_parameters(recurse=False)]
    odd += [
        name
        for name, value in vars(module).items()
        if numbers
        and type(value) in (int, float)
        and value not in (0, 1)
        and name not in _INERT_NUMBERS
        and not name.endswith(("_size", "_dim"))
    ]
    return f"parts beyond two projections and an activation: {', '.join(odd)}" if odd else ""


def _output_dropout(module: nn.Module) -> float:
    """Probability of the dropout that the FFN applies to its output."""
    used = inspect.unwrap(type(module).forward).__code__.co_names
    for name in OUTPUT_DROPOUT_ATTRIBUTES:
        # Falcon's FFN carries a dropout that its decoder layer applies.
        value = getattr(module, name, None) if name in used else None
        if isinstance(value, nn.Dropout):
            return value.p
        if isinstance(value, float):
            return value
    return 0.0


def _takes_residual(module: nn.Module) -> bool:
    """Whether the FFN's forward asks for the residual as its second argument (Bloom, MPT)."""
    names = _positional_arguments(module)
    return len(names) > 1 and names[1] in ("residual", "resid")


def _positional_arguments(module: nn.Module) -> list[str]:
    """Names of the positional arguments of a module's forward."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
