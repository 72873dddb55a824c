"""The audit: copy detector, neighbour search, calibration, controls, verdict, release. Sees arrays; knows no generator."""

from detection.audit import audit
from detection.detector import Detector, build, embedder, task, train, untrained
from detection.redaction import CHOSEN, PER_IMAGE, VOXELS
from detection.spaces import by_correlation, registered
from detection.spaces import chosen as spaces_of
from detection.verdict import exit_code
