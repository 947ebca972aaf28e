"""What --format executorch writes, by ExecuTorch's runtime for Python: the program that a phone would load."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rkd_deploy.card import ModelCard
from rkd_deploy.images import to_array

pytest.importorskip("executorch", reason="pip install 'rkd-deploy[executorch]'")


def test_the_golden_photo_gets_its_class(golden, tmp_path):
    from rkd_deploy.export.executorch import export_executorch, run_program

    parity = export_executorch(golden.bundle, tmp_path / "phone")
    assert parity.passed
    assert sorted(file.name for file in (tmp_path / "phone").iterdir()) == ["model.json", "model.pte"]
    card = ModelCard.from_json((tmp_path / "phone/model.json").read_text(), "model.json")
    pixels = to_array(golden.photo, card.preprocess)[np.newaxis]
    logits_K = run_program((tmp_path / "phone/model.pte").read_bytes(), pixels)[0].astype(np.float64)
    stored_K = json.loads((golden.bundle / "golden/photo.json").read_text())["logits"]
    np.testing.assert_allclose(logits_K, stored_K, rtol=0, atol=1e-3)
    probabilities_K = np.exp(logits_K) / np.exp(logits_K).sum()
    assert card.labels[int(logits_K.argmax())] == golden.label
    assert probabilities_K.max() == pytest.approx(golden.probability, abs=1e-3)
