"""The contrastive loss on one process: against a per-pair loop, open_clip, float64 at every loss level, and bad
input."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F

import kernels.contrastive
from kernels import contrastive_gradients, contrastive_loss
from kernels.bench.peers import open_clip_loss
from kernels.contrastive.state import Options
from kernels.rows.checks import automatic_backend

MARGINS = [
    {},
    {"hard_per_anchor": 2},
    {"hard_per_anchor": 2, "margin_weight": 0.7},
    {"hard_per_anchor": 1, "margin_weight": 0.7, "margin_space": "logits", "margin_direction": "image_to_text"},
    {"hard_per_anchor": 3, "margin_weight": 1.3, "margin_direction": "text_to_image", "label_smoothing": 0.1},
    {"hard_per_anchor": 5, "margin_weight": 1.3, "margin_space": "logits", "label_smoothing": 0.3},
]


def paired_features(
    num_rows: int, dim: int, *, noise: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    text = image + noise * torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    return [F.normalize(rows, dim=1).to(dtype).requires_grad_() for rows in (image, text)]


def logit_scale(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def gradients_of(leaves: list[torch.Tensor], **settings) -> list[torch.Tensor]:
    output = contrastive_loss(*leaves, **settings)
    return [output.loss.detach(), *torch.autograd.grad(output.loss, leaves)]


def per_pair_loop(
    image: list[list[float]],
    text: list[list[float]],
    scale: float,
    *,
    hard_per_anchor: int = 0,
    margin_weight: float = 0.0,
    margin_space: str = "cosine",
    margin_direction: str = "both",
    label_smoothing: float = 0.0,
) -> tuple[float, float, float]:
    """(loss, contrastive, margin) written out pair by pair from the formulas."""
    rows = range(len(image))
    cosine = [[math.fsum(a * b for a, b in zip(image[i], text[j], strict=True)) for j in rows] for i in rows]
    transposed = [list(column) for column in zip(*cosine, strict=True)]
    contrastive, margins = 0.0, {}
    for direction, matrix in (("image_to_text", cosine), ("text_to_image", transposed)):
        for i in rows:
            total = math.fsum(math.exp(scale * matrix[i][j]) for j in rows)
            for j in rows:
                target = label_smoothing / len(image) + (1 - label_smoothing if i == j else 0)
                contrastive -= target * math.log(math.exp(scale * matrix[i][j]) / total) / (2 * len(image))
        hinge, num_anchors = 0.0, 0
        for anchor in range(0, len(image), 1 + hard_per_anchor) if hard_per_anchor else ():
            hard = range(anchor + 1, anchor + 1 + hard_per_anchor)
            smallest = min(matrix[anchor][h] for h in hard)
            num_anchors += 1
            for j in rows:
                if j != anchor and j not in hard:
                    unit = scale if margin_space == "logits" else 1.0
                    hinge += unit * max(0.0, matrix[anchor][j] - smallest) / len(image)
        margins[direction] = hinge / max(num_anchors, 1)
    chosen = list(margins.values()) if margin_direction == "both" else [margins[margin_direction]]
    margin = sum(chosen) / len(chosen)
    return contrastive + margin_weight * margin, contrastive, margin


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("settings", MARGINS)
def test_terms_equal_the_per_pair_loop_in_float64(settings, backend):
    image, text = paired_features(12, 5)
    expected = per_pair_loop(image.tolist(), text.tolist(), 11.0, **settings)
    output = contrastive_loss(image, text, logit_scale(11.0), backend=backend, **settings)
    for value, wanted in zip((output.loss, output.contrastive, output.margin), expected, strict=True):
        assert value.item() == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3), (60, 123), (66, 16), (258, 33)])
@pytest.mark.parametrize("settings", MARGINS)
def test_blockwise_equals_reference_in_float64_whatever_the_tiles(shape, settings, monkeypatch):
    num_rows, dim = shape
    group_rows = 1 + settings.get("hard_per_anchor", 0)
    num_rows = max(num_rows - num_rows % group_rows, group_rows)
    leaves = [*paired_features(num_rows, dim), logit_scale(30.0)]
    expected = gradients_of(leaves, backend="reference", **settings)
    for row_tile, column_tile in ((512, 2048), (7, 32), (64, 5)):
        options = Options(**settings, row_tile=row_tile, column_tile=column_tile)
        monkeypatch.setattr(kernels.contrastive, "_checked_options", lambda *_, options=options: options)
        for value, wanted in zip(gradients_of(leaves, backend="blockwise"), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-13)


def test_parts_whose_cosines_lie_far_from_others_make_one_sum_with_them(monkeypatch):
    # Two clouds of rows at right angles: 300 nats lie between cosines within one and across both.
    towers = [torch.cat([rows, torch.flip(rows, [1])]) for rows in paired_features(32, 6, noise=0.02)]
    clouds = torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
    weight = torch.cat([clouds.expand(32, 6), clouds.flip(0).expand(32, 6)])
    leaves = [
        *(F.normalize(weight * (2 + rows), dim=1).detach().requires_grad_() for rows in towers),
        logit_scale(300.0),
    ]
    expected = gradients_of(leaves, backend="reference")
    options = Options(row_tile=16, column_tile=16)
    monkeypatch.setattr(kernels.contrastive, "_checked_options", lambda *_: options)
    for value, wanted in zip(gradients_of(leaves, backend="blockwise"), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("settings", MARGINS)
def test_gradients_pass_gradcheck(settings):
    leaves = [*paired_features(12, 4, seed=3), logit_scale(9.0)]
    assert torch.autograd.gradcheck(lambda *inputs: contrastive_loss(*inputs, **settings).loss, leaves, eps=1e-7)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_loss_and_gradients_equal_open_clip_on_one_process(backend):
    leaves = [*paired_features(63, 17), logit_scale(40.0)]
    loss = open_clip_loss().ClipLoss()(*leaves)
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for value, wanted in zip(gradients_of(leaves, backend=backend), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-13)


# Noise between partners that puts the loss at scale 100 near the level, by bisection, for each (B, D).
NOISE_AT_LEVEL = {
    (64, 64): {2.0: 2.40, 4e-2: 1.54, 1e-3: 1.39, 1e-6: 1.23},
    (64, 128): {2.0: 3.76, 4e-2: 2.23, 1e-3: 1.96, 1e-6: 1.68},
    (64, 512): {2.0: 9.46, 4e-2: 4.69, 1e-3: 3.8, 1e-6: 2.97},
    (512, 64): {2.0: 2.04, 4e-2: 1.35, 1e-3: 1.136, 1e-6: 0.972},
    (512, 100): {2.0: 2.74, 4e-2: 1.70, 1e-3: 1.455, 1e-6: 1.248},
    (512, 128): {2.0: 3.23, 4e-2: 2.02, 1e-3: 1.615, 1e-6: 1.418},
    (512, 512): {2.0: 7.84, 4e-2: 4.07, 1e-3: 3.15, 1e-6: 2.52},
    (4096, 64): {4e-2: 1.176},
    (4096, 128): {2.0: 2.67, 1e-3: 1.496, 1e-6: 1.287},
    (4096, 512): {1e-6: 2.32},
}
LEVELS = [(*shape, level) for shape, levels in NOISE_AT_LEVEL.items() for level in levels]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def leaves_in(dtype: torch.dtype, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


@pytest.mark.parametrize(("num_rows", "dim", "level"), LEVELS)
def test_float32_is_accurate_at_every_loss_level(num_rows, dim, level):
    noise = NOISE_AT_LEVEL[num_rows, dim][level]
    image, text = paired_features(num_rows, dim, noise=noise, dtype=torch.float32)
    leaves = [image, text, logit_scale(100.0, torch.float32)]
    loss, *gradients = gradients_of(leaves, backend="blockwise")
    expected_loss, *expected = gradients_of(leaves_in(torch.float64, leaves), backend="blockwise")
    assert level / 2 < expected_loss.item() < level * 2
    assert relative_error(loss, expected_loss) <= 2e-6
    for value, wanted in zip(gradients, expected, strict=True):
        assert relative_error(value, wanted) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [2.0, 4e-2, 1e-3, 1e-6])
def test_sixteen_bit_features_lose_nothing_but_their_own_rounding(dtype, level):
    image, text = paired_features(512, 512, noise=NOISE_AT_LEVEL[512, 512][level], dtype=dtype)
    leaves = [image, text, logit_scale(100.0, torch.float32)]
    expected = gradients_of(leaves_in(torch.float64, leaves), backend="reference")
    direct = contrastive_gradients(*leaves, backend="blockwise")
    values = [direct.terms.loss, direct.d_image_BD, direct.d_text_BD, direct.d_logit_scale]
    peer = gradients_of(leaves_in(torch.float32, leaves), backend="reference")
    for value, wanted, plain_torch in zip(values, expected, peer, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, wanted) <= min(relative_error(plain_torch, wanted) + 1e-4, 1e-5)
    if dtype == torch.float16 and level < 1e-3:
        return
    # Autograd returns gradients in the features' dtype, which costs one rounding (and underflow in float16 below that
    # loss).
    for value, wanted in zip(gradients_of(leaves, backend="blockwise")[1:3], expected[1:3], strict=True):
        assert value.dtype == dtype
        assert relative_error(value, wanted) <= (3e-3 if dtype == torch.bfloat16 else 1e-3)


def lattice_features(num_rows: int, dim: int) -> list[torch.Tensor]:
    """Entries k/4, k in -2..2: every product and sum is exact in float32, with many ties and exact hinge hits."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(-2, 3, (num_rows, dim), generator=generator) / 4 for _ in range(2)]


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image", "both"])
@pytest.mark.parametrize("hard_per_anchor", [1, 3, 7])
def test_margin_and_its_gradient_agree_bit_for_bit_on_a_lattice(hard_per_anchor, direction):
    settings = {"hard_per_anchor": hard_per_anchor, "margin_weight": 1.0, "margin_direction": direction}
    # Counts are powers of two, so that the means are exact too; identical rows tie every minimum of their group.
    image, text = lattice_features(64, 6)
    text[9:12] = text[8]
    expected = per_pair_loop(image.tolist(), text.tolist(), 1.0, **settings)[2]
    cosine = image.double() @ text.double().T
    assert (cosine.unique().numel()) < 60, "ties are plenty"
    margins, gradients = [], []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "blockwise")):
        leaves = [rows.to(dtype).requires_grad_() for rows in (image, text)]
        # A tiny scale, a power of two, makes the contrastive gradient vanish beside the margin's multiples of 1/(G *
        # A).
        output = contrastive_loss(*leaves, torch.tensor(2.0**-100, dtype=dtype), backend=backend, **settings)
        margins.append(output.margin.item())
        gradients.append([(d.double() * 2**30).round() for d in torch.autograd.grad(output.loss, leaves)])
    assert margins == [expected] * 3
    for d_image, d_text in gradients[1:]:
        assert d_image.equal(gradients[0][0])
        assert d_text.equal(gradients[0][1])


def test_equal_minima_give_their_gradient_to_the_first():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]).repeat(2, 1)
    text = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.5, -1.0], [0.5, 0.5]]).repeat(2, 1).requires_grad_()
    settings = {"hard_per_anchor": 3, "margin_weight": 1.0, "margin_direction": "image_to_text"}
    output = contrastive_loss(image, text, torch.tensor(2.0**-100), backend="blockwise", **settings)
    output.loss.backward()
    # Anchor (1, 0) scores 0.5 with each hard pair; of the other group only its own text, 1, exceeds that: (1 - 0.5) /
    # G.
    assert output.margin.item() == 0.5 / 8
    weight = 1 / (2 * 8)
    assert (text.grad * 2**30).round().div(2**30).tolist() == [[weight, 0], [-weight, 0], [0, 0], [0, 0]] * 2


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_accuracy_counts_strict_winners_only(backend):
    one, two = torch.eye(2)
    image, text = torch.stack([one, two, two]), torch.stack([one, two, one])
    # Image 0 ties between texts 0 and 2; image 1 has its text alone; image 2 prefers text 1. Text 1 ties between
    # images 1 and 2.
    output = contrastive_loss(image, text, torch.tensor(5.0), backend=backend)
    assert output.image_accuracy.item() == pytest.approx(1 / 3)
    assert output.text_accuracy.item() == pytest.approx(1 / 3)
    collapsed = contrastive_loss(one.repeat(4, 1), one.repeat(4, 1), torch.tensor(5.0), backend=backend)
    assert (collapsed.image_accuracy.item(), collapsed.loss.item()) == (0.0, pytest.approx(math.log(4)))


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_not_a_number_in_one_row_shows_in_loss_and_gradients(backend):
    image, text = (leaf.detach().float() for leaf in paired_features(12, 5))
    image[7, 2] = torch.nan
    leaves = [image.requires_grad_(), text.requires_grad_(), logit_scale(10.0, torch.float32)]
    settings = {"hard_per_anchor": 2, "margin_weight": 0.5, "backend": backend}
    assert contrastive_loss(*leaves, **settings).margin.isnan()
    loss, d_image, d_text, d_scale = gradients_of(leaves, **settings)
    assert all(value.isnan().any() for value in (loss, d_image, d_text, d_scale))


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_extreme_cosines_stay_finite(scale):
    row = paired_features(1, 16, dtype=torch.float32)[0].detach()
    for image, text in (
        (row.repeat(9, 1), row.repeat(9, 1)),
        (row.repeat(9, 1), -row.repeat(9, 1)),
        (torch.eye(9),) * 2,
    ):
        leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), logit_scale(scale, torch.float32)]
        expected = gradients_of(leaves_in(torch.float64, leaves), backend="reference")
        for value, wanted in zip(gradients_of(leaves), expected, strict=True):
            assert value.isfinite().all()
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=3e-6 * scale)


def test_upstream_gradient_and_reuse_of_features_are_respected():
    leaves = [*paired_features(10, 4), logit_scale(8.0)]
    once = gradients_of(leaves)[1:]
    (contrastive_loss(*leaves).loss * 3 - contrastive_loss(*leaves).loss * 0.5).backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2.5 * gradient)


def test_same_tensor_as_both_towers_collects_both_gradients():
    features = paired_features(10, 4)[0]
    values = [
        torch.autograd.grad(contrastive_loss(features, features, torch.tensor(8.0), backend=b).loss, features)
        for b in ("reference", "blockwise")
    ]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize(
    "learning", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_frozen_inputs_get_no_gradient_and_cost_no_product(learning, monkeypatch):
    leaves = [*paired_features(12, 4), logit_scale(8.0)]
    expected = gradients_of(leaves)[1:]
    wanted = [leaf.detach().requires_grad_(needs) for leaf, needs in zip(leaves, learning, strict=True)]
    products = []
    monkeypatch.setattr(torch.Tensor, "addmm_", counted(torch.Tensor.addmm_, products))
    contrastive_loss(*wanted).loss.backward()
    assert len(products) == sum(learning[:2])
    for leaf, gradient, needs in zip(wanted, expected, learning, strict=True):
        torch.testing.assert_close(leaf.grad, gradient if needs else None)


def counted(function, calls):
    def call(*args, **keywords):
        calls.append(args[0].shape)
        return function(*args, **keywords)

    return call


def test_no_gradient_is_prepared_under_inference_mode():
    image, text = paired_features(12, 4)
    with torch.inference_mode():
        output = contrastive_loss(image, text, torch.tensor(8.0))
    assert not output.loss.requires_grad
    assert output.loss.item() == contrastive_loss(image, text, torch.tensor(8.0)).loss.item()


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_autocast_around_the_call_changes_no_bit(backend):
    leaves = [*paired_features(24, 16, dtype=torch.float32), logit_scale(50.0, torch.float32)]
    settings = {"hard_per_anchor": 2, "margin_weight": 0.5, "backend": backend}
    expected = gradients_of(leaves, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = contrastive_loss(*leaves, **settings)
        if backend == "blockwise":
            assert gradients_of(leaves, **settings)[1].equal(expected[1]), (
                "not even with backward inside, unlike plain torch"
            )
    values = [output.loss.detach(), *torch.autograd.grad(output.loss, leaves)]
    for value, wanted in zip(values, expected, strict=True):
        assert value.equal(wanted)


def test_only_the_loss_is_differentiable_and_scale_shape_is_kept():
    image, text = paired_features(12, 4)
    scale = torch.tensor([8.0], requires_grad=True)
    output = contrastive_loss(image, text, scale, hard_per_anchor=2, margin_weight=0.1)
    assert not any(term.requires_grad for term in (output.contrastive, output.margin, output.image_accuracy))
    output.loss.backward()
    assert scale.grad.shape == (1,)


def test_same_bits_on_every_run():
    leaves = [*paired_features(700, 33, dtype=torch.float32), logit_scale(50.0, torch.float32)]
    settings = {"hard_per_anchor": 1, "margin_weight": 0.3}
    for first, second in zip(gradients_of(leaves, **settings), gradients_of(leaves, **settings), strict=True):
        assert first.equal(second)


def test_direct_gradients_equal_autograd():
    leaves = [*paired_features(12, 4), logit_scale(8.0)]
    for backend in ("reference", "blockwise"):
        settings = {"hard_per_anchor": 3, "margin_weight": 0.3, "label_smoothing": 0.1, "backend": backend}
        direct = contrastive_gradients(*leaves, **settings)
        values = [direct.terms.loss, direct.d_image_BD, direct.d_text_BD, direct.d_logit_scale]
        for value, wanted in zip(values, gradients_of(leaves, **settings), strict=True):
            assert not value.requires_grad
            torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hard_per_anchor": 2}, "hard_per_anchor=2 needs rows in groups of 3, but this rank has 16"),
        ({"hard_per_anchor": -1}, "hard_per_anchor=-1 must be 0"),
        ({"margin_weight": 0.5}, "margin_weight=0.5 needs hard pairs"),
        ({"margin_weight": -0.5, "hard_per_anchor": 1}, "margin_weight=-0.5 must be a finite number of at least 0"),
        ({"margin_weight": math.nan, "hard_per_anchor": 1}, "margin_weight=nan"),
        ({"margin_space": "angle"}, "margin_space='angle' must be one of cosine, logits"),
        ({"margin_direction": "up"}, "margin_direction='up' must be one of image_to_text"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and below 1"),
        ({"backend": "cuda"}, "backend='cuda' must be one of auto, reference, blockwise, triton"),
        ({"backend": "triton"}, "(?i)triton.*(TRITON_INTERPRET|GPU)"),
        ({"image_BD": torch.zeros(16)}, "matrices of one shape"),
        ({"text_BD": torch.zeros(15, 4)}, r"not \[16, 4\] and \[15, 4\]"),
        ({"image_BD": torch.zeros(16, 0), "text_BD": torch.zeros(16, 0)}, "D >= 1"),
        ({"text_BD": torch.zeros(16, 4, dtype=torch.float64)}, "share one dtype"),
        (
            {"image_BD": torch.zeros(16, 4, dtype=torch.int64), "text_BD": torch.zeros(16, 4, dtype=torch.int64)},
            "share one dtype",
        ),
        ({"logit_scale": torch.ones(2)}, "logit_scale must be a floating-point tensor of shape"),
        ({"logit_scale": torch.tensor(3)}, "logit_scale must be a floating-point tensor"),
        ({"logit_scale": torch.tensor(0.0)}, "logit_scale=0.0 must be positive"),
        ({"text_BD": torch.zeros(16, 4, device="meta")}, "must be on one device"),
        ({"image_BD": torch.zeros(0, 4), "text_BD": torch.zeros(0, 4)}, "at least one row"),
    ],
)
@pytest.mark.parametrize("call", [contrastive_loss, contrastive_gradients])
def test_bad_input_is_refused_with_its_name_and_remedy(call, changes, message):
    arguments = {
        "image_BD": torch.zeros(16, 4),
        "text_BD": torch.zeros(16, 4),
        "logit_scale": torch.tensor(1.0),
        **changes,
    }
    tensors = [arguments.pop(name) for name in ("image_BD", "text_BD", "logit_scale")]
    with pytest.raises(ValueError, match=message):
        call(*tensors, **arguments)


@pytest.mark.parametrize("changes", [{"hard_per_anchor": 1.5}, {"hard_per_anchor": True}])
def test_hard_per_anchor_of_another_type_is_refused(changes):
    with pytest.raises(TypeError, match="hard_per_anchor"):
        contrastive_loss(torch.zeros(16, 4), torch.zeros(16, 4), torch.tensor(1.0), **changes)


def test_a_number_as_scale_is_refused():
    with pytest.raises(TypeError, match=r"logit_scale must be a torch\.Tensor, not float"):
        contrastive_loss(torch.zeros(16, 4), torch.zeros(16, 4), 1.0)


def test_automatic_choice_is_logged_once(caplog):
    automatic_backend.cache_clear()
    image, text = paired_features(4, 3)
    with caplog.at_level(logging.INFO, logger="kernels"):
        for _ in range(3):
            contrastive_loss(image, text, torch.tensor(2.0))
    assert [record.message for record in caplog.records] == [
        "contrastive_loss on cpu: backend 'auto' takes 'blockwise'"
    ]
