"""Tokenizer: the one face of a vocabulary, whatever file it came from. Text <-> token ids <-> exact bytes.

The engine encodes prompts with it on worker threads; the detokenizer and the tools read `pieces`. It holds no state that
a call changes, and it knows no model and no template.
"""

from collections.abc import Iterable
from functools import cached_property

from tokenizers import Tokenizer as TokenizerBackend

from engine.errors import InvalidRequest

__all__ = ["Tokenizer"]


class Tokenizer:
    """A vocabulary of `vocabulary_size` ids.

    pieces: the exact bytes that each id writes (a special token's own text; b"" for padding). special_ids: markers that
    are not shown. end_ids: tokens that end a turn. bos_id, eos_id: None where the model has no such token.
    longest_piece: bytes that one token can stand for at most, so that a text's tokens can be bounded before encoding it.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        *,
        pieces: tuple[bytes, ...],
        special_ids: frozenset[int],
        bos_id: int | None,
        eos_id: int | None,
        end_ids: frozenset[int],
        add_bos: bool,
        add_eos: bool,
    ) -> None:
        self.backend = backend
        self.pieces = pieces
        self.vocabulary_size = len(pieces)
        self.longest_piece = max(map(len, pieces), default=0)
        self.special_ids = special_ids
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.end_ids = end_ids
        self._prefix = bos_id if add_bos else None
        self._suffix = eos_id if add_eos else None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of `text`; special tokens that are written in it are themselves. Safe from any thread.

        add_special: a begin token is put before it (and an end token behind) if the model wants one and the text does
        not have it already, as a rendered template often does. Half surrogates become U+FFFD.
        """
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):                # text from a lax JSON parser: "\ud83d" alone
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:                         # the split's regular expression gives up on a huge word
            if type(error).__name__ != "PanicException":
                raise
            raise InvalidRequest("the text has a word or a run of spaces too long to tokenize: break it up") from None
        if not add_special:
            return ids
        if self._prefix is not None and ids[:1] != [self._prefix]:
            ids.insert(0, self._prefix)
        if self._suffix is not None and ids[-1:] != [self._suffix]:
            ids.append(self._suffix)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, bytes that are no UTF-8 as U+FFFD; without the special tokens unless asked for."""
        pieces, hidden = self.pieces, self.special_ids if skip_special else frozenset()
        return b"".join([pieces[token] for token in ids if token not in hidden]).decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """One id's text, special or not; U+FFFD for bytes that are no character alone."""
        return self.pieces[token].decode("utf-8", "replace")

    @cached_property
    def shown_texts(self) -> tuple[str | None, ...]:
        """For the detokenizer: each id's text with special tokens hidden; None where it is no UTF-8 alone."""
        special = self.special_ids
        return tuple("" if token in special else text for token, text in enumerate(self.all_texts))

    @cached_property
    def all_texts(self) -> tuple[str | None, ...]:
        """Each id's text; None where it is no UTF-8 alone."""
        return tuple(_text_or_none(piece) for piece in self.pieces)


def _text_or_none(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
