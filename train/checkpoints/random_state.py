"""The random state of a rank: what dropout, patch dropout and stochastic depth draw from, and Python's and numpy's generators."""

import json
import random

import numpy as np
import torch

from mining.manifest import fingerprint
from train.checkpoints.tensor_files import PieceFiles, piece_key

KIND = "random"


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """All generators of this process as uint8 tensors under the keys of a rank's file."""
    _, numbers, position, has_gauss, gauss = np.random.get_state()
    others = json.dumps([random.getstate(), [numbers.tolist(), position, has_gauss, gauss]]).encode()
    states = {"torch_cpu": torch.get_rng_state(), "others": torch.frombuffer(bytearray(others), dtype=torch.uint8)}
    if device.type == "cuda":
        states["torch_cuda"] = torch.cuda.get_rng_state(device)
    return {piece_key(KIND, 0, name): state for name, state in states.items()}


def restore_random_state(files: PieceFiles, device: torch.device) -> None:
    """Raises ValueError when the file of this rank has none for this kind of device."""
    torch.set_rng_state(files.whole(KIND, "torch_cpu"))
    if device.type == "cuda":
        torch.cuda.set_rng_state(files.whole(KIND, "torch_cuda"), device)
    of_python, of_numpy = json.loads(bytes(files.whole(KIND, "others").numpy()))
    random.setstate((of_python[0], tuple(of_python[1]), of_python[2]))
    np.random.set_state(("MT19937", *of_numpy))


def seed_generators(seed: int) -> None:
    """All generators of this process at the start of a run."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_random_state(seed: int, step: int, rank: int) -> None:
    """What takes the place of a saved state when the ranks are not those that saved: the same for each (seed, step, rank)."""
    seed_generators(int(fingerprint("random state", seed, step, rank)[:15], 16))
