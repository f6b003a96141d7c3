"""The drawing of lockstep shows what its page says."""

from __future__ import annotations

from itertools import pairwise

import syncaccum
from benchmarks.lockstep_picture import MICRO_BATCHES, Stay, accumulate, go_in_lockstep, record


def _group_by_meeting(stays: list[Stay]) -> list[list[Stay]]:
    """The stays in BatchNorm layers, layer by layer."""
    layers = list(dict.fromkeys(stay.layer for stay in stays if isinstance(stay.layer, syncaccum.SyncAccumBatchNorm)))
    return [[stay for stay in stays if stay.layer is layer] for layer in layers]


def test_in_lockstep_all_have_come_to_a_batch_norm_before_one_leaves() -> None:
    meetings = _group_by_meeting(record(go_in_lockstep))
    assert [len(stays) for stays in meetings] == [MICRO_BATCHES] * 2
    for stays in meetings:
        assert max(stay.arrival for stay in stays) < min(stay.departure for stay in stays)


def test_in_accumulation_a_micro_batch_starts_when_the_one_before_has_gone() -> None:
    stays = record(accumulate)
    assert [stay.micro_batch for stay in stays] == sorted(stay.micro_batch for stay in stays)
    assert all(one.departure < other.arrival for one, other in pairwise(stays))
