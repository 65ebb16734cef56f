"""Images given to another process: which descriptors it needs, and what it has to know."""

from collections.abc import Sequence
from typing import Any

from nonroot.backends.image import Image
from nonroot.backends.overlay import OverlayImage
from nonroot.backends.raw import RawImage

__all__ = ["describe_image", "image_from"]


def describe_image(image: Image) -> tuple[dict[str, Any], list[int]] | None:
    """What :func:`image_from` needs, and descriptors that stay the image's. None: this image cannot be given away.

    Images that a daemon serves through a socket cannot: what was asked and not answered would be lost with the process.
    """
    if type(image) is RawImage:
        fd = image.descriptor(0, 0)
        return None if fd is None else ({"kind": "raw", "read_only": image.read_only, "path": image.path}, [fd])
    if type(image) is OverlayImage:
        below = describe_image(image.base)
        layer = image.layer()
        if below is None or layer is None:
            return None
        return {"kind": "overlay", "base": below[0]}, [*below[1], *layer]
    return None


def image_from(description: dict[str, Any], descriptors: Sequence[int]) -> Image:
    """The image, whose descriptors are its own from now on."""
    if description["kind"] == "overlay":
        *below, layer, bitmap = descriptors
        return OverlayImage.adopt(image_from(description["base"], below), layer, bitmap)
    return RawImage.adopt(descriptors[0], description["path"], description["read_only"])
