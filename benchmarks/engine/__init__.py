"""Wherry's engine beside llama.cpp, OpenVINO GenAI and transformers: same weights, same prompts, same threads, one run.

`python -m benchmarks.engine.peers` installs the peers, `python -m benchmarks.engine` compares.
"""
