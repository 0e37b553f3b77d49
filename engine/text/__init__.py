"""Text in, text out: tokenizers, chat templates, incremental detokenization."""
