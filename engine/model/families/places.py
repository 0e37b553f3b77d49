"""find_parts(): where each canonical tensor of a spec lies in a file, every one checked before anybody reads a byte.

gguf_names.py and hf_names.py say where a tensor may lie (Place); the registry calls this. It never touches the bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import BadModelFile, UnsupportedModel
from engine.model.spec import ModelSpec
from engine.weights.tensors import Part, RawTensor

__all__ = ["Place", "find_parts", "fused", "whole"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a file's tensor, and the shapes that the whole of that tensor may have."""

    part: Part
    shapes: tuple[Shape, ...]


def whole(name: str, shape: Shape) -> Place:
    return Place(Part(name), (shape,))


def fused(name: str, number: int, shape: Shape) -> Place:
    """Block `number` of the two blocks of rows, (rows, columns) each, that `name` holds one below the other."""
    rows, columns = shape
    return Place(Part(name, number * rows, rows), ((2 * rows, columns),))


def find_parts(
    spec: ModelSpec,
    tensors: Mapping[str, RawTensor],
    places_of: Callable[[str, Shape], Sequence[Place]],
    harmless: Callable[[str], bool],
    file: str,
) -> dict[str, Part]:
    """Canonical name -> Part, for every tensor that the spec wants.

    places_of(canonical name, its shape) tells where it may lie: the first place whose tensor is in the file counts.

    Raises BadModelFile for a tensor that is missing or of another shape, UnsupportedModel for a tensor of the file that no
    Part uses and that is not harmless: left out, it would change the mathematics.
    """
    places: dict[str, Place] = {}
    for canonical, shape in spec.shapes().items():
        options = places_of(canonical, shape)
        places[canonical] = next((place for place in options if place.part.name in tensors), options[0])
    used = {place.part.name for place in places.values()}
    if unused := [name for name in tensors if name not in used and not harmless(name)]:
        raise UnsupportedModel(
            f"{file}: it has {len(unused):,} tensors that Rillet's {spec.family} does not know "
            f"({', '.join(repr(name[:80]) for name in unused[:4])}); leaving them out would change the model's answers: "
            "upgrade Rillet, or take another conversion"
        )
    for canonical, place in places.items():
        tensor = tensors.get(place.part.name)
        if tensor is None:
            raise BadModelFile(
                f"it is missing; {canonical} needs it in shape {_words(place)}: download the file again",
                file=file,
                tensor=place.part.name,
            )
        if tensor.shape not in place.shapes:
            raise BadModelFile(
                f"its shape is {tensor.shape}, for {canonical} it must be {_words(place)}: download the file again",
                file=tensor.file,
                tensor=tensor.name,
            )
    return {canonical: place.part for canonical, place in places.items()}


def _words(place: Place) -> str:
    return " or ".join(str(shape) for shape in place.shapes)
