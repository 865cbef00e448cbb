"""The report reads what the Trainer logs, survives a running or resumed training, and draws what the log says."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from st_moe.configuration import LOSSES
from st_moe.finetune import report
from st_moe.finetune.report import draw_report, read_log, summary_table
from st_moe.finetune.trainer import ROUTER_LOG


def entry(step: int, load: list[list[float]] | None = None, **values: Any) -> dict[str, Any]:
    """One training line; loads default to two layers (1 and 3) of four experts with one dead expert."""
    load = [[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0.0]] if load is None else load
    return {
        "step": step,
        "epoch": step / 100,
        "loss": 3.0,
        "lm_loss": 2.5,
        "balance_loss": 1.25,
        "router_z_loss": 0.5,
        "router/entropy": 0.75,
        "router/max_load": 2.0,
        "router/dead_experts": 1,
        "layers": [1, 3][: len(load)],
        "expert_load": load,
        **values,
    }


def write_log(folder: Path, *entries: dict[str, Any] | str) -> Path:
    """Entries as lines; a string is written as it stands."""
    lines = (item if isinstance(item, str) else json.dumps(item) + "\n" for item in entries)
    (folder / ROUTER_LOG).write_text("".join(lines), encoding="utf-8")
    return folder


def test_layers_may_differ_in_their_experts(tmp_path: Path) -> None:
    folder = write_log(tmp_path, *(entry(step, [[0.75, 0.25], [0.2, 0.2, 0.5, 0.1]]) for step in (1, 2)))
    _, layers, loads = read_log(folder).loads()
    assert layers == [1, 3]
    np.testing.assert_allclose(loads[0], [[1.5, 0.5, np.nan, np.nan], [0.8, 0.8, 2.0, 0.4]], rtol=1e-6)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary_table(folder))
    assert set(draw_figures(folder)) == {"losses", "loads"}


def test_every_loss_of_the_registry_is_in_the_table(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary_table(write_log(tmp_path, entry(1, **dict.fromkeys(LOSSES, 0.5)))))
    text = console.export_text()
    assert [name for name in LOSSES if name not in text] == []


def draw_figures(folder: Path) -> dict[str, Figure]:
    """The figures behind the files, laid out as they are saved."""
    log = read_log(folder)
    figures = {"losses": report._draw_losses(log)}
    if log.loads()[0]:
        figures["loads"] = report._draw_loads(log)
    for figure in figures.values():
        assert isinstance(figure.canvas, FigureCanvasAgg)
        figure.canvas.draw()
    return figures


def line_data(figure: Figure, axes: int, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in figure.axes[axes].lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def table_rows(folder: Path) -> dict[str, list[str]]:
    table = summary_table(folder)
    columns = [list(column.cells) for column in table.columns]
    return {str(row[0]): [str(cell) for cell in row[1:]] for row in zip(*columns, strict=True)}


def test_series_and_loads_are_those_of_the_log(tmp_path: Path) -> None:
    write_log(tmp_path, entry(10, lm_loss=2.5), {"step": 10, "eval_loss": 2.75}, entry(20, lm_loss=2.25))
    log = read_log(tmp_path)
    assert log.series("lm_loss") == ([10, 20], [2.5, 2.25])
    assert log.series("eval_loss") == ([10], [2.75])
    assert log.series("learning_rate") == ([], [])
    steps, layers, loads = log.loads()
    assert (steps, layers) == ([10, 20], [1, 3])
    np.testing.assert_allclose(loads[1], [[1, 1, 1, 1], [2, 1, 1, 0]], rtol=1e-7)


def test_half_written_last_line_is_passed_over(tmp_path: Path) -> None:
    write_log(tmp_path, entry(10), '{"step": 20, "lo')
    assert read_log(tmp_path).series("loss") == ([10], [3.0])
    cut_inside_a_letter = json.dumps({"step": 20, "note": "ü"}, ensure_ascii=False).encode()[:-3]
    with (tmp_path / ROUTER_LOG).open("wb") as stream:
        stream.write(json.dumps(entry(10)).encode() + b"\n" + cut_inside_a_letter)
    assert read_log(tmp_path).series("loss") == ([10], [3.0])


def test_whole_last_line_without_its_end_counts(tmp_path: Path) -> None:
    write_log(tmp_path, entry(10), json.dumps(entry(20)))
    assert read_log(tmp_path).series("loss")[0] == [10, 20]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 20, "lo\n', r"line 2: must be one JSON object, .*got b'\{\"step\": 20"),
        ("\n", r"line 2: must be one JSON object"),
        ("[1]\n", r"line 2: must be a JSON object, got list"),
        ('{"loss": 1}\n', r"line 2: field 'step' must be a whole number >= 0, got None"),
        ('{"step": -1}\n', r"line 2: field 'step' must be a whole number >= 0, got -1"),
        ('{"step": true}\n', r"line 2: field 'step' must be a whole number >= 0, got True"),
        ('{"step": 20, "lm_loss": "2"}\n', r"line 2: field 'lm_loss' must be a number, got '2'"),
        ('{"step": 20, "expert_load": [[1], [[1]]]}\n', r"line 2: field 'expert_load' must be one list of numbers"),
        ('{"step": 20, "expert_load": [1, 2]}\n', r"line 2: field 'expert_load' must be one list of numbers"),
        ('{"step": 20, "expert_load": [["a"]]}\n', r"line 2: field 'expert_load' must be one list of numbers"),
        (
            '{"step": 20, "layers": [1, 2], "expert_load": [[1.0]]}\n',
            r"line 2: field 'layers' .* 1 rows .*got \[1, 2\]",
        ),
        ('{"step": 20, "expert_load": [[1.0]]}\n', r"line 2: field 'layers' must list .*got None"),
    ],
)
def test_any_other_broken_line_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    write_log(tmp_path, entry(10), line, entry(30))
    with pytest.raises(ValueError, match=message):
        draw_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ROUTER_LOG]


def test_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    lost = [entry(step, lm_loss=9.0) for step in (30, 40)]
    write_log(
        tmp_path,
        entry(10, lm_loss=3.0),
        entry(20, lm_loss=2.0),
        {"step": 20, "eval_loss": 2.5},
        *lost,
        {"step": 40, "eval_loss": 9.0},
        entry(30, lm_loss=1.0),
    )
    log = read_log(tmp_path)
    assert log.series("lm_loss") == ([10, 20, 30], [3.0, 2.0, 1.0])
    assert log.series("eval_loss") == ([20], [2.5])


def test_repeated_step_counts_once(tmp_path: Path) -> None:
    write_log(tmp_path, entry(10, lm_loss=3.0), entry(10, lm_loss=2.0), {"step": 10, "train_runtime": 5.0})
    assert read_log(tmp_path).series("lm_loss") == ([10], [2.0])


def test_loads_of_another_model_are_left_out(tmp_path: Path) -> None:
    write_log(tmp_path, entry(10, load=[[0.5, 0.5]]), entry(20))
    assert read_log(tmp_path).loads()[0] == [20]


@pytest.mark.parametrize("content", [None, "", '{"step": 5, "train_runtime": 1.0}\n'])
def test_nothing_to_report(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        write_log(tmp_path, content)
    message = r"router_log\.jsonl: no such file" if content is None else r"holds no training or evaluation entry yet"
    with pytest.raises(ValueError, match=message):
        draw_report(tmp_path)
    with pytest.raises(ValueError, match=message):
        summary_table(tmp_path)


def test_plots_show_the_values_of_the_log(tmp_path: Path) -> None:
    write_log(tmp_path, *(entry(step, lm_loss=1 / step) for step in (10, 20, 30)), {"step": 30, "eval_loss": 2.0})
    figures = draw_figures(tmp_path)
    losses, loads = figures["losses"], figures["loads"]
    assert line_data(losses, 0, "lm_loss (training)") == ([10, 20, 30], [0.1, 0.05, 1 / 30])
    assert line_data(losses, 0, "eval_loss (held out)") == ([30], [2.0])
    assert line_data(losses, 1, "perfect balance (1.0)")[1] == [1.0, 1.0]
    assert line_data(losses, 1, "balance_loss") == ([10, 20, 30], [1.25] * 3)
    assert line_data(losses, 2, "router_z_loss") == ([10, 20, 30], [0.5] * 3)
    image = loads.axes[0].images[0].get_array()
    np.testing.assert_allclose(image, [[1, 1, 1, 1], [2, 1, 1, 0]], rtol=1e-6)
    assert [label.get_text() for label in loads.axes[0].get_yticklabels()] == ["1", "3"]
    np.testing.assert_allclose(loads.axes[0].collections[0].get_offsets(), [[3, 1]])  # the dead expert's cross
    assert line_data(loads, 1, "layer 1") == ([10, 20, 30], [1.0] * 3)
    assert line_data(loads, 1, "layer 3") == ([10, 20, 30], [2.0] * 3)


def test_heat_map_is_the_mean_of_the_last_entries(tmp_path: Path) -> None:
    early = [entry(step, load=[[1.0, 0.0]]) for step in range(1, 6)]
    late = [entry(step, load=[[0.4, 0.6]]) for step in range(6, 11)]
    later = [entry(step, load=[[0.5, 0.5]]) for step in range(11, 16)]
    write_log(tmp_path, *early, *late, *later)
    axes = draw_figures(tmp_path)["loads"].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.9, 1.1]], rtol=1e-6)
    assert axes.get_title() == "Expert load (mean of 10 log entries, steps 6-15)"


@pytest.mark.parametrize("layers", [1, 24])
@pytest.mark.parametrize("experts", [8, 64])
@pytest.mark.parametrize("lines", [1, 40])
def test_plots_of_every_shape_are_readable_files(tmp_path: Path, layers: int, experts: int, lines: int) -> None:
    random = np.random.default_rng(0)
    load = random.dirichlet([5.0] * experts, size=layers).tolist()
    write_log(tmp_path, *(entry(step, load=load, layers=list(range(layers))) for step in range(1, lines + 1)))
    paths = draw_report(tmp_path, tmp_path / "new" / "plots")
    assert [path.name for path in paths] == ["losses.png", "expert_load.png"]
    assert {path.parent for path in paths} == {tmp_path / "new" / "plots"}
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 1200
            assert np.asarray(image.convert("L")).std() > 5  # not blank
    for figure in draw_figures(tmp_path).values():
        for axes in figure.axes:
            assert axes.get_title() or axes.get_ylabel()  # a panel has a title, a colour bar its label
            if axes.get_title():
                assert axes.get_xlabel()
                assert axes.get_ylabel()


def test_ticks_of_one_step_are_whole_steps(tmp_path: Path) -> None:
    write_log(tmp_path, entry(7))
    ticks = draw_figures(tmp_path)["losses"].axes[0].get_xticks()
    assert 7 in ticks
    assert all(tick == round(tick) for tick in ticks)


def test_dense_run_has_no_load_plot(tmp_path: Path) -> None:
    write_log(tmp_path, {"step": 1, "loss": 2.0, "layers": [], "expert_load": []}, {"step": 1, "eval_loss": 2.0})
    assert draw_report(tmp_path) == [tmp_path / "losses.png"]
    assert list(table_rows(tmp_path)) == ["loss", "eval_loss"]


def test_values_that_are_no_numbers_draw_as_gaps(tmp_path: Path) -> None:
    nan = float("nan")
    write_log(tmp_path, entry(1), entry(2, lm_loss=nan, load=[[nan, nan], [nan, nan]], layers=[1, 3]))
    assert len(draw_report(tmp_path)) == 2
    assert table_rows(tmp_path)["lm_loss"][1] == "nan"


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    write_log(tmp_path, entry(1))
    draw_report(tmp_path)
    assert plt.get_fignums() == before


def test_destination_must_be_a_folder(tmp_path: Path) -> None:
    write_log(tmp_path, entry(1))
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match=r"destination must be a folder, .*taken is a file"):
        draw_report(tmp_path, tmp_path / "taken")


def test_table_has_last_values_and_balanced_ones(tmp_path: Path) -> None:
    write_log(tmp_path, entry(10), {"step": 10, "eval_loss": 2.75}, entry(20, balance_loss=1.5))
    rows = table_rows(tmp_path)
    assert rows["balance_loss"] == ["20", "1.5", "no unit", "1.0"]
    assert rows["eval_loss"] == ["10", "2.75", "nats/token", "-"]
    assert rows["router/entropy"] == ["20", "0.75", "fraction of ln(experts)", "<= 1.0"]
    assert rows["router/max_load"] == ["20", "2", "x balanced (layer 3, expert 0)", "1.0"]
    assert rows["router/dead_experts"] == ["20", "1", "experts", "0"]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(summary_table(tmp_path))
    assert max(map(len, capture.get().splitlines())) <= 80
