"""Methods that choose masks, the patterns a mask must follow, and how many entries stay."""
