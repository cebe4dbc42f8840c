"""Whether any storage chunk of a part of a layer is there, by few requests.

A wrong address, a wrong mip or a server that does not serve what lies on its disk looks like a
layer whose storage chunks are all missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Final, NamedTuple

from chunkflow_core.errors import DataError, MissingInputError
from chunkflow_core.lattice.boxes import Box, vector
from chunkflow_core.storage.addresses import plain
from chunkflow_core.storage.compression import EXTENSIONS
from chunkflow_core.storage.files import is_on_disk, storage_errors
from chunkflow_core.storage.layer_info import scale_of
from chunkflow_core.storage.layer_reader import open_layer
from chunkflow_core.storage.layer_scale import SHARDED, LayerScale
from chunkflow_core.storage.listing.grid import CannotTell, Chunks, Store, batches
from chunkflow_core.storage.signatures import open_store

_FIRST: Final = 64
"""Number of storage chunks that are asked for, at random places, before the rest is listed."""

_MOST: Final = 2000
"""Number of storage chunks that are asked for, one by one, where that is all that can be done."""

_MOST_LISTED: Final = 100_000
"""Number of names in a listing after which it is given up."""

_IN_SHARDS: Final = 32
"""Number of storage chunks that are looked for in the files that they share: some requests each."""

_OF_ANOTHER: Final = 8
"""Number of storage chunks of another mip that are asked for, to see whether it has any."""


class Absence(NamedTuple):
    """What was not found."""

    text: str = ""
    """What there is to say to the user; empty if a storage chunk was found, or none is needed."""
    is_sure: bool = True
    """Whether there is none at all; else some were asked for, and none of them is there."""


def nothing_there(path: str, scale: LayerScale, mip: int, box: Box) -> Absence:
    """Look for a storage chunk that touches a box, and stop at the first.

    A layer that is there costs one request. Empty files count as storage chunks that are not there,
    where they are on a disk: a writer that was killed may have left them.

    Args:
        path: Address of the layer, where redirects lead.
        scale: The scale.
        mip: Index of the scale.
        box: The box, in voxels of the scale; it may leave the layer.

    Raises:
        SpecError: The storage refuses the credentials, or finds none.
        StorageError: The storage does not answer.
    """
    inside = box & scale.bounds
    with storage_errors(f"looking for storage chunks of {path}"):
        store = open_store(plain(path), scale) if inside else None
        if store is None:
            return Absence()
        search = _Search(path, scale, mip, inside, store)
        is_sure = search.is_sure_of_none()
        is_whole = scale.naming.parts == 1  # else the first file of each storage chunk was looked for
        return Absence() if is_sure is None else Absence(search.told(is_sure=is_sure), is_sure and is_whole)


class _Search:
    """Looks for storage chunks of one scale in a box."""

    def __init__(self, path: str, scale: LayerScale, mip: int, box: Box, store: Store) -> None:
        self._path, self._scale, self._mip, self._box, self._store = path, scale, mip, box, store
        self._chunks = Chunks(scale)
        self._ranges = self._chunks.touching(box)
        self._count = math.prod(map(len, self._ranges))
        most = _IN_SHARDS if scale.encoding == SHARDED else _MOST
        self._places = Random(0).sample(range(self._count), min(self._count, most))
        self._looked, self._strays = 0, list[str]()

    def is_sure_of_none(self) -> bool | None:
        """Whether it is sure that there is no storage chunk; None if there is one."""
        first, others = self._places[:_FIRST], self._places[_FIRST:]
        if any(map(self._any, ([*first[:1]], first[1:]))):
            return None
        listed = self._listed()
        if listed is not None:
            return None if listed else True
        if any(map(self._any, batches(others, _FIRST * 4))):
            return None
        return self._looked == self._count

    def told(self, *, is_sure: bool) -> str:
        """What to say if there is none."""
        key, which = self._scale.key, f"the {self._count:,}"
        if not is_sure:
            which = f"{self._looked:,} of {which}"
        text = (
            f"{self._path}: none of {which} storage chunks of mip {self._mip} (folder {key}) at {self._box} that were "
            "looked for is there"
        )
        return ". ".join([text, *self._hints()])

    def _any(self, places: list[int]) -> bool:
        """Whether any storage chunk of some places is there."""
        self._looked += len(places)
        if self._scale.encoding == SHARDED:
            return any(map(self._is_in_a_shard, places))
        return bool(places) and self._store.holds([self._name(place) for place in places])

    def _is_in_a_shard(self, place: int) -> bool:
        voxel = vector(
            max(low, start + position * size)
            for low, start, position, size in zip(
                self._box.start, self._scale.bounds.start, self._position(place), self._scale.chunk, strict=True
            )
        )
        reader = open_layer(self._path, self._scale, self._mip)
        try:
            with storage_errors(f"looking for storage chunks of {self._path}"):
                reader.read(Box(voxel, vector(a + 1 for a in voxel)))
        except MissingInputError:
            return False
        except DataError:  # it is there, whatever else
            pass
        return True

    def _listed(self) -> bool | None:
        """Whether there is a storage chunk by a listing; None if that does not tell."""
        if self._scale.encoding != SHARDED and self._looked == self._count:
            return False
        try:
            names, more = self._some_names()
        except CannotTell:
            return None
        if self._scale.encoding == SHARDED:
            return None if any(name.endswith(".shard") for name in names) or more else False
        found = [name for name in names if self._touches(name)]
        if any(self._store.holds(batch) for batch in batches(found, _FIRST)):
            return True
        return None if more else False

    def _some_names(self) -> tuple[list[str], bool]:
        """The first names among the storage chunks, and whether there are more."""
        names = list(islice(self._store.names(), _MOST_LISTED + 1))
        return names, len(names) > _MOST_LISTED

    def _touches(self, name: str) -> bool:
        place = self._chunks.place(name)
        zs, ys, xs = self._ranges
        return place is not None and place[1] in zs and place[0][0] in ys and place[0][1] in xs

    def _position(self, place: int) -> tuple[int, int, int]:
        """Position in the grid, zyx, of a place in the box, by its number."""
        zs, ys, xs = self._ranges
        rest, x = divmod(place, len(xs))
        z, y = divmod(rest, len(ys))
        return zs[z], ys[y], xs[x]

    def _name(self, place: int) -> str:
        z, y, x = self._position(place)
        return self._chunks.name((y, x), z)

    def _hints(self) -> Iterator[str]:
        """What is there instead."""
        names = [self._name(place) for place in self._places[:_OF_ANOTHER]]
        if not is_on_disk(plain(self._path)):
            for extension in filter(None, EXTENSIONS):
                if self._store.holds([name + extension for name in names]):
                    yield (
                        f"There is {names[0]}{extension}: on a server, its name has to be without {extension}, and the "
                        f"server has to say Content-Encoding: {EXTENSIONS[extension]}. `cloudfiles cp` uploads a layer "
                        "from a disk that way, and web servers can be told to (nginx: gzip_static always)"
                    )
        scales = self._scale.info.get("scales", [])
        if others := [mip for mip in range(len(scales)) if self._has_some(mip)]:
            yield f"There are some of mip {', '.join(map(str, others))}"
        yield "Check the address, the mip and the ROI"

    def _has_some(self, mip: int) -> bool:
        """Whether a few storage chunks of another mip show that it has some."""
        try:
            other = scale_of(self._path, self._scale.info, mip)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            return False
        store = open_store(plain(self._path), other)
        if other.key == self._scale.key or other.encoding == SHARDED or store is None:
            return False
        chunks = Chunks(other)
        zs, ys, xs = map(range, map(len, chunks.ranges))
        count = len(zs) * len(ys) * len(xs)
        places = Random(0).sample(range(count), min(count, _OF_ANOTHER))
        columns = [(divmod(place // len(xs), len(ys)), place % len(xs)) for place in places]
        return store.holds([chunks.name((y, x), z) for (z, y), x in columns])
