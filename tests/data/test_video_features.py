import ast
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gating_jax import checks
from gating_jax.data.video_features import read_features


def test_features_are_read_as_float32(tmp_path):
  features = np.arange(12, dtype=np.float64).reshape(3, 2, 2)
  np.save(tmp_path / "a.npy", features)
  np.savez(tmp_path / "b.npz", anything=features.astype(np.int16))
  np.savez_compressed(tmp_path / "c.npz", features.astype(">f4"))
  np.save(tmp_path / "d.npy", np.asfortranarray(features))
  for name in ("a.npy", "b.npz", "c.npz", "d.npy"):
    read = read_features(tmp_path / name)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, features)


def test_headers_of_features_are_parsed_by_one_thread_at_a_time(tmp_path, monkeypatch):
  np.save(tmp_path / "a.npy", np.ones((2, 2)))
  np.savez(tmp_path / "b.npz", np.ones((2, 2)))
  parse, parsing, together = ast.literal_eval, [], []

  def slowly(text):
    parsing.append(text)
    time.sleep(1e-3)
    together.append(len(parsing))
    parsing.pop()
    return parse(text)

  monkeypatch.setattr(ast, "literal_eval", slowly)  # it fails now and then when two threads use it
  with ThreadPoolExecutor(8) as threads:
    read = list(threads.map(read_features, [tmp_path / "a.npy", tmp_path / "b.npz"] * 8))
  np.testing.assert_array_equal(read, 1)
  assert together == [1] * 16


@pytest.mark.parametrize(
  ("array", "message"),
  [
    (np.array([[1.0, np.nan]]), "holds NaN or infinite numbers"),
    (np.array([[1.0, -np.inf]]), "holds NaN or infinite numbers"),
    (np.array([[1e300]]), "holds NaN or infinite numbers"),
    (np.zeros(4), r"must hold real numbers \[T, ...\]; got float64 \(4,\)"),
    (np.zeros((0, 4)), r"got float64 \(0, 4\)"),
    (np.array([["a"]]), r"got <U1 \(1, 1\)"),
    (np.zeros((1, 1), complex), "got complex128"),
    (np.array([[{}]], object), r"got object \(1, 1\)"),
  ],
)
def test_what_is_no_feature_array_is_refused(tmp_path, array, message):
  np.save(tmp_path / "a.npy", array)
  with pytest.raises(ValueError, match=message):
    read_features(tmp_path / "a.npy")


def test_a_file_of_an_unknown_version_is_refused(tmp_path):
  with open(tmp_path / "a.npy", "wb") as file:
    np.lib.format.write_array(file, np.zeros((2, 2)), version=(3, 0))
  with pytest.raises(ValueError, match=r"must be a .npy file of version 1.0 or 2.0; got 3.0"):
    read_features(tmp_path / "a.npy")


def test_an_archive_of_two_arrays_is_refused(tmp_path):
  np.savez(tmp_path / "a.npz", x=np.zeros((1, 1)), y=np.zeros((1, 1)))
  with pytest.raises(ValueError, match=r"must hold one array; got \['x', 'y'\]"):
    read_features(tmp_path / "a.npz")


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checks, "_UNPACKED", 1000)
  np.savez_compressed(tmp_path / "zeros.npz", np.zeros((1000, 100)))
  np.savez_compressed(tmp_path / "short.npz", np.zeros((10, 10)))
  unpacked = 1000 * 100 * 8 + 128  # the header included
  with pytest.raises(ValueError, match=f"at most 100 times its size; .* unpacks to {unpacked:,}$"):
    read_features(tmp_path / "zeros.npz")
  assert read_features(tmp_path / "short.npz").shape == (10, 10)
