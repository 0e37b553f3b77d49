"""model_card(): what a checkpoint is, in words and numbers; the text of `rillet show`.

It reads the spec, the tensors' headers, the tokenizer and the template; no weight is looked at. Numbers of memory are exact
for what is stored; what a backend makes of it is its own affair.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.model.spec import (
    Attention,
    Dense,
    FeedForward,
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Mixture,
    ModelSpec,
    Rope,
    YarnScaling,
)
from engine.weights.checkpoint import Checkpoint

__all__ = ["columns", "kv_cache_bytes", "model_card", "size_text"]

CONTEXTS = (2048, 8192, 32768)
KV_ELEMENT_BYTES = 4                                     # on the cpu backend; others may take 2
TEMPLATE_LINES = 6
TEMPLATE_WIDTH = 100


def model_card(checkpoint: Checkpoint) -> str:
    """Several lines without a newline at the end. What a file says is not cleaned of control characters: the caller does."""
    spec = checkpoint.spec
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    weights = 0
    files = set()
    for name in checkpoint.tensors.names():
        tensor = checkpoint.tensors.tensor(name)
        counts[tensor.storage.name] += 1
        sizes[tensor.storage.name] += tensor.data.nbytes
        weights += tensor.rows * tensor.shape[-1]
        files.add(tensor.file)
    facts = [
        ("name", checkpoint.name),
        ("path", str(checkpoint.path)),
        ("files", f"{len(files)} with weights, {size_text(sum(Path(file).stat().st_size for file in files))}"),
        ("family", spec.family),
        *_architecture(spec),
        ("weights", f"{weights:,}, {size_text(sizes.total())} as they are stored; a backend that widens a type takes more"),
        ("end tokens", _tokens(checkpoint, sorted(checkpoint.end_ids))),
        ("sampling", ", ".join(f"{key} {value:g}" for key, value in checkpoint.sampling_defaults.items()) or "no advice"),
    ]
    storage = [(kind, f"{counts[kind]:,}", size_text(sizes[kind])) for kind, _ in sizes.most_common()]
    lines = [
        *columns(facts),
        "",
        *columns([("stored as", "tensors", "bytes"), *storage], right=(1, 2)),
        "",
        *columns([("tokens of context", "KV cache"), *_kv_rows(spec)], right=(0, 1)),
        "",
        *_template(checkpoint),
    ]
    return "\n".join(lines)


def kv_cache_bytes(spec: ModelSpec, tokens: int, element_bytes: int = KV_ELEMENT_BYTES) -> int:
    """Keys and values of `tokens` tokens in all layers: 2 x key/value heads x head size x element_bytes for each layer."""
    numbers = sum(2 * layer.attention.kv_heads * layer.attention.head_size for layer in spec.layers)
    return tokens * numbers * element_bytes


def size_text(count: float) -> str:
    """98300000 -> 98.3 MB, in powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def columns(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of the same length -> lines whose columns stand under each other, two spaces apart; `right`: aligned right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells = [row[at].rjust(widths[at]) if at in right else cell for at, cell in enumerate(cells)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _architecture(spec: ModelSpec) -> list[tuple[str, str]]:
    heads = _each(_heads(layer.attention) for layer in spec.layers)
    feed = _each(_feed_forward(layer.feed_forward) for layer in spec.layers)
    rope = _each(_rope(layer.attention.rope) for layer in spec.layers)
    output = "its output is the embedding" if spec.tied_output else "with an output matrix of its own"
    return [
        ("layers", f"{len(spec.layers)}, hidden size {spec.hidden_size:,}"),
        ("attention", heads),
        ("feed-forward", feed),
        ("rope", rope),
        ("vocabulary", f"{spec.vocabulary_size:,}, {output}"),
        ("context length", f"{spec.context_length:,}"),
    ]


def _each(texts: Iterable[str]) -> str:
    """The one text of all layers, or each different one with the number of its layers."""
    counts = Counter(texts)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{count} layers: {text}" for text, count in counts.items())


def _heads(attention: Attention) -> str:
    shared = "" if attention.kv_heads == attention.heads else f", {attention.kv_heads} for keys and values"
    words = [
        f"{attention.heads} heads of {attention.head_size}{shared}",
        "qkv bias" if attention.qkv_bias else "",
        "q/k norm" if attention.qk_norm else "",
        f"window of {attention.sliding_window:,} tokens" if attention.sliding_window is not None else "",
        f"scores capped at {attention.soft_cap:g}" if attention.soft_cap is not None else "",
    ]
    return ", ".join(word for word in words if word)


def _feed_forward(feed: FeedForward) -> str:
    match feed:
        case Dense(width=width, activation=activation):
            return f"{width:,} wide, {activation}"
        case Mixture():
            shared = "" if feed.shared_width is None else f", a shared one of {feed.shared_width:,}"
            return (
                f"{feed.experts} experts {feed.width:,} wide, {feed.experts_per_token} for each token{shared}, "
                f"{feed.activation}"
            )


def _rope(rope: Rope) -> str:
    pairs = "neighbours" if rope.interleaved else "halves"
    base = f"theta {rope.theta:,g}, {rope.rotary_size} numbers of each head, pairs of {pairs}"
    match rope.scaling:
        case None:
            return base
        case LinearScaling(factor=factor):
            return f"{base}, positions divided by {factor:g}"
        case Llama3Scaling(factor=factor, original_context_length=original):
            return f"{base}, Llama 3 scaling by {factor:g} from {original:,} tokens"
        case YarnScaling(factor=factor, original_context_length=original):
            return f"{base}, YaRN by {factor:g} from {original:,} tokens"
        case FrequencyFactors():
            return f"{base}, a divisor for each frequency"
        case LongRopeScaling(original_context_length=original):
            return f"{base}, LongRoPE beyond {original:,} tokens"


def _kv_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    lengths = sorted({length for length in CONTEXTS if length < spec.context_length} | {spec.context_length})
    return [(f"{length:,}", size_text(kv_cache_bytes(spec, length))) for length in lengths]


def _tokens(checkpoint: Checkpoint, ids: Iterable[int]) -> str:
    texts = [f"{token} {checkpoint.tokenizer.token_text(token)}" for token in ids]
    return ", ".join(texts) or "none: only a limit ends an answer"


def _template(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.template is None:
        return ["chat template: none; a chat needs --chat-template"]
    lines = [line for line in checkpoint.template.source.splitlines() if line.strip()]
    shown = [f"  {line[:TEMPLATE_WIDTH]}{' ...' if len(line) > TEMPLATE_WIDTH else ''}" for line in lines[:TEMPLATE_LINES]]
    more = [f"  ... and {len(lines) - TEMPLATE_LINES} more lines"] if len(lines) > TEMPLATE_LINES else []
    return ["chat template:", *shown, *more]
