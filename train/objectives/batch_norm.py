"""Batch normalisation over the rows of all ranks, as if one process had them: torch's own needs GPUs for that.

Shape letters: B rows of this rank, C features.
"""

import torch

from train.distributed import summed_over_ranks, world_group


class BatchNormOverRanks(torch.nn.modules.batchnorm._BatchNorm):
    """torch.nn.BatchNorm1d of rows [B, C] of all ranks of the world; ranks may have different numbers of rows, or none.

    Statistics are formed in fp32 (fp64 for fp64 rows) in two passes, the running ones stay fp32 when the module goes to 16 bit. Values and
    gradients are those of one process with all rows. Collective in training, backward too: every rank calls.
    """

    def forward(self, rows_BC: torch.Tensor) -> torch.Tensor:
        """float32 [B, C] (fp64 for fp64 rows). Raises ValueError for rows that are no matrix of the width."""
        self._check_input_dim(rows_BC)
        rows_BC = rows_BC.to(torch.promote_types(rows_BC.dtype, torch.float32))
        if self.training or self.running_mean is None:
            mean_C, variance_C = self._statistics(rows_BC)
        else:
            mean_C, variance_C = self.running_mean, self.running_var
        normal_BC = (rows_BC - mean_C) * torch.rsqrt(variance_C + self.eps)
        return normal_BC * self.weight + self.bias if self.affine else normal_BC

    def _statistics(self, rows_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance over the rows of all ranks. Collective: every rank calls."""
        group = world_group()
        count = rows_BC.new_full((1,), len(rows_BC))
        total = summed_over_ranks(torch.cat([rows_BC.sum(0), count]), group)
        count = total[-1].detach()
        mean_C = total[:-1] / count
        variance_C = summed_over_ranks((rows_BC - mean_C).square().sum(0), group) / count
        if self.training and self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                unbiased_C = variance_C * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), self.momentum)
        return mean_C, variance_C

    def _check_input_dim(self, rows_BC: torch.Tensor) -> None:
        if rows_BC.dim() != 2 or rows_BC.shape[1] != self.num_features:
            raise ValueError(f"BatchNormOverRanks takes rows [B, {self.num_features}], not {list(rows_BC.shape)}")

    def _apply(self, fn, recurse=True):
        before = (self.running_mean, self.running_var)
        super()._apply(fn, recurse)
        for name, kept in zip(("running_mean", "running_var"), before, strict=True):
            now = getattr(self, name)
            if now is not None and now.dtype in (torch.bfloat16, torch.float16):
                # A tenth of a small difference would round to nothing in 16 bit.
                setattr(self, name, kept.float().to(now.device))
        return self
