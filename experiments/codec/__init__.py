"""Whole files of networks that nobody trains again, beside those of NNCodec (ISO/IEC 15938-17)."""
