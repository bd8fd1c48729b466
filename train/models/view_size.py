"""Whether a model takes pictures of another size than its own: strong views may be smaller than the weak one."""

import torch

from train.planning.flops import meta_twin


def check_view_size(towers: torch.nn.Module, model_name: str, image_size: tuple[int, int], size: int) -> None:
    """Raises ValueError when the image tower, built for pictures of `image_size` (height, width), can't take `size` x `size`.

    Tries it on a copy without memory. The towers as train.models.model builds them, before an engine has them.
    """
    if size in (0, *image_size) and image_size[0] == image_size[1]:
        return
    twin = meta_twin(towers)
    try:
        # Patch dropout draws on the CPU: this check must leave the random state as it is.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # Two pictures: BatchNorm can't normalise one.
            twin.clip.encode_image(torch.empty(2, 3, size, size, device="meta"))
    # Towers refuse a size in words of their own: an assertion of timm's, a shape that torch can't add.
    except (RuntimeError, AssertionError, ValueError) as error:
        height, width = image_size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"strong_augment.size={size}: the image tower of {model_name} takes pictures of {height} x {width} alone ({reason}); leave it "
            "0, or take a model whose tower pools globally, such as a convolutional network of timm"
        ) from error
