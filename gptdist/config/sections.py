"""The sections of a run's config: what can be set, its type, its unit and its default.

Only fields and the rules that one field keeps by itself; rules that join fields or sections are in `check.py`, and
reading YAML is in `load.py`. A part of the system is handed its own section, never the whole.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gptdist.config.units import ByteSize, Duration, SaveInterval

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, strict about unknown keys; a number is finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The network. `gptdist.model.parameters` counts its parameters without building it."""

    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_heads: PositiveInt = 12
    num_kv_heads: PositiveInt | None = Field(None, description="Key/value heads; null: as many as num_heads.")
    ffn_hidden_size: PositiveInt | None = Field(None, description="Width of the MLP; null: 4 x hidden_size.")
    vocab_size: PositiveInt = Field(50257, description="Ids the model knows; at least the corpus's.")
    sequence_length: PositiveInt = Field(1024, description="Tokens of context.")
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: PositiveFloat = 1e-5
    position: Literal["learned", "rotary"] = "learned"
    rotary_base: PositiveFloat = 10000.0
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu_tanh"
    bias: bool = Field(True, description="Biases on the linear layers.")
    tie_embeddings: bool = Field(True, description="Output weight = word embedding.")
    dropout: Probability = Field(0.0, description="After the embedding and on both residual branches.")
    attention_dropout: Probability = 0.0
    init_std: PositiveFloat = 0.02

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


class BlendPart(Section):
    """One corpus of a blend."""

    corpus: str = Field(description="Folder or URL of the corpus.")
    weight: PositiveFloat = Field(description="Its share of the samples, relative to the other weights.")


class BlendPhase(Section):
    """Another blend from some sample on."""

    from_sample: PositiveInt = Field(description="First sample of the phase, counted from 0.")
    blend: tuple[BlendPart, ...]


class DataConfig(Section):
    """Which text, in which order."""

    corpus: str | None = Field(
        None, description="Folder that `gptdist data build` made, relative to the current folder, or its URL."
    )
    blend: tuple[BlendPart, ...] | None = Field(None, description="Instead of data.corpus: several, by weight.")
    phases: tuple[BlendPhase, ...] = Field((), description="Blends that replace data.blend from a sample on.")
    seed: NonNegativeInt = Field(1234, description="Key of the order of samples.")
    shuffle: Literal["global", "local"] = Field(
        "global", description="global: any window may follow any; local: blocks of neighbours, for object storage."
    )
    shuffle_blocks: PositiveInt = Field(16, description="Local shuffle: blocks whose windows are mixed at a time.")
    shuffle_block_tokens: PositiveInt | None = Field(
        None, description="Local shuffle: tokens of a block; null: those of a mean shard."
    )
    mask_documents: bool = Field(
        False, description="Attention and positions stop at the ends of documents; the loss counts every token."
    )
    prefetch: PositiveInt = Field(4, description="Global batches read ahead.")
    verify: bool = Field(True, description="Check each chunk of a shard against its digest the first time it is read.")
    cache_dir: str | None = Field(
        None, description="Folder on the node's own disk for shards behind a URL; null: in the temporary folder."
    )
    cache_size: ByteSize = Field(32 << 30, description="Room the cache may take on a node.")
    fetch_attempts: PositiveInt = Field(6, description="Tries to fetch a shard, each after a longer wait.")
    max_unreadable_shards: NonNegativeInt = Field(
        0, description="Shards that may stay unreadable, their windows replaced; one more ends the run."
    )


class ParallelConfig(Section):
    """How the model is spread. Data parallel is what is left of the world size."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = Field(1, description="Model chunks a pipeline stage holds (interleaved 1F1B).")
    sequence: bool = Field(False, description="Megatron's sequence parallel; needs tensor > 1.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload_optimizer: bool = Field(False, description="Optimizer state and step on the CPU (ZeRO 1 to 3).")


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019). Biases and norms are not decayed."""

    learning_rate: PositiveFloat = Field(3e-4, description="Peak.")
    beta1: Probability = 0.9
    beta2: Probability = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: NonNegativeFloat = Field(1.0, description="Global gradient norm to clip to; 0: no clipping.")


class BatchRamp(Section):
    """Global batch size grows from `start` by `increment` over the first `samples` samples."""

    start: PositiveInt
    increment: PositiveInt
    samples: PositiveInt


class ScheduleConfig(Section):
    """Learning rate by step."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = Field(None, description="Step at which the decay ends; null: train.steps.")
    min_learning_rate: NonNegativeFloat = 0.0
    wsd_decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="Last part of a WSD run: decay.")
    batch_ramp: BatchRamp | None = None


class TrainConfig(Section):
    """The loop."""

    steps: PositiveInt = 1000
    stop_after: PositiveInt | None = Field(
        None, description="Save and stop, resumable (exit 75), after this step; schedules still span train.steps."
    )
    global_batch_size: PositiveInt = Field(8, description="Samples (sequences) an optimizer step consumes.")
    micro_batch_size: PositiveInt = Field(1, description="Samples one forward pass of one data rank takes.")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    seed: NonNegativeInt = Field(1234, description="Key of initial weights and dropout.")
    eval_interval: NonNegativeInt = Field(200, description="Steps between evaluations; 0: only at the end.")
    eval_samples: PositiveInt = Field(64, description="Held-out windows per evaluation, at most what there is.")
    max_skipped_steps: PositiveInt = Field(10, description="Non-finite steps in a row that end the run with exit 1.")
    spike_action: Literal["off", "note", "rollback"] = Field(
        "note",
        description="After a loss spike: note it, or go back to a checkpoint before it and pass over its samples.",
    )
    spike_factor: PositiveFloat = Field(
        6.0, description="Robust deviations of loss or gradient norm above their medians that make a step suspect."
    )
    spike_window: Annotated[int, Field(ge=8)] = Field(128, description="Steps that say what is usual.")
    spike_lead: NonNegativeInt = Field(8, description="Steps before the first suspect one that are suspect as well.")
    max_rollbacks: NonNegativeInt = Field(3, description="Rollbacks of a run; at one more spike it ends with exit 93.")
    loss_scale: PositiveInt = Field(65536, description="First fp16 loss scale, a power of two.")
    loss_scale_window: PositiveInt = Field(1000, description="Good steps before the fp16 loss scale doubles.")


class CheckpointConfig(Section):
    """When to save, what to keep, and where. `docs/checkpoints.md` explains."""

    dir: str | None = Field(None, description="Folder of checkpoints; null: launch.run_dir/checkpoints.")
    interval: SaveInterval = Field(
        500, description="Steps between saves; 0: only at the end; auto: as often as the time a save takes is worth."
    )
    interval_minutes: PositiveFloat | None = Field(
        None, description="Also save when this long has passed since the last save began."
    )
    node_mtbf: Duration = Field(100 * 86400.0, description="Of interval auto: mean time between failures of one node.")
    keep: PositiveInt = Field(3, description="Newest checkpoints kept.")
    start_from: str | None = Field(
        None,
        description="A run, a folder of checkpoints or one of them, relative to the current folder, whose weights a "
        "new run begins with; step, optimizer and data begin anew.",
    )
    allow_precision_change: bool = Field(
        False, description="Resume under another train.precision than the checkpoint was saved with."
    )
    keep_every: NonNegativeInt = Field(
        0, description="Checkpoints of steps that this divides are kept for ever; 0: none."
    )
    keep_best: NonNegativeInt = Field(
        0, description="Checkpoints of the lowest evaluation loss that are kept; 0: none."
    )
    background: bool = Field(True, description="Write while training goes on, from a copy in host memory.")
    read_back: bool = Field(
        True, description="Read and hash each checkpoint once it is saved, and mark it as verified."
    )
    max_failed_saves: NonNegativeInt = Field(0, description="Saves in a row that may fail; one more ends the run.")
    staging_dir: str | None = Field(
        None, description="Folder on each node's own disk, to write to first; null: straight to checkpoint.dir."
    )
    upload: str | None = Field(None, description="URL of a folder that finished checkpoints are copied to.")
    trust_others: bool = Field(False, description="Also load what other users own or could have changed.")


class MonitorConfig(Section):
    """What is shown, how often."""

    log_interval: PositiveInt = 10
    tensorboard: bool = True
    wandb_project: str | None = Field(None, description="Also log to Weights & Biases (extra `wandb`).")
    sample_interval: NonNegativeInt = Field(0, description="Steps between samples of generated text; 0: none.")
    sample_prompt: str = "The"
    sample_tokens: PositiveInt = 64
    progress: bool = Field(True, description="A progress bar, where the console is a terminal.")
    peak_tflops: PositiveFloat | None = Field(None, description="Peak of one device, for MFU; null: by device name.")


class LaunchConfig(Section):
    """Where a run lives and how its ranks meet."""

    run_dir: str = Field("runs/default", description="Folder of the run: checkpoints, logs, TensorBoard.")
    timeout: Duration = Field(600.0, description="A collective that waits longer fails the run.")
    port: NonNegativeInt = Field(0, description="Port of the rendezvous; 0: a free one.")
    restart: bool = Field(True, description="After a failure, start all ranks again from the newest checkpoint.")
    hang_timeout: Duration | None = Field(
        None, description="Ranks that stand still in a step for so long hang; null: learned from steps, at least 60s."
    )
    slow_factor: Annotated[float, Field(gt=1)] = Field(
        2.0, description="A rank whose own part of a step takes so many times as long as its peers' is named as slow."
    )
    preflight: bool = Field(
        True, description="Before the first step, look at nodes, links, clocks, folders and versions."
    )
    min_nodes: PositiveInt | None = Field(
        None,
        description="Fewest nodes to run on, in a layout that fits what there is; null: only in the config's own.",
    )


class RunConfig(Section):
    """A complete run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
