"""Every objective against its definition in float64: loss, gradients by parameters and features, on 1, 2 and 3 ranks with unequal rows;
the published gradients; bad settings."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import objective_definitions as definitions
from tests.ranks import run_on_ranks
from train.config import DataConfig, LossConfig, ObjectiveConfig, TrainConfig
from train.distributed import RowLayout
from train.objectives import Encoded, TowerWidths, build_objective
from train.objectives.barlip import barlow_twins
from train.objectives.contrastive import view_loss
from train.objectives.slip import nt_xent
from train.objectives.swalip import sinkhorn

WIDTHS = TowerWidths(image_trunk=5, text_trunk=4, embedding=3)
NUM_ROWS, SCALE = 6, 7.0
ALONE = RowLayout(None, (NUM_ROWS,))
COUNTS = {1: [6], 2: [4, 2], 3: [2, 0, 4]}
TINY = {
    "head_width": 6,
    "head_dim": 4,
    "siam_width": 5,
    "siam_dim": 3,
    "barlow_width": 4,
    "barlow_dim": 3,
    "ssl_weight": 0.7,
    "declip_dim": 5,
    "declip_width": 4,
    "queue_length": 16,
}
CASES: dict[str, dict[str, Any]] = {
    "slip": {},
    "cl2l": {},
    "siamlip": {"reduction": "sum"},
    "siamlip separate": {"separate_heads": True},
    "byolip": {"num_strong_views": 3},
    "barlip": {"num_strong_views": 1},
    "swalip": {"strong_label_smoothing": 0.0},
    "declip": {"num_strong_views": 1, "mlm_weight": 0.0},
}


def config_of(case: str, **loss: Any) -> TrainConfig:
    settings = ObjectiveConfig(name=case.split()[0], **{**TINY, **CASES[case]})
    return TrainConfig(objective=settings, loss=LossConfig(backend="blockwise", **loss))


def objective_of(config: TrainConfig, seed: int = 0):
    torch.manual_seed(seed)
    objective = build_objective(config, WIDTHS).double()
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "bn" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return objective.train()


def rows_of_all_ranks(objective, seed: int = 1, num_rows: int = NUM_ROWS) -> dict[str, list[torch.Tensor]]:
    """Each view's rows, by the fields of `Encoded`."""
    generator = torch.Generator().manual_seed(seed)

    def rows(width: int, num_views: int) -> list[torch.Tensor]:
        return [torch.randn(num_rows, width, generator=generator, dtype=torch.float64) for _ in range(num_views)]

    num_images, num_texts = objective.views.num_images, objective.views.num_texts
    features = {"image": rows(3, num_images), "text": rows(3, num_texts)}
    features = {name: [F.normalize(row, dim=1) for row in views] for name, views in features.items()}
    trunks = {"image_trunk": rows(WIDTHS.image_trunk, num_images), "text_trunk": rows(WIDTHS.text_trunk, num_texts)}
    return {name: [row.requires_grad_() for row in views] for name, views in {**features, **trunks}.items()}


def run(objective, teacher, rows, teacher_rows, part: slice, layout: RowLayout) -> dict[str, Any]:
    """Loss and gradients of `objective` on a part of the rows, as the engine calls it."""
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    own = {name: [row[part].detach().requires_grad_() for row in views] for name, views in rows.items()}
    encoded = Encoded(**{name: tuple(views) for name, views in own.items()}, scalars=(scale,))
    teacher_outputs = None
    if teacher is not None:
        views = {name: tuple(row[part].detach() for row in views) for name, views in teacher_rows.items()}
        with torch.no_grad():
            teacher_outputs = teacher(Encoded(**views, scalars=(scale.detach(),)), None)
    terms = objective.loss(objective(encoded, teacher_outputs), encoded.scalars, teacher_outputs, layout)
    terms.loss.backward()
    return {
        "loss": terms.loss.detach(),
        "values": {name: float(value) for name, value in terms.values.items()},
        "scale": scale.grad,
        "weights": {name: parameter.grad for name, parameter in objective.named_parameters()},
        "rows": {name: [row.grad for row in views] for name, views in own.items()},
        "queue": dict(objective.named_buffers()).get("text_queue"),
    }


def run_case(
    case: str, rank: int, world_size: int, layout: RowLayout, config: TrainConfig | None = None
) -> dict[str, Any]:
    objective = objective_of(config or config_of(case))
    teacher = objective_of(config or config_of(case), seed=5) if objective.teacher_momentum else None
    first = sum(COUNTS[world_size][:rank])
    part = slice(first, first + COUNTS[world_size][rank])
    return run(objective, teacher, rows_of_all_ranks(objective), rows_of_all_ranks(objective, 2), part, layout)


def run_all_cases(rank: int, world_size: int) -> dict[str, Any]:
    layout = RowLayout(torch.distributed.group.WORLD, tuple(COUNTS[world_size]))
    results = {case: run_case(case, rank, world_size, layout) for case in CASES}
    results["margin"] = run_case("cl2l", rank, world_size, layout, margin_config())
    return results


def margin_config() -> TrainConfig:
    plain = config_of("cl2l", margin_weight=0.6)
    return TrainConfig(objective=plain.objective, loss=plain.loss, data=DataConfig(hard_per_anchor=1))


def expected_of(case: str) -> dict[str, Any]:
    """The definition's loss and gradients over all rows."""
    config = margin_config() if case == "margin" else config_of(case)
    objective, method = objective_of(config), config.objective.name
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    weights, rows = dict(objective.named_parameters()), rows_of_all_ranks(objective)
    definition = getattr(definitions, "siamlip" if method == "byolip" else method)
    teacher = ()
    if method == "byolip":
        teacher = (dict(objective_of(config, seed=5).named_parameters()), rows_of_all_ranks(objective, 2))
    queue = (objective.text_queue,) if method == "declip" else ()
    loss = definition(weights, rows, scale, config.objective, *teacher, *queue)
    if case == "margin":
        loss = loss + 0.6 * definitions.margin_term(rows["image"][0], rows["text"][0])
    loss.backward()
    return {
        "loss": loss.detach().reshape(()),
        "scale": scale.grad,
        "weights": {name: parameter.grad for name, parameter in weights.items()},
        "rows": {name: [row.grad for row in views] for name, views in rows.items()},
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    return {case: expected_of(case) for case in (*CASES, "margin")}


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda size: f"{size} ranks")
def found(request) -> list[dict[str, Any]]:
    if request.param > 1:
        return run_on_ranks(run_all_cases, request.param)
    results = {case: run_case(case, 0, 1, ALONE) for case in CASES}
    return [{**results, "margin": run_case("cl2l", 0, 1, ALONE, margin_config())}]


# A float32 logarithm of the strong scale, as everywhere.
CLOSE = {"rtol": 2e-6, "atol": 1e-7}


@pytest.mark.parametrize("case", [*CASES, "margin"])
def test_loss_and_gradients_on_any_number_of_ranks_equal_the_definition_over_all_rows(case, found, expected):
    ranks, wanted = [rank[case] for rank in found], expected[case]
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], wanted["loss"], **CLOSE)
        assert rank["values"]["loss"] == rank["loss"].item()
    torch.testing.assert_close(mean_of([rank["scale"] for rank in ranks]), wanted["scale"], **CLOSE)
    for name, gradient in wanted["weights"].items():
        if gradient is None:
            assert all(rank["weights"][name] is None for rank in ranks), name
            continue
        mean = mean_of([rank["weights"][name] for rank in ranks])
        torch.testing.assert_close(
            mean.to(gradient.dtype), gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, views in wanted["rows"].items():
        for view, gradient in enumerate(views):
            own = [rank["rows"][name][view] for rank in ranks]
            if gradient is None:
                assert all(part is None for part in own), name
            else:
                torch.testing.assert_close(torch.cat(own) / len(ranks), gradient, **CLOSE)


def test_the_queue_takes_the_texts_of_all_ranks_first_in_first_out(found):
    objective = objective_of(config_of("declip"))
    texts = rows_of_all_ranks(objective)["text"]
    wanted = torch.cat([*texts, objective.text_queue[2 * NUM_ROWS :]])
    for rank in found:
        torch.testing.assert_close(rank["declip"]["queue"], wanted.detach(), rtol=1e-12, atol=1e-12)


def test_the_queue_goes_round_keeps_its_place_in_the_state_and_refuses_what_is_not_finite():
    objective = objective_of(config_of("declip"))
    rows = rows_of_all_ranks(objective)
    for _ in range(2):
        run(objective, None, rows, None, slice(0, NUM_ROWS), ALONE)
    assert objective.state_dict()["queue_place"] == 4 * NUM_ROWS - 16
    texts = torch.cat(rows["text"]).detach()
    torch.testing.assert_close(objective.text_queue, torch.cat([texts[4:], texts[8:], texts[:4]]))
    before = objective.text_queue.clone()
    rows["text"][0] = torch.full_like(rows["text"][0], torch.nan)
    run(objective, None, rows, None, slice(0, NUM_ROWS), ALONE)
    torch.testing.assert_close(objective.text_queue[8:14], before[8:14])
    assert objective.text_queue.isfinite().all()


def mean_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(gradients).mean(0)


def legacy_config(case: str, legacy: bool) -> TrainConfig:
    config = config_of(case)
    return TrainConfig(objective=replace(config.objective, legacy_gradients=legacy), loss=config.loss)


def unit_views() -> list[torch.Tensor]:
    """Two views of 8 images, then two of their texts."""
    generator = torch.Generator().manual_seed(8)
    views = [torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [F.normalize(view, dim=1) for view in views]


def legacy_gradients_of_rank(part: slice, layout: RowLayout, legacy: bool) -> dict[str, list[torch.Tensor]]:
    """By this rank's rows of each term that gathers or reduces, as the rank reports it."""
    scale, results = torch.tensor([SCALE], dtype=torch.float64), {}
    swalip = objective_of(legacy_config("swalip", legacy))

    def contrastive(views: list[torch.Tensor]) -> torch.Tensor:
        return view_loss(swalip.config, views[0], views[2], scale, 0.1, layout).loss

    def swapped(views: list[torch.Tensor]) -> torch.Tensor:
        names = ("strong_image_1", "strong_image_2", "strong_text_1", "strong_text_2")
        return swalip.own_term({**dict(zip(names, views, strict=True)), "strong_scale": scale}, None, layout)

    def barlow(views: list[torch.Tensor]) -> torch.Tensor:
        return barlow_twins(views[0], views[2], 0.005, layout, legacy_gradients=legacy)

    for term in (contrastive, swapped, barlow):
        own = [view[part].clone().requires_grad_() for view in unit_views()]
        gradients = torch.autograd.grad(term(own), own, allow_unused=True)
        results[term.__name__] = [gradient for gradient in gradients if gradient is not None]
    slip = objective_of(legacy_config("slip", legacy))
    rows = run(slip, None, rows_of_all_ranks(slip, num_rows=8), None, part, layout)["rows"]
    return {**results, "slip weak": rows["image"][:1], "slip strong": rows["image_trunk"][1:]}


def legacy_on_rank(rank: int, world_size: int) -> dict[bool, dict[str, list[torch.Tensor]]]:
    count = 8 // world_size
    part = slice(rank * count, (rank + 1) * count)
    layout = RowLayout(torch.distributed.group.WORLD, (count,) * world_size)
    return {old: legacy_gradients_of_rank(part, layout, old) for old in (False, True)}


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} ranks")
def legacy(request) -> list[dict[bool, dict[str, list[torch.Tensor]]]]:
    return run_on_ranks(legacy_on_rank, request.param)


def gradient_over_ranks(ranks: list[dict[bool, dict[str, list[torch.Tensor]]]], old: bool, term: str) -> torch.Tensor:
    """By all rows, of the loss that the mean over ranks minimises."""
    views = zip(*(rank[old][term] for rank in ranks), strict=True)
    return torch.cat([(torch.cat(parts) / len(ranks)).flatten() for parts in views])


def ratio_and_cosine(ranks: list[dict[bool, dict[str, list[torch.Tensor]]]], term: str) -> tuple[float, float]:
    exact, published = (gradient_over_ranks(ranks, old, term) for old in (False, True))
    return float(published.norm() / exact.norm()), float(F.cosine_similarity(published, exact, dim=0))


@pytest.mark.parametrize("term", ["contrastive", "slip weak"])
def test_legacy_gradients_of_contrastive_terms_are_half_the_exact_ones(legacy, term):
    # clip-rocket, measured in float64 with 8 pairs on 2 and on 4 ranks: norm ratio 0.505, cosine 0.982.
    ratio, cosine = ratio_and_cosine(legacy, term)
    assert ratio == pytest.approx(0.505, abs=0.05)
    assert cosine > 0.93


def test_legacy_gradients_are_those_of_each_row_as_an_anchor_alone(legacy):
    views = [view.requires_grad_() for view in unit_views()]
    contrastive = definitions.clip_term(views[0], views[2], SCALE, 0.1, anchors_alone=True)
    swapped = 0.2 * definitions.swapped_term(views[:2], views[2:], SCALE, 0.05, 3, anchors_alone=True)
    for term, loss, leaves in (("contrastive", contrastive, views[::2]), ("swapped", swapped, views)):
        wanted = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, leaves)])
        found = gradient_over_ranks(legacy, True, term)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_legacy_gradient_of_simclr_is_exact_as_published(legacy):
    ratio, cosine = ratio_and_cosine(legacy, "slip strong")
    assert (ratio, cosine) == (pytest.approx(1, abs=1e-12), pytest.approx(1, abs=1e-12))


def test_legacy_gradient_of_barlow_twins_is_one_over_the_number_of_ranks(legacy):
    # BarLIP, measured: 0.5000 at 2 ranks, 0.2500 at 4, cosine 1.0.
    ratio, cosine = ratio_and_cosine(legacy, "barlow")
    assert (ratio, cosine) == (pytest.approx(1 / len(legacy), rel=1e-12), pytest.approx(1, abs=1e-12))


def test_legacy_gradients_of_one_process_are_exact():
    exact, published = (legacy_gradients_of_rank(slice(0, 8), RowLayout(None, (8,)), old) for old in (False, True))
    for term, gradients in exact.items():
        for gradient, other in zip(gradients, published[term], strict=True):
            assert torch.equal(gradient, other), term


def balanced_on_rank(rank: int, world_size: int) -> torch.Tensor:
    return sinkhorn(cosines()[[slice(0, 2), slice(2, 2), slice(2, 6)][rank]], 0.05, 3, torch.distributed.group.WORLD)


def cosines() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    rows = [F.normalize(torch.randn(6, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]
    return rows[0] @ rows[1].T


def test_assignments_equal_swavs_loops_on_any_number_of_ranks():
    wanted = torch.tensor(definitions.sinkhorn_by_loops(cosines(), 0.05, 3), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(cosines(), 0.05, 3, None), wanted, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.cat(run_on_ranks(balanced_on_rank, 3)), wanted, rtol=1e-10, atol=1e-14)


def test_assignments_are_balanced_in_the_limit_and_their_rows_always():
    few, many = (sinkhorn(cosines(), 0.2, iterations, None) for iterations in (3, 2000))
    torch.testing.assert_close(few.sum(1), torch.ones(6, dtype=torch.float64))
    assert (few.sum(0) - 1).abs().max() > 1e-6
    torch.testing.assert_close(many.sum(0), torch.ones(6, dtype=torch.float64))


def test_nt_xent_in_float32_keeps_its_digits_at_low_loss():
    generator = torch.Generator().manual_seed(6)
    a = F.normalize(torch.randn(40, 64, generator=generator), dim=1)
    b = F.normalize(a + 0.02 * torch.randn(40, 64, generator=generator), dim=1)
    found, wanted = nt_xent(a, b, 0.02, RowLayout(None, (40,))), definitions.nt_xent_term(a.double(), b.double(), 0.02)
    assert wanted < 1e-5
    assert found.item() == pytest.approx(wanted.item(), rel=2e-5)


def test_barlow_twins_by_strips_equals_the_whole_matrix(monkeypatch):
    monkeypatch.setattr("train.objectives.barlip.FEATURE_TILE", 2)
    x, y = (view.requires_grad_() for view in unit_views()[::2])
    wanted = definitions.barlow_term(x, y, 0.3)
    alone = RowLayout(None, (8,))
    found = barlow_twins(x, y, 0.3, alone)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for gradient, expected in zip(torch.autograd.grad(found, [x, y]), torch.autograd.grad(wanted, [x, y]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x, y: barlow_twins(x, y, 0.3, alone), (x, y))


@pytest.mark.parametrize(
    ("objective", "loss", "message"),
    [
        ({"name": "slip", "num_strong_views": 3}, {}, "num_strong_views=3 does not go with --objective.name slip"),
        ({"name": "swalip"}, {}, "strong_label_smoothing=0.1 does not go with"),
        ({"name": "barlip", "barlow_dim": 0}, {}, "barlow_dim=0 must be at least 1"),
        (
            {"name": "swalip", "strong_label_smoothing": 0.0, "swap_scale": -1.0},
            {},
            "swap_scale=-1.0 must be 0 or more",
        ),
        ({"name": "declip"}, {}, "num_strong_views=2 does not go with --objective.name declip"),
        ({"name": "declip", "num_strong_views": 1}, {"kind": "sigmoid"}, "declip has no --loss.kind sigmoid"),
        ({"name": "cl2l", "legacy_gradients": True}, {"kind": "sigmoid"}, "legacy_gradients is for the published"),
    ],
)
def test_settings_without_a_meaning_are_refused(objective, loss, message):
    config = TrainConfig(
        ds_config="a",
        out="b",
        data=DataConfig(store="c"),
        objective=ObjectiveConfig(**objective),
        loss=LossConfig(**loss),
    )
    with pytest.raises(ValueError, match=message):
        config.check()
