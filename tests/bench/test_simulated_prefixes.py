"""A simulated worker tells of its prefix cache as an engine does, so that routers can be studied on it."""

from wherry_cli.simulated_engine import SimulatedEngine
from wherry_cli.simulated_model import Costs, Shape
from wherry_protocol.prefix import prefix_keys, unpack_keys, written_out
from wherry_protocol.worker import End, ExecuteRequest, Prompt, SamplingParams

COSTS = Costs(step=1e-6, decode=0.0, context=0.0, prefill=0.0)


async def answered(engine: SimulatedEngine, text: str) -> End:
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    request = ExecuteRequest(id=text[-9:], model="chat", prompt=Prompt(text=text), sampling=sampling)
    events = [event async for event in engine.generate(request)]
    last = events[-1]
    assert isinstance(last, End)
    return last


async def test_what_is_cached_is_told_and_what_is_told_is_cached() -> None:
    engine = SimulatedEngine("chat", Shape(kv_tokens=2048, max_model_len=2048), COSTS)
    await engine.start()
    try:
        text = "A boat crosses the river, and a ferry. " * 100
        cursor, first = engine.prefixes_since(None)
        assert first is not None
        assert first.added == b""
        await answered(engine, text)
        cursor, change = engine.prefixes_since(cursor)
        assert change is not None
        told = unpack_keys(change.added)
        keys = prefix_keys(written_out(Prompt(text=text)), "chat")
        assert set(told) <= set(keys)
        assert len(told) >= len(keys) - 1
        again = await answered(engine, text + "again")
        # 64 tokens a key, and what of the last one is in full blocks.
        assert len(told) * 64 <= again.cached_tokens + 16 < (len(told) + 2) * 64
        for number in range(3):
            await answered(engine, f"{number} " + "is another prompt. " * 200)
        _, change = engine.prefixes_since(cursor)
        assert change is not None
        assert set(unpack_keys(change.removed)) >= set(told)
    finally:
        await engine.close()


async def test_without_a_prefix_cache_nothing_is_told() -> None:
    engine = SimulatedEngine("chat", Shape(prefix_cache=False), COSTS)
    assert engine.prefixes_since(None) == (None, None)
