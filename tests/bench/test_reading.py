"""Records of other versions and damaged ones, read back into typed values."""

from __future__ import annotations

import json
import os

import pytest
from recorded import make_comparison, make_record

from rkd_deploy.bench.reading import bench_record, read_bench
from rkd_deploy.bench.records import record_bench
from rkd_deploy.compare import read_comparison
from rkd_deploy.errors import ModelFileError
from tests.support.benching import SHORT, bench_settings


def write(folder, content):
    (folder / "record.json").write_text(json.dumps(content))
    return folder / "record.json"


def test_fields_may_be_missing_and_unknown_ones_are_left():
    (first, *_) = bench_record(make_record()).results
    assert first.model == "resnet20"
    assert 95 not in first.percentiles  # not in the record
    assert first.build_seconds is None
    assert not hasattr(first, "a field of the future")


def test_a_record_is_read_as_it_was_written(bundle, tmp_path):
    done = record_bench([bundle], bench_settings(batches=[1], **SHORT), tmp_path)
    record = read_bench(done.path)
    rows = json.loads(done.path.read_text())["results"]
    assert [json.loads(json.dumps(result.to_row())) for result in record.results] == rows
    assert record.results[0].percentiles == done.results[0].percentiles
    assert record.conditions.after.load_1min >= 0
    assert (record.provenance.cores, record.partial) == (len(os.sched_getaffinity(0)), False)


def test_keys_of_json_become_numbers_again():
    record = bench_record(make_record())
    assert record.roofline.ceilings[0].bytes_per_s == {4194304: 1e10}
    first = record.results[0]
    assert (first.percentiles[50].ms, first.percentiles[50].low_ms) == (first.p50_ms, first.to_row()["p50_low_ms"])


DAMAGE = {
    "schema of the future": ({"schema": 99}, "schema 99"),
    "schema of another type": ({"schema": True}, "schema True"),
    "another kind": ({"kind": "train"}, "kind 'train'"),
    "a kind that is no text": ({"kind": []}, r"kind \[\]"),
    "no results": ({"results": None}, "results is null where a list"),
    "results that are no list": ({"results": 3}, "results is 3 where a list"),
    "an empty result": ({"results": [{}]}, r"results\[0\]\.p50_ms is missing"),
    "a result that is a list": ({"results": [[]]}, r"results\[0\] is no object"),
    "an empty ceiling": ({"roofline": {"ceilings": [{}]}}, r"roofline\.ceilings\[0\]\.backend is missing"),
    "layers that are an object": ({"layers": {}}, "layers is {} where a list"),
    "versions that are a list": ({"provenance": {"versions": []}}, r"provenance\.versions is \[\] where an object"),
    "conditions without an end": ({"conditions": {"before": {}}}, r"conditions\.after is missing"),
    "a number too large": ({"provenance": {"load_1min": 10**400}}, "a whole number of 401 digits"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_one_error_that_names_the_place(tmp_path, name):
    change, words = DAMAGE[name]
    with pytest.raises(ModelFileError, match=words):
        read_bench(write(tmp_path, make_record() | change))


@pytest.mark.parametrize("value", [0, 0.0, -1.5, 5e-324, 1e300])
@pytest.mark.parametrize(
    "place",
    [
        ("results", 0, "p50_ms"),
        ("results", 0, "mean_ms"),
        ("results", 0, "throughput_per_s"),
        ("results", 0, "samples_ms", 3),
        ("results", 0, "batch"),
        ("roofline", "ceilings", 0, "macs_per_s"),
        ("roofline", "ceilings", 0, "bytes_per_s", "4194304"),
    ],
)
def test_a_time_or_a_rate_that_nothing_has_is_damage(tmp_path, place, value):
    """Plots and tables divide by them, and take their logarithms."""
    record = make_record()
    *path, last = place
    inner = record
    for step in path:
        inner = inner[step]
    inner[last] = value
    with pytest.raises(ModelFileError, match=r"damaged record: .* is .* where a (number from|whole number)"):
        read_bench(write(tmp_path, record))


def test_an_accuracy_is_a_percentage(tmp_path):
    record = make_record()
    record["results"][0]["accuracy"] = 100.5
    with pytest.raises(ModelFileError, match=r"results\[0\]\.accuracy is 100\.5 where a number from 0 to 100"):
        read_bench(write(tmp_path, record))


@pytest.mark.parametrize(
    ("key", "value"), [("p50_ms", "fast"), ("batch", 1.5), ("batch", True), ("samples_ms", [None]), ("model", None)]
)
def test_a_field_of_another_type_is_damage(tmp_path, key, value):
    record = make_record()
    record["results"][1][key] = value
    with pytest.raises(ModelFileError, match=rf"damaged record: results\[1\]\.\S*{key.split('_')[0][:5]}|ms"):
        read_bench(write(tmp_path, record))


@pytest.mark.parametrize(
    "content", ["no JSON", "[]", "null", "3", "{}", "[" * 100_000, '{"kind": NaN}', '{"schema": 1' + "0" * 5000 + "}"]
)
def test_what_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    for read in (read_bench, read_comparison):
        with pytest.raises(ModelFileError, match="record"):
            read(tmp_path / "record.json")


def test_no_file_a_folder_and_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("absent.json", "", "pipe", "bytes"):
        with pytest.raises(ModelFileError, match="no record"):
            read_bench(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": []}, "rows is empty"),
        ({"rows": {}}, "rows is {} where a list"),
        ({"rows": [{"name": "S"}]}, r"rows\[0\]\.part is missing"),
        ({"data": None}, "data is null where a string"),
        ({"missing": [3]}, r"missing\[0\] is 3 where a string"),
    ],
)
def test_a_damaged_comparison_is_the_same_kind_of_error(tmp_path, change, words):
    with pytest.raises(ModelFileError, match=f"damaged record: {words}"):
        read_comparison(write(tmp_path, make_comparison() | change))
