"""One network pruned in many ways at one training budget."""
