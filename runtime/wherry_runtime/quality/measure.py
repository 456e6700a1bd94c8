"""Models on windows of text, computed as the engine computes them."""

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import torch
from torch.nn import functional

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.engine.part import Outline
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.parallel.group import place
from wherry_runtime.quality.score import Score
from wherry_runtime.scheduling.plan import SequenceStep
from wherry_runtime.tokenization.tokenizer import Tokenizer

LOGITS_BYTES = 64 << 20  # that are held of one model at a time
TOGETHER = 8  # answers at a time


class Scorer:
    """One sequence at a time through a runner whose KV cache holds `length` tokens.

    Every position is computed as decoding computes it: its key and value are written to the cache, and all keys and
    values are read from there.
    """

    def __init__(self, runner: ModelRunner, length: int, vocab_size: int) -> None:
        self.runner = runner
        self._blocks = -(-length // runner.cache.block_size)
        self._rows = max(1, LOGITS_BYTES // (4 * vocab_size))

    def logprobs(self, window: Sequence[int]) -> Iterator[torch.Tensor]:
        """[n, vocab_size] float32 for n positions at a time, after each token of the window but the last."""
        table = np.arange(self._blocks, dtype=np.int32)
        for first in range(0, len(window) - 1, self._rows):
            places = range(first, min(first + self._rows, len(window) - 1))
            # In one step, rows see what earlier ones wrote: the same name of a sequence is not looked at.
            rows = [SequenceStep(str(i), [window[i]], i, table, samples=True) for i in places]
            yield self.runner.logits(rows)[0].log_softmax(dim=-1)

    def answers(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The likeliest tokens after each prompt, one by one. The cache has room for all, side by side."""
        blocks = self._blocks // len(prompts)
        tables = np.arange(blocks * len(prompts), dtype=np.int32).reshape(len(prompts), blocks)
        found: list[list[int]] = [[] for _ in prompts]
        feed, start = [list(p) for p in prompts], [0] * len(prompts)
        for _ in range(new_tokens):
            steps = [SequenceStep(str(i), feed[i], start[i], tables[i], samples=True) for i in range(len(prompts))]
            logits, names = self.runner.logits(steps)
            for name, token in zip(names, logits.argmax(dim=-1).tolist(), strict=True):
                i = int(name)
                start[i] += len(feed[i])
                feed[i] = [token]
                found[i].append(token)
        return found


class Subject:
    """A model, loaded as its settings say, to be measured.

    Args:
        length: tokens of a window.

    Raises:
        ModelError: why it cannot be loaded, or bad_setting: the window is longer than the context.
    """

    def __init__(self, config: EngineConfig, length: int) -> None:
        self.config = msgspec.structs.replace(config, max_model_len=length)
        outline = Outline.of(self.config, place(self.config))
        self.vocab_size = outline.model_config.vocab_size
        self.tokenizer = Tokenizer(outline.directory)
        part = outline.load()
        self.weight_bytes = sum(tensor.nbytes for tensor in part.model.state().values())
        block = config.block_size
        # Answers go side by side, each in whole blocks.
        model = part.build(TOGETHER * -(-length // block))
        self.scorer = Scorer(ModelRunner(model), TOGETHER * -(-length // block) * block, self.vocab_size)


def check_same_tokens(subject: Subject, reference: Subject) -> None:
    """Raises ModelError, bad_setting, where the two do not speak of the same tokens."""
    if subject.vocab_size != reference.vocab_size or subject.tokenizer.differs_from(reference.tokenizer) is not None:
        raise ModelError(
            "bad_setting", "the model and its reference have different tokenizers, so their tokens cannot be compared"
        )


def compare(
    scorer: Scorer, reference: Scorer | None, windows: Sequence[Sequence[int]], done: Callable[[], None]
) -> Score:
    """Both on the same windows; without a reference, the model beside itself."""
    score = Score()
    with torch.inference_mode():
        for window in windows:
            theirs = reference.logprobs(window) if reference is not None else None
            first = 1
            for found in scorer.logprobs(window):
                expected = found if theirs is None else next(theirs)
                add(score, found, expected, window[first : first + len(found)])
                first += len(found)
            done()
    return score


def add(score: Score, found: torch.Tensor, expected: torch.Tensor, targets: Sequence[int]) -> None:
    """Log-probabilities [n, vocab_size] of a model and of the reference, and the tokens [n] that came."""
    index = torch.tensor(targets)[:, None]
    # In the right direction: what is lost where the reference's distribution is taken for the truth.
    divergence = float(functional.kl_div(found, expected, log_target=True, reduction="sum"))
    score.add(
        (-found.gather(-1, index)[:, 0]).tolist(),
        found.argmax(dim=-1).tolist(),
        (-expected.gather(-1, index)[:, 0]).tolist(),
        expected.argmax(dim=-1).tolist(),
        divergence,
    )


class Answers(msgspec.Struct, frozen=True):
    """Greedy answers beside the reference's.

    Attributes:
        equal: share of answers that are the same to the end.
        tokens: share of tokens before the first difference.
    """

    equal: float
    tokens: float
    answers: int
    new_tokens: int


def compare_answers(
    scorer: Scorer,
    reference: Scorer,
    windows: Sequence[Sequence[int]],
    new_tokens: int,
    done: Callable[[], None],
) -> Answers:
    """Greedy answers to the beginnings of windows, `new_tokens` shorter than they are."""
    equal = same = 0
    with torch.inference_mode():
        for first in range(0, len(windows), TOGETHER):
            prompts = [window[: len(window) - new_tokens] for window in windows[first : first + TOGETHER]]
            pairs = zip(scorer.answers(prompts, new_tokens), reference.answers(prompts, new_tokens), strict=True)
            for ours, theirs in pairs:
                until = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), new_tokens)
                same += until
                equal += until == new_tokens
                done()
    count = len(windows)
    return Answers(equal / count, same / (count * new_tokens), count, new_tokens)
