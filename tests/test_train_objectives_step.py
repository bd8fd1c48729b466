"""Same gradient every way with heads: at every ZeRO stage, on 1 to 3 ranks with unequal rows, in one piece or feature-cached, the engine
takes the step of a plain fp32 program on the global batch, whose BatchNorms in the heads see all rows.

The method is CLIP-rocket's, whose heads are on both towers and whose strong views have a temperature of their own; then BYOLIP's teacher
against the average written out.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_on_ranks
from tests.same_gradient import NUM_ROWS, OPTIM, VOCABULARY, Cell, global_batches, pixels, rows_of_rank, tiny_model
from train.config import ObjectiveConfig, TrainConfig

NUM_STEPS = 2
# Of the scales under 16-bit weights: below the weak one's start of 14.3, above the strong one's of 10.
LIMIT = 12.7
WIDTHS = {"head_width": 24, "head_dim": 12, "siam_width": 24, "siam_dim": 12}
ROCKET = ObjectiveConfig(name="cl2l", **WIDTHS)
BYOLIP = ObjectiveConfig(name="byolip", teacher_momentum=0.9, **WIDTHS)
WORLD_SIZES, STAGES, NUM_MICRO_BATCHES = (1, 2, 3), (0, 1, 2, 3), (1, 4)
ALL_CELLS = [
    Cell(stage, "fp32", "none", micro, world_size, "contrastive")
    for stage in STAGES
    for micro in NUM_MICRO_BATCHES
    for world_size in WORLD_SIZES
]
# Every stage, feature-cached and not, where ranks are unequal.
THINNED = [
    Cell(stage, "fp32", "none", micro, world_size, "contrastive")
    for stage, micro, world_size in ((1, 1, 2), (3, 4, 2), (0, 4, 3), (2, 1, 3))
]
DROPPING = replace(ROCKET, text_dropout=0.2, text_drop_path=0.2)
BF16 = Cell(2, "bf16", "none", 1, 2, "contrastive")


def views_of_step(step: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weak view and two strong ones of a step's global batch: pictures [G, 3, H, W] and tokens [G, L]."""
    image_GCHW, text_GL = list(global_batches())[step]
    generator = torch.Generator().manual_seed(40 + step)
    images, texts = [image_GCHW], [text_GL]
    for shift in (1, 2):
        images.append(image_GCHW.roll(3 * shift, 3))
        text_GL = text_GL.clone()
        text_GL[:, 2 + shift] = torch.randint(1, VOCABULARY - 1, (NUM_ROWS,), generator=generator)
        texts.append(text_GL)
    return images, texts


def config_of(cell: Cell, objective: ObjectiveConfig) -> TrainConfig:
    return replace(cell.train_config(), objective=objective)


def towers_of(cell: Cell, objective: ObjectiveConfig):
    """The same weights in every process."""
    from train.models.clip_library import PreprocessCfg
    from train.objectives.towers_and_heads import build_towers

    clip = tiny_model(cell)
    torch.manual_seed(4)
    return build_towers(clip, PreprocessCfg(), config_of(cell, objective))


def plain_head(weights: dict[str, torch.Tensor], name: str, rows_GW: torch.Tensor) -> torch.Tensor:
    """Linear, BatchNorm over all rows, ReLU, twice, and a last linear layer."""
    for number in (1, 2):
        rows_GW = F.linear(rows_GW, weights[f"{name}.layer{number}.weight"], weights[f"{name}.layer{number}.bias"])
        gain, bias = weights[f"{name}.bn{number}.weight"], weights[f"{name}.bn{number}.bias"]
        rows_GW = F.relu(F.batch_norm(rows_GW, None, None, gain, bias, training=True))
    return F.normalize(F.linear(rows_GW, weights[f"{name}.layer3.weight"], weights[f"{name}.layer3.bias"]), dim=-1)


def plain_trunks(clip: torch.nn.Module, image_GCHW: torch.Tensor, text_GL: torch.Tensor) -> list[torch.Tensor]:
    """What the projections of a ViT and of CLIP's text tower are multiplied with."""
    visual = clip.visual
    image_GW = visual.ln_post(visual.transformer(visual._embeds(pixels(image_GCHW, torch.float32))))[:, 0]
    words = clip.token_embedding(text_GL) + clip.positional_embedding
    words = clip.ln_final(clip.transformer(words, attn_mask=clip.attn_mask))
    return [image_GW, words[torch.arange(len(text_GL)), text_GL.argmax(1)]]


def cross_entropy(image_GD: torch.Tensor, text_GD: torch.Tensor, scale: torch.Tensor, smoothing: float) -> torch.Tensor:
    logits_GG, own_G = scale * image_GD @ text_GD.T, torch.arange(len(image_GD))
    rows, columns = (F.cross_entropy(logits, own_G, label_smoothing=smoothing) for logits in (logits_GG, logits_GG.T))
    return (rows + columns) / 2


def plain_loss(towers: torch.nn.Module, images: Sequence[torch.Tensor], texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """CLIP-rocket's: a third the weak pair, two thirds the mean over four strong pairs with smoothed targets."""
    clip, weights = towers.clip, dict(towers.objective.named_parameters())
    views = [plain_trunks(clip, *view) for view in zip(images, texts, strict=True)]
    weak = [
        F.normalize(views[0][0] @ clip.visual.proj, dim=-1),
        F.normalize(views[0][1] @ clip.text_projection, dim=-1),
    ]
    loss = cross_entropy(*weak, clip.logit_scale.exp(), 0.0)
    strong = [
        [plain_head(weights, f"l2l_{tower}_projector", view[side]) for view in views[1:]]
        for side, tower in enumerate(("image", "text"))
    ]
    pairs = [
        cross_entropy(image_GD, text_GD, weights["l2l_logit_scale"].exp(), 0.1)
        for image_GD in strong[0]
        for text_GD in strong[1]
    ]
    return (loss + 2 * torch.stack(pairs).mean()) / 3


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, torch.Tensor]]:
    """Weights and AdamW's first moments after the steps of one process without an engine."""
    from train.schedule import parameter_groups

    towers = towers_of(ALL_CELLS[0], ROCKET)
    adam = torch.optim.AdamW(
        parameter_groups(towers.named_parameters(), OPTIM.wd), OPTIM.lr, (OPTIM.beta1, OPTIM.beta2), OPTIM.eps
    )
    for step in range(NUM_STEPS):
        adam.zero_grad()
        plain_loss(towers, *views_of_step(step)).backward()
        adam.step()
        with torch.no_grad():
            for scale in (towers.clip.logit_scale, towers.objective.l2l_logit_scale):
                scale.clamp_(0, math.log(100))
    named = dict(towers.named_parameters())
    return {
        "start": dict(towers_of(ALL_CELLS[0], ROCKET).named_parameters()),
        "weights": {name: weight.detach() for name, weight in named.items()},
        "moments": {name: adam.state[weight]["exp_avg"] for name, weight in named.items()},
    }


def engine_steps(rank: int, world_size: int, cell: Cell, objective: ObjectiveConfig) -> dict:
    """Weights before and after each step, first moments, losses, and what the teacher's shards hold; collective."""
    from train.data.loader import RankBatch
    from train.distributed import Ranks
    from train.engine import Engine
    from train.objectives.teacher import Teacher
    from train.objectives.towers_and_heads import has_teacher
    from train.step import train_step

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    towers = towers_of(cell, objective)
    teacher = Teacher(towers, towers.objective.teacher_momentum) if has_teacher(towers) else None
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    optim = replace(OPTIM, lr=0.01, eps=1e-8, max_logit_scale=LIMIT) if cell.precision == "bf16" else OPTIM
    engine = Engine(towers, cell.ds_config(), optim, batch_size=NUM_ROWS, ranks=ranks, teacher=teacher)
    mine, weights, losses, scales = rows_of_rank(rank, world_size), [masters(engine)], [], []
    for step in range(NUM_STEPS):
        images, texts = ([view[mine] for view in views] for views in views_of_step(step))
        strong = {"strong_images": tuple(images[1:]), "strong_texts": tuple(texts[1:])}
        batch = RankBatch(images[0], texts[0], torch.arange(NUM_ROWS)[mine], NUM_ROWS, 0, **strong)
        outcome = train_step(engine, config_of(cell, objective), batch, optim.lr)
        assert not outcome.not_finite
        losses.append(outcome.values()["loss"])
        scales.append((outcome.values()["l2l_logit_scale"], outcome.scalars[0].item()))
        weights.append(masters(engine))
    found = {"weights": weights, "losses": losses, "scales": scales, "moments": whole_of(engine, "exp_avg")}
    if teacher is not None:
        found["average"] = gathered(teacher.held())
    found["spoilt"] = spoilt_step(engine, config_of(cell, objective), batch)
    found["after"] = masters(engine), gathered(teacher.held()) if teacher is not None else {}
    if teacher is not None:
        found["forward"] = {name: weight.float().clone() for name, weight in teacher.module.named_parameters()}
    engine.close()
    return found


def spoilt_step(engine, config: TrainConfig, batch) -> str:
    """What a step with an infinite loss says was not finite."""
    from train.step import train_step

    objective = engine.module.objective
    original = objective.loss

    def spoilt(*arguments):
        terms = original(*arguments)
        return replace(terms, loss=terms.loss * math.inf)

    objective.loss = spoilt
    outcome = train_step(engine, config, batch, 1.0)
    objective.loss = original
    return outcome.not_finite


def masters(engine) -> dict[str, torch.Tensor]:
    return whole_of(engine, "weight")


def whole_of(engine, kind: str) -> dict[str, torch.Tensor]:
    return gathered(held for held in engine.state.held() if held.kind == kind)


def gathered(held_tensors) -> dict[str, torch.Tensor]:
    """Flat tensors from the ranges of all ranks; collective."""
    import torch.distributed as dist

    own = [(held.name, held.start, held.tensor.detach().reshape(-1).clone()) for held in held_tensors]
    by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for name, start, tensor in (piece for rank in by_rank for piece in rank):
        pieces.setdefault(name, {})[start] = tensor
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def take_cells(rank: int, world_size: int, cells: Sequence[tuple[Cell, ObjectiveConfig]]) -> list[dict]:
    return [engine_steps(rank, world_size, *cell) for cell in cells]


def distance(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    flat = [torch.cat([tensors[name].double().flatten() for name in sorted(other)]) for tensors in (some, other)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def assert_same(cell: Cell, found: dict, plain: dict[str, dict[str, torch.Tensor]]) -> None:
    weights = found["weights"][-1]
    assert weights.keys() == plain["weights"].keys() == found["moments"].keys()
    updates = [
        {name: after[name].flatten() - plain["start"][name].flatten() for name in plain["start"]}
        for after in (weights, plain["weights"])
    ]
    assert distance(*updates) < 3e-6, str(cell)
    assert distance(found["moments"], plain["moments"]) < 3e-6, str(cell)
    for name in ("clip.logit_scale", "objective.l2l_logit_scale"):
        assert found["moments"][name].item() == pytest.approx(plain["moments"][name].item(), rel=1e-5), (cell, name)


def assert_average(cell: Cell, found: dict) -> None:
    """After each step nine tenths of it, and a tenth of the masters."""
    expected = {name: weight.double() for name, weight in found["weights"][0].items()}
    for after in found["weights"][1:]:
        expected = {name: 0.9 * expected[name] + 0.1 * after[name].double() for name in expected}
    assert distance(found["average"], expected) < 1e-7, str(cell)
    moved = {name: found["average"][name] - found["weights"][0][name] for name in expected}
    start = {name: expected[name] - found["weights"][0][name].double() for name in expected}
    assert distance(moved, start) < 1e-3, str(cell)
    assert_unchanged(found)
    # What its forward uses is the average in the weights' precision.
    assert distance(found["forward"], found["average"]) < (4e-3 if cell.precision == "bf16" else 1e-9), str(cell)


def assert_unchanged(found: dict) -> None:
    """A loss that is not finite leaves weights, heads and the average alone."""
    assert found["spoilt"] == "loss"
    weights, average = found["after"]
    assert all(torch.equal(weights[name], weight) for name, weight in found["weights"][-1].items())
    assert average.keys() == found.get("average", {}).keys()
    assert all(torch.equal(average[name], weight) for name, weight in found.get("average", {}).items())


def assert_scales(found: dict) -> None:
    """Forward uses both temperatures' fp32 masters, and both are held at the limit."""
    names = ("objective.l2l_logit_scale", "clip.logit_scale")
    for before, used in zip(found["weights"], found["scales"], strict=False):
        assert used == pytest.approx([before[name].double().exp().item() for name in names], rel=1e-6)
    for name in names:
        logs = [weights[name].item() for weights in found["weights"]]
        assert max(logs[1:]) <= math.log(LIMIT) + 1e-6, name
        assert len(set(logs)) > 1, name
        copy = torch.tensor(logs[1]).bfloat16().double().exp().item()
        assert abs(copy - math.exp(logs[1])) > 1e-3 * copy, "a copy in bfloat16 would be another scale"


def check_cells(cells: Sequence[tuple[Cell, ObjectiveConfig]], plain: dict) -> None:
    for world_size in sorted({cell.world_size for cell, _ in cells}):
        of_world = [entry for entry in cells if entry[0].world_size == world_size]
        by_rank = run_on_ranks(take_cells, world_size, of_world, timeout_s=600)
        for place, (cell, objective) in enumerate(of_world):
            assert all(found[place]["losses"] == by_rank[0][place]["losses"] for found in by_rank), (
                "one loss on all ranks"
            )
            if objective is ROCKET:
                assert_same(cell, by_rank[0][place], plain)
                assert_unchanged(by_rank[0][place])
            else:
                assert_average(cell, by_rank[0][place])
            if cell.precision == "bf16":
                assert_scales(by_rank[0][place])


@pytest.mark.slow
def test_the_step_with_heads_is_that_of_a_plain_program_and_the_teacher_is_the_average(plain):
    teachers = [Cell(3, "fp32", "none", 4, 2, "contrastive"), BF16, Cell(0, "fp32", "none", 1, 2, "contrastive")]
    check_cells([(cell, ROCKET) for cell in THINNED] + [(cell, BYOLIP) for cell in teachers], plain)


def record_encoded(rank: int, world_size: int) -> list[tuple[bool, list[torch.Tensor]]]:
    """The texts' features of every pass through the towers, and whether it had a graph."""
    from train.engine import Engine
    from train.objectives.towers_and_heads import ENCODE

    records, original = [], Engine.call

    def call(self, task, *inputs):
        found = original(self, task, *inputs)
        if task == ENCODE:
            records.append((torch.is_grad_enabled(), [rows.detach().clone() for rows in found[1]]))
        return found

    Engine.call = call
    engine_steps(rank, world_size, Cell(1, "fp32", "none", 4, 1, "contrastive"), DROPPING)
    return records


@pytest.mark.slow
def test_the_dropout_of_strong_texts_is_replayed():
    records = run_on_ranks(record_encoded, 1)[0]
    first, replayed = ([texts for had_graph, texts in records if had_graph is graph] for graph in (False, True))
    assert len(first) == len(replayed) == 4 * (NUM_STEPS + 1)
    for some, other in zip(first, replayed, strict=True):
        assert all(torch.equal(one, another) for one, another in zip(some, other, strict=True))


@pytest.mark.full
def test_every_way_to_step_with_heads_gives_the_step_of_a_plain_program(plain):
    check_cells([(cell, objective) for cell in ALL_CELLS for objective in (ROCKET, BYOLIP)], plain)


def test_a_wrong_gradient_of_a_head_would_be_noticed(plain):
    moments = {**plain["moments"], "objective.l2l_logit_scale": plain["moments"]["objective.l2l_logit_scale"] * 1.001}
    found = {"weights": [plain["weights"]], "moments": moments}
    with pytest.raises(AssertionError):
        assert_same(ALL_CELLS[0], found, plain)
