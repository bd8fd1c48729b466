"""What of a model is trained, and how: towers locked in part or whole, adapters, activations recomputed."""

import torch

from train.config import ModelConfig
from train.models.lora import add_adapters


def prepare_towers(model: torch.nn.Module, config: ModelConfig) -> None:
    """Freeze and set up the towers of an open_clip model, in place.

    Raises ValueError for a tower that open_clip can't unlock in part or recompute, that has no patches to drop, or no layers for adapters.
    """
    if config.patch_dropout and not any("PatchDropout" in type(layer).__name__ for layer in model.visual.modules()):
        raise ValueError(
            f"model.patch_dropout={config.patch_dropout} needs a vision transformer, not {type(model.visual).__name__}; leave it out"
        )
    blocks = {type(layer).__name__ for layer in model.modules()}
    if config.grad_checkpointing and "CustomResidualAttentionBlock" in blocks:
        raise ValueError("model.grad_checkpointing: open_clip can't recompute blocks of its custom kind; leave it out")
    if config.grad_checkpointing:
        recompute_activations(model)
    if config.lora_rank:
        add_adapters(model, config)
    if config.lock_image:
        lock_image(model, config.lock_image_unlocked_groups)
    if config.lock_text:
        lock_text(model, config.lock_text_unlocked_layers)


def recompute_activations(model: torch.nn.Module) -> None:
    """Recompute what both towers' blocks give in the backward pass.

    open_clip's own call does nothing for its ModifiedResNet, and turns a timm tower's refusal into a warning. Raises ValueError for both.
    """
    visual = model.visual
    if type(visual).__name__ == "ModifiedResNet":
        raise ValueError(
            "model.grad_checkpointing: open_clip can't recompute a ModifiedResNet; leave it out (--micro_batch_size bounds memory, too)"
        )
    if hasattr(visual, "trunk"):
        try:
            visual.trunk.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"model.grad_checkpointing: timm can't recompute a {type(visual.trunk).__name__} ({error}); leave it out"
            ) from error
    model.set_grad_checkpointing()


def lock_image(model: torch.nn.Module, unlocked_groups: int) -> None:
    """All of the image tower but its last groups: the projection, then the last block with the final norm, then the blocks before it."""
    try:
        model.lock_image_tower(unlocked_groups=unlocked_groups, freeze_bn_stats=True)
    except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"model.lock_image_unlocked_groups={unlocked_groups}: open_clip can't unlock a part of {type(model.visual).__name__} "
            f"({str(error) or type(error).__name__}); make it 0"
        ) from error


def lock_text(model: torch.nn.Module, unlocked_layers: int) -> None:
    """All of the text tower but its last groups, in the same order."""
    try:
        model.lock_text_tower(unlocked_layers=unlocked_layers)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"model.lock_text_unlocked_layers={unlocked_layers}: open_clip can't unlock a part of this text tower "
            f"({str(error) or type(error).__name__}); make it 0"
        ) from error
