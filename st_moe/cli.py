"""The command line: thin, each command one call into the rooms. Heavy imports wait until a command runs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    help="Sparse mixtures of experts from any dense Transformers model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_INTERRUPTED = 130  # exit code, as of the shell

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Any other field, e.g. --set router_jitter_noise=0.01; repeatable."
    ),
]


def main() -> None:
    """Entry point of `st-moe`: what a user can cause ends in one line on stderr and exit code 2."""
    from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError

    try:
        app()
    except (ValueError, OSError, HfHubHTTPError, StrictDataclassError) as error:
        _fail(str(error) or type(error).__name__)
    except SystemExit as end:
        if end.code != _INTERRUPTED:
            raise
        _fail("interrupted", code=_INTERRUPTED)  # typer ends without a word


@app.command(epilog="Example: st-moe upcycle Qwen/Qwen3-0.6B ./qwen3-8x --num-experts 8 --top-k 2")
def upcycle(
    source: Annotated[str, typer.Argument(help="Dense model: a folder, or a name on the Hub.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    num_experts: Annotated[int, typer.Option(help="Experts per sparse layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    sparse_layers: Annotated[
        str | None, typer.Option(help="every:k, every:k:first, last:k or indices such as 1,3,5; all if left out.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="How experts are made: copy, noise, drop, split, granular, shared or merge.")
    ] = "copy",
    recipe_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the recipe, e.g. ratio=0.5; repeatable.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Another model, for the recipe merge; repeatable.")
    ] = None,
    router_std: Annotated[float, typer.Option(help="Standard deviation of the routers' weights.")] = 0.02,
    router_init: Annotated[
        str, typer.Option(help="How routers start: normal (by their own rule), zeros, prompts or cluster.")
    ] = "normal",
    router_texts: Annotated[
        Path | None, typer.Option(help="File with one text per line, for routers that start from text.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    verify: Annotated[bool, typer.Option(help="Compare step 0 with the dense model.")] = True,
    proof_text: Annotated[
        Path | None, typer.Option(help="File with a text to compare step 0 on; left out, a text of this package.")
    ] = None,
    require_identity: Annotated[
        float | None, typer.Option(help="Largest relative difference of step 0 that is accepted, e.g. 1e-4.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    bundle_code: Annotated[
        bool,
        typer.Option("--bundle-code", help="Also write the code, to load without this package."),
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="NAME", help="Upload the result to the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing destination.")] = False,
    settings: Settings = None,
) -> None:
    """Turn a dense checkpoint into a mixture of experts, and prove that step 0 computes the same function."""
    from st_moe.conversion.card import plan_table
    from st_moe.conversion.folder import plan_checkpoint, upcycle_checkpoint

    own: dict[str, Any] = {
        "source": [source, *also] if also else source,
        "recipe": recipe,
        "recipe_options": _pairs("--recipe-option", recipe_option),
        "router_std": router_std,
        "seed": seed,
        "router_init": router_init,
        "router_texts": None if router_texts is None else router_texts.read_text(encoding="utf-8").splitlines(),
        "max_shard_size": max_shard_size,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "sparse_layers": None if sparse_layers is None else _layers(sparse_layers),
    }
    if dry_run:
        Console().print(plan_table(plan_checkpoint(**_joined(own, settings)), destination))
        return
    own |= {
        "destination": destination,
        "overwrite": overwrite,
        "verify": verify,
        "proof_text": None if proof_text is None else proof_text.read_text(encoding="utf-8"),
        "require_identity": require_identity,
        "bundle_code": bundle_code,
        "push_to_hub": push_to_hub,
    }
    upcycle_checkpoint(**_joined(own, settings))
    _say(f"written: {destination}")


@app.command(epilog="Example: st-moe finetune ./qwen3-8x --data my.jsonl --output ./out --max-steps 1000 --bf16")
def finetune(
    model: Annotated[str, typer.Argument(help="Mixture: a folder, or a name on the Hub.")],
    data: Annotated[str, typer.Option(help="jsonl file, folder of text files, or data set on the Hub.")],
    output: Annotated[Path, typer.Option(help="Folder of checkpoints, logs and the final model.")],
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per training block; 512, or fewer if the model's positions end before.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps; -1 follows --epochs.")] = -1,
    batch_size: Annotated[int, typer.Option(help="Blocks per device and forward pass.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Forward passes per optimizer step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-5,
    eval_fraction: Annotated[float, typer.Option(help="Share of the blocks held out for eval_loss.")] = 0.05,
    bf16: Annotated[bool, typer.Option(help="Mixed precision with bfloat16.")] = False,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations to save memory.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of dropout.")] = 42,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
    settings: Settings = None,
) -> None:
    """Fine-tune a mixture with the Trainer, every router loss in its logs."""
    from st_moe.finetune.run import finetune as run

    own: dict[str, Any] = {
        "model": model,
        "data": data,
        "output": output,
        "max_length": max_length,
        "eval_fraction": eval_fraction,
        "resume": resume,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": learning_rate,
        "bf16": bf16,
        "seed": seed,
    }
    if checkpointing:
        own[_checkpointing_field()] = True
    # A first line at once, so that a report can be drawn from the start.
    defaults = {"logging_steps": 10, "logging_first_step": True}
    metrics = run(**{**defaults, **_joined(own, settings)})
    losses = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("train_loss", "eval_loss") if name in metrics)
    _say(f"{losses}; saved in {output}")


@app.command(epilog="Example: st-moe inspect ./qwen3-8x --layers")
def inspect(
    model: Annotated[str, typer.Argument(help="Mixture: a folder, or a name on the Hub.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row per layer.")] = False,
) -> None:
    """Show what a mixture costs: parameters, FLOPs per token, memory. No weights are read."""
    from st_moe.conversion import check_checkpoint
    from st_moe.conversion.checkpoint import mixture_config
    from st_moe.finetune.costs import cost_tables, count_costs

    check_checkpoint(model, needs_weights=False)
    config = mixture_config(model)
    for table in cost_tables(config, count_costs(config), per_layer=layers):
        Console().print(table)


@app.command(epilog="Example: st-moe report ./out")
def report(
    output: Annotated[Path, typer.Argument(help="Output folder of a finished or running training.")],
    destination: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; the output folder if left out.")
    ] = None,
) -> None:
    """Draw the losses and the expert load of a training."""
    from st_moe.finetune.report import draw_report, summary_table

    drawn = draw_report(output, destination)
    Console().print(summary_table(output))
    for path in drawn:
        _say(f"drawn: {path}")


@app.command(epilog="Example: st-moe export ./out --to qwen3_moe ./out-qwen3-moe")
def export(
    model: Annotated[str, typer.Argument(help="Mixture: a folder, or a name on the Hub.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(help="Native architecture such as mixtral or qwen3_moe, or dense for one FFN per layer."),
    ] = None,
    experts: Annotated[
        str, typer.Option(help="With --to dense: average, or the number of the expert to keep.")
    ] = "average",
    format: Annotated[
        str, typer.Option(help="native, or per-expert for our own checkpoint with one tensor per expert.")
    ] = "native",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing destination.")] = False,
) -> None:
    """Write a mixture for other tools: a native Transformers checkpoint with equal logits, or a dense model."""
    from st_moe.conversion import export_dense, export_native, export_per_expert

    if format not in ("native", "per-expert"):
        raise ValueError(f"--format: must be native or per-expert, got {format!r}")
    if (to is None) != (format == "per-expert"):
        raise ValueError("--to: name the architecture to write, or give --format per-expert without it")
    if experts != "average" and to != "dense":
        raise ValueError(f"--experts: is for --to dense, got {experts!r}")
    if to is None:
        export_per_expert(model, destination, overwrite=overwrite)
    elif to == "dense":
        number = int(experts) if experts.isdecimal() else experts
        export_dense(model, destination, experts=number, overwrite=overwrite)
    else:
        proof = export_native(model, to, destination, overwrite=overwrite)
        _say(f"largest relative logit difference: {proof.max_relative_difference:.1e}")
    _say(f"written: {destination}")


@app.command("import", epilog="Example: st-moe import mistralai/Mixtral-8x7B-v0.1 ./mixtral")
def import_(
    model: Annotated[str, typer.Argument(help="Native mixture: a folder, or a name on the Hub.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    family: Annotated[
        str | None, typer.Option(help="Dense family of the result, such as llama; the first that fits if left out.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing destination.")] = False,
) -> None:
    """Turn a native mixture of Transformers into one of this project, with equal logits."""
    from st_moe.conversion import import_checkpoint

    import_checkpoint(model, destination, family=family, overwrite=overwrite)
    _say(f"written: {destination}")


@app.command(epilog="Example: st-moe demo --fast")
def demo(
    output: Annotated[Path, typer.Option(help="Folder of models, logs and pictures.")] = Path("st-moe-demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A much smaller run, to see that everything works.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Go the whole way on text that every Python carries: train, upcycle, prove, fine-tune, compare, report."""
    from st_moe.demo import run_demo

    run_demo(output, fast=fast, seed=seed)


def _pairs(option: str, pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE words as a dictionary; values are Python literals, or else text."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not name or not separator:
            raise ValueError(f"{option}: must be NAME=VALUE, got {pair!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _joined(own: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """A command's own options and what `--set` gives beside them."""
    pairs = _pairs("--set", settings)
    twice = sorted(own.keys() & pairs.keys())
    if twice:
        raise ValueError(f"--set: {', '.join(twice)} has an option of its own; see --help")
    return {**own, **pairs}


def _layers(text: str) -> list[int] | str:
    """`"1,3,5"` as indices; other forms are checked by the config."""
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().isdecimal() for part in parts) else text


def _checkpointing_field() -> str:
    """Name of the training argument that turns activation checkpointing on in the installed Transformers."""
    from transformers import TrainingArguments

    name = "activation_checkpointing"
    return name if name in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


def _say(text: str) -> None:
    """A line for the user, whatever the width of the terminal, so that a path in it can be copied."""
    Console(soft_wrap=True).print(escape(text))


def _fail(message: str, code: int = 2) -> NoReturn:
    # One line, whatever the message: logs and scripts read it line by line.
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(line)}")
    raise SystemExit(code)
