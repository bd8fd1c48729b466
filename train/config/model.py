"""Which towers a run trains, and what of them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Which model to train and where its weights come from."""

    name: str = "ViT-B-16"
    """an open_clip model name, one of train/models/configs, or the JSON file of an open_clip config; with pretrained, the default takes the
    architecture of the weights, and any other name is checked against them"""
    pretrained: str = ""
    """start from these weights: a run, checkpoint or export folder; a file of open_clip, OpenAI, SLIP, LaCLIP, CLIP-rocket or DeCLIP,
    recognised by the names of its tensors; or an open_clip pretrained tag; empty: from scratch"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    lock_image: bool = False
    """keep the image tower's weights as they are (LiT); give them with pretrained"""
    lock_image_unlocked_groups: int = 0
    """with lock_image: still train the last so many groups of the image tower (the projection; the last block; the one before; ...)"""
    lock_text: bool = False
    """keep the text tower's weights as they are"""
    lock_text_unlocked_layers: int = 0
    """with lock_text: still train the last so many groups of the text tower (the projection; the last block; the one before; ...)"""
    patch_dropout: float = 0.0
    """leave out this share of a picture's patches in training (vision transformers; FLIP): faster, less memory; 0: the config's"""
    lora_rank: int = 0
    """train adapters of this rank in the towers' linear layers instead of the towers (LoRA; needs peft); they are merged in what is saved
    for others; 0: train the towers"""
    lora_alpha: float = 0.0
    """with lora_rank: adapters count lora_alpha / lora_rank; 0: twice the rank"""
    lora_dropout: float = 0.0
    """with lora_rank: dropout of what enters an adapter"""
    lora_layers: Literal["all", "attention"] = "all"
    """with lora_rank: adapters in attention and MLP, or in attention alone"""

    def check(self) -> None:
        """Raises ValueError for what has no meaning, or leaves nothing to train."""
        if self.lora_rank < 0 or self.lora_alpha < 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"model.lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha} must be 0 or more, lora_dropout={self.lora_dropout} from "
                "0 to less than 1"
            )
        if self.lora_rank and (self.lock_image_unlocked_groups or self.lock_text_unlocked_layers):
            raise ValueError(
                f"model.lora_rank={self.lora_rank} keeps towers frozen; leave out the unlocked groups and layers"
            )
        for tower, count in (("image", "lock_image_unlocked_groups"), ("text", "lock_text_unlocked_layers")):
            number, locked = getattr(self, count), getattr(self, f"lock_{tower}")
            if number < 0 or (number and not locked):
                raise ValueError(f"model.{count}={number} must be 0 or more groups, and needs --model.lock_{tower}")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"model.patch_dropout={self.patch_dropout} must be from 0 to less than 1")
        unlocked = self.lock_image_unlocked_groups or self.lock_text_unlocked_layers
        if self.lock_image and self.lock_text and not unlocked:
            raise ValueError("model.lock_image and model.lock_text leave no tower to train; lock one of them")
