"""The one optimizer step: Megatron-core runs the micro-batches, DeepSpeed owns the optimizer state."""

import warnings

# Both libraries warn at import of every accelerator package that is absent; what is absent, `gptdist doctor` says.
warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|deepspeed)\.")
# DeepSpeed calls collectives by names that newer torch has renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
