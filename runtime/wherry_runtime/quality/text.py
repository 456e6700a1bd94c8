"""A short text to measure models with where nobody gave one: plain prose, a list, numbers and code."""

TEXT = """\
The harbour wakes before the town does. Long before the bakers open their shutters, two boats come in past the
breakwater, low in the water, and the men on the quay know from that alone that the night was good. They say
little. Ropes are thrown, crates are lifted, and by the time the first bus stops at the market the fish lie on
ice in rows, silver and grey.

Nobody remembers when the wooden crane was built. It stands at the end of the pier, out of use for forty
years, and every spring the council discusses whether it should be taken down. Every spring somebody finds a
reason to leave it for another year: a pair of storks, a film crew, a letter from an old engineer who explains
how its counterweight works and why there is none like it on this coast. So it stays, and children learn to
draw by drawing it.

What a visitor should bring:

1. A coat, even in July. The wind comes from the north after 4 pm.
2. Cash: the ferry costs 3.50 one way, 6.00 for both, and takes no cards.
3. Time. The museum has 212 model ships, and the guide has a story for each.

The water is measured at three places, twice a day, and a small program works out whether bathing is allowed:

def allowed(samples, limit=500):
    worst = max(sample.count for sample in samples)
    if worst > limit:
        return False
    return sum(sample.count for sample in samples) / len(samples) < limit / 2

Last year it said no on nine days out of a hundred and twenty. The mayor would like that number to be zero;
the biologist who takes the samples would like people to ask what happened on those nine days. It had rained,
she says, and the old sewers had overflowed, as they always do when more than twenty millimetres fall in an
hour. "You can change the limit or you can change the pipes. Only one of them changes the water."
"""
