"""Neighbour search against brute force in numpy, for every block size, and against its own error bound."""

import functools
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from detection import neighbours, tiles
from detection.neighbours import count_above, nearest, standardise
from launch import mesh

SIZES = dict(
    seed=st.integers(0, 2**31),
    n=st.sampled_from([1, 3, 60]),
    m=st.sampled_from([1, 64, 65, 700]),
    d=st.sampled_from([2, 33]),
    k=st.sampled_from([1, 2, 70]),
    block=st.sampled_from([None, (1, 1), (16, 64), (33, 300)]),
    copies=st.sampled_from([1, 2, 30]),
)


def rows(seed, n, d, copies=1):
    """n standardised rows, of which about n / copies are distinct."""
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((-(-n // copies), d))
    return standardise(few[rng.integers(0, len(few), n)] if copies > 1 else few)


def brute(query, key, k):
    """The definition: float64 products rounded to float32, larger first, then the smaller index."""
    sim = (query.astype(np.float64) @ key.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-sim, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(sim, order, 1), order


@settings(max_examples=30, deadline=None)
@given(**SIZES, bf16=st.booleans())
@example(seed=0, n=3, m=700, d=2, k=70, block=(16, 64), copies=30, bf16=False)
@example(seed=1, n=3, m=700, d=33, k=1, block=(1, 1), copies=700, bf16=False)
@example(seed=2, n=60, m=700, d=2, k=2, block=(16, 64), copies=1, bf16=True)
def test_nearest_is_brute_force(seed, n, m, d, k, block, copies, bf16):
    query, key, k = rows(seed, n, d), rows(seed + 1, m, d, copies), min(k, m)
    sim, index = nearest(query, key, k=k, block=block, bf16=bf16)
    expected_sim, expected_index = brute(query, key, k)
    assert sim.dtype == np.float32 and index.dtype == np.int32
    np.testing.assert_array_equal(sim, expected_sim)
    np.testing.assert_array_equal(index, expected_index)


@settings(max_examples=15, deadline=None)
@given(**SIZES, tau=st.sampled_from([-0.5, 0.0, 0.3, 0.9]), equal=st.booleans())
def test_count_above_is_brute_force(seed, n, m, d, k, block, copies, tau, equal):
    query, key = rows(seed, n, d), rows(seed + 1, m, d, copies)
    sim = brute(query, key, m)[0]
    tau = float(sim[0, min(k, m) - 1]) if equal else tau  # a threshold that is itself a similarity: strictly above
    np.testing.assert_array_equal(count_above(query, key, tau, block=block), (sim > tau).sum(1))
    top = nearest(query, key, block=block).sim[:, 0]
    np.testing.assert_array_equal(count_above(query, key, tau, block=block) > 0, top > tau)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.sampled_from([1, 4]))
def test_the_order_of_rows_does_not_matter(seed, k):
    query, key = rows(seed, 50, 9), rows(seed + 1, 300, 9)
    rng = np.random.default_rng(seed)
    turn_q, turn_k = rng.permutation(50), rng.permutation(300)
    sim, index = nearest(query, key, k=k)
    turned_sim, turned_index = nearest(query[turn_q], key[turn_k], k=k)
    np.testing.assert_array_equal(turned_sim, sim[turn_q])
    np.testing.assert_array_equal(turn_k[turned_index], index[turn_q])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([1, 3]), st.sampled_from([1, 5]))
def test_the_largest_maxima_are_top_ks(seed, c, blocks, tiles_each):
    """Of equal ones the earlier; a place without a value is never kept."""
    rng = np.random.default_rng(seed)
    maxima_RxQxG = rng.choice([-np.inf, -1.0, 0.0, 1.0], (blocks, 6, tiles_each)).astype(np.float32)
    tile_RxG = np.arange(blocks * tiles_each, dtype=np.int32).reshape(blocks, tiles_each)
    none = np.full((6, c), -np.inf, np.float32), np.full((6, c), -1, np.int32)
    kept = none
    for part in np.split(np.arange(blocks), [1]):  # in two calls
        if len(part):
            kept = jax.jit(tiles._largest)(*kept, maxima_RxQxG[part], tile_RxG[part])
    all_QxG = np.concatenate([none[0], np.moveaxis(maxima_RxQxG, 0, 1).reshape(6, -1)], 1)
    peak, place = jax.lax.top_k(all_QxG, c)
    np.testing.assert_array_equal(kept[0], peak)
    np.testing.assert_array_equal(kept[1], np.where(np.isfinite(peak), place - c, -1))


def test_equal_keys_go_to_the_smaller_index_whatever_the_block():
    query, key = rows(0, 20, 16), np.tile(rows(1, 30, 16), (40, 1))
    for block in (None, (7, 64), (20, 128), (3, 1000)):
        sim, index = nearest(query, key, k=5, block=block)
        best = brute(query, key[:30], 1)[1]
        np.testing.assert_array_equal(index, best + 30 * np.arange(5))
        assert (sim == sim[:, :1]).all()


def test_long_rows_keep_the_error_bound():
    # binary images make the float32 sums drift in one direction, the worst case of the bound
    rng = np.random.default_rng(0)
    query, key = (standardise(rng.integers(0, 2, (n, 5000))) for n in (20, 500))
    product = np.asarray(tiles.products(query, key), np.float64)
    exact = query.astype(np.float64) @ key.astype(np.float64).T
    assert (np.abs(product - exact) <= neighbours._errors(query, 1.0)[0][:, None]).all()
    np.testing.assert_array_equal(nearest(query, key, k=3).index, brute(query, key, 3)[1])


def test_the_hosts_products_may_be_wrong_by_their_bound(monkeypatch):
    query, key = rows(0, 40, 5000), rows(1, 640, 5000)
    products, bound = neighbours._tile_products, neighbours._errors(query, 1.0)[1].min()
    error = products(query, key, np.zeros(40, int)) - query.astype(np.float64) @ key[:64].astype(np.float64).T
    assert np.abs(error).max() <= bound
    monkeypatch.setattr(neighbours, "_tile_products", lambda *args: products(*args) - np.float32(0.9) * bound)
    np.testing.assert_array_equal(nearest(query, key).index, brute(query, key, 1)[1])


def test_standardise_gives_pearson_correlation():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 50)) * 1e3 + 1e4
    z = standardise(x)
    np.testing.assert_allclose(z @ z.T, 1 - cdist(x, x, "correlation"), atol=1e-6)
    np.testing.assert_allclose(standardise(-3 * x + 7), -z, atol=1e-6)


def test_a_blank_image_is_similar_to_nothing():
    x = np.full((2, 1001), 0.1, np.float32)
    x[1] = np.linspace(-1, 1, 1001)
    z = standardise(x)
    assert not z[0].any() and abs(np.linalg.norm(z[1]) - 1) < 1e-6
    sim, index = nearest(z[:1], standardise(np.random.default_rng(0).standard_normal((300, 1001))), k=2)
    assert (sim == 0).all() and index.tolist() == [[0, 1]]


def test_memory_maps_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setitem(tiles._RESIDENT, True, 0)
    query, key = rows(0, 30, 8), rows(1, 3000, 8)
    np.save(tmp_path / "key.npy", key)
    mapped = np.load(tmp_path / "key.npy", mmap_mode="r")
    np.testing.assert_array_equal(nearest(query, mapped, k=2, block=(16, 64)).index, brute(query, key, 2)[1])


def test_one_compile_for_all_blocks():
    tiles.keep.clear_cache()  # traced again below: 2 calls over queries, 5 over keys
    query, key = rows(0, 1000, 8), rows(1, 5000, 8)
    nearest(query, key, block=(64, 128))
    assert tiles.keep._cache_size() == 1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("devices", "fsdp", "spatial"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (8, 1, 1), (8, 4, 2)]
)
def test_the_mesh_does_not_matter(mesh_of, devices, fsdp, spatial, bf16):
    """Ties too: most keys are there several times, and a query is one of them."""
    query, key = rows(0, 203, 24), rows(1, 3001, 24, copies=3)
    query[:50] = key[:50]
    expected_sim, expected_index = brute(query, key, 4)
    tau = float(expected_sim[60, 2])
    with jax.set_mesh(mesh.make(fsdp, spatial, devices=jax.devices()[:devices])):
        for block in (None, (16, 64), (50, 1000)):
            sim, index = nearest(query, key, k=4, block=block, bf16=bf16)
            np.testing.assert_array_equal(index, expected_index)
            np.testing.assert_array_equal(sim, expected_sim)
            np.testing.assert_array_equal(
                count_above(query, key, tau, block=block), (brute(query, key, 3001)[0] > tau).sum(1)
            )


@pytest.fixture
def mesh_of():
    """Asks for no mesh but the test's own."""


def test_bf16_products_keep_their_error_bound():
    query, key = rows(0, 50, 128), rows(1, 400, 128)
    key[0] = query[0] = np.float32(1 / 128 + 2**-16) * 11.3  # rounds down in every place, the worst case
    error = np.abs(
        np.asarray(tiles.products(query, key, bf16=True)) - query.astype(np.float64) @ key.T.astype(np.float64)
    )
    bound, _ = neighbours._errors(query, float(neighbours._norms(key).max()), bf16=True)
    assert (error <= bound[:, None]).all() and error.max() > 1e-3


def test_a_search_in_bfloat16_goes_on_in_float32_where_keys_are_too_alike(monkeypatch):
    key = standardise(rows(0, 1, 64) + 0.02 * rows(1, 2000, 64))
    query, keep, used = standardise(key[:600] + 0.001 * rows(2, 600, 64)), tiles.keep, []
    monkeypatch.setattr(tiles, "_JOINED", ((10, 2048), (1, 1)))
    monkeypatch.setattr(tiles, "_IN_CACHE", ((10, 2048), (1, 1)))
    monkeypatch.setattr(tiles, "keep", lambda *args, bf16, over: used.append(bf16) or keep(*args, bf16=bf16, over=over))
    np.testing.assert_array_equal(nearest(query, key, k=2, bf16=True).index, brute(query, key, 2)[1])
    assert used[0] and not used[-1] and used.count(True) == 2


@pytest.mark.parametrize("can", [{"amx_bf16", "fpu"}, {"avx512_bf16", "fpu"}, set()])
def test_products_come_first_in_bfloat16_where_the_processor_has_units_for_them(monkeypatch, can):
    keep, used = tiles.keep, []
    monkeypatch.setattr(tiles.machine, "processor", lambda: frozenset(can))
    monkeypatch.setattr(tiles, "_JOINS", True)
    monkeypatch.setattr(tiles, "keep", lambda *args, bf16, over: used.append(bf16) or keep(*args, bf16=bf16, over=over))
    query, key = rows(0, 30, 16), rows(1, 500, 16)
    np.testing.assert_array_equal(nearest(query, key).index, brute(query, key, 1)[1])
    assert used[0] == ("amx_bf16" in can)


def test_rows_made_when_read_are_searched_as_they_are():
    query, key = rows(0, 70, 8), rows(1, 900, 8)
    turned = lambda x: neighbours.Rows(x[:, ::-1], lambda part: part[:, ::-1], 8)
    np.testing.assert_array_equal(
        nearest(turned(query), turned(key), k=3, block=(16, 64)).index, brute(query, key, 3)[1]
    )


def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "_LONG", 0)
    for name in ("_JOINED", "_IN_CACHE"):
        monkeypatch.setattr(tiles, name, ((5, 64), (1, 1)))
    query, key = rows(0, 300, 8), rows(1, 500, 8)
    look_into, seen = neighbours._look_into, []

    def stopped(*args):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(args)
        return look_into(*args)

    monkeypatch.setattr(neighbours, "_look_into", stopped)
    search = functools.partial(nearest, k=2, block=(5, 64), keep=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        search(query, key)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4
    monkeypatch.setattr(neighbours, "_look_into", lambda *args: seen.append(args) or look_into(*args))
    other = search(query, rows(2, 500, 8))
    np.testing.assert_array_equal(other.index, brute(query, rows(2, 500, 8), 2)[1])
    assert sorted(tmp_path.iterdir()) == kept, "what another search kept is not this one's"
    groups = len(seen) - 4
    seen.clear()
    np.testing.assert_array_equal(search(query, key).index, brute(query, key, 2)[1])
    assert len(seen) == groups - 4 > 0 and not list(tmp_path.iterdir())


def test_bad_input_is_one_clear_error():
    x = rows(0, 5, 4)
    with pytest.raises(ValueError, match="k = 6 neighbours asked of 5 keys"):
        nearest(x, x, k=6)
    with pytest.raises(ValueError, match="k = 0"):
        nearest(x, x, k=0)
    with pytest.raises(ValueError, match="4 dimensions and key 3"):
        nearest(x, x[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        nearest(x, x * np.nan)
    with pytest.raises(ValueError, match="NaN"):
        standardise([[1.0, np.inf]])
    with pytest.raises(ValueError, match="not a similarity"):
        count_above(x, x, np.nan)
    assert nearest(x[:0], x, k=2).sim.shape == (0, 2) and count_above(x[:0], x, 0.5).shape == (0,)


def test_as_on_an_accelerator(monkeypatch):
    """Its blocks: all keys and many queries a call."""
    monkeypatch.setattr(tiles, "_cpu", lambda: False)
    query, key = rows(0, 9000, 4), rows(1, 70_000, 4)
    assert tiles.plan(9000, 70_000, 4, None, None, maxima=True)[:2] == (4500, 9000)
    for bf16 in (False, True):
        found = nearest(query, key, k=2, bf16=bf16)
        np.testing.assert_array_equal(found.index[::100], brute(query[::100], key, 2)[1])


PROCESS = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("localhost:" + sys.argv[2], 2, int(sys.argv[1]))
import numpy as np
from detection import neighbours
from launch import mesh
rng = np.random.default_rng(0)
query, key = (neighbours.standardise(rng.standard_normal((n, 12))) for n in (101, 900))
key[500:] = key[:400]
sim = (query.astype(np.float64) @ key.T.astype(np.float64)).astype(np.float32)
for fsdp in (1, 2, 4):
    with jax.set_mesh(mesh.make(fsdp)):
        for bf16 in (False, True):
            found = neighbours.nearest(query, key, k=12, block=(8, 64), bf16=bf16)
            assert (found.index == np.argsort(-sim, 1, kind="stable")[:, :12]).all(), (fsdp, bf16)
        alone = neighbours.nearest(query[:1], key, k=12)  # a query of which the second process has no share
        assert (alone.index == np.argsort(-sim[:1], 1, kind="stable")[:, :12]).all()
        assert (neighbours.count_above(query, key, 0.5) == (sim > 0.5).sum(1)).all()
print("agrees")
"""


@pytest.mark.slow
def test_two_processes_agree():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    start = lambda i: subprocess.Popen([sys.executable, "-c", PROCESS, str(i), port], stdout=subprocess.PIPE, text=True)
    children = [start(i) for i in range(2)]
    assert ["agrees" in child.communicate(timeout=600)[0] for child in children] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("search", ["nearest(query, key)", "count_above(query, key, 0.9)"])
def test_memory_depends_on_the_block_only(search):
    # 20,000 x 100,000 products would be 8 GB; what is held beside the embeddings stays small
    code = f"""
import resource, numpy as np
from detection.neighbours import count_above, nearest, standardise
rng = np.random.default_rng(0)
query, key = (standardise(rng.standard_normal((n, 16), dtype=np.float32)) for n in (20_000, 100_000))
nearest(query[:2000], key[:9000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{search}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(grown) < 200  # MiB
