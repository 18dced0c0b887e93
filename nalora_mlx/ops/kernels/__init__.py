"""The gated residual of an adapted MLP, h = phi(z) u, and the statistics that NA-LoRA takes from it.

`gated_residual` is the operation. It runs as a Metal or CUDA kernel (`fused`) or as MLX operations (`reference`).
`backend` chooses one, `selfcheck` compares them, and `healthcheck` does so for `nalora doctor`.
"""
