"""A node that is taken away in the midst of training and replaced: torchrun starts the job anew from its checkpoint."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.arguments import Arguments
from launch.checkpoint import find_checkpoints, load_checkpoint
from tests.faults.conftest import Row
from tests.faults.crew import Crew
from tests.faults.nodes import INTERFACE, Network
from tests.launch.jobs import CHECKOUT, MULTINODE, make_environment

# Two epochs of 15 steps with a checkpoint after each step, and the test images after each epoch.
SHORT = Arguments(model="mlp", micro_batch=3, window=16, train_images=240, epochs=2, checkpoint_every=1, resume="auto")
STEPS = 30
PORT = 29400
# The first node, where the ranks meet, stays; the last one goes.
NODES = 2
# torchrun gives a node up that it has not heard from for 15 s, and starting train.py takes some seconds each time.
PATIENCE = 90.0


@contextmanager
def started(network: Network, index: int, output: Path) -> Iterator[subprocess.Popen[str]]:
    """train.py under torchrun on this node. The kill of the process ends all of them, as that of a container does."""
    node = network.nodes[index]
    options = ["--nodes", NODES, "--node-rank", index, "--rendezvous", "c10d"]
    options += [
        "--endpoint",
        f"{network.nodes[0].address}:{PORT}",
        "--local-addr",
        node.address,
        "--interface",
        INTERFACE,
    ]
    training = [f"--model={SHORT.model}", f"--micro-batch={SHORT.micro_batch}", f"--window={SHORT.window}"]
    training += [f"--train-images={SHORT.train_images}", f"--epochs={SHORT.epochs}", f"--resume={SHORT.resume}"]
    training += [f"--checkpoint-every={SHORT.checkpoint_every}", f"--output={output}"]
    command = [CHECKOUT / MULTINODE, *options, "launch/train.py", *training]
    with subprocess.Popen(
        node.inside("unshare", "--pid", "--fork", "--kill-child", *command),
        cwd=CHECKOUT,
        env=make_environment(PET_MAX_RESTARTS="3"),  # torchrun's --max-restarts
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def await_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while max(find_checkpoints(output), default=0) < step:
        assert time.monotonic() < deadline, f"no checkpoint of step {step} came"
        time.sleep(0.01)


def await_success(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output


def read_end(output: Path) -> dict[str, Any]:
    state = load_checkpoint(output, SHORT)
    assert state is not None
    assert state["progress"]["total_steps"] == STEPS
    return state


@pytest.fixture(scope="module")
def uninterrupted(_crew: Crew, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("uninterrupted")
    _crew.restore()
    with started(_crew.network, 0, output) as one, started(_crew.network, 1, output) as other:
        await_success([one, other])
    return read_end(output)


def remove(network: Network, process: subprocess.Popen[str]) -> None:
    """As ``docker rm --force`` does: processes first, whose connections the kernel closes."""
    process.kill()
    process.wait()
    network.nodes[1].unplug()


def lose_power(network: Network, process: subprocess.Popen[str]) -> None:
    """Nobody hears of it."""
    network.nodes[1].unplug()
    process.kill()
    process.wait()


@pytest.mark.parametrize(("name", "lose"), [("removed", remove), ("without power", lose_power)])
def test_replaced(crew: Crew, uninterrupted: dict[str, Any], row: Row, tmp_path: Path, name: str, lose: Any) -> None:
    row.try_out(
        f"a node {name}, and replaced; torchrun, c10d, train.py --resume auto",
        "in the midst of a step",
        "training goes on from the checkpoint; in the end all weights, statistics and momenta as undisturbed",
    )
    network = crew.network
    with started(network, 0, tmp_path) as stays:
        with started(network, 1, tmp_path) as goes:
            await_step(tmp_path, 3)
            lose(network, goes)
        lost_at = max(find_checkpoints(tmp_path))
        lost = time.monotonic()
        assert lost_at < STEPS, "the training was over before its node was lost"
        network.replace(1)
        with started(network, 1, tmp_path) as comes:
            await_step(tmp_path, lost_at + 1)
            seconds = time.monotonic() - lost
            row.saw(f"lost after the checkpoint of step {lost_at}; that of the next came {seconds:.0f} s later")
            await_success([stays, comes])
    end = read_end(tmp_path)
    for part in ("model", "optimizer"):
        torch.testing.assert_close(end["learner"][part], uninterrupted["learner"][part], rtol=0, atol=0)
    assert end["progress"]["history"] == uninterrupted["progress"]["history"]
    counters = {name: value for name, value in end["learner"]["model"].items() if name.endswith("num_batches_tracked")}
    assert set(map(int, counters.values())) == {STEPS}
    row.saw(f"after {STEPS} steps bit for bit as undisturbed; {len(counters)} layers have tracked {STEPS} batches")
