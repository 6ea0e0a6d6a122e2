"""What is read: corpora, blends and how they are shuffled."""

from collections.abc import Iterator
from itertools import pairwise

from gptdist.config.rules.rule import Broken, Rule
from gptdist.config.sections import BlendPart, DataConfig, RunConfig
from gptdist.config.weights import LARGEST_PERIOD, rounded_weights, whole_weights


def rule_corpus_or_blend(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """A run reads one corpus or a blend of several."""
    data = config.data
    if data.corpus is not None and data.blend is not None:
        text = (
            f"data.corpus ({data.corpus}) and data.blend are both set; a run reads one corpus or a blend. Leave one "
            "out (a file's is undone by data.blend=null or data.corpus=null)."
        )
        yield Broken(text, ("data.corpus", "data.blend"))
    elif data.corpus is None and data.blend is None:
        text = "data.corpus is not set. Set it to a corpus, or data.blend to several: [{corpus: DIR, weight: 1}, ...]."
        yield Broken(text, ("data.corpus", "data.blend"))


def rule_blend(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Each blend has corpora, each once, and weights whose turns repeat before long."""
    for key, blend in _blends(config.data):
        if not blend:
            yield Broken(f"{key} is empty. Name at least one corpus: [{{corpus: DIR, weight: 1}}].", (key,))
            continue
        names = [part.corpus for part in blend]
        for number, name in enumerate(names):
            if name in names[:number]:
                first = f"{key}[{names.index(name)}].corpus"
                again = f"{key}[{number}].corpus"
                text = f"{again} names {name} a second time; the first is {first}. Add their weights up in one."
                yield Broken(text, (again, first))
        weights = [part.weight for part in blend]
        period = sum(whole_weights(weights))
        if period > LARGEST_PERIOD:
            near = ", ".join(map(str, rounded_weights(weights)))
            text = (
                f"The weights of {key} ({', '.join(f'{weight:g}' for weight in weights)}) repeat only after {period:,} "
                f"samples, the sum of the smallest whole numbers in their proportions; it can be at most "
                f"{LARGEST_PERIOD:,}. Use rounder ones: {near}."
            )
            yield Broken(text, (key, *(f"{key}[{number}].weight" for number in range(len(blend)))))


def rule_phases(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Phases replace a blend, each later than the one before."""
    data = config.data
    if data.phases and data.blend is None:
        text = (
            "data.phases replace data.blend, which is not set. Write the corpus of the first phase as a blend: "
            f"data.blend: [{{corpus: {data.corpus or 'DIR'}, weight: 1}}]."
        )
        yield Broken(text, ("data.phases", "data.corpus"))
    for number, (earlier, later) in enumerate(pairwise(data.phases), 1):
        if later.from_sample <= earlier.from_sample:
            key = f"data.phases[{number}].from_sample"
            text = (
                f"{key} ({later.from_sample}) is not above that of the phase before it ({earlier.from_sample}). Put "
                f"the phases in their order; this one can begin at {earlier.from_sample + 1} or later."
            )
            yield Broken(text, (key, f"data.phases[{number - 1}].from_sample"))


def rule_local_shuffle(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Blocks belong to the local shuffle."""
    data, defaults = config.data, DataConfig()
    if data.shuffle == "local":
        return
    for key in ("shuffle_blocks", "shuffle_block_tokens"):
        value, default = getattr(data, key), getattr(defaults, key)
        if value != default:
            text = (
                f"data.{key} ({value}) is about blocks, and data.shuffle is {data.shuffle}, which has none. Set "
                f"data.shuffle: local, or leave data.{key} out."
            )
            yield Broken(text, (f"data.{key}", "data.shuffle"))


RULES: tuple[Rule, ...] = (
    rule_corpus_or_blend,
    rule_blend,
    rule_phases,
    rule_local_shuffle,
)


def _blends(data: DataConfig) -> Iterator[tuple[str, tuple[BlendPart, ...]]]:
    """Every blend and where it is set."""
    if data.blend is not None:
        yield "data.blend", data.blend
    for number, phase in enumerate(data.phases):
        yield f"data.phases[{number}].blend", phase.blend
