import io
import json

import numpy as np
import pytest
from rich.console import Console

from rkd_deploy.bench.machine import Provenance
from rkd_deploy.bench.reading import BenchRecord
from rkd_deploy.bench.results import Result, to_bench_record
from rkd_deploy.bench.statistics import Timing
from rkd_deploy.commands.options import console_for
from rkd_deploy.errors import DataError
from rkd_deploy.report.accuracy_latency import draw, write_plot
from rkd_deploy.report.columns import RESULT_COLUMNS, print_bench, with_names
from rkd_deploy.report.tables import markdown_table

PNG = b"\x89PNG\r\n\x1a\n"


def result(model="resnet20", p50=1.0, accuracy=70.0, spread=0.01, runs=41, **facts):
    """A result whose median is `p50` exactly: samples evenly around it."""
    samples = tuple(p50 * (1 + spread * (place - runs // 2) / runs) for place in range(runs))
    batch = facts.pop("batch", 1)
    timing = Timing(
        samples_ms=samples, batch=batch, transfers=True, first_run_ms=9.0, warmup_runs=10, warmup_seconds=0.5
    )
    known = {
        "part": "fused",
        "fusion": "tail",
        "backend": "onnxruntime",
        "device": "cpu",
        "threads": 1,
        "precision": "fp32",
        "parameters": 272_474,
        "macs": 40_800_000,
        "file_bytes": 1_100_000,
    }
    return Result.from_timing(timing, model=model, accuracy=accuracy, **(known | facts))


def test_a_record_is_json_with_the_fixed_names():
    record = json.loads(
        json.dumps(to_bench_record([result(runs=3)], Provenance(python="3"), {"seed": 0}), allow_nan=False)
    )
    assert record["provenance"]["python"] == "3"
    assert record["settings"] == {"seed": 0}
    (found,) = record["results"]
    assert {"backend", "batch", "precision", "p50_ms", "p90_ms", "p99_ms", "throughput_per_s"} <= found.keys()
    assert found["p50_ms"] == 1.0
    assert len(found["samples_ms"]) == found["runs"] == 3
    assert found["p50_low_ms"] is None  # three samples bound nothing


def test_a_result_holds_the_ends_of_the_intervals():
    found = result(p50=2.0, runs=101, spread=0.1)
    for q in (50, 90):
        assert found.percentiles[q].low_ms < found.percentiles[q].ms < found.percentiles[q].high_ms
    assert found.throughput_per_s == pytest.approx(500)


def test_markdown_has_units_and_leaves_unknown_columns_out():
    text = markdown_table(RESULT_COLUMNS, [result(), result("a|b", p50=123.456, accuracy=None)])
    head, rule, first, second = text.strip().splitlines()
    assert head.count("|") == rule.count("|") == first.count("|")
    for title in (
        "Model",
        "Part",
        "Fusion",
        "p50, ms",
        "its 95 % CI, ms",
        "p99, ms",
        "Images/s",
        "Top-1, %",
        "File, MB",
    ):
        assert f" {title} |" in head
    assert "| 70.00 | 40.8 | 0.272 | 1.10 |" in first
    assert "| a\\|b |" in second
    assert "| 123 | 123 to 124 |" in second
    assert "| - |" in second
    bare = markdown_table(
        RESULT_COLUMNS, [result(part=None, fusion="none", accuracy=None, threads=None, macs=None, precision="unknown")]
    )
    for title in ("Part", "Fusion", "Top-1", "Threads", "MACs", "Precision"):
        assert title not in bare


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (0.5, "0.500"), (9.876, "9.88"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_milliseconds_have_three_digits(value, text):
    assert f"| {text} |" in markdown_table(RESULT_COLUMNS, [result(p50=value, spread=0, runs=3)])


def shown(results, width, details=False):
    stream = io.StringIO()
    print_bench(BenchRecord(tuple(results)), Console(file=stream, width=width, soft_wrap=True), details=details)
    return stream.getvalue()


def test_80_columns_get_one_short_table_with_a_line_a_result():
    """As a pipe does: 80 columns are what a console takes there."""
    results = [result("digits S + A", batch=batch, runs=2001) for batch in (1, 8, 32)]
    lines = shown([*results, result("teacher", p50=123.4)], 80).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if " onnxruntime " in line]
    assert [row.split()[-5:] for row in rows[:1]] == [["1", "1.00", "1.00", "1,000", "70.00"]]
    assert len(rows) == 4
    assert len(lines) <= len(rows) + 6
    assert "CI" not in shown(results, 80)


def test_details_are_behind_an_option_and_fit_80_columns_too():
    results = [result("resnet20", runs=2001, spread=1.0, batch=batch) for batch in (1, 8)]
    lines = shown(results, 80, details=True).splitlines()
    assert max(map(len, lines)) <= 80
    row, _ = (line.split() for line in lines if "end to end" in line and " 8 " in line)
    figures = results[1]
    p50, p90, p95 = (figures.percentiles[q] for q in (50, 90, 95))
    expected = [figures.mean_ms, None, p50.ms, p50.low_ms, None, p50.high_ms, p90.ms, p95.ms]
    for text, value in zip(row[5:13], expected, strict=True):
        assert value is None or float(text) == pytest.approx(value, rel=0.006)
    assert float(row[14]) == pytest.approx(figures.percentiles[99.9].ms, rel=0.006)
    assert "95 % CI" in shown(results, 200, details=True).replace("\n", " ")


@pytest.mark.parametrize("width", [20, 30, 40, 60])
def test_a_terminal_that_no_table_fits_gets_a_line_for_each_cell(width):
    text = shown([result("digits S + A"), result("two", p50=3.0, batch=8)], width)
    if width < 60:
        assert "Model: digits S + A\n" in text
        assert "p50, ms: 3.00\n" in text
    assert "digits S + A" in text
    assert "3.00" in text


def test_the_terminal_table_says_once_what_is_equal_in_all_rows():
    text = shown([result("[one]"), result("two", p50=3.0)], 160)
    assert text.count("threads 1") == 1
    assert "[one]" in text
    assert "3.00" in text


def test_bundles_of_one_name_are_told_apart_by_what_differs():
    same = [result(), result(precision="int8"), result(fusion="wide"), result("other")]
    assert [one.model for one in with_names(same)] == [
        "resnet20, tail, fp32",
        "resnet20, tail, int8",
        "resnet20, wide",
        "other",
    ]
    again = [result(file_sha256="a" * 64), result(file_sha256="b" * 64), result(file_sha256="b" * 64, batch=8)]
    assert [one.model for one in with_names(again)] == [
        "resnet20, aaaaaaaa",
        "resnet20, bbbbbbbb",
        "resnet20, bbbbbbbb",
    ]
    assert [one.model for one in with_names([result(), result(batch=8)])] == ["resnet20"] * 2


FORGED = "good\n resnet20 onnxruntime 1 0.001\x1b[2K\x1b]0;title\x07 \u202e<script>[red]x[/]|`"


def test_foreign_text_forges_no_line_and_no_mark_up(capsys):
    text = shown([result(FORGED), result("two")], 400)
    assert len([line for line in text.splitlines() if "onnxruntime" in line]) == 2
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert r"good\n resnet20 onnxruntime 1 0.001\x1b[2K\x1b]0;title\x07 \u202e<script>[red]x[/]|`" in text
    table = markdown_table(RESULT_COLUMNS, [result(FORGED)])
    assert len(table.splitlines()) == 3
    assert r"\<script\>\[red\]x\[/\]\|\`" in table
    console_for(False).print(f"Record {FORGED}")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "\x1b" not in out
    assert "[red]x[/]" in out


def test_the_plot_is_a_png_written_whole(tmp_path):
    write_plot([result(), result("teacher", 4.0, 75.0, part="teacher")], tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(PNG)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plot.png"]


CROWDS = {
    "one": [result()],
    "spread": [result("t", 40.0, 80.2), result("s0", 24.0, 69.7), result("s", 3.1, 67.2), result("f", 6.1, 69.9)],
    "same place": [result(fusion=fusion) for fusion in ("sum", "tail", "wide")],
    "row": [result(f"cifar100-resnet20-{place}", 1 + 0.04 * place, 70 + 0.1 * (place % 3)) for place in range(8)],
    "noisy": [result(f"model-{place}", 1 + 0.1 * place, 70 + place, spread=1.5) for place in range(5)],
}


@pytest.mark.parametrize("name", CROWDS)
def test_labels_collide_with_nothing_and_stay_in_the_frame(name):
    figure = draw(CROWDS[name])
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    texts = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    assert len(texts) == len(CROWDS[name])
    frame = axes.get_window_extent(renderer)
    spots = axes.transData.transform([(point.p50_ms, point.accuracy) for point in CROWDS[name]])
    for number, box in enumerate(texts):
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not any(box.contains(*spot) for spot in spots)
        assert not any(box.overlaps(other) for other in texts[number + 1 :])
    lines = np.concatenate([line.get_segments() for line in axes.collections])
    ends = axes.transData.transform(lines.reshape(-1, 2))
    assert (ends[:, 0] >= frame.x0).all()
    assert (ends[:, 0] <= frame.x1).all()


def test_points_of_one_model_are_told_apart_by_what_differs():
    points = [result(), result(precision="int8", p50=0.5), result(part="student", p50=0.7), result("other", 2.0)]
    names = {text.get_text().splitlines()[0] for text in draw(points).axes[0].texts if text.get_text()}
    assert names == {"resnet20, fused, fp32", "resnet20, fused, int8", "resnet20, student", "other"}


def test_the_plot_takes_one_batch_size_and_says_which():
    points = [result(), result(batch=8, p50=5.0)]
    assert "batch 1," in draw(points).axes[0].get_title(loc="left")
    assert "batch 8," in draw(points, batch=8).axes[0].get_title(loc="left")
    assert len(draw(points).axes[0].texts) == 1


@pytest.mark.parametrize(("results", "batch"), [([], None), ([result(accuracy=None)], None), ([result()], 8)])
def test_nothing_to_plot_is_an_error_that_says_why(tmp_path, results, batch):
    with pytest.raises(DataError, match="Nothing to plot"):
        write_plot(results, tmp_path / "plot.png", batch=batch)
    assert list(tmp_path.iterdir()) == []
