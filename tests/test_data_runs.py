"""Whole runs on the data that users have: several sets, no camera ids, broken files, identities held out."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import layouts
from tests.runs import PLAIN, SMALL, losses_of, run

TEXT = f"{SMALL} {PLAIN} TRAIN.MAX_STEPS 3"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A table of 12 training images of 3 identities, 2 queries and 4 gallery images, pids as names, no camera ids."""
    rows = [(f"x/{n}.jpg", f"p{n % 3}", "train") for n in range(12)]
    rows += [(f"y/{n}.jpg", f"q{n % 2}", "query" if n < 2 else "gallery") for n in range(6)]
    return layouts.manifest(tmp_path_factory.mktemp("own"), rows, ("path", "pid", "split"))


@pytest.mark.ranks
def test_a_union_tested_on_both_on_one_and_two_ranks(pedestrians, own, tmp_path, capfd):
    text = f"{TEXT} DATA.DATASET market1501+csv TEST.DATASETS [csv,market1501] TEST.EVAL_STEP 1"
    root = f"market1501={pedestrians},csv={own}"
    found = [run(w, root, tmp_path / str(w), text) for w in (1, 2)]
    out = capfd.readouterr().out
    np.testing.assert_allclose(losses_of(found[1][0]), losses_of(found[0][0]), rtol=1e-9, atol=1e-9)
    for (_, one), (_, two) in [found]:
        assert [e["dataset"] for e in one] == ["csv", "market1501"] * (len(one) // 2) and len(one) >= 2
        for a, b in zip(one, two, strict=True):
            assert (a["dataset"], a["num_query"]) == (b["dataset"], b["num_query"])
            assert a["mAP"] == pytest.approx(b["mAP"], abs=1e-9)
    assert "csv: no camera ids, so it is evaluated without the junk rule" in out
    assert "csv (no camera ids), epoch 1" in out and "by rank1 on the test set of csv" in out
    result = json.loads((Path(tmp_path) / "1/market1501+csv/t/result.json").read_text())
    assert result["best"]["dataset"] == "csv" and result["final"]["others"][0]["dataset"] == "market1501"
