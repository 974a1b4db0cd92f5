"""Compressing a decoder language model: layer by layer, by statistics of a text, judged by perplexity."""
