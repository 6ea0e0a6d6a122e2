"""Where documents lie in windows of tokens, read off the tokens: each document ends with the end-of-text id.

Pure torch. Text never becomes that id, so nothing else need be stored or sent. The end-of-text token belongs to the
document that it ends; a document that a window's edge cuts counts as one from or up to the edge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def positions_in_documents(tokens: Tensor, end_of_text: int) -> Tensor:
    """How many tokens of its own document precede each token in its window; int64, shaped as `tokens` [..., length]."""
    index = torch.arange(tokens.shape[-1], device=tokens.device)
    begins = F.pad(tokens[..., :-1] == end_of_text, (1, 0))
    return index - torch.where(begins, index, 0).cummax(-1).values


def document_lengths(tokens: Tensor, end_of_text: int) -> Tensor | None:
    """Tokens of each document, one window after the other, of `tokens` [windows, length]: int64 [documents].

    None where every window is one document, so that nothing need be told apart.
    """
    ends = tokens == end_of_text
    ends[:, -1] = True
    last = ends.flatten().nonzero().squeeze(1)
    return None if len(last) == len(tokens) else last.diff(prepend=last.new_tensor([-1]))
