"""Memory of preparing a data set, against the number of its images: names may stay in memory, pixels may not.

Tiny PNG files, each in a folder of its patient, are prepared and loaded by a process of its own, whose peak is read at the end.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

FEW, MANY = 10_000, 100_000
LOAD = """
import json, re, resource, sys, time
import data
begin = time.perf_counter()
sets = data.load(path=sys.argv[1], patient_pattern="p[0-9]+", size=(8, 8), cache=sys.argv[2])
seconds = time.perf_counter() - begin
count = sum(len(s.ids) for s in sets.values())
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024  # ru_maxrss would be the parent's
worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"images": count, "peak": peak, "worker": worker, "seconds": seconds}))
"""


def measure() -> dict:
    few, many = prepared(FEW), prepared(MANY)
    return {
        "images": [few["images"], many["images"]],
        "peak_MB": [round(run["peak"] / 1e6, 1) for run in (few, many)],
        "peak_MB_of_a_worker": [round(run["worker"] / 1e6, 1) for run in (few, many)],
        "bytes_per_further_image": round((many["peak"] - few["peak"]) / (MANY - FEW), 1),
        "images_per_s": round(many["images"] / many["seconds"], 1),
    }


def prepared(count: int) -> dict:
    """What a fresh process says that prepared so many 8x8 images, five of each patient."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        for i in range(0, count, 5):
            patient = root / f"p{i // 5:05d}"
            patient.mkdir(parents=True)
            for k in range(5):
                (patient / f"{k}.png").write_bytes(png(pixels[i + k]))
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(root), f"{folder}/cache"],
            env={**os.environ, "FACSIMILE_QUIET": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def png(grey: np.ndarray) -> bytes:
    """An 8-bit grey PNG, without PIL's time for each."""
    height, width = grey.shape
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
