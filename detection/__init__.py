"""The audit: copy detector, neighbour search, calibration, controls, report. Sees arrays; knows no generator."""

from detection.audit import audit
from detection.detector import build, train
