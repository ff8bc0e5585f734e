"""How fp32 is computed and whether runs are deterministic: the settings in effect where something is computed, what a
resume may change, and that nothing in a step lacks a deterministic algorithm on a GPU."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from reid_dist import checkpoint, evaluate, extract, precision, summary, train
from reid_dist.config import changed_keys, check_config, defaults, load_config, parser, set_key
from reid_dist.data.augment import CODES, Augmentation
from reid_dist.data.finish import finish
from reid_dist.inference import FeatureExtractor
from reid_dist.losses import PAIRWISE, build_classification, build_pairwise
from reid_dist.losses.center import center_gradient
from reid_dist.models import build_model
from reid_dist.models.batch_norm import group_batch_norms
from reid_dist.precision import fp32_products, set_determinism
from reid_dist.report.results import made_with
from reid_dist.world import World
from tests import ranks
from tests.ranks import run_ranks
from tests.runs import PLAIN, SMALL, TINY, arguments, newest, read_events, run, same_state

CPU = World(0, 0, 1, torch.device("cpu"))
FP32 = f"{SMALL} {TINY} TRAIN.PRECISION fp32".replace("TRAIN.PRECISION fp64 ", "")
PARTS = {
    "generic": torch.backends,
    "cudnn": torch.backends.cudnn,
    "mkldnn": torch.backends.mkldnn,
    "conv": torch.backends.cudnn.conv,
    "matmul": torch.backends.cuda.matmul,
    "rnn": torch.backends.cudnn.rnn,
    "cpu conv": torch.backends.mkldnn.conv,
    "cpu matmul": torch.backends.mkldnn.matmul,
}
IEEE, TF32 = ("ieee", "ieee", "ieee", "ieee"), ("tf32", "tf32", "ieee", "ieee")


def in_effect():
    """(conv, matmul) on a GPU, then on a CPU."""
    return tuple(PARTS[name].fp32_precision for name in ("conv", "matmul", "cpu conv", "cpu matmul"))


def all_settings():
    """By both of torch's interfaces; the older one raises where they contradict each other."""
    found = {name: part.fp32_precision for name, part in PARTS.items()}
    for name, part in (("cudnn", torch.backends.cudnn), ("matmul", torch.backends.cuda.matmul)):
        try:
            found[f"{name}.allow_tf32"] = part.allow_tf32
        except RuntimeError:
            found[f"{name}.allow_tf32"] = "mixed"
    return found


@pytest.fixture(autouse=True)
def torch_as_it_starts():
    """The settings of a fresh process, before and after each test."""

    def reset():
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
        for name, part in PARTS.items():
            part.fp32_precision = "tf32" if name in ("conv", "rnn") else "none"
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cudnn.benchmark = False

    reset()
    yield
    reset()


# ---------------------------------------------------------------- the settings of a process


def set_new(name, value):
    PARTS[name].fp32_precision = value


HOSTS = {
    "as torch starts": lambda: None,
    "older interface, off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "older interface, on": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "everything tf32": lambda: set_new("generic", "tf32"),
    "conv alone": lambda: set_new("conv", "ieee"),
    "matmul alone": lambda: set_new("matmul", "tf32"),
    "cuDNN's own": lambda: (set_new("conv", "none"), set_new("cudnn", "ieee")),
    "bf16 on the CPU": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.parametrize("host", HOSTS)
def test_settings_are_those_of_the_precision_and_then_the_hosts_again(host):
    HOSTS[host]()
    before = all_settings()
    with fp32_products("fp32"):
        assert in_effect() == IEEE
        with fp32_products("tf32"):
            assert in_effect() == TF32
            with pytest.raises(KeyError), fp32_products("bf16"):
                assert in_effect() == IEEE
                raise KeyError
            assert in_effect() == TF32
        assert in_effect() == IEEE
    assert all_settings() == before


def test_a_setting_that_was_inherited_still_is():
    set_new("generic", "tf32")
    with fp32_products("fp32"):
        pass
    set_new("generic", "ieee")
    assert PARTS["matmul"].fp32_precision == PARTS["cpu matmul"].fp32_precision == "ieee"


def test_determinism_sets_what_torch_has_for_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_determinism(True, torch.device("cpu"))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory and not torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in precision.os.environ
    set_determinism(False, torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


def test_cublas_is_told_before_it_starts_unless_it_was_told_already(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_determinism(False, gpu)
    assert "CUBLAS_WORKSPACE_CONFIG" not in precision.os.environ
    set_determinism(True, gpu)
    assert precision.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_determinism(True, gpu)
    assert precision.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    with pytest.raises(ValueError, match=r"TRAIN\.DETERMINISTIC 'on'.*CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8; unset it"):
        set_determinism(True, gpu)


def test_nccl_takes_no_algorithm_whose_sums_may_differ(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    set_determinism(True, torch.device("cuda", 0))
    assert precision.os.environ["NCCL_ALGO"] == "Ring", "the user's choice"
    monkeypatch.delenv("NCCL_ALGO")
    set_determinism(False, torch.device("cuda", 0))
    assert "NCCL_ALGO" not in precision.os.environ
    set_determinism(True, torch.device("cuda", 0))
    assert precision.os.environ["NCCL_ALGO"] == "^NVLS"


# ---------------------------------------------------------------- the settings in effect in each command


def watch(monkeypatch, *places):
    """A list that (name, settings in effect, deterministic, benchmark) of each call of these functions is added to."""
    seen = []

    def noting(name, original):
        def note(*args, **kwargs):
            on = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
            seen.append((name, in_effect(), *on))
            return original(*args, **kwargs)

        return note

    for module, name in places:
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    return seen


def watched_training(argv):
    with pytest.MonkeyPatch.context() as patch:
        evaluation = [(evaluate, name) for name in ("extract", "evaluate_features", "ranked_lists")]
        seen = watch(patch, (train, "rehearse"), (train, "train_step"), *evaluation)
        train.main(ranks.world, argv)
    assert in_effect() == ("tf32", "none", "none", "none")  # whatever a process computes after it
    return seen


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("train_precision", "test_precision", "on", "step", "extraction"),
    [
        ("fp32", "", "on", IEEE, IEEE),
        ("tf32", "", "on", TF32, TF32),
        ("tf32", "fp32", "off", TF32, IEEE),
        ("fp32", "tf32", "on", IEEE, TF32),
        ("bf16", "tf32", "on", IEEE, TF32),
        ("fp64", "", "on", IEEE, IEEE),
    ],
)
def test_training_and_tests_each_compute_in_their_own_precision(
    pedestrians, tmp_path, train_precision, test_precision, on, step, extraction
):
    text = FP32.replace("TRAIN.PRECISION fp32", f"TRAIN.PRECISION {train_precision}")
    text += f" TEST.PRECISION {test_precision or 'NONE'} TRAIN.DETERMINISTIC {on} TEST.EVAL_STEP 1 TRAIN.MAX_EPOCH 2"
    argv = arguments(pedestrians, tmp_path, text)
    expected = {"rehearse": step, "train_step": step, "extract": extraction}
    for seen in run_ranks(2, watched_training, argv, timeout_s=100):
        names = [name for name, *_ in seen]
        # Steps before and after an evaluation.
        assert "train_step" in names[: names.index("extract")] and "train_step" in names[names.index("extract") :]
        assert {"rehearse", "evaluate_features", "ranked_lists"} <= set(names)
        for name, settings, deterministic, benchmark in seen:
            assert settings == expected.get(name, IEEE), name
            assert (deterministic, benchmark) == ((True, False) if on == "on" else (False, True))


def watched_evaluation(argv):
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch, (evaluate, "extract"), (evaluate, "evaluate_features"), (evaluate, "evaluate_further"))
        evaluate.main(ranks.world, argv)
    return seen


@pytest.mark.ranks
def test_the_evaluation_command_extracts_in_the_precision_and_ranks_in_fp32(trained, pedestrians, tmp_path):
    text = f"{FP32} TRAIN.PRECISION fp32 TEST.PRECISION tf32 TRAIN.DETERMINISTIC on"
    [seen] = run_ranks(1, watched_evaluation, ["--weights", str(trained), *arguments(pedestrians, tmp_path, text)])
    expected = {"extract": TF32, "evaluate_features": IEEE, "evaluate_further": IEEE}
    assert {name: settings for name, settings, *_ in seen} == expected
    assert all(on and not benchmark for *_, on, benchmark in seen)


def images_of(root, num=4):
    return sorted(str(f) for f in (root / "bounding_box_test").iterdir() if f.suffix == ".jpg")[:num]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("opts", "expected"), [((), IEEE), (("TEST.PRECISION", "tf32"), TF32)])
def test_the_extractor_leaves_the_process_as_it_was(trained, pedestrians, host, opts, expected):
    extractor = FeatureExtractor(trained, opts=opts, device="cpu")
    seen = []
    extractor.network.register_forward_pre_hook(lambda *_: seen.append(in_effect()))
    HOSTS[host]()
    before = all_settings()
    extractor(images_of(pedestrians))
    assert seen == [expected] and all_settings() == before
    with pytest.raises(ValueError, match=r"nowhere\.jpg"):
        extractor("nowhere.jpg")
    assert all_settings() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_extractor_takes_every_precision_of_a_test(trained, pedestrians):
    images = images_of(pedestrians)
    by_precision = {
        name: FeatureExtractor(trained, opts=("TEST.PRECISION", name), device="cpu", flip=True)(images)
        for name in ("", "fp32", "tf32", "bf16")
    }
    assert all(feats.dtype == torch.float32 for feats in by_precision.values())
    assert torch.equal(by_precision[""], by_precision["fp32"]) and torch.equal(by_precision[""], by_precision["tf32"])
    assert not torch.equal(by_precision[""], by_precision["bf16"])
    torch.testing.assert_close(by_precision["bf16"], by_precision["fp32"], rtol=0.1, atol=0.1)


def test_extraction_to_a_file_takes_the_precision_of_a_test(trained, pedestrians, tmp_path, monkeypatch):
    written = []
    seen = watch(monkeypatch, (extract, "extract"))
    for name in ("NONE", "tf32", "bf16"):
        out = tmp_path / f"{name}.npz"
        options = "DATA.TEST_BATCH 5 DATA.NUM_WORKERS 0 DATA.PIPELINE torch TEST.PRECISION".split()
        argv = ["--weights", trained, "--images", pedestrians / "bounding_box_test", "--out", out]
        extract.main(CPU, [*map(str, argv), *options, name.replace("NONE", "")])
        written.append(np.load(out)["feats"])
    assert [settings for _, settings, *_ in seen] == [IEEE, TF32, IEEE]
    assert np.array_equal(written[0], written[1]) and not np.array_equal(written[0], written[2])


@pytest.mark.ranks
@pytest.mark.parametrize("change", ["TRAIN.PRECISION tf32", "TRAIN.DETERMINISTIC off"])
def test_on_a_cpu_neither_tf32_nor_determinism_changes_a_bit(pedestrians, tmp_path, change):
    evals = []
    for name, more in (("plain", ""), ("changed", change)):
        run(2, pedestrians, tmp_path / name, f"{FP32} LOSS.CENTER 0.1 TRAIN.MAX_STEPS 2 {more}")
        found = [e for e in read_events(tmp_path / name) if e["event"] == "eval"]
        evals.append([{k: v for k, v in e.items() if k != "seconds"} for e in found])
    assert same_state(newest(tmp_path / "plain"), newest(tmp_path / "changed"))
    assert evals[0] and evals[0] == evals[1]


# ---------------------------------------------------------------- the config and a resume


def load(*opts):
    return load_config(parser("train").parse_intermixed_args(list(opts)))


def test_values_of_the_keys(tmp_path):
    assert load().TRAIN.DETERMINISTIC == "on" and load().TRAIN.PRECISION == "fp32"
    check_config(load("TRAIN.PRECISION", "tf32", "TEST.PRECISION", "tf32"), 1, cuda=False)
    with pytest.raises(ValueError, match=r"TRAIN\.DETERMINISTIC 'maybe': expected one of on, off"):
        check_config(load("TRAIN.DETERMINISTIC", "maybe"), 1, cuda=False)
    with pytest.raises(ValueError, match=r"TEST\.PRECISION 'tf32' with TRAIN\.PRECISION 'fp64'"):
        check_config(load("TRAIN.PRECISION", "fp64", "TEST.PRECISION", "tf32"), 1, cuda=False)
    # YAML reads off without quotes as false.
    (tmp_path / "c.yaml").write_text("TRAIN: {DETERMINISTIC: off}\nDATA: {CACHE: off}\n")
    cfg = load("--cfg", str(tmp_path / "c.yaml"))
    assert (cfg.TRAIN.DETERMINISTIC, cfg.DATA.CACHE) == ("off", "off")
    assert yaml.safe_load(cfg.dump())["TRAIN"]["DETERMINISTIC"] == "off"


def without(key, text):
    """A config's YAML as a version wrote it that did not have the key."""
    tree = yaml.safe_load(text)
    *parents, leaf = key.split(".")
    node = tree
    for name in parents:
        node = node[name]
    del node[leaf]
    return yaml.safe_dump(tree)


def test_a_key_that_a_checkpoint_does_not_have_counts_as_its_default():
    saved = without("TRAIN.DETERMINISTIC", defaults().dump())
    assert changed_keys(saved, load()) == []
    assert changed_keys(saved, load("TRAIN.DETERMINISTIC", "off")) == ["TRAIN.DETERMINISTIC 'on' -> 'off'"]


@pytest.mark.ranks
def test_determinism_may_not_change_on_a_resume(pedestrians, tmp_path, capfd):
    text = f"{FP32} {PLAIN} MODEL.RESUME auto TRAIN.MAX_STEPS"
    run(1, pedestrians, tmp_path, f"{text} 1 TRAIN.DETERMINISTIC on")
    with pytest.raises(AssertionError, match="UserError"):
        run(1, pedestrians, tmp_path, f"{text} 2 TRAIN.DETERMINISTIC off")
    assert "TRAIN.DETERMINISTIC 'on' -> 'off'; expected the checkpoint's value" in capfd.readouterr().err
    run(1, pedestrians, tmp_path, f"{text} 2 TRAIN.DETERMINISTIC off TRAIN.ALLOW_CHANGES true")
    assert newest(tmp_path)["step"] == 2 and "DETERMINISTIC: 'off'" in newest(tmp_path)["config"]


@pytest.mark.ranks
def test_a_run_of_a_version_without_the_key_goes_on_bitwise(pedestrians, tmp_path):
    text = f"{FP32} {PLAIN} MODEL.RESUME auto TRAIN.MAX_STEPS"
    run(1, pedestrians, tmp_path / "straight", f"{text} 2")
    run(1, pedestrians, tmp_path / "old", f"{text} 1")
    folder = tmp_path / "old/market1501/t"
    [file] = checkpoint.list_steps(folder / "checkpoints")
    saved = torch.load(file, weights_only=True)
    saved["config"] = without("TRAIN.DETERMINISTIC", saved["config"])
    del saved["checksum"]
    checkpoint.write(folder / "checkpoints", saved, keep=2)
    config = Path(folder / "config.yaml")
    config.write_text(without("TRAIN.DETERMINISTIC", config.read_text()))
    run(1, pedestrians, tmp_path / "old", f"{text} 2", flags=["--cfg", str(config)])
    assert same_state(newest(tmp_path / "straight"), newest(tmp_path / "old"))


# ---------------------------------------------------------------- what a run says


def config(**keys):
    cfg = defaults()
    for key, value in keys.items():
        set_key(cfg, key.replace("__", "."), value)
    return cfg


def test_the_summary_names_precision_and_determinism():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert summary.arithmetic(config(), gpu) == "fp32; deterministic algorithms"
    changed = config(TRAIN__PRECISION="tf32", TRAIN__DETERMINISTIC="off")
    assert summary.arithmetic(changed, gpu) == "tf32; fastest algorithms, not deterministic"
    assert summary.arithmetic(changed, cpu).startswith("tf32 (tf32 is fp32 on a CPU); ")
    mixed = config(TRAIN__PRECISION="bf16", TEST__PRECISION="tf32")
    assert summary.arithmetic(mixed, gpu) == "bf16, tf32 at test; deterministic algorithms"


def test_the_table_of_results_notes_a_run_that_was_not_deterministic():
    keys = {"TRAIN.PRECISION": "tf32", "TRAIN.DETERMINISTIC": "on", "MODEL.PRETRAINED": "imagenet"}
    assert made_with(SimpleNamespace(config=keys)) == ["tf32"]
    keys["TRAIN.DETERMINISTIC"] = "off"
    assert made_with(SimpleNamespace(config=keys)) == ["tf32", "not deterministic"]


# ---------------------------------------------------------------- operations without a deterministic algorithm on a GPU

# Of torch's list (use_deterministic_algorithms, 2.11 and 2.14), with kthvalue, which its source has as well. Their
# CPU kernels are deterministic, so that a CPU run alone would not show one of them.
RAISE_ON_GPU = (
    "avg_pool3d_backward adaptive_avg_pool2d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward "
    "adaptive_max_pool2d_backward adaptive_max_pool3d_backward fractional_max_pool2d_backward "
    "fractional_max_pool3d_backward max_pool3d_with_indices_backward max_unpool2d max_unpool3d "
    "upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward upsample_trilinear3d_backward "
    "_upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward reflection_pad1d_backward "
    "reflection_pad2d_backward reflection_pad3d_backward nll_loss2d_forward nll_loss2d_backward _ctc_loss_backward "
    "_embedding_bag_dense_backward put_ put histc median nanmedian kthvalue grid_sampler_2d_backward "
    "grid_sampler_3d_backward scatter_reduce scatter_reduce_ resize_"
).split()


class Recorder(TorchDispatchMode):
    """The names of the ATen operations that run, those of a backward pass included."""

    def __init__(self):
        super().__init__()
        self.names, self.raising = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.names.add(name)
        is_float_sum = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
        is_weighted = name == "bincount" and len(args) > 1 and args[1] is not None
        if name in RAISE_ON_GPU or is_float_sum or is_weighted:
            self.raising.add(name)
        return func(*args, **(kwargs or {}))


def test_the_recorder_sees_what_would_raise():
    x = torch.rand(1, 1, 4, 4, requires_grad=True)
    with Recorder() as found:
        torch.nn.functional.interpolate(x, size=8, mode="bilinear").sum().backward()
        torch.nn.functional.adaptive_avg_pool2d(x, 2).sum().backward()
        torch.rand(3).cumsum(0), torch.arange(3).cumsum(0), torch.rand(3).median(0)
    raising = {"upsample_bilinear2d_backward", "_adaptive_avg_pool2d_backward", "cumsum", "median"}
    assert found.raising == raising, found.names


NETWORKS = {
    "resnet50": {"pool": "gem", "non_local": True, "embed_dim": 32},
    "resnet50_ibn": {"pool": "max+avg", "bnneck": True},
    "ianet": {"variant": "released"},
    "ianet_ibn": {"variant": "normalised"},
    "mobilenet_v2": {},
    "tiny": {},
    "timm/vit_tiny_patch16_224": {},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_with_deterministic_algorithms(name):
    set_determinism(True, torch.device("cpu"))
    size = (32, 16) if not name.startswith("timm/") else (32, 32)
    width = {"mobilenet_v2": 1280, "tiny": 128, "timm/vit_tiny_patch16_224": 192}.get(name, 2048)
    model = build_model(name, width, range(6), cosine=True, image_size=size, **NETWORKS[name])
    group_batch_norms(model, 2)
    images = torch.rand(4, 3, *size).to(memory_format=torch.channels_last)
    with Recorder() as found:
        feats, logits = model.train()(images)
        (feats.square().mean() + logits.square().mean()).backward()
    assert not found.raising and "native_batch_norm_backward" in found.names


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_every_loss_has_a_deterministic_algorithm(distance):
    set_determinism(True, torch.device("cpu"))
    feats = torch.rand(8, 5, requires_grad=True)
    pids = torch.arange(8) // 2
    with Recorder() as found:
        for name in PAIRWISE:
            build_pairwise(name, 16.0, 0.1, distance)(feats, pids, feats.flip(0), pids.flip(0), 0).backward()
        for name in ("crossentropy", "crossentropylabelsmooth", "arcface", "cosface", "circle"):
            build_classification(name, 16.0, 0.1)(feats.tanh(), pids).backward()
        center_gradient(feats, pids, torch.rand(5, 5))
    assert not found.raising and "index_add_" in found.names


def test_every_operation_on_images_has_a_deterministic_algorithm():
    set_determinism(True, torch.device("cpu"))
    n, h, w = len(CODES) - 1, 24, 12
    magnitudes = np.full((n, 1), 0.4, np.float32)
    for name, value in (("posterize", 4), ("solarize", 100), ("rotate", 20), ("blur", 2)):
        magnitudes[CODES[name] - 1] = value
    box = np.tile(np.array([2, 3, 8, 6], np.int32), (n, 1))
    augmentation = Augmentation(
        np.tile(np.array([h, w], np.int32), (n, 1)), np.zeros((n, 2), np.int32), np.arange(n) % 2 == 0,
        np.full((n, 2), 3, np.int32), np.arange(1, n + 1, dtype=np.uint8)[:, None], magnitudes, box, box,
        np.arange(n, dtype=np.uint64),
    )  # fmt: skip
    images = torch.randint(0, 256, (n, h, w, 3), dtype=torch.uint8)
    with Recorder() as found:
        for fill in ("constant", "mean", "noise"):
            finish(images, copy.deepcopy(augmentation), torch.float32, fill)
    assert not found.raising and {"scatter_add_", "cumsum"} <= found.names


@pytest.mark.ranks
def test_rankings_have_deterministic_algorithms(trained, pedestrians, tmp_path):
    """Re-ranking, expansion, ROC and the rest, by the functions that run on both devices."""
    text = f"{FP32} TEST.RERANK true TEST.EXPAND both TEST.SINGLE_SHOT 2 TEST.DETAILS true"
    text += " TEST.RERANK_K1 5 TEST.RERANK_K2 2 TEST.EXPAND_K 3"
    argv = ["--weights", str(trained), *arguments(pedestrians, tmp_path, text)]
    [(raising, names)] = run_ranks(1, recorded_evaluation, argv, timeout_s=100)
    assert not raising and {"index_add_", "bincount"} <= names


def recorded_evaluation(argv):
    with Recorder() as found:
        evaluate.main(ranks.world, argv)
    return found.raising, found.names
