"""lockstep, convert and revert on real networks of monai and transformers; the oracle: BatchNorm on torch.cat."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from syncaccum import SyncAccumBatchNorm, commit, convert_sync_accum, lockstep, revert_sync_accum
from tests.networks import NETWORKS, Network, assert_same_buffers, assert_same_gradients, flatten_output, loss_of

EMPTY = [name for name, network in NETWORKS.items() if network.takes_empty]


def check_against_the_whole_batch(network: Network, sizes: tuple[int, ...]) -> None:
    """Two windows, so that the second begins with statistics of the first."""
    model, reference = network.pair()
    for _ in range(2):
        model.zero_grad()
        reference.zero_grad()
        whole = network.examples(sum(sizes))
        outputs = lockstep(model, model, list(whole.split(sizes)))
        expected = reference(whole)
        actual = torch.cat([flatten_output(output) for output in outputs])
        assert_close(actual, flatten_output(expected))
        torch.stack([loss_of(output) for output in outputs]).sum().backward()
        loss_of(expected).backward()
        assert_same_gradients(network, model, reference)
        commit(model)
        assert_same_buffers(model, reference)


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_uneven_micro_batches_are_the_whole_batch(name: str) -> None:
    check_against_the_whole_batch(NETWORKS[name], (3, 1, 2))


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_micro_batch_adds_nothing(name: str) -> None:
    check_against_the_whole_batch(NETWORKS[name], (0, 4, 2))


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - EMPTY))
def test_networks_that_refuse_an_empty_batch_do_so_unconverted(name: str) -> None:
    _, reference = NETWORKS[name].pair()
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        reference(NETWORKS[name].examples(0))


def test_each_micro_batch_keeps_the_hidden_states_it_asked_for() -> None:
    """transformers collects them in a context variable, by hooks on layers that all micro-batches go through."""
    network = NETWORKS["LeViT"]
    model, reference = network.pair()
    whole = network.examples(6)
    outputs = lockstep(model, lambda x: model(x, output_hidden_states=True).hidden_states, list(whole.split((3, 1, 2))))
    expected = reference(whole, output_hidden_states=True).hidden_states
    for parts, state in zip(zip(*outputs, strict=True), expected, strict=True):
        assert_close(torch.cat(parts), state)


@pytest.mark.parametrize("name", NETWORKS)
def test_convert_and_revert_round_trip(name: str) -> None:
    model, reference = NETWORKS[name].pair()
    assert sum(isinstance(layer, SyncAccumBatchNorm) for layer in model.modules()) == NETWORKS[name].layers
    whole = NETWORKS[name].examples(4)
    model(whole)
    commit(model)
    # Converted to unconverted and back, nothing missing and nothing unexpected.
    reference.load_state_dict(model.state_dict(), strict=True)
    other, _ = NETWORKS[name].pair()
    other.load_state_dict(reference.state_dict(), strict=True)
    assert revert_sync_accum(model) is model
    # By name: parametrizations make a class for each module.
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in reference.modules()]
    assert_same_state(model, reference)
    for training in (True, False):
        output, expected = (flatten_output(m.train(training)(whole)) for m in (model, reference))
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert_same_state(model, reference)


def assert_same_state(model: nn.Module, reference: nn.Module) -> None:
    state, expected = model.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def test_save_pretrained_of_a_converted_model_loads_anywhere(tmp_path: Path) -> None:
    from transformers import ResNetModel

    model, _ = NETWORKS["ResNet"].pair()
    model(NETWORKS["ResNet"].examples(3))
    commit(model)
    model.save_pretrained(tmp_path)
    loaded = ResNetModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same_state(loaded, model)
    assert_same_state(convert_sync_accum(loaded), model)


@pytest.mark.parametrize("name", ["DenseNet121", "ResNet"])
def test_a_converted_model_pickles(name: str) -> None:
    model, _ = NETWORKS[name].pair()
    model(NETWORKS[name].examples(3))
    assert_same_state(pickle.loads(pickle.dumps(model)), model)
