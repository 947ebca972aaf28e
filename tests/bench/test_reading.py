"""Records of other versions, broken ones, and what the page and the Markdown make of them."""

from __future__ import annotations

import json
import re

import pytest
from rkd_deploy.report.reading import gather, read_records

from rkd_deploy.compare import write_comparison_report
from rkd_deploy.errors import DataError, ModelFileError
from rkd_deploy.report.writing import write_bench_report


def test_fields_may_be_missing_and_unknown_ones_are_left(record):
    (first, *_) = gather([record]).results
    assert first.model == "resnet20"
    assert first.p95_ms is None  # not in the record
    assert first.build_seconds is None
    assert not hasattr(first, "a field of the future")


def test_several_records_stand_side_by_side(record):
    other = json.loads(json.dumps(record))
    other["provenance"]["cpu"], other["partial"] = "Another", True
    material = gather([record, other])
    assert len(material.results) == 12
    assert [one["cpu"] for one in material.environments] == ["A processor & more", "Another"]
    assert material.environments[0]["commit"] == "0123456789ab, changed since"
    assert material.remarks == ["Interrupted: what had been measured until then."]
    assert material.roofline.ceilings[0].bytes_per_s == {4194304: 1e10}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 99}, "schema 99"),
        ({"kind": "train"}, "kind 'train'"),
        ({"results": [{}]}, "damaged"),
        ({"results": 3}, "damaged"),
        ({"roofline": {"ceilings": [{}]}}, "damaged"),
    ],
)
def test_what_is_no_record_is_refused(record, tmp_path, change, words):
    (tmp_path / "bench.json").write_text(json.dumps(record | change))
    with pytest.raises(ModelFileError, match=words):
        read_records([tmp_path / "bench.json"])


def test_no_file_and_no_json_are_refused(tmp_path):
    (tmp_path / "text.json").write_text("no JSON")
    for name in ("absent.json", "text.json"):
        with pytest.raises(ModelFileError, match="no record"):
            read_records([tmp_path / name])


def with_both(record):
    """The record with device-only figures of half the time, the last one's cut short."""
    both = json.loads(json.dumps(record))
    for row in both["results"]:
        times = [0.5 * ms for ms in row["samples_ms"]]
        figures = {name: 0.5 * row[name] for name in ("p50_ms", "p90_ms", "p99_ms", "mean_ms", "first_run_ms")}
        row["device_only"] = {**figures, "samples_ms": times, "transfers": False, "runs": len(times), "cv": 0.25}
    both["results"][-1]["device_only"]["complete"] = False
    return both | {"partial": True}


def test_a_partial_record_names_what_was_cut_short(record):
    (said,) = gather([with_both(record)]).remarks
    assert said.endswith("Cut short: slow & worse on onnxruntime, threads 1, batch 8.")


def test_a_page_has_both_kinds_of_figures_where_both_were_measured(record, tmp_path):
    record = {name: record[name] for name in ("kind", "schema")} | {"results": record["results"][:1]}
    page = write_bench_report([with_both(record)], tmp_path)
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
    alone = write_bench_report([record], tmp_path / "alone").markdown.read_text()
    assert "device only" not in alone


def test_nothing_measured_is_an_error(record, tmp_path):
    with pytest.raises(DataError, match="Nothing to report"):
        write_bench_report([record | {"results": []}], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_ids_are_unique_and_lead_somewhere(pages):
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        targets = re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', text)
        assert targets
        assert {one for target in targets for one in target.split()} <= set(ids)


def test_pictures_have_no_colours_of_their_own(pages):
    for page in pages.values():
        svgs = re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL)
        assert svgs
        assert not [colour for svg in svgs for colour in re.findall(r"#[0-9a-f]{6}\b|\bblack\b|\bwhite\b", svg)]


def test_the_same_record_gives_the_same_page(record, pages, tmp_path):
    again = write_bench_report([record], tmp_path)
    assert again.page.read_bytes() == pages["bench"].read_bytes()


def test_markdown_has_the_tables_and_nothing_in_it_is_mark_up(comparison, tmp_path):
    text = write_comparison_report(comparison, tmp_path).markdown.read_text(encoding="utf-8")
    for title in ("Networks", "Every call", "Prediction and measurement", "Layer by layer", "Environment"):
        assert f"\n## {title}\n" in text
    assert "| S + A | 70.50 |" in text
    assert "Missing: runs/b has no \\<S0\\>." in text
    assert not re.search(r"(?<!\\)<", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 40


def test_a_comparison_without_latency_has_a_page(comparison, tmp_path):
    bare = {key: value for key, value in comparison.items() if key not in ("roofline", "layers")} | {"results": []}
    text = write_comparison_report(bare, tmp_path).page.read_text(encoding="utf-8")
    assert "Every call" not in text
    assert text.count("<svg") == 1
