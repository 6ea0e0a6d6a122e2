"""What the fork server imports, once: all that a rank or a command may need, which costs seconds a process otherwise.

Importing must start no thread and touch no GPU, because it is forked.
"""

import contextlib
import gc
import importlib
import os

_MODULES = (
    "pytest",
    "gptdist.engine.engine",
    "launch.cli",
    "launch.train",
    "launch.models.generate",
    "launch.models.evaluate",
    "launch.checkpoints.show",
    "launch.corpora.show",
    "launch.corpora.build",
    "launch.corpora.order",
    "tests.dist.cases",
    "tests.dist.commands",
    "tests.dist.ranks",
)
_OPTIONAL = ("s3fs", "transformers")

for _name in _MODULES:
    importlib.import_module(_name)
for _name in _OPTIONAL:
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

LOADED_BY = os.getpid()
# What is imported stays: no collection need look at it again, and the pages that all processes share stay shared.
gc.collect()
gc.freeze()
