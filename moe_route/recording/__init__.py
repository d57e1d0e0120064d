"""Record the routing of a model: integer sums per (group, layer, expert), single sequences, or single tokens.

``sentence_vectors`` reads the hidden states of sentences, of any model.
"""

from moe_route.recording.conservation import Conservation
from moe_route.recording.counting import DEFAULT_METRICS, RecordOptions
from moe_route.recording.labels import LabelBlock
from moe_route.recording.ranks import all_reduce
from moe_route.recording.recorder import Recorder
from moe_route.recording.statistics import MergeError, RecordingError, RoutingStatistics
from moe_route.recording.store import SequenceShard, SequenceStore
from moe_route.recording.trace import Trace
from moe_route.recording.vectors import SentenceVectors, sentence_vectors

__all__ = [
    "DEFAULT_METRICS",
    "Conservation",
    "LabelBlock",
    "RecordOptions",
    "Recorder",
    "RecordingError",
    "RoutingStatistics",
    "SentenceVectors",
    "SequenceShard",
    "SequenceStore",
    "MergeError",
    "Trace",
    "all_reduce",
    "sentence_vectors",
]
