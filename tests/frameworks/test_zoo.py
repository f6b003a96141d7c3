"""A sample of `make zoo`: a model of each library passes, and a trial finds what is wrong."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.zoo.table import write_lines
from benchmarks.zoo.trial import try_model

pytestmark = pytest.mark.filterwarnings("ignore")  # what libraries deprecate in each other

SAMPLE = {
    ("timm", "resnet10t"): 14,
    ("timm", "mobilenetv3_small_050"): 34,
    ("torchvision", "shufflenet_v2_x0_5"): 56,
    ("smp", "fpn resnet18"): 20,
    ("transformers", "LevitForImageClassification"): 27,
    ("transformers", "PatchTSTForPrediction"): 6,
    ("monai", "BasicUNet"): 18,
}
"""How many layers each has."""


@pytest.mark.parametrize(("library", "name"), SAMPLE)
def test_a_model_passes(library: str, name: str) -> None:
    torch.manual_seed(0)
    outcome = try_model(*import_module(f"benchmarks.zoo.{library}_models").build(name))
    assert outcome.failure == ""
    assert outcome.layers == SAMPLE[library, name]
    assert outcome.unreached == 0


class Moving(nn.BatchNorm1d):
    """Moves its statistics by itself, whatever it was converted to."""

    def forward(self, x: torch.Tensor) -> Any:
        self.running_mean += 1
        return super().forward(x)


class Scaled(nn.BatchNorm1d):
    """Its layer sees other values than it was given."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(2 * x)


@pytest.mark.parametrize(
    ("kind", "failure"), [(Moving, "moved within a window"), (Scaled, "statistics differ from nn.BatchNorm's by")]
)
def test_a_trial_finds_what_is_wrong(kind: type[nn.BatchNorm1d], failure: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), kind(4), nn.Linear(4, 1))
    assert failure in try_model(model, lambda size: model(torch.randn(size, 3))).failure


def test_the_page_has_a_row_for_each_family_and_names_what_fails() -> None:
    passed = {"layers": 3, "unreached": 1, "error": 1e-7, "seconds": 1.0, "failure": ""}
    models = [
        {"family": "a", "name": "a1", "outcome": passed},
        {"family": "b", "name": "b1", "outcome": {**passed, "failure": "TrialError: it | broke"}},
        {"family": "b", "name": "b2", "outcome": None},
    ]
    found = {"timm": {"package": "timm", "version": "1", "torch": "2", "models": models}}
    lines = list(write_lines(found))
    assert "**1 of 2 pass.**" in lines[0]
    assert "| a | a1: 3 (1) | passes |" in lines
    assert "| b | b1: 3 (1) | b1 fails |" in lines
    assert "| b1 | TrialError: it / broke |  |" in lines
