"""The OpenAI API, as far as Wherry speaks it: requests, their translation to the worker's, and the answers' shapes."""
