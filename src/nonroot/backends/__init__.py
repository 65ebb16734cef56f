"""What is behind the storage devices: image files, throw-away layers, other programs' formats.

>>> from nonroot.backends import Drive, open_image
>>> image = open_image(Drive.parse("disk.img,overlay"))  # doctest: +SKIP
"""

from nonroot.backends.drive import Drive, open_image
from nonroot.backends.image import Image
from nonroot.backends.service import BlockService

__all__ = ["BlockService", "Drive", "Image", "open_image"]
