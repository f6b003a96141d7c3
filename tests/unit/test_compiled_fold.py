"""A commit's compiled arithmetic gives the bits of torch's operations: some ranks may have it, and some not."""

from __future__ import annotations

import copy
import ctypes
import unittest.mock

import pytest
import torch
from torch import Tensor, nn

from syncaccum import SyncAccumBatchNorm, commit
from syncaccum.layer import native
from syncaccum.layer.kernels.build import CAPABILITIES, library_for
from syncaccum.window import compiled_fold
from tests.oracle import as_bytes

WIDTHS = (1, 5, 64, 131)
COUNTS = torch.tensor([2, 3, 7, 12_345, 2**31 + 1, 2**52], dtype=torch.float64)
MOMENTA = (0.0, 0.1, 0.3, 0.7, 1.0, None)
# Powers of ten that a mean, and a standard deviation, may have: the variance has twice as many.
LARGEST = {torch.float16: (4, 2), torch.bfloat16: (18, 18), torch.float32: (18, 18), torch.float64: (140, 140)}

needs_it = pytest.mark.skipif(not native.which().startswith("compiled"), reason=f"CPU passes here: {native.which()}")


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic as it was compiled for this processor, and for lesser ones."""
    known = list(CAPABILITIES)
    if known.index(request.param) > known.index(torch.backends.cpu.get_cpu_capability()):
        pytest.skip("this processor has no such instructions")
    assert native._library is not None
    fold = ctypes.CDLL(str(library_for(request.param))).syncaccum_fold
    fold.argtypes, fold.restype = native._library.fold.argtypes, native._library.fold.restype
    monkeypatch.setattr(native._library, "fold", fold)


def awkward_model(seed: int, dtype: torch.dtype) -> nn.Sequential:
    """Statistics and open windows of any size, from denormal to nearly too large; layers and channels without data."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int, power: int) -> Tensor:
        """Numbers of up to 10^power, and as small; some are 0."""
        powers = (torch.rand(width, generator=generator, dtype=torch.float64) * 2.1 - 1.1) * power
        signs = torch.randint(-4, 5, (width,), generator=generator).sign()
        return 10**powers * signs

    def pick(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    mean_power, deviation_power = LARGEST[dtype]
    one_momentum = MOMENTA[pick(len(MOMENTA))] if seed % 2 else None
    layers = []
    for index, width in enumerate(WIDTHS):
        momentum = one_momentum if seed % 2 else MOMENTA[pick(len(MOMENTA))]
        layer = SyncAccumBatchNorm(width, momentum=momentum).to(dtype)
        layer.running_mean.copy_(draw(width, mean_power))
        layer.running_var.copy_(draw(width, deviation_power).square())
        layer.num_batches_tracked.fill_(pick(1000))
        if seed % 5 or index != 2:
            n, mean, deviation = COUNTS[pick(len(COUNTS))], draw(width, mean_power), draw(width, deviation_power)
            # Off by some last bits, so that variances fall below zero, too.
            off = 1 + 1e-15 * torch.randn(width, generator=generator, dtype=torch.float64)
            total_sq = n * (mean.square() + deviation.square()) * off
            layer._accumulation.window.copy_(torch.cat([n.reshape(1), n * mean, total_sq]))
        layers.append(layer)
    return nn.Sequential(*layers)


@needs_it
@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_statistics_are_torchs_to_the_last_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(40):
        ours = awkward_model(seed, dtype)
        theirs = copy.deepcopy(ours)
        with unittest.mock.patch.object(native, "fold", wraps=native.fold) as fold:
            commit(ours)
        # Else torch is compared with itself.
        assert fold.call_count == (dtype in (torch.float32, torch.float64))
        with monkeypatch.context() as patch:
            patch.setattr(native, "_library", None)
            commit(theirs)
        for (name, buffer), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            assert torch.equal(as_bytes(buffer), as_bytes(expected)), f"{name}, seed {seed}"
            assert "running_var" not in name or (buffer >= 0).all()


@needs_it
def test_sizes_and_dtypes_that_do_not_fit_are_not_taken() -> None:
    sums, statistics = torch.ones(7, dtype=torch.float64), torch.ones(6)
    with pytest.raises(RuntimeError, match="need other sums"):
        compiled_fold.fold(sums, statistics, [4], [0.1])
    assert not compiled_fold.takes(sums, [torch.ones(3), torch.ones(4)], [3, 3])
    assert not compiled_fold.takes(sums, [torch.ones(3), torch.ones(3).double()], [3, 3])
    assert not compiled_fold.takes(sums, [torch.ones(3).half(), torch.ones(3).half()], [3, 3])
    assert compiled_fold.takes(sums, [torch.ones(3), torch.ones(3)], [3, 3])
