"""Requests and faults, drawn from a seed. Pure: the same seed gives the same episode."""

import random
from dataclasses import dataclass
from typing import Any, Literal

Fault = Literal[
    "kill",  # SIGKILL; it is started again
    "freeze",  # SIGSTOP, until the episode is over
    "blink",  # SIGSTOP for a moment
    "freeze then kill",
    "cut",  # its connections are reset
    "swallow",  # its connections that are in use carry nothing any more; others do
    "darken",  # none carries anything, new ones neither
    "drain",  # SIGTERM, with less time than its answers need
    "lose a rank",  # SIGKILL to one process of several that are one worker
    "freeze a rank",  # SIGSTOP to it
    "lose the node",
]
FAULTS: tuple[Fault, ...] = ("kill", "freeze", "blink", "freeze then kill", "cut", "swallow", "darken", "drain")
# Where a worker is several processes.
RANK_FAULTS: tuple[Fault, ...] = ("lose a rank", "freeze a rank", "kill", "freeze", "drain")
# How many different requests there are. Each one's undisturbed answer is computed once.
CATALOGUE = 256
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_PROMPTS = (
    "Explain boats to me.",
    "How do I list the files in a directory?",
    "Schreibe ein Gedicht über Äpfel, Öl und Übermut.",
    "写一首关于猫的诗。",
    "日本語で自己紹介をしてください。",
    "🚀🚀 Tell me about rockets 👩‍👩‍👧‍👦 and flags 🇪🇺",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    "#include <stdio.h>\nint main(void)\n{\n\tfor (int i = 0; i < 10; i++) {\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "مرحبا بالعالم",
    "Write the licence of this program.",
    "SELECT name, count(*) FROM users GROUP BY",
)
# Texts that the sample model often writes, so that they match somewhere, and some that hardly ever do.
_STOPS = (["\n\n"], [" the end of"], ["."], [" file", "0000"], ["ß", "猫"], ["```", " of the"], ["nd"])


@dataclass(frozen=True)
class Client:
    """One stream: what it asks (a number of the catalogue), when it begins and how it behaves.

    `begins`: once this share of the episode's pieces came. `leaves_after`: pieces; None: it stays.
    `paced`: it reads slowly.
    """

    request: int
    begins: float
    leaves_after: int | None
    paced: bool


@dataclass(frozen=True)
class Act:
    """One fault: once this share of the episode's pieces came, to the first healthy worker in `order`."""

    at: float
    what: Fault
    order: tuple[int, ...]


@dataclass(frozen=True)
class Episode:
    seed: int
    clients: tuple[Client, ...]
    acts: tuple[Act, ...]


def draw_request(number: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a request of the catalogue. Its answer is a function of the body: greedy or seeded."""
    rng = random.Random(f"request {number}")
    chat = rng.random() < 0.6
    body: dict[str, Any] = {"stream_options": {"include_usage": True}} if rng.random() < 0.7 else {}
    prompt = rng.choice(_PROMPTS) + rng.choice(("", " ", f"\n{rng.randrange(1000)}"))
    if chat:
        body["messages"] = [{"role": "user", "content": prompt}]
        if rng.random() < 0.3:
            body["messages"].insert(0, {"role": "system", "content": "You are a manual page. 📖"})
    else:
        body["prompt"] = prompt
    body["max_tokens"] = rng.choice((16, 60, 120, 160, 200, 280))
    _add_sampling(body, rng)
    if rng.random() < 0.5:
        body |= {"logprobs": True, "top_logprobs": rng.choice((0, 3))} if chat else {"logprobs": rng.choice((0, 2))}
    return CHAT if chat else COMPLETIONS, body


def _add_sampling(body: dict[str, Any], rng: random.Random) -> None:
    if rng.random() < 0.3:
        body["temperature"] = 0
    else:
        body |= {"temperature": rng.choice((0.5, 0.9, 1.3)), "seed": rng.randrange(2**53)}
        body |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}))
        if rng.random() < 0.25:
            body["n"] = rng.choice((2, 3))
            body["max_tokens"] = min(body["max_tokens"], 120)
    if rng.random() < 0.4:
        body |= rng.choice(
            (
                {"presence_penalty": 1.2},
                {"frequency_penalty": 0.7},
                {"repetition_penalty": 1.3},
                {"presence_penalty": -0.5, "frequency_penalty": 0.9, "repetition_penalty": 1.1},
            )
        )
    if rng.random() < 0.35:
        body["stop"] = rng.choice(_STOPS)
    if rng.random() < 0.8:
        body["ignore_eos"] = True
    if rng.random() < 0.15:
        body["logit_bias"] = {str(rng.randrange(300, 8000)): rng.choice((-5, 4))}
    if rng.random() < 0.15:
        body["min_tokens"] = 12


def draw_episode(seed: int, workers: int, streams: int = 20, faults: tuple[Fault, ...] = FAULTS) -> Episode:
    """Clients and faults of one episode."""
    rng = random.Random(f"episode {seed}")
    clients = []
    for number in range(streams):
        leaves = rng.randrange(0, 40) if rng.random() < 0.1 else None
        clients.append(
            Client(
                request=rng.randrange(CATALOGUE),
                begins=0.0 if number < streams // 2 else rng.random() * 0.6,
                leaves_after=leaves,
                paced=leaves is None and rng.random() < 0.1,
            )
        )
    acts = []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        acts.append(Act(0.05 + rng.random() * 0.6, rng.choice(faults), tuple(rng.sample(range(workers), workers))))
    return Episode(seed, tuple(clients), tuple(sorted(acts, key=lambda act: act.at)))
