"""Which NumPy arrays the kernels take as they lie in memory; the others are refused for what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest

import tfops_kernels

RNG = np.random.default_rng(0)
ARRAYS = {
    "x": RNG.normal(size=(6, 3)).astype(np.float32),
    "scale": np.float32([1, 2, 3]),
    "offset": np.float32([-1, 0, 1]),
    "residual": RNG.normal(size=(6, 3)).astype(np.float32),
}
WANT = tfops_kernels.forward(**ARRAYS)  # test_cpu.py compares such with an oracle


def _memmap(array, folder, name, offset=0):
    file = np.memmap(folder / name, array.dtype, "w+", offset, array.shape)
    file[...] = array
    file.flush()
    return np.memmap(folder / name, array.dtype, "r", offset, array.shape)


def _assert_wanted(results):
    for got, want in zip(results[:5], WANT[:5], strict=True):  # there is no mask
        assert type(got) is np.ndarray
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("names", [["x"], ["scale"], ["residual", "offset"], list(ARRAYS)], ids=str)
def test_memory_maps_are_taken(names, tmp_path):
    mapped = {name: _memmap(ARRAYS[name], tmp_path, name, offset=12) for name in names}
    _assert_wanted(tfops_kernels.forward(**{**ARRAYS, **mapped}))
    arrays = {**ARRAYS, **mapped}
    del arrays["residual"]
    statistics = {"mean": WANT.saved_mean, "spread": WANT.saved_inv_std}
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    dy = _memmap(ARRAYS["residual"], tmp_path, "dy")
    results = (
        tfops_kernels.backward(np.asarray(dy), **plain, **statistics),
        tfops_kernels.backward(dy, **arrays, **statistics),
    )
    for want, got in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)


def test_frozen_sliced_and_derived_arrays_are_taken():
    class Derived(np.ndarray):
        pass

    frozen = ARRAYS["x"].copy()
    frozen.setflags(write=False)
    rows = np.concatenate([ARRAYS["x"], ARRAYS["x"]])[6:]
    for x in (frozen, rows, ARRAYS["x"].view(Derived)):
        _assert_wanted(tfops_kernels.forward(**{**ARRAYS, "x": x}))


def _odd(array):
    """One byte after an address that is aligned to its elements."""
    return np.frombuffer(b"." + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda array: array.astype(">f4"), r"in this machine's byte order \(array\.astype\('float32'\) makes it so\)"),
        (
            lambda array: np.repeat(array, 2, -1)[..., ::2],
            r"dense and row-major \(numpy\.ascontiguousarray makes it so\)",
        ),
        (lambda array: array[..., ::-1], "dense and row-major"),
        (_odd, r"aligned to its elements \(array\.copy\(\) makes it so\)"),
        (np.ma.masked_array, r"without a mask \(array\.filled\(\) makes it so\)"),
    ],
)
def test_arrays_of_another_memory_layout_are_refused(name, spoil, message):
    with pytest.raises(ValueError, match=f"^{name} must be {message}"):
        tfops_kernels.forward(**{**ARRAYS, name: spoil(ARRAYS[name])})


def test_remedies_in_the_messages_work():
    for spoiled, remedy in (
        (ARRAYS["x"].astype(">f4"), lambda array: array.astype("float32")),
        (np.asfortranarray(ARRAYS["x"]), np.ascontiguousarray),
        (_odd(ARRAYS["x"]), lambda array: array.copy()),
        (np.ma.masked_array(ARRAYS["x"]), lambda array: array.filled()),
    ):
        _assert_wanted(tfops_kernels.forward(**{**ARRAYS, "x": remedy(spoiled)}))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (ARRAYS["x"].astype(">f2"), "in this machine's byte order .*'float16'"),
        (ARRAYS["x"].astype(object), "of dtype float16, .*, but it is object"),
        (ARRAYS["x"].astype(np.longdouble), "of dtype float16, .*, but it is float"),
        (np.zeros((6, 3), [("a", "f4")]), "of dtype float16, .*, but it is void"),
        (np.float32(1), r"a numpy\.ndarray or a CUDA torch\.Tensor, but it is a numpy\.float32"),
        (np.array(1, np.float32), "must have rank >= 2, but its rank is 0"),
        (None, r"a numpy\.ndarray .* but it is a NoneType"),
    ],
    ids=lambda value: "",
)
def test_other_element_types_are_refused(x, message):
    with pytest.raises((TypeError, ValueError), match=f"^x (must be )?{message}"):
        tfops_kernels.forward(**{**ARRAYS, "x": x, "residual": None})


def test_arrays_of_another_library_than_x_are_refused():
    with pytest.raises(TypeError, match=r"^scale must be a numpy\.ndarray as x is, but it is a list"):
        tfops_kernels.forward(**{**ARRAYS, "scale": [1.0, 2.0, 3.0]})
