"""load: from a config to everything that exists while an engine runs, made whole or not at all.

Engine.__aenter__ calls it. Files are opened on worker threads, everything that touches a device runs on the device thread;
what model, backend and flags allow together is decided here, before any request.
"""

import logging
from collections.abc import Callable
from functools import partial

import anyio
import anyio.to_thread
from anyio.lowlevel import current_token

from engine.backend import Backend, LoadOptions, Progress, create_backend
from engine.config import EngineConfig, read_chat_template
from engine.core import Core, DeviceThread, loop_caller
from engine.errors import ConfigError, UnsupportedModel
from engine.metrics import Metrics
from engine.model.spec import ModelSpec
from engine.model_facts import ModelFacts, model_facts
from engine.pages import PagePool
from engine.prompts import PromptReader
from engine.scheduler import Limits, Scheduler
from engine.text.dialects import Dialect, choose_dialect
from engine.text.grammars import Grammars
from engine.text.template import ChatTemplate
from engine.weights.checkpoint import Checkpoint
from engine.weights.open_model import open_model

__all__ = ["Running", "load"]

DECODING_SHARE = 8                                       # a step that also decodes takes 1 / 8 of its tokens from prompts
log = logging.getLogger("rillet")


class Running:
    """What exists only while an engine runs."""

    def __init__(
        self, checkpoint: Checkpoint, backend: Backend, device: DeviceThread, scheduler: Scheduler, core: Core,
        prompts: PromptReader, template_source: str | None, dialect: Dialect, facts: ModelFacts,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.backend = backend
        self.device = device
        self.scheduler = scheduler
        self.core = core
        self.prompts = prompts
        self.template_source = template_source           # None: it has no chat template
        self.dialect = dialect
        self.facts = facts
        self.grammars = Grammars(checkpoint.tokenizer, checkpoint.spec.vocabulary_size, checkpoint.end_ids)
        self.on_loop = loop_caller()
        self.token = current_token()
        self.scope = anyio.CancelScope()                 # of the loop


async def load(
    config: EngineConfig, metrics: Metrics, report: Progress, check: Callable[[], None], *, backend: Backend | None,
    checkpoint: Checkpoint | None,
) -> Running:  # fmt: skip
    """Open the model and the backend, or take those given, and load the one into the other.

    report is called from the device thread while the backend loads, check at the end; what they raise ends loading. Raises
    ConfigError, ModelError, BackendError; then the backend, and a checkpoint that was opened here, are closed as soon as the
    device thread is free.
    """
    device = DeviceThread()
    opened: Checkpoint | None = None
    try:
        if config.isq is not None:
            message = f"--isq {config.isq}: quantizing while loading is not built yet"
            raise ConfigError(f"{message}: use a GGUF file that is quantized already")
        if checkpoint is None:
            checkpoint = opened = await anyio.to_thread.run_sync(open_model, config)
        override = await anyio.to_thread.run_sync(read_chat_template, config)
        template = _template(checkpoint, override)
        if backend is None:
            backend = await device.call(create_backend, config.backend)
        running = await _fill(config, metrics, report, device, backend, checkpoint, template)
        check()
    except BaseException:
        device.stop_after(partial(_close, backend, opened))
        raise
    _close(None, opened)                                 # the backend has its weights
    return running


def _close(backend: Backend | None, checkpoint: Checkpoint | None) -> None:
    try:
        if backend is not None:
            backend.close()
    finally:
        if checkpoint is not None:
            checkpoint.close()


async def _fill(
    config: EngineConfig, metrics: Metrics, report: Progress, device: DeviceThread, backend: Backend, checkpoint: Checkpoint,
    template: ChatTemplate | None,
) -> Running:  # fmt: skip
    """The weights into the backend, pages beside them, and the core above both."""
    info, spec = backend.info, checkpoint.spec
    if config.fp8_kvcache and "fp8_kvcache" not in info.supports:
        raise ConfigError(f"the {info.name} backend has no 8-bit KV cache: leave --fp8-kvcache away")
    context_length = _context_length(config, spec)
    max_num_seqs = config.max_num_seqs or info.max_num_seqs
    max_batch_tokens = config.max_batch_tokens or info.max_batch_tokens
    if max_num_seqs > min(info.max_places, max_batch_tokens):
        raise ConfigError(
            f"max_num_seqs is {max_num_seqs}, but a step of the {info.name} backend has at most "
            f"{min(info.max_places, max_batch_tokens)} rows: lower it, or raise --max-batch-tokens"
        )
    if max_batch_tokens > info.max_batch_tokens:
        raise ConfigError(f"max_batch_tokens is {max_batch_tokens}, {info.name} takes at most {info.max_batch_tokens}")
    options = LoadOptions(
        dtype=config.dtype, threads=config.threads, device_ids=config.device_ids, kv_fraction=config.kv_fraction,
        fp8_kvcache=config.fp8_kvcache, context_length=context_length, max_num_seqs=max_num_seqs,
        checkpoint=str(checkpoint.path.absolute()),
    )  # fmt: skip
    await device.call(backend.load, spec.at_context(context_length), checkpoint.tensors, options, report)
    pages = await device.call(backend.allocate_cache, config.kv_bytes)
    pool_tokens = pages * info.page_tokens
    bounded = pool_tokens < context_length
    if bounded:
        level = logging.INFO if config.max_model_len is None else logging.WARNING
        log.log(level, "the KV cache holds %d tokens, less than the context length of %d", pool_tokens, context_length)
    context_length = min(context_length, pool_tokens)
    limits = Limits(
        max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, max_places=info.max_places,
        context_length=context_length, beside_decoding=max(info.page_tokens, max_batch_tokens // DECODING_SHARE),
    )  # fmt: skip
    scheduler = Scheduler(PagePool(pages, info.page_tokens), limits)
    core = Core(backend, device, scheduler, metrics, most=config.max_waiting, lookahead=config.lookahead)
    prompts = PromptReader(checkpoint, template, context_length, bounded_by_cache=bounded)
    log.info(
        "%s runs on %s: %.0f MB of weights, a KV cache of %d tokens, a context of %d, at most %d sequences at a time",
        checkpoint.name, info.device, backend.memory().weights_bytes / 1e6, pool_tokens, context_length, max_num_seqs,
    )  # fmt: skip
    source = None if template is None else template.tools_source
    dialect = choose_dialect(source, tools=config.tool_call_parser, reasoning=config.reasoning_parser)
    return Running(checkpoint, backend, device, scheduler, core, prompts, source, dialect, model_facts(checkpoint))


def _template(checkpoint: Checkpoint, override: str | None) -> ChatTemplate | None:
    if override is None:
        return checkpoint.template
    tokenizer = checkpoint.tokenizer
    bos = tokenizer.token_text(tokenizer.bos_id) if tokenizer.bos_id is not None else ""
    return ChatTemplate(override, bos_token=bos, eos_token="")


def _context_length(config: EngineConfig, spec: ModelSpec) -> int:
    wanted = config.max_model_len
    if wanted is not None and wanted > spec.context_length:
        raise ConfigError(
            f"max_model_len is {wanted:,}, the model was made for {spec.context_length:,}: lower --max-model-len"
        )
    if spec.vocabulary_size < 2:
        raise UnsupportedModel(f"a vocabulary of {spec.vocabulary_size} cannot be sampled")
    return wanted or spec.context_length
