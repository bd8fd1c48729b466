"""The objectives as their papers write them: loops over pairs in plain torch, float64, one process, on an objective's own parameters.

Nothing here uses the code under test. Rows of all ranks come whole; autograd gives the expected gradients.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

Tensors = Mapping[str, torch.Tensor]


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def cross_entropy(logits: Sequence[torch.Tensor], target: int, smoothing: float = 0.0) -> torch.Tensor:
    total = torch.stack([logit.exp() for logit in logits]).sum().log()
    uniform = sum(total - logit for logit in logits) / len(logits)
    return (1 - smoothing) * (total - logits[target]) + smoothing * uniform


def clip_term(image, text, scale, smoothing: float = 0.0, anchors_alone: bool = False) -> torch.Tensor:
    """anchors_alone: candidates carry no gradient."""
    loss = 0
    for x, y in ((image, text), (text, image)):
        candidates = y.detach() if anchors_alone else y
        for i in range(len(x)):
            loss = loss + cross_entropy([scale * x[i] @ other for other in candidates], i, smoothing)
    return loss / (2 * len(image))


def margin_term(image, text) -> torch.Tensor:
    """HNML in cosine, both directions, one hard pair behind each anchor."""
    loss, num_rows = 0, len(image)
    for x, y in ((image, text), (text, image)):
        for anchor in range(0, num_rows, 2):
            threshold = x[anchor] @ y[anchor + 1]
            for j in range(num_rows):
                if j not in (anchor, anchor + 1):
                    loss = loss + F.relu(x[anchor] @ y[j] - threshold) / num_rows
    return loss / num_rows


def nt_xent_term(a, b, temperature: float) -> torch.Tensor:
    rows = [*a, *b]
    loss = 0
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        partner = others.index((i + len(a)) % len(rows))
        loss = loss + cross_entropy([rows[i] @ rows[j] / temperature for j in others], partner)
    return loss / len(rows)


def simsiam_distance(prediction, target) -> torch.Tensor:
    """Mean over rows of 2 - 2 cos."""
    return sum(
        2 - 2 * F.cosine_similarity(p, v, dim=0) for p, v in zip(prediction, target.detach(), strict=True)
    ) / len(target)


def barlow_term(x, y, off_diagonal: float) -> torch.Tensor:
    loss = 0
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            correlation = sum(x[row, i] * y[row, j] for row in range(len(x))) / len(x)
            loss = loss + ((correlation - 1) ** 2 if i == j else off_diagonal * correlation**2)
    return loss


def sinkhorn_by_loops(cosine: torch.Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """SwAV's: prototypes (columns) get equal shares of all samples, then samples sum to one."""
    num_rows = len(cosine)
    weight = [[float(torch.exp(cosine[i, j] / epsilon)) for j in range(num_rows)] for i in range(num_rows)]
    for _ in range(iterations):
        columns = [sum(weight[i][j] for i in range(num_rows)) for j in range(num_rows)]
        weight = [[weight[i][j] / columns[j] / num_rows for j in range(num_rows)] for i in range(num_rows)]
        rows = [sum(row) for row in weight]
        weight = [[value / rows[i] / num_rows for value in weight[i]] for i in range(num_rows)]
    return [[value * num_rows for value in row] for row in weight]


def swapped_term(
    image: Sequence, text: Sequence, scale, epsilon: float, iterations: int, anchors_alone: bool = False
) -> torch.Tensor:
    loss, num_rows = 0, len(image[0])
    for a in range(2):
        for b in range(2):
            for x, other_x, y, other_y in (
                (image[a], image[1 - a], text[b], text[1 - b]),
                (text[b], text[1 - b], image[a], image[1 - a]),
            ):
                assigned = sinkhorn_by_loops((other_x @ other_y.T).detach(), epsilon, iterations)
                candidates = y.detach() if anchors_alone else y
                for i in range(num_rows):
                    log_softmax = torch.log_softmax(torch.stack([scale * x[i] @ row for row in candidates]), 0)
                    loss = loss - sum(assigned[i][j] * log_softmax[j] for j in range(num_rows)) / (2 * num_rows)
    return loss / 4


def head(weights: Tensors, name: str, rows: torch.Tensor, num_layers: int, last_norm: bool = False) -> torch.Tensor:
    for number in range(1, num_layers + 1):
        rows = F.linear(rows, weights[f"{name}.layer{number}.weight"], weights.get(f"{name}.layer{number}.bias"))
        if number < num_layers or last_norm:
            rows = normalised(rows) * weights[f"{name}.bn{number}.weight"] + weights[f"{name}.bn{number}.bias"]
        if number < num_layers:
            rows = rows.clamp(min=0)
    return rows


def normalised(rows: torch.Tensor) -> torch.Tensor:
    return (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()


def slip(weights, encoded, scale, settings) -> torch.Tensor:
    views = [unit(head(weights, "image_mlp", trunk, 3)) for trunk in encoded["image_trunk"][1:]]
    weak = clip_term(encoded["image"][0], encoded["text"][0], scale)
    return weak + settings.ssl_weight * nt_xent_term(*views, settings.simclr_temperature)


def strong_views(weights, encoded) -> list[list[torch.Tensor]]:
    return [
        [unit(head(weights, f"l2l_{tower}_projector", trunk, 3)) for trunk in encoded[f"{tower}_trunk"][1:]]
        for tower in ("image", "text")
    ]


def cl2l(weights, encoded, scale, settings) -> torch.Tensor:
    images, texts = strong_views(weights, encoded)
    num_views, own_scale = len(images), weights["l2l_logit_scale"].exp()
    weak = clip_term(encoded["image"][0], encoded["text"][0], scale)
    strong = (
        sum(clip_term(x, t, own_scale, settings.strong_label_smoothing) for x in images for t in texts) / num_views**2
    )
    loss = (weak + num_views * strong) / (1 + num_views)
    return 2 * loss if settings.reduction == "sum" else loss


def siam_targets(weights, encoded, separate_heads: bool = False) -> dict[str, list[torch.Tensor]]:
    def name(tower: str, view: int) -> str:
        return f"siam_projectors.{tower}_{'strong' if view and separate_heads else 'weak'}"

    return {
        tower: [
            normalised(head(weights, name(tower, view), trunk, 2))
            for view, trunk in enumerate(encoded[f"{tower}_trunk"])
        ]
        for tower in ("image", "text")
    }


def siamlip(weights, encoded, scale, settings, teacher_weights=None, teacher_encoded=None) -> torch.Tensor:
    projected = siam_targets(weights, encoded, settings.separate_heads)
    target = projected
    if teacher_weights is not None:
        target = siam_targets(teacher_weights, teacher_encoded, settings.separate_heads)
    predicted = {
        "image": [head(weights, "image_text_predictor", rows, 2) for rows in projected["image"]],
        "text": [head(weights, "text_image_predictor", rows, 2) for rows in projected["text"]],
    }
    num_views = len(predicted["image"]) - 1
    pairs = [(0, 0), *((a, b) for a in range(1, 1 + num_views) for b in range(1, 1 + num_views))]
    own = sum(
        simsiam_distance(predicted["image"][a], target["text"][b])
        + simsiam_distance(predicted["text"][b], target["image"][a])
        for a, b in pairs
    )
    return cl2l(weights, encoded, scale, settings) + settings.ssl_weight * own / (2 + 2 * num_views**2)


def barlip(weights, encoded, scale, settings) -> torch.Tensor:
    def projections(tower: str) -> list[torch.Tensor]:
        return [
            head(weights, f"barlow_projectors.{tower}_weak", trunk, 3, last_norm=True)
            for trunk in encoded[f"{tower}_trunk"]
        ]

    images, texts = projections("image"), projections("text")
    num_views = len(images) - 1
    pairs = [(0, 0), *((a, b) for a in range(1, 1 + num_views) for b in range(1, 1 + num_views))]
    own = sum(barlow_term(images[a], texts[b], settings.barlow_off_diagonal) for a, b in pairs) / len(pairs)
    return cl2l(weights, encoded, scale, settings) + settings.ssl_weight * settings.barlow_scale * own


def swalip(weights, encoded, scale, settings) -> torch.Tensor:
    images, texts = strong_views(weights, encoded)
    own_scale = weights["l2l_logit_scale"].exp()
    own = swapped_term(images, texts, own_scale, settings.sinkhorn_epsilon, settings.sinkhorn_iterations)
    return cl2l(weights, encoded, scale, settings) + settings.ssl_weight * settings.swap_scale * own


def declip(weights, encoded, scale, settings, queue) -> torch.Tensor:
    images, texts = encoded["image"], encoded["text"]
    mvs = sum(clip_term(x, t, scale) for x in images for t in texts) / 4
    nns = 0
    for text in texts:
        near = [queue[max(range(len(queue)), key=lambda q, row=row: float(row @ queue[q]))] for row in text.detach()]
        for image in images:
            rows = [cross_entropy([scale * row @ other for other in near], i) for i, row in enumerate(image)]
            nns = nns + sum(rows) / len(rows) / 4
    projected = [head(weights, "projector", image, 3, last_norm=True) for image in images]
    predicted = [head(weights, "predictor", rows, 2) for rows in projected]
    siam = sum(F.cosine_similarity(predicted[a], projected[1 - a].detach(), dim=1).mean() for a in (0, 1)) / -2
    return settings.mvs_weight * mvs + settings.nns_weight * nns + settings.ssl_weight * siam
