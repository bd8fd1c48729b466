"""Which search answers: the choice of backend and device, checked before anything is computed."""

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mining.fused import FusedSearch
from mining.helip import HelipSearch
from mining.problem import SearchBackend, SearchProblem
from mining.reference import ReferenceSearch

BACKENDS = ("fused", "reference", "faiss")
DEVICES = ("auto", "cpu", "cuda")
# In an unfinished table's folder.
CLUSTERS_FOLDER = "clusters"


@dataclass(frozen=True)
class BackendChoice:
    """Backend and its settings; `index` to `seed` matter to faiss alone, `helip_subset` to the released ranking.

    exact: search rows exactly that no candidate list certifies; else they stay uncertified. nlist 0 is chosen by N.
    Raises ValueError naming a setting that does not exist, is out of range, or that the backend has no use for.
    """

    backend: str = "fused"
    device: str = "auto"
    index: Literal["flat", "ivf"] = "flat"
    nlist: int = 0
    nprobe: int = 64
    exact: bool = False
    seed: int = 0
    helip_compat: bool = False
    helip_subset: int = 3_000_000

    def __post_init__(self):
        for name, allowed in (("backend", BACKENDS), ("device", DEVICES), ("index", ("flat", "ivf"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(allowed)}")
        if self.backend != "faiss" and self.index != "flat":
            raise ValueError(
                f"backend={self.backend!r} searches without an index: index={self.index!r} needs backend='faiss'"
            )
        if self.nlist < 0 or self.nprobe < 1:
            raise ValueError(f"nlist={self.nlist} must be at least 0 (0: by N) and nprobe={self.nprobe} at least 1")
        if self.helip_subset < 1:
            raise ValueError(f"helip_subset={self.helip_subset}, but a subset holds at least 1 pair")
        if self.backend == "reference" and self.device == "cuda":
            raise ValueError("backend='reference' runs on the CPU alone; use backend='fused' with device='cuda'")

    @property
    def searches_exactly(self) -> bool:
        """Every row is what the definition says, whichever backend finds it."""
        return not self.helip_compat and (self.backend != "faiss" or self.exact)

    def parameters(self) -> dict[str, Any]:
        """What a table's content depends on: nothing of this when it is exact."""
        if self.helip_compat:
            return {"ranking": "helip", "helip_subset": self.helip_subset, "seed": self.seed}
        if self.searches_exactly:
            return {"ranking": "exact"}
        names = ("index",) if self.index == "flat" else ("index", "nlist", "nprobe", "seed")
        return {"ranking": "faiss", **{name: asdict(self)[name] for name in names}}


def chosen_device(choice: BackendChoice, local_rank: int = 0) -> torch.device:
    """The device of this rank. ValueError for a GPU that is asked for and missing, or a missing faiss."""
    if choice.backend == "faiss" and not choice.helip_compat:
        if importlib.util.find_spec("faiss") is None:
            raise ValueError("backend='faiss' needs the package faiss-gpu or faiss-cpu; install it or use 'fused'")
        # Only here, so that everything else works without faiss.
        from mining.index import faiss_device

        return faiss_device(choice.device, local_rank)
    return torch.device("cpu") if choice.backend == "reference" else torch_device(choice.device, local_rank)


def torch_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; ValueError when a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' was asked for, but torch sees no CUDA device here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def make_backend(
    choice: BackendChoice, problem: SearchProblem, device: torch.device, folder: Path, *, show_progress: bool = False
) -> SearchBackend:
    """The backend, ready to search on `device`. `folder`: where an inverted index lies on disk, for all ranks."""
    if device.type == "cuda" and torch.cuda.is_available():
        # Triton launches, and pinned memory belongs to, the current GPU, which is the first one in every process.
        torch.cuda.set_device(device)
    if choice.helip_compat:
        return HelipSearch(problem, subset=choice.helip_subset, seed=choice.seed, device=device)
    if choice.backend == "reference":
        return ReferenceSearch(problem)
    if choice.backend == "fused":
        return FusedSearch(problem, device=device)
    exact = exact_backend(problem, device) if choice.searches_exactly else None
    if choice.index == "flat":
        from mining.candidates import CandidateSearch
        from mining.index import FlatLists

        return CandidateSearch(problem, FlatLists(problem, device), exact=exact)
    from mining.cluster_search import ClusterSearch
    from mining.clusters import Clusters, automatic_nlist

    nlist = choice.nlist or automatic_nlist(len(problem))
    clusters = Clusters.shared(
        problem, folder / CLUSTERS_FOLDER, nlist=nlist, seed=choice.seed, show_progress=show_progress
    )
    return ClusterSearch(problem, clusters, nprobe=choice.nprobe, exact=exact, device=device_of_torch(device))


def exact_backend(problem: SearchProblem, device: torch.device) -> SearchBackend:
    """What decides where candidates do not: the fused search, on the GPU where torch sees that one."""
    return FusedSearch(problem, device=device_of_torch(device))


def device_of_torch(device: torch.device) -> torch.device:
    """faiss may see a GPU that torch does not."""
    return device if torch.cuda.is_available() else torch.device("cpu")
