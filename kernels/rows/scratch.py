"""Memory that every tile uses again: fresh memory costs page faults, which took a fifth of a sweep's time."""

import torch
from torch import Tensor


class Scratch:
    """Named matrices of one device, allocated at their first use and handed out again, contents undefined."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat: dict[str, Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        size = rows * columns
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.flat[name][:size].view(rows, columns)

    def rows_in(self, dtype: torch.dtype, rows_BD: Tensor, name: str) -> Tensor:
        """The rows themselves where they have the dtype, else a copy that lasts until `name` is asked for again."""
        if rows_BD.dtype == dtype:
            return rows_BD
        return self.matrix(name, *rows_BD.shape, dtype).copy_(rows_BD)
