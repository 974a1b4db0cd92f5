"""Loaders on files made here: what is read is what was written, and damage is named."""

import gzip
import struct

import numpy as np
import pytest

from experiments import data, lab


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """Ten images, gzipped, and their labels, not."""
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 3), np.uint8)
    labels = np.arange(10, dtype=np.uint8) % 5
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path, images, labels


class TestMNIST:
    def test_test_split_alone_is_cut_in_order(self, mnist):
        folder, images, labels = mnist
        found = data.load("mnist", str(folder))
        assert (len(found.train), len(found.val), len(found.test), found.classes) == (8, 0, 2, 5)
        np.testing.assert_array_equal(found.train.x[..., 0] * np.float32(255), images[:8].astype(np.float32))
        np.testing.assert_array_equal(found.test.y, labels[8:])

    def test_training_files_are_used_where_they_are(self, mnist):
        folder, images, labels = mnist
        (folder / "train-images-idx3-ubyte").write_bytes(idx(np.concatenate([images, images])))
        (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.concatenate([labels, labels])))
        found = data.load("mnist", str(folder), val=0.25)
        assert (found.name, len(found.train), len(found.val), len(found.test)) == ("MNIST", 15, 5, 10)

    def test_folds_cover_everything_once(self, mnist):
        found = data.load("mnist", str(mnist[0]))
        tests = np.concatenate([data.fold(found, i).test.x for i in range(5)])
        everything = np.concatenate([found.train.x, found.test.x])
        assert sorted(tests.sum((1, 2, 3))) == sorted(everything.sum((1, 2, 3)))
        for i in range(5):
            one = data.fold(found, i)
            together = np.concatenate([one.train.x, one.test.x]).sum((1, 2, 3))
            assert sorted(together) == sorted(everything.sum((1, 2, 3)))
        with pytest.raises(ValueError, match="fold 5 of 5 does not exist"):
            data.fold(found, 5)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda b: b[:-7], "cannot be read.*download it again"),
            (lambda b: b"", "not an idx file"),
            (lambda b: b"<html>not found</html>", "not an idx file"),
            (lambda b: gzip.compress(gzip.decompress(b)[:-5]), "header says 10x4x3 bytes, found 115"),
            (lambda b: gzip.compress(b"\0\0\x0d\x03" + gzip.decompress(b)[4:]), "not an idx file of bytes"),
            (lambda b: gzip.compress(idx(np.zeros((9, 4, 3), np.uint8))), "do not belong together"),
        ],
    )
    def test_damage_is_named(self, mnist, damage, message):
        path = mnist[0] / "t10k-images-idx3-ubyte.gz"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(data.DataError, match=message):
            data.load("mnist", str(mnist[0]))


class TestDigits:
    def test_split_is_seeded_and_disjoint(self):
        a, b, c = (data.load("digits", seed=s) for s in (0, 0, 1))
        assert a.checksum() == b.checksum() != c.checksum()
        assert (len(a.train), len(a.val), len(a.test)) == (1078, 360, 359)
        for found in (a, c):
            whole = np.concatenate([found.train.x, found.val.x, found.test.x])
            assert len(np.unique(whole.reshape(1797, -1), axis=0)) == 1797
            assert whole.min() == 0 and whole.max() == 1


class TestText:
    def test_labels_are_the_next_bytes_and_the_last_tenth_tests(self, tmp_path):
        content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
        (tmp_path / "a.txt").write_bytes(content.tobytes())
        found = data.load("text", str(tmp_path), length=8)
        np.testing.assert_array_equal(found.train.x.reshape(-1), content[: 8 * 112])
        np.testing.assert_array_equal(found.train.y.reshape(-1), content[1 : 8 * 112 + 1])
        np.testing.assert_array_equal(found.test.x.reshape(-1), content[900 : 900 + 8 * 12])

    def test_too_short_or_missing(self, tmp_path):
        with pytest.raises(data.DataError, match=r"found no \.txt file"):
            data.load("text", str(tmp_path))
        (tmp_path / "a.txt").write_text("short")
        with pytest.raises(data.DataError, match="5 bytes are too few"):
            data.load("text", str(tmp_path))


def test_tfds_says_what_is_missing():
    pytest.importorskip("sklearn")
    try:
        import tensorflow_datasets  # noqa: F401
    except ImportError:
        with pytest.raises(data.DataError, match="not installed; pip install"):
            data.load("tfds:cifar10")


class TestBatches:
    def test_each_epoch_shows_each_example_once(self):
        import jax

        found = lab.batches(jax.random.key(0), 10, 5)
        epochs = [np.concatenate([next(found), next(found)]) for _ in range(3)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(10))
        assert not np.array_equal(epochs[0], epochs[1])

    def test_start_anywhere(self):
        import jax

        whole = lab.batches(jax.random.key(0), 11, 3)
        expected = [next(whole) for _ in range(9)]
        for start in range(9):
            found = lab.batches(jax.random.key(0), 11, 3, start)
            for index in expected[start:]:
                np.testing.assert_array_equal(next(found), index)
