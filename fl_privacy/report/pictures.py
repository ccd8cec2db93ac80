"""Before and after pictures that lie beside a ledger, as a page embeds them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from fl_privacy.audit.wording import natural_key, plain
from fl_privacy.errors import InvalidInputError

MAX_PICTURES, MAX_BYTES = 24, 3 * 1024**2
"""Most pictures of a page, and most bytes of all of them."""

_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture.

    Attributes:
        caption: The file's name without its ending.
        uri: Data URI.
    """

    caption: str
    uri: str


def pictures_folder(ledger: Path) -> Path:
    """Returns where the pictures of a ledger belong: `runs/vision.pictures` for `runs/vision.db`."""
    return ledger.with_suffix(".pictures")


def find_pictures(folder: Path, *, required: bool = False) -> tuple[list[Picture], int]:
    """Returns the PNG and JPEG files of a folder in natural order of their names, and how many found no room.

    `client-3-after.png` and `client-3-before.png` are shown side by side, as their names are neighbours: whatever sorts
    together is shown together. A folder that is not there holds none.

    Args:
        folder: Where they are.
        required: Whether there must be some.

    Raises:
        InvalidInputError: Some are required, and there are none.
    """
    if not folder.is_dir():
        if required:
            raise InvalidInputError(f"expected a folder of pictures at {folder}, and there is no such folder")
        return [], 0
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=_before_first)
    pictures: list[Picture] = []
    left, skipped = MAX_BYTES, 0
    for path in files:
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            continue
        size = path.stat().st_size
        if len(pictures) == MAX_PICTURES or size > left:
            skipped += 1
            continue
        content = path.read_bytes()
        kind = next((kind for magic, kind in _KINDS.items() if content.startswith(magic)), None)
        if kind is None:
            skipped += 1
            continue
        left -= size
        uri = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
        pictures.append(Picture(caption=plain(path.stem), uri=uri))
    if required and not pictures:
        raise InvalidInputError(
            f"expected PNG or JPEG files in {folder}, of at most {MAX_BYTES} bytes, and there are none"
        )
    return pictures, skipped


def _before_first(path: Path) -> tuple[object, ...]:
    """Sorts `x-before` ahead of `x-after`."""
    stem, _, last = path.stem.rpartition("-")
    rank = {"before": 0, "after": 1}.get(last)
    return (natural_key(stem), rank, "") if rank is not None else (natural_key(path.stem), 2, path.name)
