"""Policies under load, in a model of time: a few virtual seconds, the same in every run."""

from benchmarks.router.model import Result, run


def under_load(policy: str, routers: int = 1) -> Result:
    return run("shared-prefix", policy, rate=16, replicas=4, routers=routers, seconds=9, warm=5)


def test_prefix_aware_keeps_prefixes_where_random_spreads_them_and_routers_agree() -> None:
    at_random, aware, of_three = under_load("random"), under_load("prefix-aware"), under_load("prefix-aware", routers=3)
    for result in (aware, of_three):
        assert result.cached / result.prompt > 1.5 * at_random.cached / at_random.prompt
        assert result.percentile(0.5) < 0.75 * at_random.percentile(0.5)
        assert result.imbalance < 1.5
