"""Files of tensors: what the safetensors library reads from them, ranges across files, and damage that is named."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from train.checkpoints.tensor_files import DTYPE_NAMES, FileSum, PieceFiles, file_sum, piece_key, write_tensors


def test_the_safetensors_library_reads_every_type_and_shape(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}/{'x'.join(map(str, shape))}": (torch.randn(shape, generator=generator) * 100).to(dtype)
        for dtype, name in DTYPE_NAMES.items()
        for shape in ((), (0,), (3,), (2, 3, 5))
    }
    tensors["not contiguous"] = torch.arange(12).view(3, 4).t()
    written = write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert written == file_sum(tmp_path / "a.safetensors")
    assert written.num_bytes == (tmp_path / "a.safetensors").stat().st_size


def test_a_range_is_put_together_from_the_files_that_have_it(tmp_path):
    whole = torch.arange(100, dtype=torch.float32)
    cuts = ((0, 7), (7, 60), (60, 100))
    for number, (low, high) in enumerate(cuts):
        # Written by the library itself.
        save_file({piece_key("weight", low, "a/b"): whole[low:high].clone()}, tmp_path / f"{number}.safetensors")
    files = PieceFiles([tmp_path / f"{number}.safetensors" for number in (1, 2, 0)])
    assert torch.equal(files.read("weight", "a/b", 10, 40), whole[10:50])
    assert len(files.unopened) == 2, "the first file had them all"
    rng = np.random.default_rng(0)
    for low, high in np.sort(rng.integers(0, 101, (30, 2)), axis=1).tolist():
        assert torch.equal(files.read("weight", "a/b", low, high - low), whole[low:high])
    with pytest.raises(ValueError, match=r"weight of a/b: elements 90 to 100 are not all there"):
        files.read("weight", "a/b", 90, 11)
    with pytest.raises(ValueError, match="exp_avg of a/b: elements 0 to 4"):
        files.read("exp_avg", "a/b", 0, 5)


def test_a_flipped_bit_a_cut_and_a_missing_file_are_told_apart(tmp_path):
    path = tmp_path / "a.safetensors"
    written = write_tensors(path, {"a": torch.arange(1000)})
    data = path.read_bytes()
    assert written.mismatch(path) == ""
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert written.mismatch(path) == "a.safetensors is damaged: its sha256 is not that of what was written"
    path.write_bytes(data[:-1])
    assert written.mismatch(path) == f"a.safetensors has {len(data) - 1} bytes instead of {len(data)}"
    path.unlink()
    assert written.mismatch(path) == "a.safetensors is missing"


def test_a_pickle_is_no_file_of_tensors(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors can't be read"):
        PieceFiles([tmp_path / "a.safetensors"]).read("weight", "a", 0, 3)


def test_the_sum_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sum(tmp_path / "abc") == FileSum(3, expected)
