"""Bad options are refused before anything is started, naming option, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.arguments import Arguments, check_arguments, parse_arguments
from launch.placement import Placement
from tests.launch import jobs


def get_error(capsys: pytest.CaptureFixture[str], *argv: str, ranks: int = 2) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(argv, Placement(size=ranks))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("--micro-batch", "0", "give 1 or more"),
        ("--window", "-3", "give 1 or more"),
        ("--window", "1", "give 2 or more, or start fewer ranks"),
        ("--epochs", "0", "give 1 or more"),
        ("--train-images", "0", "give 1 or more"),
        ("--train-images", "1438", "there are 1437"),
        ("--checkpoint-every", "-1", "give 0"),
        ("--keep-checkpoints", "0", "give 1 or more"),
        ("--resume", "perhaps", "auto"),
        ("--lr", "nan", "give a finite number above 0"),
        ("--lr", "-0.5", "give a finite number above 0"),
        ("--lr", "inf", "give a finite number above 0"),
        ("--timeout", "nan", "give a finite number of seconds above 0"),
        ("--timeout", "0.0", "give a finite number of seconds above 0"),
        ("--momentum", "1.0", "give a number in [0, 1)"),
        ("--normalization", "none-at-all", "renorm"),
        ("--window", "many", "invalid int value"),
    ],
)
def test_error_names_option_value_and_remedy(
    capsys: pytest.CaptureFixture[str], option: str, value: str, remedy: str
) -> None:
    error = get_error(capsys, option, value)
    assert option in error
    assert value in error
    assert remedy in error


def test_output_must_not_be_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"--output {output}: that is, or is below, a file" in get_error(capsys, f"--output={output}")


@pytest.mark.parametrize("normalization", ["batch", "none"])
def test_a_micro_batch_of_one_needs_a_policy_that_takes_it(
    capsys: pytest.CaptureFixture[str], normalization: str
) -> None:
    command = ["--model=mlp", f"--normalization={normalization}", "--train-images=66"]
    assert "--micro-batch 4: with --window 64 and 2 rank(s)" in get_error(capsys, *command)
    check_arguments(Arguments(model="mlp", normalization=normalization, train_images=66), ranks=1)
    check_arguments(Arguments(model="mlp", normalization="renorm", train_images=66), ranks=2)


def test_a_global_batch_of_one_has_no_variance_in_the_mlp(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--window 64: some global batch of the 65" in get_error(capsys, "--model=mlp", "--train-images=65")
    check_arguments(Arguments(train_images=65), ranks=2)


def test_defaults_are_valid_and_no_option_may_be_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_arguments([], Placement()) == Arguments()
    assert "--micro" in get_error(capsys, "--micro", "4")


def test_help_names_every_option_and_imports_no_torch() -> None:
    probe = "import sys, runpy; sys.argv = ['train.py', '--help']\n"
    probe += "try: runpy.run_module('launch.train', run_name='__main__')\n"
    probe += "except SystemExit as stop: print('status', stop.code, 'torch' in sys.modules)"
    shown = jobs.run("python", "-c", probe).stdout
    assert "status 0 False" in shown
    for name in vars(Arguments()):
        assert f"--{name.replace('_', '-')}" in shown


def test_under_torchrun_one_message_comes_through() -> None:
    finished = jobs.run(jobs.LOCAL, 2, "launch/train.py", "--window", "1")
    assert finished.returncode == 1
    assert finished.stdout.count("train.py: error: --window 1: 2 ranks cannot share so few images") == 1
