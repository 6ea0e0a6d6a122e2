"""`gptdist generate`: continue prompts with a trained model."""

import argparse

from gptdist.errors import EXIT_DONE
from gptdist.train.sample import generate
from launch.trained import open_trained

DEFAULT_PROMPT = "The"


def main(args: argparse.Namespace) -> int:
    """Print each prompt with its continuation."""
    with open_trained(args.path) as trained:
        tokenizer = trained.tokenizer
        for prompt in args.prompt or [DEFAULT_PROMPT]:
            ids = generate(
                trained.engine,
                trained.comms,
                tokenizer.encode(prompt) or [tokenizer.end_of_text],
                args.tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                seed=args.seed,
                end_of_text=tokenizer.end_of_text,
            )
            print(prompt + tokenizer.decode(ids), flush=True)
    return EXIT_DONE
