"""Images: where they are, how they are read, and what becomes of a row that cannot be. No row is seen from outside."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dp_curriculum.data.images import NO_CONTRIBUTION as NO_CONTRIBUTION
    from dp_curriculum.data.images import ImageSource as ImageSource
    from dp_curriculum.data.images import PrivateImages as PrivateImages
    from dp_curriculum.data.images import contributing as contributing
    from dp_curriculum.data.images import to_unit_range as to_unit_range
    from dp_curriculum.data.reading import load_images as load_images
    from dp_curriculum.data.reading import read_images as read_images
    from dp_curriculum.data.sources import digits_dataset as digits_dataset
    from dp_curriculum.data.sources import open_images as open_images
    from dp_curriculum.data.sources import open_rows as open_rows

# Imported when first used: a decoding process starts without torch.
_MODULE_OF = {
    "NO_CONTRIBUTION": "images",
    "ImageSource": "images",
    "PrivateImages": "images",
    "contributing": "images",
    "digits_dataset": "sources",
    "load_images": "reading",
    "open_images": "sources",
    "open_rows": "sources",
    "read_images": "reading",
    "to_unit_range": "images",
}
__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
