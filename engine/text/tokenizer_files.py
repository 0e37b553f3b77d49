"""A model folder's own tokenizer files -> Tokenizer and ChatTemplate: tokenizer.json or tokenizer.model, and their settings.

checkpoint.py calls read_folder_tokenizer() and read_folder_template() for a folder of safetensors. tokenizer.json goes
before tokenizer.model, chat_template.jinja before tokenizer_config.json. Files are read whole, so each has a bound.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken

from engine.errors import BadModelFile, ModelNotFound
from engine.text.end_tokens import END_MARKERS, end_tokens
from engine.text.gguf_values import CONTROL, UNUSED, USER_DEFINED
from engine.text.sentencepiece import Piece, sentencepiece_tokenizer
from engine.text.sentencepiece_model import read_sentencepiece_model
from engine.text.template import MAX_SOURCE_CHARACTERS, ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_json import read_tokenizer_json
from engine.text.tokenizer_settings import AddedPiece, TokenizerSettings, read_bytes, read_settings, read_text

__all__ = ["read_folder_template", "read_folder_tokenizer"]

CURE = "download the file again"
MAX_TOKENIZER_BYTES = 64 << 20             # a vocabulary of 256k tokens with its merges takes 33 MB
MAX_ALL_PIECES_BYTES = 64 << 20            # of all tokens together, after the decoder's replacements
MAX_TEMPLATE_BYTES = 4 * MAX_SOURCE_CHARACTERS


def read_folder_tokenizer(folder: Path, rows: int, end_ids: frozenset[int]) -> Tokenizer:
    """The tokenizer of the model in `folder`.

    rows: of the embedding; ids that the vocabulary does not have write nothing. end_ids: those that the model's
    configuration names; the tokenizer's own end token and well-known end markers are added.
    Raises BadModelFile, ModelNotFound (no tokenizer file), UnsupportedModel.
    """
    settings = read_settings(folder)
    end_ids = frozenset(token for token in end_ids if 0 <= token < rows)
    if (path := folder / "tokenizer.json").is_file():
        return _from_json(path, settings, rows, end_ids)
    if (path := folder / "tokenizer.model").is_file():
        return _from_sentencepiece(path, settings, rows, end_ids)
    raise ModelNotFound(f"{folder}: it has neither tokenizer.json nor tokenizer.model: download the model's other files too")


def read_folder_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of the model in `folder`, None if it has none. Raises BadModelFile."""
    if (path := folder / "chat_template.jinja").is_file():
        sources = {"default": read_text(path, MAX_TEMPLATE_BYTES)}
        if (tools := folder / "additional_chat_templates" / "tool_use.jinja").is_file():
            sources["tool_use"] = read_text(tools, MAX_TEMPLATE_BYTES)
    else:
        path = folder / "tokenizer_config.json"
        sources = _configured_templates(read_settings(folder).chat_template, str(path))
    if "default" not in sources:
        return None
    bos, eos = ("" if token is None else tokenizer.token_text(token) for token in (tokenizer.bos_id, tokenizer.eos_id))
    return ChatTemplate(
        sources["default"], bos_token=bos, eos_token=eos, file=str(path), tools_source=sources.get("tool_use")
    )


def _configured_templates(value: object, file: str) -> dict[str, str]:
    """A text is the default; a list holds templates by name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    sources: dict[str, str] = {}
    for each in value if isinstance(value, list) else [value]:
        match each:
            case {"name": str(name), "template": str(source)}:
                sources[name] = source
            case _:
                raise BadModelFile(f"its chat_template is neither a text nor a list of named ones: {CURE}", file=file)
    return sources


def _from_json(path: Path, settings: TokenizerSettings, rows: int, end_ids: frozenset[int]) -> Tokenizer:
    file = str(path)
    read = read_tokenizer_json(read_text(path, MAX_TOKENIZER_BYTES), file)
    ids = read.ids
    if not ids or len(set(ids.values())) != len(ids):
        raise BadModelFile(f"it has no tokens, or two with one id: {CURE}", file=file)
    if (last := max([*ids.values(), *read.prefix, *read.suffix])) >= rows:
        raise BadModelFile(f"it has ids up to {last:,}, the embedding has {rows:,} rows: {CURE}", file=file)
    special = {text for text in settings.special | END_MARKERS if text in ids}
    unmarked = sorted(text for text in special if ids[text] not in read.added)
    read.backend.add_special_tokens([AddedToken(text, normalized=False) for text in unmarked])
    special |= {text for text in ids if ids[text] in read.special}
    pieces = [b""] * rows
    total = 0
    for text, token in ids.items():
        pieces[token] = text.encode("utf-8", "replace") if text in special else read.piece(text, token in read.added)
        total += len(pieces[token])
        if total > MAX_ALL_PIECES_BYTES:
            raise BadModelFile(f"its tokens stand for more than {MAX_ALL_PIECES_BYTES:,} bytes: {CURE}", file=file)
    bos, eos = (ids.get(text) if text else None for text in (settings.bos, settings.eos))
    return Tokenizer(
        read.backend,
        pieces=tuple(pieces),
        special_ids=frozenset(ids[text] for text in special),
        bos_id=bos,
        eos_id=eos,
        end_ids=_ends(end_ids, eos, {text: ids[text] for text in special}),
        prefix=read.prefix,
        suffix=read.suffix,
        drops_first_space=read.drops_first_space,
    )


def _from_sentencepiece(path: Path, settings: TokenizerSettings, rows: int, end_ids: frozenset[int]) -> Tokenizer:
    file = str(path)
    model = read_sentencepiece_model(read_bytes(path, MAX_TOKENIZER_BYTES), file)
    special = settings.special | END_MARKERS
    pieces = [
        Piece(text, score, CONTROL if text in special else kind)
        for text, score, kind in _with_added(model.pieces, settings.added, rows, file)
    ]
    ids = {text: token for token, (text, _, _) in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise BadModelFile(f"it has the same token twice: {CURE}", file=file)
    bos = ids.get(settings.bos, model.bos_id) if settings.bos else model.bos_id
    eos = ids.get(settings.eos, model.eos_id) if settings.eos else model.eos_id
    return sentencepiece_tokenizer(
        pieces,
        file=file,
        rows=rows,
        unknown_id=model.unknown_id,
        bos_id=bos,
        eos_id=eos,
        end_ids=_ends(end_ids, eos, {text: token for text, token in ids.items() if pieces[token].kind == CONTROL}),
        prefix=(bos,) if settings.adds_bos and bos is not None else (),
        suffix=(eos,) if settings.adds_eos and eos is not None else (),
        space_prefix=model.space_prefix and settings.space_prefix,
        squeeze_spaces=model.squeeze_spaces,
        unigram=model.unigram,
    )


def _with_added(pieces: Sequence[Piece], added: Sequence[AddedPiece], rows: int, file: str) -> list[Piece]:
    """The model's pieces and what only the settings know: tokens behind them, and names for its placeholders."""
    table = list(pieces)
    places = {piece.text: token for token, piece in enumerate(table)}
    for token in added:
        if token.id < rows and places.setdefault(token.text, token.id) == token.id:
            table += [Piece(f"[EMPTY_{place}]", 0.0, UNUSED) for place in range(len(table), token.id + 1)]
            table[token.id] = Piece(token.text, table[token.id].score, CONTROL if token.special else USER_DEFINED)
    if len(table) > rows:
        raise BadModelFile(f"it has {len(table):,} tokens, the embedding has {rows:,} rows: {CURE}", file=file)
    return table


def _ends(given: frozenset[int], eos: int | None, special: Mapping[str, int]) -> frozenset[int]:
    return given | end_tokens(special) | ({eos} if eos is not None else frozenset())
