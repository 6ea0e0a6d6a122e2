"""Whether a run's settings go together and fit a world size, and the layout that comes of them.

Pure: knows values and where they were written, no file and no process. What one setting keeps by itself is in
`sections.py`; a rule that joins several belongs to one of the files in `rules/`.
"""

from collections.abc import Mapping

from gptdist.config.problems import Problem, places_of, raise_problems
from gptdist.config.rules import checkpoints, data, layout, training
from gptdist.config.rules.rule import Rule
from gptdist.config.sections import RunConfig
from gptdist.layout import Layout

RULES: tuple[Rule, ...] = (*data.RULES, *layout.RULES, *training.RULES, *checkpoints.RULES)


def check_run(config: RunConfig, world_size: int, origins: Mapping[str, str] | None = None) -> Layout:
    """The layout of `config` on `world_size` ranks. Raises ConfigError listing every broken rule with its origins."""
    problems = [
        Problem(broken.text, places_of(broken.keys, origins or {}))
        for rule in RULES
        for broken in rule(config, world_size)
    ]
    raise_problems(problems, f"this run on {world_size} ranks")
    parallel = config.parallel
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence,
        zero_stage=parallel.zero_stage,
    )
