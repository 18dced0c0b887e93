"""The gated residual of an adapted MLP and the statistics that NA-LoRA takes from it."""
