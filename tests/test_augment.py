"""Distortions against scipy and numpy, and the properties that copy detection rests on."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from data import augment as aug

SHAPES = [(3, 20, 27, 1), (2, 9, 12, 10, 2)]
WIDE = dict(shift=0.1, scale=0.1, gamma=0.3, bias=0.3, blur=1.0, noise=0.1)


def _images(shape, seed=0):
    """Smooth random images in [-1, 1]: interpolation has something to be right about."""
    rng = np.random.default_rng(seed)
    x = scipy.ndimage.gaussian_filter(rng.uniform(-1, 1, shape), [0, *[1.0] * (len(shape) - 2), 0])
    return np.asarray(x / np.abs(x).max(), np.float32)


@functools.cache
def _jitted(items):
    return jax.jit(functools.partial(aug.augment, **dict(items)))


def _augment(key, x, **settings):
    """augment, compiled once for each of its settings and shapes: these tests are all compile time."""
    return np.asarray(_jitted(tuple(sorted(settings.items())))(jax.random.key(key), x))


def _per_channel(function, x):
    """Applies function to every (*size,) array of a (B, *size, C) batch."""
    return np.stack([np.stack([function(image[..., c]) for c in range(x.shape[-1])], -1) for image in x])


@pytest.mark.parametrize("degrees", [-5.0, 3.3, 90.0, 180.0])
@pytest.mark.parametrize("border", ["edge", "minimum"])
def test_rotation_in_the_plane_is_scipys(degrees, border):
    x = _images((2, 21, 21, 1))

    def scipys(image):
        return scipy.ndimage.rotate(
            image,
            degrees,
            axes=(0, 1),
            reshape=False,
            order=1,
            mode="nearest" if border == "edge" else "constant",
            cval=image.min(),
        )

    want, got = _per_channel(scipys, x), np.asarray(aug.rotate(x, degrees, border))
    # scipy's 'constant' cuts off just outside the last voxel where ours fades to the fill, so compare inside.
    inside = np.s_[:, 3:-3, 3:-3]
    np.testing.assert_allclose(got[inside], want[inside], atol=2e-4)
    if border == "edge":
        np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_of_a_volume_about_one_axis_is_scipys(axis):
    x = _images(SHAPES[1])
    plane = tuple(a for a in range(3) if a != axis)
    want = _per_channel(lambda v: scipy.ndimage.rotate(v, 7.0, plane, False, order=1, mode="nearest"), x)
    np.testing.assert_allclose(aug.rotate(x, [7.0 * (a == axis) for a in range(3)]), want, atol=2e-4)


def test_rotation_about_all_axes_is_one_affine_transform():
    x = _images(SHAPES[1])
    turns = np.asarray(aug._rotation(jnp.array([4.0, -3.0, 5.0])))
    np.testing.assert_allclose(turns @ turns.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(turns) > 0
    middle = (np.array(x.shape[1:-1]) - 1) / 2
    want = _per_channel(
        lambda v: scipy.ndimage.affine_transform(v, turns, middle - turns @ middle, order=1, mode="nearest"), x
    )
    np.testing.assert_allclose(aug.rotate(x, [4.0, -3.0, 5.0]), want, atol=2e-4)
    one = aug.rotate(x, 4.0)
    np.testing.assert_array_equal(one, aug.rotate(x, [4.0, 0.0, 0.0]))  # one angle turns the axial sections


def test_quarter_turns_move_voxels_whole():
    x = _images((2, 12, 12, 1))
    np.testing.assert_allclose(aug.rotate(x, 90.0), np.rot90(x, 1, (1, 2)), atol=1e-5)
    volume = _images((1, 8, 8, 8, 1))
    np.testing.assert_allclose(aug.rotate(volume, [0.0, 0.0, 90.0]), np.rot90(volume, 1, (1, 2)), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_shift_scale(shape):
    x, rank = _images(shape), len(shape) - 2
    for axis in range(-rank, rank):
        np.testing.assert_array_equal(aug.flip(x, axis), np.flip(x, axis % rank + 1))
    np.testing.assert_array_equal(aug.flip(x), x[..., ::-1, :])
    # A shift by whole voxels copies them, and repeats the edge.
    moved = aug.shift(x, [0.0] * (rank - 1) + [2 / shape[-2]])
    np.testing.assert_allclose(moved[..., 2:, :], x[..., :-2, :], atol=1e-5)
    np.testing.assert_allclose(moved[..., :2, :], np.repeat(x[..., :1, :], 2, -2), atol=1e-5)
    middle = (np.array(shape[1:-1]) - 1) / 2
    want = _per_channel(
        lambda v: scipy.ndimage.affine_transform(v, np.eye(rank) / 1.2, middle - middle / 1.2, order=1, mode="nearest"),
        x,
    )
    np.testing.assert_allclose(aug.scale(x, 1.2), want, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.5, 1.3])
def test_blur_is_scipys(shape, sigma):
    x = _images(shape)
    want = _per_channel(
        lambda v: scipy.ndimage.gaussian_filter(
            v.astype(np.float64), sigma, mode="nearest", radius=int(np.ceil(3 * sigma))
        ),
        x,
    )
    np.testing.assert_allclose(aug.blur(x, sigma), want, atol=1e-5)


def test_intensity_transforms_in_closed_form():
    x = _images(SHAPES[0])
    np.testing.assert_allclose(aug.gamma(x, 2.0), 2 * ((x + 1) / 2) ** 2 - 1, atol=1e-5)
    ratio = np.log((np.asarray(aug.bias_field(x * 0.1, 0.3)) + 1) / (x * 0.1 + 1))
    assert np.abs(ratio).max() <= 0.3 + 1e-4
    np.testing.assert_allclose(ratio[:, -1, -1], 0.3, atol=1e-4)  # the default ramp runs from corner to corner
    np.testing.assert_allclose(ratio[:, 0, 0], -0.3, atol=1e-4)
    grain = np.asarray(aug.noise(jax.random.key(0), jnp.zeros((2, 64, 64, 1)), 0.1))
    assert abs(grain.std() - 0.1) < 0.005 and abs(grain.mean()) < 0.005
    assert abs(np.corrcoef(grain[0].ravel(), grain[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_neutral_transforms_change_no_bit(shape):
    x = _images(shape)
    for same in (
        aug.rotate(x, 0.0),
        aug.shift(x, 0.0),
        aug.scale(x, 1.0),
        aug.blur(x, 0.0),
        aug.noise(jax.random.key(0), x, 0.0),
        aug.rotate(x, 0.0, "minimum"),
    ):
        np.testing.assert_array_equal(same, x)
    for close in (aug.gamma(x, 1.0), aug.bias_field(x, 0.0)):
        np.testing.assert_allclose(close, x, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 1e-9])  # not traced at all; traced in full and drawn by nobody
def test_what_is_not_drawn_changes_no_bit(shape, p):
    x = _images(shape)
    never = {f"{kind}_p": p for kind in ("rotate", *WIDE)}
    np.testing.assert_array_equal(_augment(1, x, flip=p, **WIDE, **never), x)
    np.testing.assert_array_equal(_augment(1, x, flip=p, rotate_p=p), x)
    np.testing.assert_array_equal(_augment(1, x, flip=1, rotate_p=p), x[..., ::-1, :])  # nor does a flip on its own
    np.testing.assert_array_equal(_augment(1, x, flip=1, rotate=0), x[..., ::-1, :])


@pytest.mark.parametrize("size", [(16, 17), (6, 8, 7)])
def test_the_papers_positive(size):
    n = 400
    x = jnp.broadcast_to(_images((1, *size, 1)), (n, *size, 1))
    y = _augment(3, x)
    plain, mirrored = np.asarray(x[0]), np.asarray(x[0, ..., ::-1, :])
    same = np.array([np.array_equal(image, plain) for image in y])
    flipped = np.array([np.array_equal(image, mirrored) for image in y])
    # One in four is untouched, one in four only flipped (standard error 0.022).
    assert abs(same.mean() - 0.25) < 0.08 and abs(flipped.mean() - 0.25) < 0.08
    # The rest lie nearer to their own handedness, and half are mirrored in all.
    error = [np.abs(y - image).mean(tuple(range(1, y.ndim))) for image in (plain, mirrored)]
    assert abs((error[1] < error[0]).mean() - 0.5) < 0.1
    assert max(np.minimum(*error)) < 0.2
    assert y.min() >= -1 and y.max() <= 1


def test_every_drawn_map_is_one_of_the_single_transforms():
    x = _images((20, 9, 9, 1))
    turned = np.asarray(jax.jit(jax.vmap(lambda angle: aug.rotate(x, angle)))(np.linspace(-5, 5, 201)))
    for flip in (0.0, 1.0):
        y = _augment(0, x, flip=flip, rotate=5.0, rotate_p=1.0)
        candidates = turned[..., ::-1, :] if flip else turned
        error = np.abs(candidates - y).mean((2, 3, 4))
        assert error.min(0).max() < 0.003  # each is a turn by some angle of the range
        assert len(set(error.argmin(0))) > 10  # and the angles differ
    sizes = np.asarray(jax.jit(jax.vmap(lambda factor: aug.scale(x, factor)))(np.linspace(0.8, 1.2, 201)))
    y = _augment(0, x, flip=0.0, rotate=0.0, scale=0.2, scale_p=1.0)
    assert np.abs(sizes - y).mean((2, 3, 4)).min(0).max() < 0.003


@pytest.mark.parametrize("shape", SHAPES)
def test_the_wide_set_keeps_type_and_range_and_depends_on_key_and_place_alone(shape):
    x = np.random.default_rng(0).uniform(-1, 1, (6, *shape[1:])).astype(np.float32)
    always = WIDE | {f"{kind}_p": 1.0 for kind in ("rotate", *WIDE)}
    y = _augment(0, x, **always)
    assert y.shape == x.shape and y.dtype == np.float32
    assert np.isfinite(y).all() and y.min() >= -1 and y.max() <= 1
    np.testing.assert_array_equal(y, _augment(0, x, **always))
    assert not np.array_equal(y, _augment(1, x, **always))
    np.testing.assert_allclose(y[:3], _augment(0, x[:3], **always), atol=1e-5)  # not on the batch's size
    twins = _augment(0, np.repeat(x[:1], 6, 0), **always)
    assert len({image.tobytes() for image in twins}) == 6  # not alike between rows


@pytest.mark.slow  # compiles for every shape
@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(1, 2), st.sampled_from(["edge", "minimum"]))
def test_linear_interpolation_makes_no_new_extremes(size, channels, border):
    x = np.random.default_rng(0).uniform(-1, 1, (2, *size, channels)).astype(np.float32)
    y = _augment(0, x, rotate_p=1.0, border=border)
    assert y.shape == x.shape and y.dtype == np.float32
    for image, source in zip(y, x, strict=True):
        assert image.min() >= source.min() - 1e-6 and image.max() <= source.max() + 1e-6


def test_turning_one_kind_on_leaves_the_others_draws_alone():
    x = _images((3, 20, 27, 1))
    rare = {f"{kind}_p": 1e-9 for kind in WIDE}
    np.testing.assert_allclose(_augment(0, x, **WIDE, **rare), _augment(0, x), atol=1e-6)


def test_rows_may_lie_on_several_devices():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    x = _images((4, 16, 16, 1))
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("data")))
    with jax.set_mesh(mesh):
        run = jax.jit(aug.augment).lower(jax.random.key(0), spread).compile()
        np.testing.assert_allclose(run(jax.random.key(0), spread), _augment(0, x), atol=1e-6)
    assert "all-gather" not in run.as_text()  # each device resamples its own rows


def test_gradients_reach_the_image():
    x = jnp.asarray(_images(SHAPES[0]))
    slope = jax.jit(jax.grad(lambda v: aug.augment(jax.random.key(0), v, rotate_p=1.0).sum()))(x)
    assert np.isfinite(slope).all() and abs(float(slope.sum()) - x.size) < 1e-2 * x.size


@pytest.mark.parametrize(
    "bad",
    [
        dict(flip=1.5),
        dict(rotate_p=-0.1),
        dict(rotate=-1.0),
        dict(scale=1.0),
        dict(flip_axis=2),
        dict(flip_axis=-3),
        dict(noise=float("nan")),
        dict(border="wrap"),
        dict(x=np.zeros((3, 8, 8), np.float32)),
    ],
)
def test_bad_settings_are_one_clear_line(bad):
    with pytest.raises(ValueError, match=r"^augment: [^\n]+$"):
        aug.augment(jax.random.key(0), **{"x": np.zeros((2, 8, 8, 1), np.float32)} | bad)


def test_bad_single_transforms_are_one_clear_line():
    x = np.zeros((2, 8, 8, 1), np.float32)
    for call in (
        lambda: aug.rotate(x, [1.0, 2.0, 3.0]),
        lambda: aug.flip(x, 2),
        lambda: aug.scale(x, 0.0),
        lambda: aug.blur(x, -1.0),
        lambda: aug.bias_field(x, 0.1, [0.0] * 4),
        lambda: aug.bias_field(x, 0.1, [1.0]),
        lambda: aug.noise(jax.random.key(0), x[0], 0.1),
    ):
        with pytest.raises(ValueError, match=r"^augment: "):
            call()


@pytest.mark.parametrize("quality", [90, 50, 10])
@pytest.mark.parametrize("shape", [(1, 40, 32, 1), (1, 29, 43, 1)])
def test_jpeg_is_libjpegs(shape, quality):
    grey = np.asarray(np.round((_images(shape, 3) + 1) * 127.5), np.uint8)
    stored = io.BytesIO()
    PIL.Image.fromarray(grey[0, ..., 0]).save(stored, "jpeg", quality=quality)
    theirs = np.asarray(PIL.Image.open(stored), float)
    ours = (np.asarray(aug.jpeg(grey / np.float32(127.5) - 1, quality))[0, ..., 0] + 1) * 127.5
    lost = np.abs(theirs - grey[0, ..., 0]).mean()
    assert np.abs(ours - theirs).mean() < 0.2 * lost, "libjpeg's own cosine transform is of whole numbers"


def test_jpeg_of_a_volume_is_its_slices():
    x = _images((1, 3, 16, 24, 1))
    slices = [aug.jpeg(x[:, i], 30) for i in range(3)]
    np.testing.assert_array_equal(aug.jpeg(x, 30), np.stack(slices, 1))
