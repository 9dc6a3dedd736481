"""Text to token ids and back: tokenizers, published vocabularies, rank files, and other tools' tokenizer files."""
