"""safetensors (https://huggingface.co/docs/safetensors/index)."""
