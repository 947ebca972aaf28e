"""The page and the Markdown of a record."""

from __future__ import annotations

import copy
import re

import pytest
from recorded import make_comparison, make_record

from rkd_deploy.bench.reading import bench_record
from rkd_deploy.compare import write_comparison_report
from rkd_deploy.compare.report import recorded_comparison
from rkd_deploy.errors import DataError
from rkd_deploy.report.sections import environment, remark, sections
from rkd_deploy.report.writing import facts_of, write_bench_report


def report(record, folder):
    return write_bench_report([bench_record(record)], folder)


def test_several_records_stand_side_by_side():
    first, second = bench_record(make_record()), make_record()
    second["provenance"]["cpu"], second["partial"] = "Another", True
    records = [first, bench_record(second)]
    facts = facts_of(records)
    assert facts["Processor"] == "A processor & more, Another"
    assert facts["Timed calls"] == f"{2 * 6 * 61:,}"
    assert facts["Partial"] == "Interrupted: what had been measured until then."
    assert environment(first)["commit"] == "0123456789ab, changed since"
    (table,) = sections(records)[-1].blocks
    assert table.head == ["What", "Record 1", "Record 2"]


def with_both(record):
    """The record with device-only figures of half the time, the last one's cut short."""
    both = copy.deepcopy(record)
    for row in both["results"]:
        times = [0.5 * ms for ms in row["samples_ms"]]
        figures = {name: 0.5 * row[name] for name in ("p50_ms", "p90_ms", "p99_ms", "mean_ms", "first_run_ms")}
        figures["throughput_per_s"] = 2 * row["throughput_per_s"]
        row["device_only"] = {**figures, "samples_ms": times, "transfers": False, "runs": len(times), "cv": 0.25}
    both["results"][-1]["device_only"]["complete"] = False
    return both | {"partial": True}


def test_a_partial_record_names_what_was_cut_short():
    assert remark(bench_record(with_both(make_record()))).endswith(
        "Cut short: slow & worse on onnxruntime, threads 1, batch 8."
    )


def test_a_page_has_both_kinds_of_figures_where_both_were_measured(tmp_path):
    record = make_record()
    record = {name: record[name] for name in ("kind", "schema")} | {"results": record["results"][:1]}
    page = report(with_both(record), tmp_path)
    text, words = page.page.read_text(), page.markdown.read_text()
    first = record["results"][0]
    for p50 in (first["p50_ms"], 0.5 * first["p50_ms"]):
        assert f"{p50:.3g}" in words
    assert "resnet20, device only: p50" in words
    assert "Device only p50, ms" in words
    for kind in ("end to end", "device only"):
        assert words.count(f"| {kind} |") == 2
    assert "Cut short: resnet20" in words
    assert "| interrupted |" in words
    assert "End to end is from an array on the host" in text
    alone = report(record, tmp_path / "alone").markdown.read_text()
    assert "device only" not in alone


def test_nothing_measured_is_an_error(tmp_path):
    with pytest.raises(DataError, match="Nothing to report"):
        report(make_record() | {"results": []}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_ids_are_unique_and_lead_somewhere(pages):
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        targets = re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', text)
        assert targets
        assert {name for target in targets for name in target.split()} <= set(ids)


def test_pictures_have_no_colours_of_their_own(pages):
    for page in pages.values():
        svgs = re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL)
        assert svgs
        assert not [colour for svg in svgs for colour in re.findall(r"#[0-9a-f]{6}\b|\bblack\b|\bwhite\b", svg)]


def test_the_same_record_gives_the_same_page(pages, tmp_path):
    again = report(make_record(), tmp_path)
    assert again.page.read_bytes() == pages["bench"].read_bytes()


def test_markdown_has_the_tables_and_nothing_in_it_is_mark_up(tmp_path):
    text = write_comparison_report(recorded_comparison(make_comparison()), tmp_path).markdown.read_text(
        encoding="utf-8"
    )
    for title in ("Networks", "Every call", "Prediction and measurement", "Layer by layer", "Environment"):
        assert f"\n## {title}\n" in text
    assert "| S + A | 70.50 |" in text
    assert "Missing: runs/b has no \\<S0\\>." in text
    assert not re.search(r"(?<!\\)<", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 40


def test_a_comparison_without_latency_has_a_page(tmp_path):
    comparison = make_comparison()
    bare = {key: value for key, value in comparison.items() if key not in ("roofline", "layers")} | {"results": []}
    text = write_comparison_report(recorded_comparison(bare), tmp_path).page.read_text(encoding="utf-8")
    assert "Every call" not in text
    assert text.count("<svg") == 1
