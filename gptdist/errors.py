"""The errors gptdist raises on purpose, and the exit code each one stands for.

Knows nothing of torch, files or ranks. Every message says what is wrong, the value, the rule, and what to change.
The exit codes are a contract: 0 done, 2 the user's mistake, 75 stopped early and resumable, 93 do not requeue,
1 anything else.
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_MISTAKE = 2
EXIT_RESUMABLE = 75
EXIT_DO_NOT_REQUEUE = 93


class GptdistError(Exception):
    """Anything gptdist itself decided is wrong. `exit_code` is what the command returns for it."""

    exit_code = EXIT_FAILED


class UserError(GptdistError):
    """The user can mend this: a wrong path, value or combination."""

    exit_code = EXIT_USER_MISTAKE


class ConfigError(UserError):
    """A run config breaks one or more rules; the message lists all of them."""


class LayoutError(ConfigError):
    """The parallel sizes do not fit the model or the world."""


class CorpusError(UserError):
    """A corpus, or the text it is built from, is missing, empty, damaged or of another tokenizer."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class NoGoodCheckpoint(GptdistError):
    """There are checkpoints, but not one of them is good; the message lists them."""


class GenerationError(UserError):
    """Text cannot be generated as asked: a prompt longer than the context, settings that exclude each other."""


class ExchangeError(UserError):
    """A model that another system's format cannot hold, or a folder in such a format that is not understood."""


class LaunchError(UserError):
    """Ranks could not be started or find each other: a port in use, a launcher's environment that does not fit."""


class SlurmRefused(UserError):
    """Slurm does not take a job as it was asked for."""


class SlurmUnavailable(GptdistError):
    """Slurm is not here, or its controller does not answer."""


class NodeUnfit(GptdistError):
    """Machines that a run was given cannot take part in it. `hosts`: to start without next time; empty where it cannot
    be told which."""

    def __init__(self, message: str, hosts: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.hosts = hosts


class StorageError(UserError):
    """A disk is full or a folder cannot be written."""


class RemoteFailed(StorageError):
    """Something behind a URL could not be read or written, however often it was tried."""


class NotConformant(GptdistError):
    """What was exported does not compute what our model computes."""


class RankFailed(GptdistError):
    """A rank of this run ended with an error of its own; the launcher shows the first one."""


class WorkerFailed(GptdistError):
    """A process that worked for a build died or met an error nobody foresaw."""


class TrainingDiverged(GptdistError):
    """Too many steps in a row had a non-finite loss or gradient."""


class TooManySpikes(GptdistError):
    """The loss spiked again after all the rollbacks that a run may make: to start it again as it is would not help."""

    exit_code = EXIT_DO_NOT_REQUEUE
