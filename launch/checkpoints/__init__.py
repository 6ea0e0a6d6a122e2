"""`gptdist ckpt`: checkpoints listed, verified, compared, rewritten and copied."""
