"""The audit: copy detector, neighbour search, calibration, controls, verdict, release. Sees arrays; knows no generator."""

from detection.audit import audit
from detection.detector import Detector, build, embedder, task, train, untrained
from detection.redaction import PER_IMAGE
from detection.spaces import by_correlation, registered
from detection.spaces import chosen as spaces_of
from detection.verdict import EXIT
