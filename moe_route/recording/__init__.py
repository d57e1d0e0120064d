"""Evidence: what the routers of a model did, as integer sums per (group, layer, expert), sequence by sequence, or
token by token."""

from moe_route.recording.labels import LabelBlock
from moe_route.recording.ranks import sum_over_ranks
from moe_route.recording.recorder import DEFAULT_PLANES, Recorder
from moe_route.recording.statistics import PHASES, MergeError, RecordingError, RoutingStatistics
from moe_route.recording.store import SequenceShard, SequenceStore
from moe_route.recording.trace import Trace

__all__ = [
    "DEFAULT_PLANES",
    "PHASES",
    "LabelBlock",
    "Recorder",
    "RecordingError",
    "RoutingStatistics",
    "SequenceShard",
    "SequenceStore",
    "MergeError",
    "Trace",
    "sum_over_ranks",
]
