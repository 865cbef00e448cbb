"""How the routers of a new mixture start: without text, or from what they will see of given text.

To add a way: one function, one line in `ROUTER_INITS`, one test. Shape letters: B sequences, S tokens of one, n tokens
of a text, H hidden size, R router rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from st_moe.conversion.partition import balanced_kmeans
from st_moe.conversion.proof import evaluating, input_device, tokens_of
from st_moe.modeling.ffn import FFNLocation
from st_moe.modeling.modeling_st_moe import STMoEPreTrainedModel
from st_moe.modeling.routing import Router
from st_moe.modeling.sparse_block import SparseBlock

#: A text, several texts, or token ids int64 [B, S].
Text = str | Sequence[str] | Tensor
#: What one router sees of one set of texts: float32 [n, H] for each text.
RouterInputs = list[Tensor]


def normal(
    count: int, hidden_size: int, generator: torch.Generator, inputs: Sequence[RouterInputs], *, std: float = 0.02
) -> Tensor:
    """Rows from N(0, std^2)."""
    return torch.randn(count, hidden_size, generator=generator) * _size("std", std)


def zeros(count: int, hidden_size: int, generator: torch.Generator, inputs: Sequence[RouterInputs]) -> Tensor:
    """Rows of zeros: every token takes the first K experts, until training breaks the tie."""
    return torch.zeros(count, hidden_size)


def prompts(
    count: int, hidden_size: int, generator: torch.Generator, inputs: Sequence[RouterInputs], *, scale: float = 1.0
) -> Tensor:
    """Row e is the mean router input of the e-th set of prompts, made as long as `scale`.

    The mean is taken over the tokens of each prompt, then over the prompts. The idea is mergekit's, which takes layer
    inputs instead of what the router sees.

    Raises:
        ValueError: when there is not one set per row.
    """
    if len(inputs) != count:
        raise ValueError(f"texts: must be one set of prompts for each of the {count} router rows, got {len(inputs)}")
    means = torch.stack([torch.stack([text.mean(0) for text in texts]).mean(0) for texts in inputs])
    return _of_length(means, scale)


def cluster(
    count: int, hidden_size: int, generator: torch.Generator, inputs: Sequence[RouterInputs], *, scale: float = 1.0
) -> Tensor:
    """The rows are the centres of a balanced k-means over the router's inputs, made as long as `scale`.

    After LLaMA-MoE v2, which clusters hidden states.

    Raises:
        ValueError: when there are fewer tokens than rows.
    """
    tokens = torch.cat([text for texts in inputs for text in texts])
    if len(tokens) < count:
        raise ValueError(f"texts: must hold at least {count} tokens, one per router row, got {len(tokens)}")
    _, centres = balanced_kmeans(tokens, count, generator)
    return _of_length(centres, scale)


class RouterInit(NamedTuple):
    """A row of `ROUTER_INITS`.

    Attributes:
        function: takes R, H, a generator, the router's inputs set by set, and the options; gives float32 [R, H].
        reads_text: whether it needs those inputs.
    """

    function: Callable[..., Tensor]
    reads_text: bool


ROUTER_INITS: dict[str, RouterInit] = {
    "normal": RouterInit(normal, reads_text=False),
    "zeros": RouterInit(zeros, reads_text=False),
    "prompts": RouterInit(prompts, reads_text=True),
    "cluster": RouterInit(cluster, reads_text=True),
}


class RouterStart(NamedTuple):
    """How the routers of a mixture start: the arguments of `upcycle`, checked by `check_router_init`.

    Attributes:
        init, options: a key of `ROUTER_INITS` and its options.
        texts, tokenizer: what ways that read text read.
    """

    init: str = "normal"
    options: Mapping[str, Any] = {}
    texts: Sequence[Text] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def is_own_rule(self) -> bool:
        """Whether routers are left as they draw themselves."""
        return self.init == "normal" and not self.options


def check_router_init(name: str, options: Mapping[str, Any], texts: Sequence[Text] | None) -> RouterInit:
    """The way of that name, if it takes these options and has the text that it needs.

    Raises:
        ValueError: when the name or an option is at fault, or text is missing or not read.
    """
    if name not in ROUTER_INITS:
        raise ValueError(f"router_init: must be one of {', '.join(ROUTER_INITS)}, got {name!r}")
    way = ROUTER_INITS[name]
    parameters = inspect.signature(way.function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = sorted(str(option) for option in options if option not in known)
    if unknown:
        raise ValueError(f"router_options: {name!r} takes {', '.join(known) or 'none'}, got {', '.join(unknown)}")
    for option in ("std", "scale"):
        if option in options:
            _size(option, options[option])
    if way.reads_text != bool(texts is not None and len(texts)):
        rule = "must be given" if way.reads_text else "must be left out, for it reads none,"
        raise ValueError(f"router_texts: {rule} with router_init {name!r}, got {texts!r}")
    if isinstance(texts, str | Tensor):
        raise ValueError("router_texts: must be a list, of which each entry is a text, some texts or token ids")
    return way


def initialise_routers(
    model: STMoEPreTrainedModel,
    init: str = "normal",
    *,
    texts: Sequence[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    shared_rows: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> None:
    """Give every router of a mixture new rows, in place.

    Ways that read text run the model, as it is, in evaluation mode, and take what reaches each router.

    Args:
        model: a mixture whose routers have one row per expert.
        init: a key of `ROUTER_INITS`.
        texts: for `"prompts"` one entry per expert, for `"cluster"` any; an entry is a text, some texts, or ids [B, S].
        tokenizer: needed for text.
        seed: of what is random; every layer has its own stream.
        shared_rows: per sparse layer, int64 [E]: experts with the same number share a row; None gives each its own.
        options: of the way.

    Raises:
        ValueError: when an argument is at fault, or the model has no such routers or no weights.
    """
    check_router_init(init, options, texts)
    gates = [module.gate for module in model.modules() if isinstance(module, SparseBlock)]
    for gate in gates:
        check_rows(gate, init)
    seen = inputs_of_modules(model, gates, texts or (), tokenizer)
    shared = [None] * len(gates) if shared_rows is None else shared_rows
    for gate, inputs, rows, index in zip(gates, seen, shared, model.config.sparse_layer_indices, strict=True):
        rows = torch.arange(gate.num_experts) if rows is None else rows
        start_router(gate, init, inputs, rows, seed, index, options)


def check_rows(gate: Router, init: str) -> None:
    """Refuse a router without one row per expert.

    Raises:
        ValueError: naming the router.
    """
    weight = getattr(gate, "weight", None)
    if weight is None or len(weight) != gate.num_experts:
        raise ValueError(
            f"router_init: {init!r} needs a router with one row per expert, and {type(gate).__name__} has none; choose "
            "another router_type"
        )


@torch.no_grad()
def start_router(
    gate: Router, init: str, inputs: Sequence[RouterInputs], rows: Tensor, seed: int, layer: int, options: Any
) -> None:
    """Give one router new rows, in place.

    Args:
        gate: with one row per expert.
        init, options: the way and its options, both checked.
        inputs: what the router sees, per set of texts.
        rows: int64 [E]; experts with the same number share a row.
        seed: of what is random.
        layer: index of the decoder layer; every layer has its own stream.
    """
    different, row_of = rows.unique(return_inverse=True)
    # Not the stream that drew the experts.
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + layer)
    weight: Any = gate.weight
    drawn = ROUTER_INITS[init].function(len(different), weight.shape[1], generator, inputs, **options)
    weight.copy_(drawn[row_of])


def router_inputs(
    model: STMoEPreTrainedModel, inputs: Text, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[RouterInputs]:
    """What reaches each router of a mixture: per sparse layer, per text, float32 [n, H] on the CPU.

    Args:
        model: the mixture.
        inputs: a text or texts (with `tokenizer`), or token ids int64 [B, S].
        tokenizer: needed for text.

    Raises:
        ValueError: when text comes without a tokenizer, ids have the wrong shape, or the model has no weights.
    """
    gates = [module.gate for module in model.modules() if isinstance(module, SparseBlock)]
    return [sets[0] for sets in inputs_of_modules(model, gates, [inputs], tokenizer)]


def inputs_of_ffns(
    dense: PreTrainedModel,
    ffns: Sequence[FFNLocation],
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[list[RouterInputs]]:
    """As `inputs_of_modules`, for the routers that will stand where these FFNs of a dense model stand."""
    entries = [ffn.module if ffn.rule == "module" else ffn.linears()[0] for ffn in ffns]
    return inputs_of_modules(dense, entries, texts, tokenizer)


def inputs_of_modules(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[list[RouterInputs]]:
    """What reaches each module: per module, per set of texts, per text, float32 [n, H] on the CPU.

    All of it is kept: tokens times H numbers per module.

    Raises:
        ValueError: when text comes without a tokenizer, ids have the wrong shape, or the model has no weights.
    """
    seen: list[list[RouterInputs]] = [[] for _ in modules]
    if texts and model.device.type == "meta" and not hasattr(model, "hf_device_map"):
        raise ValueError("model: must have weights to start routers from text, got one on the meta device")
    for text in texts:
        for layer in seen:
            layer.append([])
        # One at a time: where padding stands on the left, some families give the text behind it other positions.
        for one in [text] if isinstance(text, str | Tensor) else text:
            ids, mask = tokens_of(model, one, tokenizer)
            with _catching(modules) as caught, evaluating(model), torch.no_grad():
                # Without a head, whose logits of all tokens would be large.
                model.base_model(input_ids=ids.to(input_device(model)), attention_mask=mask.to(input_device(model)))
            for layer, module in zip(seen, modules, strict=True):
                # A layer that is run several times sees the text as often.
                if any(hidden.numel() != ids.numel() * hidden.shape[-1] for hidden in caught[module]):
                    raise ValueError(
                        f"router_init: {type(model).__name__} routes other tokens than those of the text, so its "
                        "routers cannot start from text; choose 'normal' or 'zeros'"
                    )
                calls = torch.stack([hidden.view(*ids.shape, -1) for hidden in caught[module]], dim=1)
                layer[-1].extend(sequence.flatten(0, 1) for sequence in calls)
    return seen


@contextmanager
def _catching(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """What reaches each module meanwhile, call by call."""
    caught: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def catch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        caught[module].append(arguments[0].float().cpu())

    hooks = [module.register_forward_pre_hook(catch) for module in caught]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def _of_length(rows: Tensor, scale: float) -> Tensor:
    """Rows [R, H] made as long as `scale`; rows of zeros stay."""
    return nn.functional.normalize(rows, dim=-1) * _size("scale", scale)


def _size(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"router_options: {name} must be a number that is finite and not negative, got {value!r}")
    return float(value)
