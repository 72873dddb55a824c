"""Eight CPU devices for every test, and warnings of the project's own modules as errors."""

import gc
import importlib.metadata
import os

# Most of the suite's time is compilation, of programs that run for an instant: compiled fast, not to be fast. An unknown
# flag ends the process.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FAST)

os.environ.setdefault("FACSIMILE_QUIET", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/facsimile/tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

import pathlib  # noqa: E402

import pytest  # noqa: E402

from launch import mesh  # noqa: E402

# JAX makes millions of small objects when it traces; to look for garbage as often as Python does was a tenth of the time.
gc.set_threshold(50_000, 50, 50)

ROOT = pathlib.Path(__file__).resolve().parent.parent
REAL = pathlib.Path(os.environ.get("FACSIMILE_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(autouse=True)
def one_device_mesh(request):
    """Every test runs on a mesh; those that ask for `mesh_of` make their own."""
    if "mesh_of" in request.fixturenames:
        yield
        return
    with jax.set_mesh(make_mesh(8, 1)):
        yield


@pytest.fixture
def mesh_of():
    """`mesh_of(devices, fsdp, spatial)`: a mesh of the first so many devices."""
    return make_mesh


def make_mesh(devices: int, fsdp: int, spatial: int = 1) -> jax.sharding.Mesh:
    return mesh.make(fsdp, spatial, devices=jax.devices()[:devices])


@pytest.fixture
def real_data():
    """Folder of real images; skips where it is absent."""
    if not REAL.is_dir():
        pytest.skip(f"no real images at {REAL}; set FACSIMILE_DATA")
    return REAL


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache for the data and the compilations of all runs of `main.py`, also of other workers' tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder
