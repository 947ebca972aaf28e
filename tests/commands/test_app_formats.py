"""`rkd-deploy export --format transformers-js`, and what is refused before anything is exported."""

from __future__ import annotations

import pytest


def test_a_run_becomes_a_bundle_and_what_transformers_js_loads(rkd, runs):
    first = rkd("export", "--format", "transformers-js", "--json")
    assert first.code == 0, first.err
    folder = runs / "transformers-js"
    assert {file.name for file in folder.rglob("*.*")} == {"config.json", "preprocessor_config.json", "model.onnx"}
    assert first.json["transformers-js"]["parity"]["passed"]
    assert "is proven: logits differ" in first.err
    again = rkd("export", runs / "bundle", "--format", "transformers-js", "--output", "app", "--json")
    assert again.code == 0, again.err
    assert again.json["transformers-js"]["folder"] == "app"


@pytest.mark.parametrize("output_format", ["transformers-js", "executorch"])
def test_options_of_other_formats_are_refused(rkd, runs, output_format):
    ended = rkd("export", "--format", output_format, "--max-batch", "3")
    assert ended.code == 2
    assert f"--format {output_format} writes no model repository, and has no use for --max-batch" in ended.err


def test_a_bundle_without_a_program_cannot_become_one_for_a_phone(rkd, runs):
    pytest.importorskip("executorch", reason="pip install 'rkd-deploy[executorch]'")
    assert rkd("export", "--random-images").code == 0
    ended = rkd("export", runs / "bundle", "--format", "executorch")
    assert ended.code == 1
    assert "--with-pytorch" in ended.err
    made = rkd("export", "--format", "executorch", "--random-images", "--json")
    assert made.code == 0, made.err
    assert (runs / "executorch/model.pte").is_file()
    assert made.json["executorch"]["parity"]["passed"]
