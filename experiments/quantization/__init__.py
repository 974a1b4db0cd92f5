"""Networks trained to be quantized."""
