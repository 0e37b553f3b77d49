"""Registers and stack of the kernels in a cubin, read from its ELF sections: for a compiler that prints no report."""

import struct

__all__ = ["resources_of"]

HEADER = struct.Struct("<16x2HI3QI6H")              # from e_type on
SECTION = struct.Struct("<2I4Q2I2Q")
SYMBOL = struct.Struct("<I2BH2Q")
SYMBOL_TABLE = 2
SIZED = 4                                           # the format of an attribute that says its length
FRAME_SIZE, REGISTER_COUNT = 0x11, 0x2F             # attributes of .nv.info: (symbol, value)


def resources_of(cubin: bytes) -> dict[str, tuple[int, int]]:
    """{symbol: (registers, bytes of stack)}. Raises ValueError if it is no cubin."""
    try:
        sections = sections_of(cubin)
        symbols = next(symbols_of(cubin, each, sections) for each in sections if each[1] == SYMBOL_TABLE)
        names = sections[HEADER.unpack_from(cubin)[-1]]
        notes = next(each for each in sections if text_at(cubin, names, each[0]) == ".nv.info")
        found: dict[str, list[int]] = {}
        for attribute, index, value in attributes_of(cubin[notes[4] : notes[4] + notes[5]]):
            entry = found.setdefault(symbols[index], [0, 0])
            entry[attribute == FRAME_SIZE] = value
    except (struct.error, IndexError, StopIteration) as error:
        raise ValueError(f"this is no cubin: {error!r}") from error
    return {symbol: (registers, stack) for symbol, (registers, stack) in found.items()}


def sections_of(cubin: bytes) -> list[tuple[int, ...]]:
    """(name, type, flags, address, offset, size, link, ...) of each."""
    if cubin[:4] != b"\x7fELF":
        raise ValueError("this is no cubin: it is no ELF file")
    header = HEADER.unpack_from(cubin)
    start, count = header[5], header[11]
    return [SECTION.unpack_from(cubin, start + i * SECTION.size) for i in range(count)]


def symbols_of(cubin: bytes, table: tuple[int, ...], sections: list[tuple[int, ...]]) -> list[str]:
    names = sections[table[6]]
    entries = range(table[4], table[4] + table[5], SYMBOL.size)
    return [text_at(cubin, names, SYMBOL.unpack_from(cubin, at)[0]) for at in entries]


def text_at(cubin: bytes, names: tuple[int, ...], offset: int) -> str:
    start = names[4] + offset
    return cubin[start : cubin.index(b"\0", start)].decode()


def attributes_of(notes: bytes) -> list[tuple[int, int, int]]:
    """(attribute, symbol, value) of those that are asked for here."""
    found, at = [], 0
    while at + 4 <= len(notes):
        form, attribute, size = struct.unpack_from("<2BH", notes, at)
        if form == SIZED and attribute in (FRAME_SIZE, REGISTER_COUNT):
            found.append((attribute, *struct.unpack_from("<2I", notes, at + 4)))
        at += 4 + (size if form == SIZED else 0)
    return found
