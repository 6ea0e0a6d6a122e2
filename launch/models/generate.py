"""`gptdist generate`: continue prompts with a trained model, on one rank or split over several."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptdist.errors import EXIT_DONE, GenerationError
from gptdist.world import World

if TYPE_CHECKING:
    from launch.models.trained import Trained

DEFAULT_PROMPT = "The"
STDIN = "-"
DEFAULT_TEMPERATURE = 0.8
_MOST_PROMPT_BYTES = 64 << 20


@dataclass(frozen=True)
class Order:
    """What to generate, as every rank is told."""

    path: Path
    prompts: tuple[str, ...]
    tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    beams: int
    length_penalty: float
    no_repeat: int
    trust_others: bool


def main(args: argparse.Namespace) -> int:
    """Print each prompt with its continuation, token by token as they come."""
    order = _order(args)
    if args.tensor == 1:
        return run_rank(World(), order)
    from launch.ranks.local import launch_local
    from launch.ranks.warm import ENGINES

    return launch_local(args.tensor, run_rank, order, preload=(*ENGINES, "launch.models.trained"))


def run_rank(world: World, order: Order) -> int:
    """One rank of a generation; the first prints."""
    from launch.models.trained import open_trained

    with open_trained(order.path, world, trust_others=order.trust_others) as trained:
        for prompt in order.prompts:
            for piece in _pieces(trained, order, prompt):
                if world.is_first:
                    print(piece, end="", flush=True)
    return EXIT_DONE


def _pieces(trained: "Trained", order: Order, prompt: str) -> Iterator[str]:
    """The prompt, and its continuation as it comes."""
    from gptdist.data.text_stream import TextStream
    from gptdist.model.beam import BeamSettings
    from gptdist.model.sampling import Sampling
    from gptdist.train.sample import continue_text, generate_by_beams

    ids, tokenizer, context = trained.prompt_ids(prompt), trained.tokenizer, trained.config.model.sequence_length
    if len(ids) > context:
        raise GenerationError(
            f"The prompt has {len(ids):,} tokens, and the model's context is {context:,}. Shorten it: its beginning "
            "would count for nothing."
        )
    yield prompt
    text = TextStream(tokenizer, ids)
    if order.beams > 1:
        settings = BeamSettings(order.beams, order.length_penalty, order.no_repeat)
        found = generate_by_beams(
            trained.engine,
            trained.comms,
            ids,
            order.tokens,
            settings,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
        )
        yield "".join(map(text.push, found))
    else:
        sampling = Sampling(order.temperature, order.top_k, order.top_p, order.seed)
        for token in continue_text(
            trained.engine,
            trained.comms,
            ids,
            order.tokens,
            sampling,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
        ):
            yield text.push(token.id)
    yield text.finish() + "\n"


def _order(args: argparse.Namespace) -> Order:
    if args.beams > 1 and (args.temperature is not None or args.top_k is not None or args.top_p is not None):
        raise GenerationError(
            "--beams looks for the likeliest text and draws nothing, so --temperature, --top-k and --top-p mean "
            "nothing to it. Leave them out, or --beams."
        )
    prompts = args.prompt or [DEFAULT_PROMPT]
    if prompts.count(STDIN) > 1:
        raise GenerationError("--prompt - reads standard input, which can be read once. Give it once.")
    return Order(
        path=args.path,
        prompts=tuple(_read_stdin() if prompt == STDIN else prompt for prompt in prompts),
        tokens=args.tokens,
        temperature=DEFAULT_TEMPERATURE if args.temperature is None else args.temperature,
        top_k=args.top_k,
        top_p=1.0 if args.top_p is None else args.top_p,
        seed=args.seed,
        beams=args.beams,
        length_penalty=args.length_penalty,
        no_repeat=args.no_repeat,
        trust_others=args.trust_others,
    )


def _read_stdin() -> str:
    """All of it, without the line's end that a shell puts there."""
    content = sys.stdin.buffer.read(_MOST_PROMPT_BYTES + 1)
    if len(content) > _MOST_PROMPT_BYTES:
        raise GenerationError(f"Standard input has over {_MOST_PROMPT_BYTES >> 20} MiB, more than any context holds.")
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise GenerationError(f"Standard input is not UTF-8 at byte {error.start:,}. Convert it first.") from None
