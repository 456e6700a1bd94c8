"""What a policy is told of a request: how long it is, in tokens, and by which keys its beginnings are known."""

from wherry_protocol.prefix import CHUNK_BYTES, prefix_keys, written_out
from wherry_protocol.worker import EXPECTED_OUTPUT, EmbedRequest, ExecuteRequest
from wherry_router.policies import Ask

_BYTES_PER_TOKEN = 4.0  # until workers have told
_LEAST, _MOST = 0.5, 16.0
_WEIGHT = 0.05  # of one prompt in the running mean


def expected_output(max_tokens: int | None) -> int:
    """Tokens that an answer is taken to have before it begins."""
    return EXPECTED_OUTPUT if max_tokens is None else min(max_tokens, EXPECTED_OUTPUT)


class Asks:
    """Makes them, and learns from workers how many bytes of a prompt are a token."""

    def __init__(self, *, with_keys: bool) -> None:
        self._with_keys = with_keys
        self.bytes_per_token = _BYTES_PER_TOKEN

    def of(self, request: ExecuteRequest | EmbedRequest, session: str = "") -> Ask:
        """What is known of `request`. Texts to be embedded are known by no beginning: nothing of them is cached."""
        if isinstance(request, EmbedRequest):
            texts = [one for one in request.inputs if isinstance(one, str)]
            size, tokens = sum(map(len, texts)), sum(len(one) for one in request.inputs if not isinstance(one, str))
            return Ask(prompt_tokens=max(int(size / self.bytes_per_token) + tokens, 1), session=session)
        text = written_out(request.prompt)
        return Ask(
            prompt_bytes=len(text),
            prompt_tokens=max(int(len(text) / self.bytes_per_token), 1),
            output_tokens=expected_output(request.sampling.max_tokens),
            keys=prefix_keys(text, request.model, request.cache_salt) if self._with_keys else (),
            tokens_per_key=CHUNK_BYTES / self.bytes_per_token,
            session=session,
        )

    def learn(self, ask: Ask, prompt_tokens: int) -> None:
        """A worker has read the prompt."""
        if ask.prompt_bytes >= CHUNK_BYTES and prompt_tokens > 0:  # in short ones it is the template that counts
            seen = min(max(ask.prompt_bytes / prompt_tokens, _LEAST), _MOST)
            self.bytes_per_token += _WEIGHT * (seen - self.bytes_per_token)
