"""The byte-level alphabet of GPT-2's tokenizer: every byte has one printable character, so that a vocabulary is text.

Printable Latin-1 characters stand for themselves; the other 68 bytes take the characters from U+0100 on, in order.
"""

__all__ = ["BYTE_TO_CHARACTER", "spelled_bytes"]

_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_TO_CHARACTER: dict[int, str] = {byte: chr(byte) for byte in sorted(_PRINTABLE)} | {
    byte: chr(0x100 + place) for place, byte in enumerate(_OTHERS)
}
# Latin-1 then turns a translated text into its bytes in one pass of C.
_TO_LATIN1 = {ord(character): byte for byte, character in BYTE_TO_CHARACTER.items()}
_UNSPELLED = {code: 0x2603 for code in range(256) if chr(code) not in BYTE_TO_CHARACTER.values()}   # any non-Latin-1 one
_TABLE = _UNSPELLED | _TO_LATIN1


def spelled_bytes(token: str) -> bytes:
    """The bytes that a vocabulary entry spells; an entry that is not in the alphabet stands for its own UTF-8."""
    try:
        return token.translate(_TABLE).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")
