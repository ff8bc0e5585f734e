"""`python -m reid_dist.evaluate` on files of features, and the rows and blocks that the config asks for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reid_dist import evaluate
from reid_dist.evaluator import evaluate_features
from reid_dist.feature_files import FeatureFile, write_features
from reid_dist.ranking import expansion, rerank
from reid_dist.ranking.pair import read_pair
from tests import ranks
from tests.ranks import run_ranks
from tests.runs import SMALL, TINY, arguments, start
from tests.test_rerank import clustered

CASE = clustered(30, 90, 6, 7, 3, 0)


def write(folder, text: bool, **changes) -> list[str]:
    """The flags for two files that hold CASE in float32."""
    flags, kinds = [], {"pids": "p", "camids": "c"}
    for name, feats, pids, camids in (
        ("query", CASE.q, CASE.q_pids, CASE.q_camids),
        ("gallery", CASE.g, CASE.g_pids, CASE.g_camids),
    ):
        columns = {"pids": pids, "camids": camids}
        if text:
            columns = {key: np.array([f"{kinds[key]}{v}" for v in values]) for key, values in columns.items()}
        paths = np.array([f"{i}.jpg" for i in range(len(feats))])
        file = folder / f"{name}.npz"
        write_features(str(file), FeatureFile(feats.astype(np.float32), paths, **(columns | changes.get(name, {}))))
        flags += [f"--features-{name}", str(file)]
    return flags


def call(argv):
    evaluate.main(ranks.world, argv)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 3])
def test_files_of_features_give_what_the_functions_give(world_size, tmp_path):
    """On ranks that do not divide the training batch either."""
    options = "TEST.RERANK True TEST.RERANK_K1 8 TEST.RERANK_K2 3 TEST.EXPAND query TEST.EXPAND_K 4 TEST.SINGLE_SHOT 2"
    run_ranks(world_size, call, [*write(tmp_path, True), "--output", str(tmp_path), *options.split()])
    found = json.loads((tmp_path / "features/query/evaluation.json").read_text())
    assert found["tests"]["query"] == {key: value for key, value in found.items() if key != "tests"}
    case = clustered(30, 90, 6, 7, 3, 0)
    case.q, case.g = case.q.astype(np.float32), case.g.astype(np.float32)
    sides = case.features("q", 0, 1), case.features("g", 0, 1)
    for block, wanted in (
        (found, evaluate_features(*sides)),
        (found["re_ranked"], rerank.evaluate_reranked(*sides, settings=rerank.Settings(8, 3))),
        (found["query_expansion"], expansion.evaluate_expanded(*sides, settings=expansion.Settings(4))),
    ):
        assert block["mAP"] == pytest.approx(wanted.mAP, abs=1e-6)
        assert block["num_query"] == 30
    assert (found["re_ranked"]["k1"], found["query_expansion"]["k"], found["single_shot"]["repeats"]) == (8, 4, 2)
    assert found["multi_query"]["num_query"] == len({*zip(case.q_pids, case.q_camids, strict=True)}) < 30
    assert found["roc"]["fpr"] == [1e-4, 1e-3, 1e-2] and len(found["roc"]["curve"]["tpr"]) == 49
    assert found["camera_pairs"]["query_cameras"] == ["c0", "c1", "c2"] and found["camera_pairs"]["mAP"][0][0] is None
    worst = found["worst_identities"]
    assert {w["pid"] for w in worst} <= {f"p{i}" for i in range(7)} and worst[0]["mAP"] <= worst[-1]["mAP"]


def test_details_can_be_left_out_and_no_camera_ids_are_said(tmp_path, capfd):
    flags = write(tmp_path, False, query={"camids": None}, gallery={"camids": None})
    run_ranks(1, call, [*flags, "--output", str(tmp_path), "TEST.DETAILS", "False"])
    found = json.loads((tmp_path / "features/query/evaluation.json").read_text())
    assert not {"roc", "multi_query", "re_ranked"} & found.keys()
    assert "no camera ids, so nothing is junk" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": {"pids": None}}, "--features-query .* has no pid"),
        ({"gallery": {"camids": None}}, "--features-gallery .* has no camid, the query text as camid"),
        ({"gallery": {"pids": np.arange(90)}}, "has numbers as pid, the query text as pid; expected the same kind"),
    ],
)
def test_files_that_do_not_fit_are_named(changes, message, tmp_path):
    _, query, _, gallery = write(tmp_path, True, **changes)
    with pytest.raises(ValueError, match=message):
        read_pair(query, gallery)


def test_widths_that_differ_are_named(tmp_path):
    _, query, _, gallery = write(tmp_path, False)
    write_features(gallery, FeatureFile(np.ones((2, 3), np.float32), np.array(["a", "b"]), np.arange(2), np.arange(2)))
    with pytest.raises(ValueError, match="width 3; expected the query's 8"):
        read_pair(query, gallery)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--features-query", "q.npz"], "both of them"),
        (["--features-query", "q.npz", "--features-gallery", "g.npz", "--weights", "w.pt"], "expected one of them"),
        ([], "expected --weights FILE, or --features-query FILE"),
        (["--weights", "w.pt", "TEST.RERANK_LAMBDA", "1.5"], "TEST.RERANK_LAMBDA 1.5: expected a share"),
        (["--weights", "w.pt", "TEST.PRECISION", "fp16"], "expected bf16 or fp32 on a machine without a GPU"),
    ],
)
def test_command_lines_that_say_too_little_or_too_much(argv, message, capfd):
    with pytest.raises(AssertionError, match="UserError"):
        run_ranks(1, call, argv)
    assert message in capfd.readouterr().err


@pytest.mark.ranks
def test_the_trainers_evaluation_has_the_rows_too(pedestrians, trained, tmp_path):
    """`train --eval` on three ranks, which do not divide the training batch, finds what evaluate finds on one."""
    wanted = "TEST.RERANK True TEST.RERANK_K1 5 TEST.FEATURE_DTYPE fp16"
    text = f"{SMALL} {TINY} TRAIN.PRECISION fp32 REPORT.PAGE False {wanted}"
    run_ranks(3, start, ["--eval", "--resume", str(trained), *arguments(pedestrians, tmp_path / "three", text)])
    run_ranks(1, call, ["--weights", str(trained), *arguments(pedestrians, tmp_path / "one", text)])
    three, one = (json.loads((tmp_path / n / "market1501/t/evaluation.json").read_text()) for n in ("three", "one"))
    for block in (lambda found: found, lambda found: found["re_ranked"]):
        for name in ("mAP", "rank1", "mINP", "num_query", "num_gallery"):
            assert block(three)[name] == pytest.approx(block(one)[name], abs=1e-4), name
    assert three["re_ranked"]["k1"] == 5 and three["re_ranked"]["mAP"] != three["mAP"]
