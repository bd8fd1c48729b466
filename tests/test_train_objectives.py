"""Every objective against its definition in float64: loss, gradients by parameters and features, on 1, 2 and 3 ranks with unequal rows;
the published gradients; bad settings."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import objective_definitions as definitions
from tests.ranks import run_on_ranks
from train.config import DataConfig, LossConfig, ObjectiveConfig, TrainConfig
from train.objectives import Encoded, TowerWidths, build_objective

WIDTHS = TowerWidths(image_trunk=5, text_trunk=4, embedding=3)
NUM_ROWS, SCALE = 6, 7.0
COUNTS = {1: [6], 2: [4, 2], 3: [2, 0, 4]}
TINY = {
    "head_width": 6,
    "head_dim": 4,
    "siam_width": 5,
    "siam_dim": 3,
    "barlow_width": 4,
    "barlow_dim": 3,
    "ssl_weight": 0.7,
}
CASES: dict[str, dict[str, Any]] = {
    "slip": {},
    "cl2l": {},
    "siamlip": {"reduction": "sum"},
    "siamlip separate": {"separate_heads": True},
    "byolip": {"num_strong_views": 3},
    "barlip": {"num_strong_views": 1},
    "swalip": {"strong_label_smoothing": 0.0},
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


def rows_of_all_ranks(objective, seed: int = 1) -> dict[str, list[torch.Tensor]]:
    """Each view's rows, by the fields of `Encoded`."""
    generator = torch.Generator().manual_seed(seed)

    def rows(width: int, num_views: int) -> list[torch.Tensor]:
        return [torch.randn(NUM_ROWS, width, generator=generator, dtype=torch.float64) for _ in range(num_views)]

    num_images, num_texts = objective.views.num_images, objective.views.num_texts
    features = {"image": rows(3, num_images), "text": rows(3, num_texts)}
    features = {name: [F.normalize(row, dim=1) for row in views] for name, views in features.items()}
    trunks = {"image_trunk": rows(WIDTHS.image_trunk, num_images), "text_trunk": rows(WIDTHS.text_trunk, num_texts)}
    return {name: [row.requires_grad_() for row in views] for name, views in {**features, **trunks}.items()}


def run(objective, teacher, rows, teacher_rows, part: slice, group) -> dict[str, Any]:
    """Loss and gradients of `objective` on a part of the rows, as the engine calls it."""
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    own = {name: [row[part].detach().requires_grad_() for row in views] for name, views in rows.items()}
    encoded = Encoded(**{name: tuple(views) for name, views in own.items()}, scalars=(scale,))
    teacher_outputs = None
    if teacher is not None:
        views = {name: tuple(row[part].detach() for row in views) for name, views in teacher_rows.items()}
        with torch.no_grad():
            teacher_outputs = teacher(Encoded(**views, scalars=(scale.detach(),)), None)
    terms = objective.loss(objective(encoded, teacher_outputs), encoded.scalars, teacher_outputs, group)
    terms.loss.backward()
    return {
        "loss": terms.loss.detach(),
        "values": {name: float(value) for name, value in terms.values.items()},
        "scale": scale.grad,
        "weights": {name: parameter.grad for name, parameter in objective.named_parameters()},
        "rows": {name: [row.grad for row in views] for name, views in own.items()},
    }


def run_case(case: str, rank: int, world_size: int, group, config: TrainConfig | None = None) -> dict[str, Any]:
    objective = objective_of(config or config_of(case))
    teacher = objective_of(config or config_of(case), seed=5) if objective.teacher_momentum else None
    first = sum(COUNTS[world_size][:rank])
    part = slice(first, first + COUNTS[world_size][rank])
    return run(objective, teacher, rows_of_all_ranks(objective), rows_of_all_ranks(objective, 2), part, group)


def run_all_cases(rank: int, world_size: int) -> dict[str, Any]:
    group = torch.distributed.group.WORLD
    results = {case: run_case(case, rank, world_size, group) for case in CASES}
    results["margin"] = run_case("cl2l", rank, world_size, group, margin_config())
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
    loss = definition(weights, rows, scale, config.objective, *teacher)
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
    results = {case: run_case(case, 0, 1, None) for case in CASES}
    return [{**results, "margin": run_case("cl2l", 0, 1, None, margin_config())}]


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


def mean_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(gradients).mean(0)
