"""Networks in few bits: a pretrained encoder quantized in many ways, and small ones trained for it."""
