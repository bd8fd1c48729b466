"""Every operation against its float64 definition on one device: what `python -m kernels.bench.gpu` runs first.

A check yields errors beside their limits; it passes when each error is at most its limit. Limits are those that the
operations promise: losses within 2e-6, gradients within 1e-5 (relative Frobenius norm) at every loss level, 2e-3 with
the fast operand, top-k exact; of 16-bit rows on a GPU's matrix units 1e-5 and 3e-5.

Shape letters: `B` rows, `D` embedding, `N` base pairs, `Q` queries, `K` neighbours.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import contrastive_gradients, contrastive_loss, product_topk, sigmoid_contrastive_gradients

Errors = dict[str, tuple[float, float]]
LOSS_LIMIT = 2e-6
# NVIDIA's 16-bit matrix units cut off what a sum loses at every step, where float32 arithmetic rounds: on an H100 cosines
# shrink by up to D/16 * 2^-24, and gradients by up to 2^-24 for every 16 columns of a strip. Torch's float32 products of
# the same rows are allowed 1e-4.
MATRIX_UNIT_LOSS_LIMIT, MATRIX_UNIT_GRADIENT_LIMIT = 1e-5, 3e-5
GRADIENT_LIMITS = {"precise": 1e-5, "fast": 2e-3}
# Of the sums that make the gradients by scale and bias, which cancel.
SCALAR_LIMIT = 1e-4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, width): one row, odd sizes, usual ones.
SHAPES = ((1, 1), (63, 123), (257, 64), (1024, 512), (4096, 768), (16384, 512))
TYPICAL_ROWS = 4096
# In nats, at scale 100: from early training to where a loss formed as a difference loses its digits.
LOSS_LEVELS = (2.0, 4e-2, 5e-4, 1e-6)
BISECTIONS = 9
FLAGS = (
    {"label_smoothing": 0.1},
    {"hard_per_anchor": 2, "margin_weight": 0.7},
    {"hard_per_anchor": 1, "margin_weight": 2.0, "margin_space": "logits"},
    {"hard_per_anchor": 2, "margin_weight": 0.7, "margin_direction": "image_to_text"},
    {"hard_per_anchor": 2, "margin_weight": 0.7, "margin_direction": "text_to_image", "label_smoothing": 0.2},
)


@dataclass(frozen=True)
class Check:
    """`run()` gives {quantity: (error, limit)}."""

    name: str
    run: Callable[[], Errors]


def all_checks(device: torch.device, backend: str, *, max_rows: int = SHAPES[-1][0]) -> Iterator[Check]:
    """Every operation, dtype, flag and odd shape up to `max_rows` rows."""
    shapes = [shape for shape in SHAPES if shape[0] <= max_rows]
    typical = max(shape for shape in shapes if shape[0] <= TYPICAL_ROWS)
    for dtype, shape in itertools.product(DTYPES, shapes):
        yield _contrastive(device, backend, dtype, shape, noise=3.0)
        yield _sigmoid(device, backend, dtype, shape)
    for level in LOSS_LEVELS:
        noise = noise_of_loss(level, typical, device)
        for dtype in DTYPES:
            yield _contrastive(device, backend, dtype, typical, noise=noise)
    for dtype in DTYPES[1:]:
        yield _contrastive(device, backend, dtype, typical, noise=3.0, gradient_operand="fast")
        yield _sigmoid(device, backend, dtype, typical, gradient_operand="fast")
    for flags, dtype in itertools.product(FLAGS, (torch.float32, torch.bfloat16)):
        yield _contrastive(device, backend, dtype, (252, 123), noise=3.0, **flags)
    for scale in (1.0, 1000.0):
        yield _contrastive(device, backend, torch.float32, (257, 64), noise=3.0, scale=scale)
    yield Check("margin on a lattice equals float64 bit for bit", lambda: _lattice(device, backend))
    yield Check("same bits on every run", lambda: _determinism(device, backend, typical))
    yield Check("not a number is never hidden", lambda: _not_a_number(device, backend))
    for dtype, num_pairs in itertools.product(DTYPES, (257, min(max_rows, 3000))):
        yield Check(
            f"product_topk, {_named(dtype)}, N = {num_pairs}", lambda d=dtype, n=num_pairs: _topk(device, backend, d, n)
        )


def long_rows_check(device: torch.device, *, num_rows: int = (1 << 21) + 77, dim: int = 1025) -> Check:
    """Rows beyond 2^31 elements, through the sigmoid loss's own sweep; 5 GB of bfloat16."""
    return Check("rows beyond 2^31 elements", lambda: _long_rows(device, num_rows, dim))


def paired_rows(shape: tuple[int, int], dtype: torch.dtype, noise: float, device: torch.device) -> list[Tensor]:
    """Unit rows of both towers, the texts `noise` away from their images in a random direction."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    image = torch.randn(shape, generator=generator, dtype=torch.float64)
    text = image + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    return [F.normalize(tower, dim=1).to(device, dtype) for tower in (image, text)]


def noise_of_loss(level: float, shape: tuple[int, int], device: torch.device) -> float:
    """The noise between towers at which the loss at scale 100 is near `level` nats, rounded to two digits."""
    scale = torch.tensor(100.0, dtype=torch.float64, device=device)
    low, high = 0.1, 20.0
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        rows = paired_rows(shape, torch.float64, middle, device)
        is_above = contrastive_loss(*rows, scale, backend="reference").loss > level
        low, high = (low, middle) if is_above else (middle, high)
    return float(f"{low:.2g}")


def relative_error(value: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(shape: tuple[int, int], settings: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"B = {shape[0]}, D = {shape[1]}" + (f", {values}" if values else "")


def _contrastive(device, backend, dtype, shape, *, noise: float, scale: float = 100.0, **settings) -> Check:
    def run() -> Errors:
        rows, logit_scale = paired_rows(shape, dtype, noise, device), torch.tensor(scale, device=device)
        ours = contrastive_gradients(*rows, logit_scale, backend=backend, **settings)
        definition = {name: value for name, value in settings.items() if name != "gradient_operand"}
        exact = contrastive_gradients(
            *(tower.double() for tower in rows), logit_scale.double(), backend="reference", **definition
        )
        names = ("d_image_BD", "d_text_BD", "d_logit_scale")
        loss_limit, limit = _limits(device, backend, dtype, settings)
        return {
            "loss": (relative_error(ours.terms.loss, exact.terms.loss), loss_limit),
            **_gradient_errors(ours, exact, names, limit),
        }

    settings_shown = {"noise": noise, "scale": scale, **settings}
    return Check(f"contrastive_loss, {_named(dtype)}, {_described(shape, settings_shown)}", run)


def _sigmoid(device, backend, dtype, shape, **settings) -> Check:
    def run() -> Errors:
        rows = paired_rows(shape, dtype, 3.0, device)
        scalars = [torch.tensor(value, device=device) for value in (10.0, -10.0)]
        ours = sigmoid_contrastive_gradients(*rows, *scalars, backend=backend, **settings)
        exact = sigmoid_contrastive_gradients(*(value.double() for value in (*rows, *scalars)), backend="reference")
        names = ("d_image_BD", "d_text_BD", "d_logit_scale", "d_logit_bias")
        loss_limit, limit = _limits(device, backend, dtype, settings)
        return {
            "loss": (relative_error(ours.terms.loss, exact.terms.loss), loss_limit),
            **_gradient_errors(ours, exact, names, limit),
        }

    return Check(f"sigmoid_contrastive_loss, {_named(dtype)}, {_described(shape, settings)}", run)


def _limits(device: torch.device, backend: str, dtype: torch.dtype, settings: dict[str, Any]) -> tuple[float, float]:
    """(of the loss, of the gradients by features)."""
    limit = GRADIENT_LIMITS[settings.get("gradient_operand", "precise")]
    if device.type == "cuda" and backend == "triton" and dtype.itemsize == 2:
        return MATRIX_UNIT_LOSS_LIMIT, max(limit, MATRIX_UNIT_GRADIENT_LIMIT)
    return LOSS_LIMIT, limit


def _gradient_errors(ours, exact, names: tuple[str, ...], limit: float) -> Errors:
    """One row alone has no negatives: its gradient is 0 and compared as such."""
    errors = {}
    for name in names:
        value, expected = getattr(ours, name), getattr(exact, name)
        is_scalar = value.dim() == 0
        if expected.abs().max() < 1e-12:
            errors[name] = (value.double().abs().max().item(), 1e-9)
        else:
            errors[name] = (relative_error(value, expected), SCALAR_LIMIT if is_scalar else limit)
    return errors


def _lattice(device: torch.device, backend: str) -> Errors:
    """Entries k/4 make every dot product exact, ties and hinges that are hit exactly included."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(-2, 3, (96, 20), generator=generator).to(device, torch.bfloat16) / 4 for _ in range(2)]
    settings = {"hard_per_anchor": 2, "margin_weight": 1.0}
    scale = torch.tensor(2.0, device=device)
    ours = contrastive_gradients(*rows, scale, backend=backend, **settings).terms.margin
    exact = contrastive_gradients(*(row.double() for row in rows), scale.double(), backend="reference", **settings)
    return {"margin": (abs(ours.item() - exact.terms.margin.to(ours.dtype).item()), 0.0)}


def _determinism(device: torch.device, backend: str, shape: tuple[int, int]) -> Errors:
    rows = paired_rows(shape, torch.bfloat16, 3.0, device)
    scale, bias = torch.tensor(100.0, device=device), torch.tensor(-10.0, device=device)

    def results() -> list[Tensor]:
        one = contrastive_gradients(*rows, scale, backend=backend)
        two = sigmoid_contrastive_gradients(*rows, scale, bias, backend=backend)
        return [one.terms.loss, one.d_image_BD, one.d_text_BD, two.terms.loss, two.d_image_BD, two.d_text_BD]

    differing = sum(not torch.equal(*pair) for pair in zip(results(), results(), strict=True))
    return {"results that differ": (differing, 0)}


def _not_a_number(device: torch.device, backend: str) -> Errors:
    rows = paired_rows((100, 40), torch.float32, 3.0, device)
    rows[0][7, 3] = torch.nan
    scale, bias = torch.tensor(100.0, device=device), torch.tensor(-10.0, device=device)
    losses = [
        contrastive_gradients(*rows, scale, backend=backend).terms.loss,
        sigmoid_contrastive_gradients(*rows, scale, bias, backend=backend).terms.loss,
    ]
    return {"losses that hide it": (sum(not loss.isnan().item() for loss in losses), 0)}


def _topk(device: torch.device, backend: str, dtype: torch.dtype, num_pairs: int) -> Errors:
    base = paired_rows((num_pairs, 64), dtype, 1.0, device)
    base[0][1::7], base[1][1::7] = base[0][0], base[1][0]
    queries = torch.arange(0, num_pairs, 3, device=device)
    groups = torch.arange(num_pairs, device=device) % (num_pairs // 2)
    settings = {"query_ids_Q": queries, "image_ceiling": 0.97, "floor": 0.001}
    settings |= {"image_group_Q": groups[queries], "image_group_N": groups}
    ours, exact = (
        product_topk(base[0][queries], base[1][queries], *base, 50, backend=name, **settings)
        for name in (backend, "reference")
    )
    scores = [one.image_similarity_QK * one.text_similarity_QK for one in (ours, exact)]
    errors = {
        "scores": ((scores[0] - scores[1]).abs().max().item(), 1e-12),
        "exclusion counts that differ": ((ours.num_excluded_Q != exact.num_excluded_Q).sum().item(), 0),
    }
    if dtype == torch.float16:
        # Products of float16 rows are exact in float64: so are ties, and with them the ids.
        errors["ids that differ"] = ((ours.ids_QK != exact.ids_QK).sum().item(), 0)
    return errors


def _long_rows(device: torch.device, num_rows: int, dim: int) -> Errors:
    # Triton alone has 64-bit addresses to prove.
    from kernels.sigmoid import launches

    generator = torch.Generator(device).manual_seed(1)
    y_GD = torch.empty(num_rows, dim, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    y_GD *= dim**-0.5
    x_BD = y_GD[-64:].clone()
    settings = {"scale": 10.0, "bias": -5.0, "offset": num_rows - 64}
    total = launches.negative_sum(x_BD, y_GD, **settings)
    dx_BD, *_ = launches.gradient_sweep(x_BD, y_GD, want_x=True, want_y=False, want_scalars=False, **settings)
    exact, exact_dx_BD = torch.zeros_like(total), torch.zeros_like(dx_BD, dtype=torch.float64)
    own_B = torch.arange(64, device=device)
    for first in range(0, num_rows, 1 << 16):
        part = y_GD[first : first + (1 << 16)].double()
        logits = 10.0 * x_BD.double() @ part.T - 5.0
        inside = own_B + num_rows - 64 - first
        rows = own_B[(inside >= 0) & (inside < len(part))]
        logits[rows, inside[rows]] = -torch.inf
        exact += F.softplus(logits, threshold=40).sum()
        exact_dx_BD += torch.sigmoid(logits) @ part
    return {
        "sum": (relative_error(total, exact), LOSS_LIMIT),
        "dx": (relative_error(dx_BD, exact_dx_BD), MATRIX_UNIT_GRADIENT_LIMIT),
    }
