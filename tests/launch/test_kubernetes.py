"""The manifest for Kubeflow Trainer: as its published schema wants it, and its command trains on two nodes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from tests.launch.jobs import CHECKOUT, find_free_port, started

MANIFEST = yaml.safe_load((CHECKOUT / "launch" / "kubernetes.yaml").read_text())
PUBLISHED = json.loads(Path(__file__).with_name("trainjob_schema.json").read_text())


def make_strict(schema: Any) -> Any:
    """Unknown fields are errors, as to ``kubectl --validate=strict``. The published schema lets them be dropped."""
    if isinstance(schema, list):
        return [make_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: make_strict(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        strict.setdefault("additionalProperties", False)
    return strict


def validate(manifest: Any) -> None:
    Draft202012Validator(make_strict(PUBLISHED["schema"])).validate(manifest)


def test_the_manifest_is_as_the_published_schema_wants_it() -> None:
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == (PUBLISHED["apiVersion"], PUBLISHED["kind"])
    validate(MANIFEST)


@pytest.mark.parametrize(
    ("field", "value"), [("numNodes", "two"), ("nodes", 2), ("command", "torchrun launch/train.py")]
)
def test_the_schema_finds_a_wrong_field(field: str, value: object) -> None:
    trainer = {**MANIFEST["spec"]["trainer"], field: value}
    with pytest.raises(ValidationError, match=field if field == "nodes" else str(value)):
        validate({**MANIFEST, "spec": {**MANIFEST["spec"], "trainer": trainer}})


def test_the_command_trains_on_two_nodes_told_by_the_operators_variables(tmp_path: Path) -> None:
    trainer = MANIFEST["spec"]["trainer"]
    # One rank a node, and little to do: the two launchers are what is tried.
    small = ["--epochs", "1", "--model", "mlp", "--train-images", "128", "--output", str(tmp_path)]
    told = {one["name"]: one["value"] for one in trainer["env"]} | {
        "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(find_free_port()),
    }  # fmt: skip
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(started(trainer["command"] + trainer["args"] + small, PET_NODE_RANK=str(node), **told))
            for node in range(trainer["numNodes"])
        ]
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert list(tmp_path.glob("checkpoint-*.pt"))
