"""BatchNorm that sees the global batch across micro-batches and ranks. The public names, and nothing else."""

from syncaccum.errors import (
    CommitError,
    LayoutMismatchError,
    LockstepError,
    NoLayersError,
    NonFiniteStatisticsError,
    TooFewValuesError,
)
from syncaccum.exact.lockstep import lockstep
from syncaccum.exact.lookahead import lookahead
from syncaccum.layer.batchnorm import SyncAccumBatchNorm
from syncaccum.layer.convert import AccumulateBatchNorm, convert_sync_accum, revert_sync_accum
from syncaccum.moments import Moments
from syncaccum.window.commit import CommitReport, commit
from syncaccum.window.counted import discard, not_counted
from syncaccum.window.join import join
from syncaccum.window.recalibrate import recalibrate
from syncaccum.window.saved import gather_window_state_dict, load_window_state_dict, window_state_dict
from syncaccum.window.step_hook import commit_on_step
from syncaccum.window.summary import summary

__all__ = [
    "AccumulateBatchNorm",
    "CommitError",
    "CommitReport",
    "LayoutMismatchError",
    "LockstepError",
    "Moments",
    "NoLayersError",
    "NonFiniteStatisticsError",
    "SyncAccumBatchNorm",
    "TooFewValuesError",
    "commit",
    "commit_on_step",
    "convert_sync_accum",
    "discard",
    "gather_window_state_dict",
    "join",
    "load_window_state_dict",
    "lockstep",
    "lookahead",
    "not_counted",
    "recalibrate",
    "revert_sync_accum",
    "summary",
    "window_state_dict",
]
__version__ = "0.1.0"
