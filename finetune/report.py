"""Plots and a table of a fine-tuning run, finished or running, from the `router_log.jsonl` in its output folder.

Shapes: L sparse layers, E experts, N log entries that carry expert loads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from st_moe.finetune.trainer import ROUTER_LOG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

LOSS_PLOT = "losses.png"
LOAD_PLOT = "expert_load.png"
AVERAGED_ENTRIES = 10  # the heat map is a mean over the last entries: one entry sees few batches and is noisy
MAX_ANNOTATED_SHAPE = (8, 16)  # up to this [L, E] the numbers fit their cells
MAX_NAMED_LAYERS = 8
DOTS_PER_INCH = 100  # with figures 12 inches wide: 1200 pixels

_FEW_POINTS = 30  # up to here every point gets a marker, so that a run of one line shows something


@dataclass
class RunLog:
    """The entries of one run, each a checked log line, in the order of their steps."""

    training: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        entries = self.evaluation if name.startswith("eval_") else self.training
        points = [(entry["step"], float(entry[name])) for entry in entries if name in entry]
        return [step for step, _ in points], [value for _, value in points]

    def loads(self) -> tuple[list[int], list[int], np.ndarray]:
        """Steps `[N]`, layer indices `[L]` and shares of assignments relative to balanced `[N, L, E]`.

        Entries with another shape than the last one (the folder was used for another model before) are left out. NaN
        fills up the rows of layers with fewer experts than others.
        """
        entries = [entry for entry in self.training if "expert_load" in entry]
        if not entries:
            return [], [], np.zeros((0, 0, 0))
        layers, shape = entries[-1]["layers"], entries[-1]["expert_load"].shape
        same = [entry for entry in entries if entry["layers"] == layers and entry["expert_load"].shape == shape]
        shares = np.stack([entry["expert_load"] for entry in same])
        experts = np.array([entries[-1]["experts"]])[..., None]
        return [entry["step"] for entry in same], layers, shares * experts


def read_log(output_dir: str | Path) -> RunLog:
    """Read `OUTPUT_DIR/router_log.jsonl`.

    A resumed or repeated run writes steps again that the file already has: the later line counts, and what an
    abandoned run wrote beyond it is dropped. A last line without an end of line is being written and is passed over.

    Raises:
        ValueError: there is no log, it has no entry yet, or a line breaks the schema (with its number).
    """
    path = Path(output_dir) / ROUTER_LOG
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a report needs the output folder of an STMoETrainer run")
    log = RunLog()
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            place = f"{path}, line {number}"
            try:
                entry = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                if not raw.endswith(b"\n"):
                    break
                raise ValueError(f"{place}: must be one JSON object, {error}: got {raw[:80]!r}") from None
            _check_entry(entry, place)
            _add_entry(log, entry)
    if not log.training and not log.evaluation:
        raise ValueError(f"{path}: holds no training or evaluation entry yet")
    return log


def draw_report(output_dir: str | Path, destination: str | Path | None = None) -> list[Path]:
    """Draw the losses and, where the run has sparse layers, the expert load of a finished or running training.

    Args:
        output_dir: the Trainer's output folder, with `router_log.jsonl`.
        destination: folder for the plots, made if need be; `output_dir` if None.

    Returns:
        The files written: `losses.png`, and `expert_load.png` if the log carries expert loads.

    Raises:
        ValueError: the log is missing, empty or broken (see `read_log`), or `destination` is a file.
    """
    log = read_log(output_dir)
    folder = Path(output_dir if destination is None else destination)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"destination must be a folder, {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    plots = {LOSS_PLOT: _draw_losses(log)}
    if log.loads()[0]:
        plots[LOAD_PLOT] = _draw_loads(log)
    for name, figure in plots.items():
        figure.savefig(folder / name, dpi=DOTS_PER_INCH)
    return [folder / name for name in plots]


def summary_table(output_dir: str | Path) -> Table:
    """Last value of every metric of a run, its unit, and what it is at perfect balance.

    Raises:
        ValueError: the log is missing, empty or broken (see `read_log`).
    """
    from rich.table import Table

    log = read_log(output_dir)
    _, layers, loads = log.loads()
    experts = loads.shape[2]
    last_step = max(entries[-1]["step"] for entries in (log.training, log.evaluation) if entries)
    shape = f", sparse layers: {len(layers)}, experts: {experts}" if experts else ""
    table = Table(title=f"Router log up to step {last_step}{shape}")
    for heading in ("metric", "step", "value", "unit", "at balance"):
        table.add_column(
            heading, justify="right" if heading in ("step", "value") else "left", no_wrap=heading != "unit"
        )
    busiest = ""
    if experts:
        layer, expert = np.unravel_index(int(np.nan_to_num(loads[-1]).argmax()), loads[-1].shape)
        busiest = f" (layer {layers[layer]}, expert {expert})"
    for name, unit, balanced in _METRICS:
        steps, values = log.series(name)
        if values:
            unit += busiest if name == "router/max_load" else ""
            table.add_row(name, str(steps[-1]), f"{values[-1]:.4g}", unit, balanced)
    return table


# Name in the log, unit, and value of a perfectly balanced router; a uniform router has the entropy 1.
_METRICS = (
    ("loss", "nats/token + router losses", "-"),
    ("lm_loss", "nats/token", "-"),
    ("eval_loss", "nats/token", "-"),
    ("balance_loss", "no unit", "1.0"),
    ("router_z_loss", "squared logit", "-"),
    ("sequence_balance_loss", "no unit", "1.0"),
    ("second_place_loss", "no unit", "0.5"),
    ("importance_loss", "squared variation", "0"),
    ("load_loss", "squared variation", "0"),
    ("diversity_loss", "no unit", "-"),
    ("simplicity_loss", "no unit", "-"),
    ("top_any_balance_loss", "no unit", "-"),
    ("efficiency_loss", "fraction of the experts", "-"),
    ("depth_loss", "nats/token", "-"),
    ("router/entropy", "fraction of ln(experts)", "<= 1.0"),
    ("router/max_load", "x balanced", "1.0"),
    ("router/dead_experts", "experts", "0"),
    ("router/active_experts", "experts per layer", "-"),
)


# ------------------------------------------------------------------------------------------------ reading the log


def _check_entry(entry: Any, place: str) -> None:
    """Raise a ValueError that names the field if a line does not follow the schema; loads become an array."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be a JSON object, got {type(entry).__name__}")
    step = entry.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{place}: field 'step' must be a whole number >= 0, got {step!r}")
    for name, *_ in _METRICS:
        value = entry.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{place}: field {name!r} must be a number, got {value!r}")
    if entry.get("expert_load"):
        given = entry["expert_load"]
        entry["expert_load"] = _checked_loads(given, entry.get("layers"), place)
        entry["experts"] = [len(row) for row in given]
    else:
        entry.pop("expert_load", None)  # a dense model has no sparse layers to show


def _checked_loads(loads: Any, layers: Any, place: str) -> np.ndarray:
    """Expert loads `[L, E]` as an array (a long run's lists of Python numbers would fill the memory).

    Layers may differ in their number of experts; NaN fills up the shorter rows.
    """
    try:
        rows = [np.asarray(row, dtype=np.float32) for row in loads]
    except (ValueError, TypeError):
        rows = []
    if not rows or any(row.ndim != 1 for row in rows):
        raise ValueError(f"{place}: field 'expert_load' must be one list of numbers per layer")
    array = np.full((len(rows), max(map(len, rows))), np.nan, dtype=np.float32)
    for place_of_row, row in zip(array, rows, strict=True):
        place_of_row[: len(row)] = row
    if not isinstance(layers, list) or len(layers) != len(array) or not all(type(layer) is int for layer in layers):
        raise ValueError(
            f"{place}: field 'layers' must list one index for each of the {len(array)} rows of 'expert_load', "
            f"got {layers!r}"
        )
    return array


def _add_entry(log: RunLog, entry: dict[str, Any]) -> None:
    """Put an entry in its list; lines of neither kind (run time at the end of training) are left out."""
    step = entry["step"]
    newest = max((entries[-1]["step"] for entries in (log.training, log.evaluation) if entries), default=-1)
    if step < newest:  # resumed from an earlier checkpoint: what was logged from here on belongs to the lost run
        _drop_from(log.training, step)
        _drop_from(log.evaluation, step)
    entries = log.evaluation if "eval_loss" in entry else log.training
    if "eval_loss" in entry or "loss" in entry or "expert_load" in entry:
        _drop_from(entries, step)
        entries.append(entry)


def _drop_from(entries: list[dict[str, Any]], step: int) -> None:
    while entries and entries[-1]["step"] >= step:
        entries.pop()


# ------------------------------------------------------------------------------------------------ losses


def _draw_losses(log: RunLog) -> Figure:
    """One wide panel for the language-model losses, one each for the two router losses (where logged)."""
    figure = _new_figure(12, 6.5)
    router = [name for name in ("balance_loss", "router_z_loss") if log.series(name)[0]]
    if router:
        grid = figure.add_gridspec(len(router), 2, width_ratios=(3, 2))
        main = figure.add_subplot(grid[:, 0])
        panels = {name: figure.add_subplot(grid[row, 1]) for row, name in enumerate(router)}
    else:
        main, panels = figure.add_subplot(), {}
    _draw_language_losses(main, log)
    if "balance_loss" in panels:
        axes = panels["balance_loss"]
        _line(axes, log, "balance_loss", color="tab:purple")
        axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="perfect balance (1.0)")
        _dress(axes, "Balance loss", "balance_loss (no unit)")
        _legend_above_lines(axes)
    if "router_z_loss" in panels:
        axes = panels["router_z_loss"]
        _line(axes, log, "router_z_loss", color="tab:brown")
        _dress(axes, "Router z-loss", "router_z_loss (squared logit)")
        _legend_above_lines(axes)
    return figure


def _draw_language_losses(axes: Axes, log: RunLog) -> None:
    _line(axes, log, "loss", label="loss (with router losses)", color="tab:gray", linewidth=1)
    _line(axes, log, "lm_loss", label="lm_loss (training)", color="tab:blue")
    _line(axes, log, "eval_loss", label="eval_loss (held out)", color="tab:orange", marker="o")
    _dress(axes, "Language-model loss", "loss (nats per token)")
    axes.legend()


def _line(axes: Axes, log: RunLog, name: str, *, label: str | None = None, **style: Any) -> None:
    steps, values = log.series(name)
    if steps:
        style.setdefault("marker", "o" if len(steps) <= _FEW_POINTS else "")
        axes.plot(steps, values, label=label or name, markersize=4, **style)


# ------------------------------------------------------------------------------------------------ expert load


def _draw_loads(log: RunLog) -> Figure:
    """Heat map of the last entries, and below it the largest load of each layer over the steps."""
    steps, layers, loads = log.loads()
    figure = _new_figure(12, 7.5 + min(4.0, 0.12 * max(0, len(layers) - 8)))
    heat, history = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_heat_map(figure, heat, steps, layers, loads)
    _draw_history(figure, history, steps, layers, loads)
    return figure


def _draw_heat_map(figure: Figure, axes: Axes, steps: list[int], layers: list[int], loads: np.ndarray) -> None:
    from matplotlib.colors import TwoSlopeNorm

    recent = steps[-AVERAGED_ENTRIES:]
    mean = np.ma.masked_invalid(loads[-AVERAGED_ENTRIES:]).mean(axis=0)  # [L, E]; NaN: no token was counted
    # White is balanced, blue is idle, red is overloaded; at least 2.0 so that noise around 1 stays pale.
    top = max(2.0, float(mean.max())) if mean.count() else 2.0
    image = axes.imshow(mean, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, top), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("share of tokens relative to balanced\n(1.0 = balanced, x = dead, 0.0)")
    dead_rows, dead_columns = np.nonzero(mean == 0)
    axes.scatter(dead_columns, dead_rows, marker="x", s=24, color="white")
    if np.all(np.less_equal(mean.shape, MAX_ANNOTATED_SHAPE)):
        for (row, column), value in np.ma.ndenumerate(mean):
            if value == 0:
                continue
            dark = value < 0.35 or value > 1 + 0.65 * (top - 1)
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    _index_ticks(axes, "x", list(range(mean.shape[1])), limit=32)
    _index_ticks(axes, "y", layers, limit=26)
    span = (
        f"step {recent[0]}"
        if len(recent) == 1
        else f"mean of {len(recent)} log entries, steps {recent[0]}-{recent[-1]}"
    )
    axes.set_title(f"Expert load ({span})")
    axes.set_xlabel("expert (index)")
    axes.set_ylabel("sparse layer (index)")


def _index_ticks(axes: Axes, side: str, names: list[int], limit: int) -> None:
    """Label every index, or every second, fourth ... so that no more than `limit` labels stand on the axis."""
    stride = 1
    while len(names) / stride > limit:
        stride *= 2
    positions = list(range(0, len(names), stride))
    setter = axes.set_xticks if side == "x" else axes.set_yticks
    setter(positions, [str(names[position]) for position in positions])


def _draw_history(figure: Figure, axes: Axes, steps: list[int], layers: list[int], loads: np.ndarray) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    largest = np.ma.masked_invalid(loads).max(axis=2)  # [N, L]
    few = len(layers) <= MAX_NAMED_LAYERS
    marker = "o" if len(steps) <= (_FEW_POINTS if few else 1) else ""
    depth = Normalize(min(layers), max(layers))
    for row, layer in enumerate(layers):
        color, label = (
            (colormaps["tab10"](row), f"layer {layer}") if few else (colormaps["viridis"](depth(layer)), None)
        )
        axes.plot(steps, largest[:, row], color=color, marker=marker, markersize=4, label=label)
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="perfect balance (1.0)")
    if not few:
        figure.colorbar(ScalarMappable(depth, "viridis"), ax=axes, pad=0.01).set_label("sparse layer (index)")
    _dress(axes, "Busiest expert of each layer", "largest share of tokens\nrelative to balanced")
    _legend_above_lines(axes)


# ------------------------------------------------------------------------------------------------ figures


def _new_figure(width: float, height: float) -> Figure:
    """A figure on its own Agg canvas: no display, and nothing shared with the caller's pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Axes, title: str, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    low, high = axes.get_xlim()
    if high - low < 2:  # a single step: widen the axis until it holds whole steps
        axes.set_xlim(round((low + high) / 2) - 1, round((low + high) / 2) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _legend_above_lines(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))
    axes.legend(loc="upper right", ncols=5)
