"""ConfigJson: TypedKeys of a Hugging Face model's config.json, and of the tables inside it.

Real configs carry dozens of keys that say nothing about the arithmetic; they are listed here. Any other key that a family
did not read is refused by name.
"""

from collections.abc import Mapping

from engine.errors import UnsupportedModel
from engine.model.families.typed_keys import TypedKeys

__all__ = ["ConfigJson", "ConfigTable"]

FOR_TRAINING = frozenset({
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "dropout",
    "initializer_range", "router_aux_loss_coef", "output_router_logits", "neftune_noise_alpha", "max_sequence_length",
    "gradient_checkpointing", "classifier_dropout", "ep_size", "problem_type", "finetuning_task", "task_specific_params",
})  # fmt: skip
FOR_PROGRAMS = frozenset({
    "architectures", "model_type", "name_or_path", "auto_map", "transformers_version", "torch_dtype",
    "dtype", "torchscript", "use_cache", "use_bfloat16", "return_dict", "return_dict_in_generate", "output_attentions",
    "output_hidden_states", "output_scores", "tokenizer_class", "tf_legacy_loss", "attn_implementation",
    "use_flash_attn", "is_llama_config", "transformers.js_config",
    "unsloth_fixed", "unsloth_version", "model_max_length", "cache_implementation", "keys_to_ignore_at_inference",
    "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "prefix", "license", "model_name", "base_model",
})  # fmt: skip
FOR_TEXT = frozenset({                     # tokens, and how to sample them: generation_config.json has replaced it
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "cls_token_id", "mask_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "suppress_tokens",
    "bad_words_ids", "do_sample", "temperature", "top_k", "top_p", "typical_p", "min_length", "max_length", "num_beams",
    "num_beam_groups", "diversity_penalty", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "num_return_sequences", "early_stopping", "remove_invalid_values",
    "exponential_decay_length_penalty", "max_new_tokens",
})  # fmt: skip
# What transformers' classes would have to say for the model to be another one, and the values that say nothing
PLAIN: dict[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "pretraining_tp": (1,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
}


class ConfigJson(TypedKeys):
    """One config.json, already parsed; `model` is the architecture that it states."""

    cure = "download config.json again, or correct it"
    harmless = FOR_TRAINING | FOR_PROGRAMS | FOR_TEXT

    def __init__(self, values: Mapping[str, object], file: str, prefix: str = "") -> None:
        super().__init__(values, file, prefix)
        self._tables: list[ConfigTable] = []

    def table(self, key: str) -> "ConfigTable":
        """The table under `key`, empty if there is none."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.bad(key, value, "a table")
        table = ConfigTable({f"{key}.{inner}": each for inner, each in value.items()}, self.file, f"{key}.", self.model)
        self._tables.append(table)
        return table

    def texts(self, key: str, length: int) -> list[str] | None:
        """A list of `length` texts, or None if there is none."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or not all(isinstance(each, str) for each in value):
            raise self.bad(key, value, f"a list of {length:,} texts")
        return [str(each) for each in value]

    def integers(self, key: str, low: int, high: int) -> list[int]:
        """A list of integers in [low, high], empty if there is none."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(type(each) is int and low <= each <= high for each in value):
            raise self.bad(key, value, f"a list of integers from {low:,} to {high:,}")
        return value

    def refuse_unread(self) -> None:
        """Raises UnsupportedModel for a key of it or of its tables that would be left out."""
        if self.has("quantization_config") or self.has("compression_config"):
            raise UnsupportedModel(
                f"{self.file}: its weights are quantized (quantization_config), which Rillet reads from GGUF files only: "
                "take the model as it was before, or a .gguf of it"
            )
        for key, values in PLAIN.items():
            self.must_be(key, *values)
        super().refuse_unread()

    def unread(self) -> list[str]:
        own = [key for key in super().unread() if not key.startswith("_")]     # programs' notes, such as _name_or_path
        return own + [key for table in self._tables for key in table.unread()]


class ConfigTable(TypedKeys):
    """A table in a config.json, such as rope_scaling."""

    cure = ConfigJson.cure

    def numbers(self, key: str, length: int, low: float, high: float) -> tuple[float, ...]:
        """A list of `length` numbers in [low, high], which must be there."""
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) != length or not all(
            type(each) in (int, float) and low <= each <= high for each in value
        ):
            raise self.bad(key, value, f"a list of {length:,} numbers from {low:g} to {high:g}")
        return tuple(float(each) for each in value)
