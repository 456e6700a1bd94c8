"""Prompt lookup: what followed the last few tokens when they came before is a guess at what follows them now.

The idea is A. Saxena's (2023, https://github.com/apoorvumang/prompt-lookup-decoding). Occurrences are found as LZ77
compressors find them: the places of each pair of tokens are chained, newest first, and the longest match along the
chain wins. A token costs one dictionary entry to add, and a lookup looks at a bounded number of places, so neither
grows with the length of the sequence.
"""

from collections.abc import Sequence

MIN_MATCH = 2  # a single equal token says too little
MAX_MATCH = 16  # longer matches are not told apart
MAX_PLACES = 16  # of the newest pair, looked at from the most recent back


class NgramIndex:
    """The tokens of one sequence and where each pair of them was. Tokens are only ever added."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._newest: dict[tuple[int, int], int] = {}  # pair → the place after its latest occurrence with a successor
        self._older: list[int] = []  # place → the place before it in the same chain, or -1

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes in what is new in `tokens`, which begins with everything known so far."""
        known, newest, older = self._tokens, self._newest, self._older
        for place in range(len(known), len(tokens)):
            if place < MIN_MATCH:
                older.append(-1)
            else:
                pair = (known[place - 2], known[place - 1])
                older.append(newest.get(pair, -1))
                newest[pair] = place
            known.append(tokens[place])

    def propose(self, count: int) -> tuple[list[int], int]:
        """Up to `count` guesses and the length of the match they rest on; ([], 0) if the last pair is new.

        Of equally long matches the most recent counts. A match that reaches the end of the sequence repeats: guesses
        are then copied from guesses.
        """
        tokens = self._tokens
        size = len(tokens)
        if size <= MIN_MATCH or count < 1:
            return [], 0
        place = self._newest.get((tokens[-2], tokens[-1]), -1)
        best, longest = -1, 0
        for _ in range(MAX_PLACES):
            if place < 0:
                break
            length = self._match(place)
            if length > longest:
                best, longest = place, length
                if length == MAX_MATCH:
                    break
            place = self._older[place]
        if best < 0:
            return [], 0
        period = size - best
        return [tokens[best + i % period] for i in range(count)], longest

    def _match(self, place: int) -> int:
        """How many tokens before `place` equal the last ones."""
        tokens = self._tokens
        size = len(tokens)
        limit = min(MAX_MATCH, place)
        length = MIN_MATCH
        while length < limit and tokens[place - 1 - length] == tokens[size - 1 - length]:
            length += 1
        return length
