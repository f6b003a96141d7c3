"""The experiment that compares policies with the large batch, from its command line to its plot."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.equivalence import runner
from benchmarks.equivalence.__main__ import main
from benchmarks.equivalence.cases import Case, Limits, add_references, plan_full, plan_quick
from benchmarks.equivalence.picture import average_scores
from benchmarks.equivalence.policies import apply_policy
from benchmarks.equivalence.ranks import train_on_ranks
from benchmarks.equivalence.results import Result, Store
from benchmarks.equivalence.spread import measure_spreads
from benchmarks.equivalence.tasks import load_task
from benchmarks.equivalence.training import Trace, train
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

PICTURES = ("equivalence.png", "readme.png")


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
    return train(case, Placement(), lambda step: None)


def measure(case: Case, folder: Path) -> Result:
    """A case's result beside its reference's."""
    store = Store(folder)
    store.keep(case.reference, train_alone(case.reference))
    return store.keep(case, train_alone(case) if case.ranks == 1 else train_on_ranks(case))


def score(policy: str, micro_batch: int, seed: int, value: float | None) -> Result:
    return Result(
        Case("mlp", policy, micro_batch, 0.1, seed, 1), "trained" if value else "diverged", [1.0], value, 1, {}
    )


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
    assert f"{renorm['final_loss']:.4g}" in printed
    assert f"{renorm['score']:.1%}" in printed
    assert [spread["inside"] for spread in content["spreads"]] == [True]
    for name in ("equivalence.json", "equivalence.png", "readme.png"):
        assert (published / name).read_bytes() == (output / name).read_bytes()
    for name in PICTURES:
        picture = (output / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 200_000


def test_pictures_are_drawn_anew_from_the_json_alone(tiny: tuple[Path, Path, str], tmp_path: Path) -> None:
    (tmp_path / "equivalence.json").write_bytes((tiny[0] / "equivalence.json").read_bytes())
    main(["--redraw", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"equivalence.json", *PICTURES}
    # The JSON has losses rounded and scores in full; the README's picture shows scores alone.
    assert (tmp_path / "readme.png").read_bytes() == (tiny[0] / "readme.png").read_bytes()


def test_the_readme_pictures_points_are_means_beside_the_large_batch_of_the_same_seeds() -> None:
    results = [
        score("reference", 64, 0, 0.9),
        score("reference", 64, 1, 0.8),
        score("renorm", 4, 0, 0.7),
        score("renorm", 4, 1, 0.5),
        score("renorm", 2, 0, 0.4),
        score("batchnorm", 4, 0, 0.3),
        score("batchnorm", 4, 1, None),
    ]
    assert average_scores(results, "reference") == pytest.approx({2: 0.9, 4: 0.85})
    assert average_scores(results, "renorm") == pytest.approx({2: 0.4, 4: 0.6})
    assert average_scores(results, "batchnorm") == {}


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


@pytest.mark.parametrize("task", ["denoise", "resnet18", "finetune"])
def test_every_task_trains_and_is_scored(task: str) -> None:
    trace = train_alone(Case(task, "renorm", 32, 0.01, 0, 2))
    assert (trace.outcome, list(trace.weights)) == ("trained", [1, 2])
    assert trace.score is not None


def test_fine_tuning_starts_from_the_same_pretrained_weights_each_time() -> None:
    first, second = (load_task("finetune", 0, torch.float32).build() for _ in range(2))
    fresh = load_task("resnet", 0, torch.float32).build()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
    assert not torch.equal(next(first.parameters()), next(fresh.parameters()))


def test_training_samples_fill_whole_windows() -> None:
    for task in ("mlp", "denoise", "finetune"):
        assert len(load_task(task, 0, torch.float32).train[1]) % 64 == 0


def test_group_norm_takes_over_the_affine_parameters() -> None:
    model = build_model("resnet")
    before = dict(model.named_parameters())
    assert not apply_policy(model, "groupnorm")
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == 17
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("running", ("running", 1.5, 0.5, 1.0)),
        ("batch", ("batch", 1.5, 0.5, 1.0)),
        ("renorm", ("renorm", 1.5, 0.5, 1.0)),
        ("renorm-prior0", ("renorm", 1.5, 0.5, 0.0)),
        ("renorm-ioffe", ("renorm", 3.0, 5.0, 0.0)),
        ("exact", ("renorm", 1.5, 0.5, 1.0)),
    ],
)
def test_policies_set_up_every_layer(policy: str, settings: tuple[object, ...]) -> None:
    model = build_model("mlp")
    assert apply_policy(model, policy)
    layers = [layer for layer in model.modules() if isinstance(layer, SyncAccumBatchNorm)]
    assert [(x.normalization, x.r_max, x.d_max, x.prior_count) for x in layers] == [settings] * 3


@pytest.mark.parametrize("plan", [plan_quick, plan_full])
def test_a_plan_has_each_case_once_and_its_reference_before_it(plan: Any) -> None:
    cases = add_references(plan([0, 1], "float32"))
    assert len({case.name for case in cases}) == len(set(cases)) == len(cases)
    for index, case in enumerate(cases):
        assert case.reference in cases[: index + 1]


def test_limits_keep_only_what_they_name() -> None:
    limits = Limits(tasks=["mlp"], policies=["exact"], micro_batches=[4], lrs=[0.4], ranks=[1], steps=7)
    assert limits.apply(plan_full([0, 1], "float32")) == [Case("mlp", "exact", 4, 0.4, 0, 7)]


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
        (["--micro-batches", "3"], "no training is left"),
        (["--tasks", "cifar"], "invalid choice: 'cifar'"),
        (["--policies", "groupnom"], "invalid choice: 'groupnom'"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
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
