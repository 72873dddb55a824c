"""The audit: copy detector, neighbour search, calibration, controls, report. Sees arrays; knows no generator."""

from detection.detector import build, train
from detection.audit import audit
